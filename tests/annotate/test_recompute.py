import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotate.recompute import RELATIVE_TOLERANCE, compare, recompute
from annotate.shard import AnnotateConfig, annotate_shard
from annotate.teachers import Teacher, TeacherSpec, load_teacher
from tokenlabels.images import ImageShard, find_shards
from tokenlabels.store import LabelStoreError, claim_shard, open_store, verify_store
from tokenlabels.types import ScoreMap, ScoreMaps

MakeTeacher = Callable[..., Any]


@pytest.fixture(scope="session")
def labelled(scene_tars: Path, pixel_teacher: MakeTeacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = tmp_path_factory.mktemp("labelled") / "labels"
    for shard in find_shards([f"{scene_tars}/*.tar"]):
        annotate_shard(shard, labels, pixel_teacher(), AnnotateConfig())
    return labels


@pytest.fixture
def labels(labelled: Path, tmp_path: Path) -> Path:
    """Labels of the three tars of scenes, of this test's own."""
    return Path(shutil.copytree(labelled, tmp_path / "labels"))


@pytest.fixture
def shards(scene_tars: Path) -> list[ImageShard]:
    return find_shards([f"{scene_tars}/*.tar"])


def findings(labels: Path, shards: list[ImageShard], teacher: Teacher, num_images: int = 100) -> list[str]:
    return [str(finding) for finding in recompute(open_store(labels), shards, teacher, num_images=num_images)]


def tamper(labels: Path, stem: str, change: Callable[[ScoreMaps], object]) -> None:
    """Write a shard again, in good order, but with other values."""
    store = open_store(labels)
    (shard,) = (shard for shard in store.shards if shard.stem == stem)
    maps = shard.read()
    change(maps)
    with claim_shard(labels, stem, store.info) as writer:
        writer.write(maps, source=shard.manifest.source, image_level=shard.manifest.image_level, versions={})
    assert list(verify_store(labels)) == []


class TestWholeSets:
    def test_nothing_is_found(self, labels: Path, shards: list[ImageShard], pixel_teacher: MakeTeacher) -> None:
        teacher = pixel_teacher()
        assert findings(labels, shards, teacher) == []
        assert teacher.batch_sizes == [1] * 10

    @pytest.mark.parametrize("resize", ["squash", "center", "letterbox"])
    def test_a_real_teacher_in_other_batches(
        self, resize: Any, shards: list[ImageShard], tiny_spec: TeacherSpec, tmp_path: Path
    ) -> None:
        teacher = load_teacher([tiny_spec], flip=True)
        annotate_shard(shards[0], tmp_path / "labels", teacher, AnnotateConfig(resize=resize))
        assert findings(tmp_path / "labels", shards, load_teacher([tiny_spec], flip=True)) == []

    @pytest.mark.parametrize(("num_images", "num_labelled"), [(0, 0), (1, 1), (4, 4), (10, 10), (11, 10)])
    def test_as_many_images_as_asked_for(
        self,
        num_images: int,
        num_labelled: int,
        labels: Path,
        shards: list[ImageShard],
        pixel_teacher: MakeTeacher,
    ) -> None:
        teacher = pixel_teacher()
        assert findings(labels, shards, teacher, num_images) == []
        assert len(teacher.batch_sizes) == num_labelled

    def test_class_names_are_not_compared(
        self, shards: list[ImageShard], pixel_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        config = AnnotateConfig(class_names=tuple(f"name {number}" for number in range(20)))
        annotate_shard(shards[2], tmp_path / "labels", pixel_teacher(), config)
        assert findings(tmp_path / "labels", shards, pixel_teacher()) == []


def raise_scores(maps: ScoreMaps) -> None:
    maps.scores[1] += 1


def rename_a_class(maps: ScoreMaps) -> None:
    cell = maps.classes[1, 0, 2]
    cell[-2] = next(number for number in range(20) if number not in cell.tolist())


def raise_a_tail(maps: ScoreMaps) -> None:
    maps.tail[1, 1, 0] = 1 - maps.tail[1, 1, 0]


def move_the_view(maps: ScoreMaps) -> None:
    maps.views[1] = [0, 0, 1, 0.9]


def swap_images(maps: ScoreMaps) -> None:
    for array in (maps.scores, maps.classes, maps.tail):
        array[[1, 2]] = array[[2, 1]]


class TestTampering:
    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            pytest.param(raise_scores, "scores differ by up to 1 (allowed ", id="scores"),
            pytest.param(rename_a_class, "1 of 24 classes are others", id="class"),
            pytest.param(raise_a_tail, "tails differ by up to ", id="tail"),
            pytest.param(move_the_view, "the view is [0.0, 0.0, 1.0, 0.8999", id="view"),
        ],
    )
    def test_one_map_of_five(
        self,
        change: Callable[[ScoreMaps], object],
        problem: str,
        labels: Path,
        shards: list[ImageShard],
        pixel_teacher: MakeTeacher,
    ) -> None:
        tamper(labels, "scenes-0000", change)
        (finding,) = findings(labels, shards, pixel_teacher())
        assert finding.startswith(f"{labels}/scenes-0000.zarr: scene_000001: {problem}")

    def test_labels_of_other_images(self, labels: Path, shards: list[ImageShard], pixel_teacher: MakeTeacher) -> None:
        tamper(labels, "scenes-0001", swap_images)
        assert [finding.split(": ")[1] for finding in findings(labels, shards, pixel_teacher())] == [
            "scene_000006",
            "scene_000007",
        ]

    def test_an_image_that_is_damaged_now(self, labels: Path, scene_tars: Path, pixel_teacher: MakeTeacher) -> None:
        tar = Path(shutil.copy(scene_tars / "scenes-0002.tar", labels.parent))
        data = bytearray(tar.read_bytes())
        first_jpeg = data.index(b"\xff\xd8\xff")
        data[first_jpeg : first_jpeg + 100] = bytes(100)
        tar.write_bytes(data)
        (finding,) = findings(labels, find_shards([str(tar)]), pixel_teacher())
        assert finding.startswith(f"{labels}/scenes-0002.zarr: scene_000008: cannot be labelled now (broken header")


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings_given", "differences"),
        [
            pytest.param(
                {"seed": 1},
                ["teacher.digest: pixels, seed 0 != pixels, seed 1", "teacher.models.0.digest: seed 0 != seed 1"],
                id="weights",
            ),
            pytest.param({"topk": 5}, ["k: 4 != 5"], id="topk"),
            pytest.param({"num_classes": 7}, ["num_classes: 20 != 7"], id="classes"),
            pytest.param({"grid": (3, 3)}, ["grid: [2, 3] != [3, 3]"], id="grid"),
        ],
    )
    def test_another_teacher(
        self,
        settings_given: dict[str, Any],
        differences: list[str],
        labels: Path,
        shards: list[ImageShard],
        pixel_teacher: MakeTeacher,
    ) -> None:
        with pytest.raises(LabelStoreError, match="another teacher") as caught:
            findings(labels, shards, pixel_teacher(**settings_given))
        assert [line.strip() for line in str(caught.value).splitlines()[1:]] == differences

    def test_another_number_of_classes_where_they_have_names(
        self, shards: list[ImageShard], pixel_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        names = tuple(f"name {number}" for number in range(20))
        annotate_shard(shards[2], tmp_path / "labels", pixel_teacher(class_names=names), AnnotateConfig())
        with pytest.raises(LabelStoreError, match="num_classes: 20 != 7"):
            findings(tmp_path / "labels", shards, pixel_teacher(num_classes=7))

    def test_images_of_no_shard(self, labels: Path, scene_tars: Path, pixel_teacher: MakeTeacher) -> None:
        other = Path(shutil.copy(scene_tars / "scenes-0000.tar", labels.parent / "other.tar"))
        with pytest.raises(LabelStoreError, match="none of the given images belong to its shards"):
            findings(labels, find_shards([str(other)]), pixel_teacher())

    def test_other_images_under_the_same_name(self, labels: Path, scene_tars: Path, pixel_teacher: MakeTeacher) -> None:
        other = Path(shutil.copy(scene_tars / "scenes-0000.tar", labels.parent / "scenes-0001.tar"))
        with pytest.raises(ValueError, match=r"scenes-0001\.tar: no sample with the key 'scene_00000[567]'"):
            findings(labels, find_shards([str(other)]), pixel_teacher())


def map_of(*cells: list[tuple[int, float]], tail: float = 0.25) -> ScoreMap:
    """One row of cells, each a list of (class, score)."""
    scores = np.array([[[score for _, score in cell] for cell in cells]], np.float16)
    classes = np.array([[[class_id for class_id, _ in cell] for cell in cells]], np.uint16)
    return ScoreMap(
        "k", scores, classes, np.full((1, len(cells)), tail, np.float16), np.array([0, 0, 1, 1], np.float32)
    )


class TestCompare:
    """The largest score is 20, so that 0.1 is allowed."""

    STORED = map_of([(3, 20.0), (5, 19.95), (7, 10.0)], [(1, 12.0), (2, 8.0), (4, 8.0)])

    @pytest.mark.parametrize(
        "again",
        [
            pytest.param(STORED, id="the-same"),
            pytest.param(
                map_of([(3, 20.05), (5, 19.9), (7, 10.05)], [(1, 11.95), (2, 8.05), (4, 8.0)]), id="last-bits"
            ),
            pytest.param(
                map_of([(5, 20.0), (3, 19.95), (7, 10.0)], [(1, 12.0), (4, 8.0), (2, 8.0)]), id="ties-swapped"
            ),
            pytest.param(
                map_of([(3, 20.0), (5, 19.95), (7, 10.0)], [(1, 12.0), (2, 8.0), (9, 8.05)]), id="tie-at-the-cut"
            ),
            pytest.param(replace(STORED, tail=STORED.tail + np.float16(0.04)), id="tail"),
        ],
    )
    def test_what_arithmetic_explains(self, again: ScoreMap) -> None:
        assert list(compare(self.STORED, again, amp="none")) == []
        assert list(compare(again, self.STORED, amp="none")) == []

    @pytest.mark.parametrize(
        ("again", "problem"),
        [
            pytest.param(
                map_of([(3, 20.0), (5, 19.95), (7, 10.25)], [(1, 12.0), (2, 8.0), (4, 8.0)]),
                "scores differ by up to 0.25 (allowed 0.1)",
                id="score",
            ),
            pytest.param(
                map_of([(9, 20.0), (5, 19.95), (7, 10.0)], [(1, 12.0), (2, 8.0), (4, 8.0)]),
                "1 of 6 classes are others",
                id="another-leading-class",
            ),
            pytest.param(
                map_of([(7, 20.0), (5, 19.95), (3, 10.0)], [(1, 12.0), (2, 8.0), (4, 8.0)]),
                "2 of 6 classes are others",
                id="classes-swapped-that-are-no-tie",
            ),
            pytest.param(replace(STORED, tail=STORED.tail + np.float16(0.06)), "tails differ by up to", id="tail"),
            pytest.param(
                replace(STORED, view=np.array([0, 0.01, 1, 1], np.float32)),
                "the view is [0.0, 0.0, 1.0, 1.0], expected [0.0, 0.0",
                id="view",
            ),
        ],
    )
    def test_what_it_does_not(self, again: ScoreMap, problem: str) -> None:
        (line,) = compare(self.STORED, again, amp="none")
        assert line.startswith(problem)

    def test_half_precision_may_differ_more(self) -> None:
        again = replace(self.STORED, scores=self.STORED.scores + np.float16(0.3))
        assert [len(list(compare(self.STORED, again, amp=amp))) > 0 for amp in ("none", "fp16", "bf16")] == [
            True,
            False,
            False,
        ]

    # The rest up to 1 is what rounding both sides to float16 takes.
    @given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.1, 12), share=st.floats(0, 0.75))
    @settings(max_examples=60, deadline=None)
    def test_logits_that_moved_by_less_than_is_allowed(self, seed: int, spread: float, share: float) -> None:
        random = np.random.default_rng(seed)
        logits = random.normal(0, spread, size=(3, 4, 30))
        stored = best_of(logits)
        moved = share * RELATIVE_TOLERANCE["none"] * max(1.0, float(np.abs(stored.scores).max()))
        again = best_of(logits + random.uniform(-moved, moved, size=logits.shape))
        assert list(compare(stored, again, amp="none")) == []


def best_of(logits: np.ndarray[Any, np.dtype[np.float64]], k: int = 4) -> ScoreMap:
    classes = np.argsort(-logits, axis=-1)[..., :k]
    scores = np.take_along_axis(logits, classes, axis=-1)
    kept = np.exp(scores).sum(axis=-1) / np.exp(logits).sum(axis=-1)
    view = np.array([0, 0, 1, 1], np.float32)
    return ScoreMap("k", scores.astype(np.float16), classes.astype(np.uint16), (1 - kept).astype(np.float16), view)
