"""The benchmarks run and their figures are what they say. No test looks at how fast anything is."""

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from annotate import bench_store
from annotate.bench import bench_inline, bench_ray, scene_shards
from annotate.bench_store import GRID, NUM_CLASSES, TOPK, StoreFigures, simulate_maps, write_simulated
from annotate.schedule import Job
from annotate.shard import AnnotateConfig
from annotate.teachers import TeacherSpec
from tokenlabels.images import find_shards
from tokenlabels.measure import Comparison
from tokenlabels.store import open_store, verify_store
from tokenlabels.store.verify import wrong_values
from tokenlabels.summary import num_distinct_classes
from tokenlabels.types import ScoreMaps


def assert_finite(comparison: Comparison, rounds: int) -> None:
    assert len(comparison.ratios) == rounds
    for value in (comparison.ours, comparison.reference, comparison.ratio, *comparison.ratios):
        assert 0 < value < math.inf


class TestBenchAnnotate:
    @pytest.fixture
    def job(self, tiny_spec: TeacherSpec, tmp_path: Path) -> Job:
        return Job(tmp_path / "labels", (tiny_spec,), AnnotateConfig(batch_size=2))

    def test_inline(self, job: Job, scene_tars: Path) -> None:
        comparison = bench_inline(find_shards([f"{scene_tars}/*.tar"]), job, rounds=2)
        assert_finite(comparison, rounds=2)
        assert list(verify_store(job.labels)) == []
        assert len(open_store(job.labels)) == 10

    def test_the_bare_side_gets_the_same_batches(
        self, job: Job, scene_tars: Path, pixel_teacher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        teacher = pixel_teacher(((24, 24), (12, 24)))
        monkeypatch.setattr(Job, "load_teacher", lambda _: teacher)
        bench_inline(find_shards([f"{scene_tars}/*.tar"]), job, rounds=1)
        one_run = [2, 2, 1, 2, 1, 2]
        assert teacher.batch_sizes == one_run * 4

    @pytest.mark.ray
    def test_ray(self, job: Job, scene_tars: Path) -> None:
        assert_finite(bench_ray(find_shards([f"{scene_tars}/*.tar"]), job, rounds=1), rounds=1)
        assert list(verify_store(job.labels)) == []
        assert len(open_store(job.labels)) == 10

    def test_scenes_to_measure_with(self, tmp_path: Path) -> None:
        shards = scene_shards(tmp_path, (2, 1))
        assert [(shard.stem, len(shard.keys())) for shard in shards] == [("scenes-0000", 2), ("scenes-0001", 1)]


@pytest.fixture(scope="module")
def maps() -> ScoreMaps:
    return simulate_maps(70, seed=0)


class TestSimulatedMaps:
    def test_they_are_maps_that_a_teacher_could_have_made(self, maps: ScoreMaps) -> None:
        assert (len(maps), maps.grid, maps.k) == (70, GRID, TOPK)
        assert list(wrong_values(maps, NUM_CLASSES)) == []
        assert len(set(maps.keys)) == 70

    def test_they_are_as_varied_as_real_ones(self, maps: ScoreMaps) -> None:
        assert 70 < np.median(num_distinct_classes(maps)) < 140

    def test_they_follow_from_the_seed(self, maps: ScoreMaps) -> None:
        again, other = simulate_maps(70, seed=0), simulate_maps(70, seed=1)
        for name in ("scores", "classes", "tail", "views"):
            np.testing.assert_array_equal(getattr(again, name), getattr(maps, name))
        assert not np.array_equal(other.scores, maps.scores)

    def test_they_survive_the_store(self, maps: ScoreMaps, tmp_path: Path) -> None:
        manifest = write_simulated(tmp_path / "labels", maps)
        assert list(verify_store(tmp_path / "labels")) == []
        (shard,) = open_store(tmp_path / "labels").shards
        assert (shard.manifest, shard.keys) == (manifest, maps.keys)
        np.testing.assert_array_equal(shard.read().scores, maps.scores)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def figures(folder: Path) -> StoreFigures:
    """Of 20 maps in `folder`, all but the memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_store, "_writer_memory", lambda *_: 1.5)
        return bench_store.bench_store(folder, num_images=20, rounds=2)


class TestBenchStore:
    def test_bytes_are_those_on_the_disk(self, figures: StoreFigures, folder: Path) -> None:
        sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        published = [size for path, size in sizes.items() if path.suffix == ".pt"]
        stored = {
            path.relative_to(folder / "labels" / "a.zarr"): size
            for path, size in sizes.items()
            if "a.zarr" in path.parts
        }
        without_tail = sum(size for path, size in stored.items() if path.parts[0] != "tail")
        assert len(published) == 20
        assert 0 < without_tail < sum(stored.values())
        assert figures.published_bytes == sum(published) / 20
        assert figures.store_bytes == sum(stored.values()) / 20
        assert figures.ratio == pytest.approx(sum(stored.values()) / sum(published))
        assert figures.ratio_without_tail == pytest.approx(without_tail / sum(published))

    def test_the_published_layout(self, figures: StoreFigures, folder: Path) -> None:
        maps = simulate_maps(figures.num_images, seed=0)
        for score_map in maps:
            tensor = torch.load(folder / "published" / f"{score_map.key}.pt", weights_only=True)
            assert (tensor.dtype, tuple(tensor.shape)) == (torch.float16, (2, TOPK, *GRID))
            np.testing.assert_array_equal(tensor[0].numpy().transpose(1, 2, 0), score_map.scores)
            np.testing.assert_array_equal(tensor[1].numpy().transpose(1, 2, 0), score_map.classes)

    def test_the_other_figures(self, figures: StoreFigures) -> None:
        assert (figures.num_images, figures.writer_memory) == (20, 1.5)
        expected = np.median(num_distinct_classes(simulate_maps(20, seed=0)))
        assert figures.distinct_classes_median == expected
        assert_finite(figures.read, rounds=2)
        assert {field.name for field in fields(figures)} == set(vars(figures))

    def test_the_page_shows_every_figure(self, figures: StoreFigures) -> None:
        page = str(figures)
        for text in (
            "20 simulated maps",
            f"{figures.store_bytes:.0f} / {figures.published_bytes:.0f} published = {figures.ratio:.3f}",
            f"without tail {figures.ratio_without_tail:.3f}",
            str(figures.read),
            "1.50",
        ):
            assert text in page

    @pytest.mark.slow
    def test_memory_of_a_writer(self, tmp_path: Path) -> None:
        ratio = bench_store._writer_memory(tmp_path, 1280)
        # The maps themselves are 1; memory that the process had freed before may be used again for a part of them.
        assert 0.5 < ratio < math.inf
        assert list(verify_store(tmp_path / "shard")) == []
        assert len(open_store(tmp_path / "shard")) == 1280
