"""Many shards in one process: what is done, what is skipped, what is tried again, and what a Ctrl-C leaves."""

import errno
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from annotate import ledger, schedule
from annotate.images import EncodedImage, ImageShard, TarShard, find_shards
from annotate.ledger import MAX_ATTEMPTS, RunStoppedError, ShardFailure
from annotate.schedule import Job, job_array_part, run_inline, try_shard
from annotate.shard import AnnotateConfig, ShardError, ShardReport
from annotate.specs import TeacherSpec
from annotate.teachers import TeacherError
from tokenlabels.store import (
    DiskFullError,
    LabelSet,
    LabelStoreError,
    ShardBusyError,
    claim_shard,
    open_store,
    verify_store,
    writer,
)
from tokenlabels.store.files import TEMPORARY_MARK, files_below, fsync_tree
from tokenlabels.store.writer import LOCK_FOLDER

STEMS = ("scenes-0000", "scenes-0001", "scenes-0002")


def contents(labels: Path) -> dict[str, bytes]:
    """Every file of a label set but the locks."""
    names = [name for name in files_below(labels) if not name.startswith(LOCK_FOLDER)]
    return {name: (labels / name).read_bytes() for name in names}


@dataclass
class Recorder:
    """Keeps what a run says of itself; `on_outcome` and `on_images` may interfere."""

    on_outcome: Callable[[ShardReport | ShardFailure], None] = lambda _: None
    on_images: Callable[[int], None] = lambda _: None
    started: list[tuple[LabelSet, tuple[str, ...]]] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)
    outcomes: list[tuple[str, str, bool]] = field(default_factory=list)

    def start(self, info: LabelSet, shards: Sequence[ImageShard]) -> None:
        self.started.append((info, tuple(shard.stem for shard in shards)))

    def images(self, num_images: int) -> None:
        self.num_images.append(num_images)
        self.on_images(len(self.num_images))

    def outcome(self, outcome: ShardReport | ShardFailure, *, settled: bool) -> None:
        what = outcome.status if isinstance(outcome, ShardReport) else outcome.kind
        self.outcomes.append((outcome.stem, what, settled))
        self.on_outcome(outcome)


@dataclass(frozen=True)
class FlakyShard(TarShard):
    """Reading fails after the first image, as often as there are files to use up in `failures`."""

    failures: Path

    def images(self) -> Iterator[EncodedImage]:
        images = super().images()
        yield next(images)
        for left in sorted(self.failures.iterdir())[:1]:
            left.unlink()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        yield from images


@pytest.fixture
def job(tmp_path: Path, tiny_spec: TeacherSpec) -> Job:
    return Job(tmp_path / "labels", (tiny_spec,), AnnotateConfig(batch_size=2), torch_threads=1)


@pytest.fixture
def shards(scene_tars: Path) -> list[ImageShard]:
    return find_shards([f"{scene_tars}/*.tar"])


@pytest.fixture
def copied_tars(scene_tars: Path, tmp_path: Path) -> Path:
    """The tars again, to be damaged."""
    return Path(shutil.copytree(scene_tars, tmp_path / "images"))


