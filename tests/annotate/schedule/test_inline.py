"""Many shards in one process: what is labelled, what is skipped, what is refused."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from annotate.schedule import Job, job_array_part, run_inline
from annotate.shard import AnnotateConfig
from annotate.specs import TeacherSpec
from annotate.teachers import TeacherError
from tokenlabels.images import ImageShard, TarShard
from tokenlabels.store import LabelStoreError, open_store, verify_store
from tokenlabels.store.writer import LOCK_FOLDER

MakeRecorder = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]

STEMS = ("scenes-0000", "scenes-0001", "scenes-0002")


def test_a_run_labels_every_shard(job: Job, shards: list[ImageShard], make_recorder: MakeRecorder) -> None:
    recorder = make_recorder()
    report = run_inline(shards, job, recorder)
    assert [(shard.stem, shard.status, shard.rows) for shard in report.reports] == [
        (stem, "written", rows) for stem, rows in zip(STEMS, (5, 3, 2), strict=True)
    ]
    assert (report.num_images, report.num_skipped, report.failures) == (10, 0, [])
    store = open_store(job.labels)
    assert recorder.started == [(store.info, STEMS)]
    assert recorder.num_images == [2, 2, 1, 2, 1, 2]
    assert recorder.outcomes == [(stem, "written", True) for stem in STEMS]
    assert list(store.keys()) == list(chain.from_iterable(shard.keys() for shard in shards))
    keys_by_stem = {shard.stem: shard.keys() for shard in shards}
    assert list(verify_store(job.labels, source_keys=keys_by_stem.get)) == []


def test_a_rerun_touches_nothing(job: Job, shards: list[ImageShard], make_recorder: MakeRecorder) -> None:
    run_inline(shards, job, make_recorder())
    before = {path: path.stat().st_mtime_ns for path in job.labels.rglob("*") if LOCK_FOLDER not in path.parts}
    recorder = make_recorder()
    report = run_inline(shards, job, recorder)
    assert recorder.outcomes == [(stem, "finished before", True) for stem in STEMS]
    assert (recorder.num_images, report.num_images) == ([], 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_rerun_makes_a_damaged_shard_again(
    job: Job, shards: list[ImageShard], make_recorder: MakeRecorder, contents: Contents, undisturbed: dict[str, bytes]
) -> None:
    run_inline(shards, job, make_recorder())
    scores = job.labels / f"{STEMS[1]}.zarr/scores/c/0/0/0/0"
    scores.write_bytes(scores.read_bytes()[:-1])
    report = run_inline(shards, job, make_recorder())
    assert [shard.status for shard in report.reports] == ["finished before", "written", "finished before"]
    redone = report.reports[1].redone
    assert redone is not None
    assert "the manifest says" in redone
    assert contents(job.labels) == undisturbed


@settings(max_examples=50, deadline=None)
@given(num_shards=st.integers(0, 40), num_parts=st.integers(1, 12))
def test_the_parts_of_a_job_array_are_a_partition(num_shards: int, num_parts: int) -> None:
    shards = [TarShard(f"{index}.tar") for index in range(num_shards)]
    parts = [job_array_part(shards, index, num_parts) for index in range(num_parts)]
    assert sorted((shard for part in parts for shard in part), key=lambda shard: int(shard.stem)) == shards
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("index", [-1, 3], ids=["below", "above"])
def test_a_job_outside_its_array_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=rf"--shard-index must be in 0\.\.2 for --num-shards 3, got {index}"):
        job_array_part([TarShard("a.tar")], index, 3)


def test_the_jobs_of_an_array_make_one_label_set(
    job: Job, shards: list[ImageShard], make_recorder: MakeRecorder, contents: Contents, undisturbed: dict[str, bytes]
) -> None:
    reports = [run_inline(job_array_part(shards, index, 2), job, make_recorder()).reports for index in (1, 0)]
    assert [[shard.stem for shard in part] for part in reports] == [[STEMS[1]], [STEMS[0], STEMS[2]]]
    assert contents(job.labels) == undisturbed


def test_an_array_may_have_more_jobs_than_shards(
    job: Job, shards: list[ImageShard], make_recorder: MakeRecorder
) -> None:
    report = run_inline(job_array_part(shards, 3, 4), job, make_recorder())
    assert (report.reports, report.failures) == ([], [])


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"topk": 3}, "k: 5 != 3"),
        ({"flip": True}, "teacher.flip: False != True"),
        ({"config": AnnotateConfig(resize="center")}, "resize: squash != center"),
        ({"teachers": (TeacherSpec("test_efficientnet_gn", seed=1, image_size=64),)}, "teacher.models.0.weights"),
    ],
    ids=["topk", "flip", "resize", "weights"],
)
def test_other_settings_are_refused(
    changes: dict[str, Any],
    difference: str,
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
    contents: Contents,
    undisturbed: dict[str, bytes],
) -> None:
    run_inline(shards, job, make_recorder())
    recorder = make_recorder()
    with pytest.raises(LabelStoreError, match="made in another way") as refusal:
        run_inline(shards, replace(job, **changes), recorder)
    assert difference in str(refusal.value)
    assert (recorder.started, recorder.outcomes) == ([], [])
    assert contents(job.labels) == undisturbed


def test_a_teacher_that_cannot_be_loaded_leaves_no_folder(
    job: Job, shards: list[ImageShard], make_recorder: MakeRecorder
) -> None:
    with pytest.raises(TeacherError, match="no model 'no_such_model'"):
        run_inline(shards, replace(job, teachers=(TeacherSpec("no_such_model", seed=0),)), make_recorder())
    assert not job.labels.exists()


def test_a_job_travels(job: Job) -> None:
    assert pickle.loads(pickle.dumps(job)) == job


def test_a_job_sets_the_threads_of_its_teacher(job: Job) -> None:
    replace(job, torch_threads=2).load_teacher()
    assert torch.get_num_threads() == 2
    replace(job, torch_threads=None).load_teacher()
    assert torch.get_num_threads() == 2


def test_a_part_of_a_job_array_lists_the_tars_of_all_parts(
    job: Job, shards: list[ImageShard], make_recorder: MakeRecorder
) -> None:
    names = tuple(shard.name for shard in shards)
    run_inline(job_array_part(shards, 0, 3), replace(job, tars=names), make_recorder())
    store = open_store(job.labels)
    assert store.info.tars == names
    assert store.missing == names[1:]
    assert [finding.problem for finding in verify_store(job.labels)] == ["not annotated yet"] * 2