@pytest.fixture(scope="module")
def undisturbed_labels(scene_tars: Path, tiny_spec: TeacherSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The label set of one run that nothing went wrong in."""
    num_threads = torch.get_num_threads()
    labels = tmp_path_factory.mktemp("undisturbed")
    job = Job(labels, (tiny_spec,), AnnotateConfig(batch_size=2), torch_threads=1)
    run_inline(find_shards([f"{scene_tars}/*.tar"]), job, Recorder())
    torch.set_num_threads(num_threads)
    return labels


@pytest.fixture(scope="module")
def undisturbed(undisturbed_labels: Path) -> dict[str, bytes]:
    return contents(undisturbed_labels)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "FIRST_BACKOFF_SECONDS", 0.001)


def test_a_run_labels_every_shard(job: Job, shards: list[ImageShard]) -> None:
    recorder = Recorder()
    report = run_inline(shards, job, recorder)
    assert [(shard.stem, shard.status, shard.rows) for shard in report.reports] == [
        (stem, "written", rows) for stem, rows in zip(STEMS, (5, 3, 2), strict=True)
    ]
    assert (report.num_images, report.num_skipped, report.failures) == (10, 0, [])
    store = open_store(job.labels)
    assert recorder.started == [(store.info, STEMS)]
    assert recorder.num_images == [2, 2, 1, 2, 1, 2]
    assert recorder.outcomes == [(stem, "written", True) for stem in STEMS]
    assert list(store.keys()) == [key for shard in shards for key in shard.keys()]
    by_stem = {shard.stem: shard for shard in shards}
    assert list(verify_store(job.labels, source_keys=lambda stem: by_stem[stem].keys())) == []


def test_a_rerun_touches_nothing(job: Job, shards: list[ImageShard]) -> None:
    run_inline(shards, job, Recorder())
    before = {path: path.stat().st_mtime_ns for path in job.labels.rglob("*") if LOCK_FOLDER not in path.parts}
    recorder = Recorder()
    report = run_inline(shards, job, recorder)
    assert recorder.outcomes == [(stem, "finished before", True) for stem in STEMS]
    assert (recorder.num_images, report.num_images) == ([], 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_rerun_makes_a_damaged_shard_again(job: Job, shards: list[ImageShard], undisturbed: dict[str, bytes]) -> None:
    run_inline(shards, job, Recorder())
    scores = next((job.labels / f"{STEMS[1]}.zarr" / "scores").glob("c/**/0"))
    scores.write_bytes(scores.read_bytes()[:-1])
    report = run_inline(shards, job, Recorder())
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
    assert sorted((shard for part in parts for shard in part), key=shards.index) == shards
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("index", [-1, 3], ids=["below", "above"])
def test_a_job_outside_its_array_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=rf"--shard-index must be in 0\.\.2 for --num-shards 3, got {index}"):
        job_array_part([TarShard("a.tar")], index, 3)


def test_two_jobs_of_an_array_make_one_label_set(
    job: Job, shards: list[ImageShard], undisturbed: dict[str, bytes]
) -> None:
    reports = [run_inline(job_array_part(shards, index, 2), job, Recorder()).reports for index in (1, 0)]
    assert [[shard.stem for shard in part] for part in reports] == [[STEMS[1]], [STEMS[0], STEMS[2]]]
    assert contents(job.labels) == undisturbed


def test_a_job_of_an_array_without_shards_is_no_error(job: Job, shards: list[ImageShard]) -> None:
    report = run_inline(job_array_part(shards, 3, 4), job, Recorder())
    assert (report.reports, report.failures) == ([], [])


def test_a_damaged_tar_is_reported_and_the_others_are_done(
    job: Job, copied_tars: Path, undisturbed: dict[str, bytes]
) -> None:
    tar = copied_tars / f"{STEMS[1]}.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    recorder = Recorder()
    report = run_inline(find_shards([f"{copied_tars}/*.tar"]), job, recorder)
    assert [shard.stem for shard in report.reports] == [STEMS[0], STEMS[2]]
    (failure,) = report.failures
    assert (failure.stem, failure.kind) == (STEMS[1], "final")
    assert str(tar) in failure.reason
    assert recorder.outcomes[1] == (STEMS[1], "final", True)
    assert not any(STEMS[1] in name for name in contents(job.labels))

    tar.write_bytes(whole)
    assert run_inline(find_shards([f"{copied_tars}/*.tar"]), job, Recorder()).num_images == 3
    assert contents(job.labels) == undisturbed


def test_a_full_disk_stops_the_run_at_once(
    job: Job, shards: list[ImageShard], undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(root: Path) -> None:
        if STEMS[1] in root.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "fsync_tree", flush)
    recorder = Recorder()
    with pytest.raises(RunStoppedError, match=rf"{STEMS[1]}\.zarr: No space left on device"):
        run_inline(shards, job, recorder)
    assert recorder.outcomes == [(STEMS[0], "written", True)]
    assert {name.split("/")[0] for name in contents(job.labels)} == {"labels.json", "manifest", f"{STEMS[0]}.zarr"}

    monkeypatch.setattr(writer, "fsync_tree", fsync_tree)
    assert run_inline(shards, job, Recorder()).num_images == 5
    assert contents(job.labels) == undisturbed


@pytest.mark.parametrize("num_failures", range(MAX_ATTEMPTS + 1))
@pytest.mark.usefixtures("no_pauses")
def test_a_read_that_fails_is_tried_again(
    num_failures: int, job: Job, shards: list[ImageShard], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    failures = tmp_path / "failures"
    failures.mkdir()
    for number in range(num_failures):
        (failures / str(number)).touch()
    recorder = Recorder()
    report = run_inline([shards[0], FlakyShard(shards[1].path, failures), shards[2]], job, recorder)
    mine = [(what, settled) for stem, what, settled in recorder.outcomes if stem == STEMS[1]]
    if num_failures < MAX_ATTEMPTS:
        assert mine == [("transient", False)] * num_failures + [("written", True)]
        assert contents(job.labels) == undisturbed
        assert report.failures == []
    else:
        assert mine == [("transient", False)] * (MAX_ATTEMPTS - 1) + [("transient", True)]
        assert report.failures == [
            ShardFailure(STEMS[1], f"{shards[1].path}: [Errno 5] Input/output error", "transient")
        ]
        assert [shard.stem for shard in open_store(job.labels).shards] == [STEMS[0], STEMS[2]]


@pytest.mark.parametrize("other_finishes", [True, False], ids=["the other one finishes", "the other one dies"])
def test_a_shard_that_another_process_writes_comes_last(
    other_finishes: bool, job: Job, shards: list[ImageShard], undisturbed: dict[str, bytes], undisturbed_labels: Path
) -> None:
    def let_go(outcome: ShardReport | ShardFailure) -> None:
        if outcome.stem == STEMS[2]:
            if other_finishes:
                for name in (f"{STEMS[0]}.zarr", f"manifest/{STEMS[0]}.json"):
                    copy = shutil.copytree if name.endswith("zarr") else shutil.copy
                    copy(undisturbed_labels / name, job.labels / name)
            claim.close()

    recorder = Recorder(on_outcome=let_go)
    with ExitStack() as claim:
        claim.enter_context(claim_shard(job.labels, STEMS[0], open_store(undisturbed_labels).info))
        run_inline(shards, job, recorder)
    assert recorder.outcomes == [
        (STEMS[0], "busy", False),
        (STEMS[1], "written", True),
        (STEMS[2], "written", True),
        (STEMS[0], "finished before" if other_finishes else "written", True),
    ]
    assert contents(job.labels) == undisturbed


@pytest.mark.parametrize("at_call", range(1, 7))
def test_control_c_leaves_whole_shards_only(
    at_call: int, job: Job, shards: list[ImageShard], undisturbed: dict[str, bytes]
) -> None:
    def press(call: int) -> None:
        if call == at_call:
            signal.raise_signal(signal.SIGINT)

    recorder = Recorder(on_images=press)
    with pytest.raises(KeyboardInterrupt):
        run_inline(shards, job, recorder)
    finished = {"labels.json": undisturbed["labels.json"]}
    for stem, _, _ in recorder.outcomes:
        finished |= {name: data for name, data in undisturbed.items() if stem in name}
    assert contents(job.labels) == finished
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "read"))]

    report = run_inline(shards, job, Recorder())
    assert sum(shard.status == "finished before" for shard in report.reports) == len(recorder.outcomes)
    assert contents(job.labels) == undisturbed


@pytest.mark.parametrize("step", ["_describe_files", "fsync_tree", "seal"])
def test_control_c_while_a_shard_is_written(
    step: str,
    job: Job,
    shards: list[ImageShard],
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer, step, lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_inline(shards[1:], job, Recorder())
    assert not [name for name in contents(job.labels) if STEMS[1] in name or TEMPORARY_MARK in name]
    monkeypatch.undo()
    run_inline(shards, job, Recorder())
    assert contents(job.labels) == undisturbed


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
    changes: dict[str, object],
    difference: str,
    job: Job,
    shards: list[ImageShard],
    undisturbed: dict[str, bytes],
) -> None:
    run_inline(shards, job, Recorder())
    recorder = Recorder()
    with pytest.raises(LabelStoreError, match="made in another way") as refusal:
        run_inline(shards, replace(job, **changes), recorder)
    assert difference in str(refusal.value)
    assert (recorder.started, recorder.outcomes) == ([], [])
    assert contents(job.labels) == undisturbed


def test_a_teacher_that_cannot_be_loaded_leaves_no_folder(job: Job, shards: list[ImageShard]) -> None:
    with pytest.raises(TeacherError, match="no model 'no_such_model'"):
        run_inline(shards, replace(job, teachers=(TeacherSpec("no_such_model", seed=0),)), Recorder())
    assert not job.labels.exists()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ShardBusyError("taken"), "busy"),
        (DiskFullError("full"), "fatal"),
        (LabelStoreError("other labels"), "final"),
        (ShardError("too many skipped"), "final"),
        (TimeoutError("storage"), "transient"),
        (FileNotFoundError("gone"), "transient"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_a_failure_means_for_the_run(
    error: Exception, kind: str, job: Job, shards: list[ImageShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(schedule, "annotate_shard", fail)
    outcome = try_shard(shards[0], job, job.load_teacher(), wait=False)
    assert isinstance(outcome, ShardFailure)
    assert (outcome.stem, outcome.kind) == (STEMS[0], kind)
    assert str(error) in outcome.reason


def test_a_bug_stays_an_exception(job: Job, shards: list[ImageShard]) -> None:
    def broken(_: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_inline(shards, job, Recorder(on_images=broken))


def test_a_job_travels(job: Job) -> None:
    assert pickle.loads(pickle.dumps(job)) == job


def test_a_job_sets_the_threads_of_its_teacher(job: Job) -> None:
    replace(job, torch_threads=2).load_teacher()
    assert torch.get_num_threads() == 2
    replace(job, torch_threads=None).load_teacher()
    assert torch.get_num_threads() == 2
