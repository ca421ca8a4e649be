"""Runs in which something goes wrong: tars, disks, other processes, Ctrl-C."""

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from annotate import schedule
from annotate.ledger import MAX_ATTEMPTS, RunStoppedError, ShardFailure
from annotate.schedule import Job, run_inline, try_shard
from annotate.shard import ShardError, ShardReport
from tokenlabels.files import TEMPORARY_MARK, fsync_tree
from tokenlabels.images import EncodedImage, ImageShard, TarShard, find_shards
from tokenlabels.store import (
    DiskFullError,
    LabelStoreError,
    ShardBusyError,
    claim_shard,
    open_store,
    writer,
)

MakeRecorder = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]

STEMS = ("scenes-0000", "scenes-0001", "scenes-0002")


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


def test_a_damaged_tar_is_reported_and_the_others_are_done(
    job: Job,
    scene_tars: Path,
    make_recorder: MakeRecorder,
    contents: Contents,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    images = Path(shutil.copytree(scene_tars, tmp_path / "images"))
    tar = images / f"{STEMS[1]}.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    recorder = make_recorder()
    report = run_inline(find_shards([f"{images}/*.tar"]), job, recorder)
    assert [shard.stem for shard in report.reports] == [STEMS[0], STEMS[2]]
    (failure,) = report.failures
    assert (failure.stem, failure.kind) == (STEMS[1], "final")
    assert str(tar) in failure.reason
    assert recorder.outcomes[1] == (STEMS[1], "final", True)
    assert not any(STEMS[1] in name for name in contents(job.labels))

    tar.write_bytes(whole)
    assert run_inline(find_shards([f"{images}/*.tar"]), job, make_recorder()).num_images == 3
    assert contents(job.labels) == undisturbed


def test_a_full_disk_stops_the_run_at_once(
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
    contents: Contents,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flush(root: Path) -> None:
        if STEMS[1] in root.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "fsync_tree", flush)
    recorder = make_recorder()
    with pytest.raises(RunStoppedError, match=rf"{STEMS[1]}\.zarr: No space left on device"):
        run_inline(shards, job, recorder)
    assert recorder.outcomes == [(STEMS[0], "written", True)]
    assert {name.split("/")[0] for name in contents(job.labels)} == {"labels.json", "manifest", f"{STEMS[0]}.zarr"}

    monkeypatch.setattr(writer, "fsync_tree", fsync_tree)
    assert run_inline(shards, job, make_recorder()).num_images == 5
    assert contents(job.labels) == undisturbed


@pytest.mark.parametrize("num_failures", range(MAX_ATTEMPTS + 1))
@pytest.mark.usefixtures("no_pauses")
def test_a_read_that_fails_is_tried_again(
    num_failures: int,
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
    contents: Contents,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    failures = tmp_path / "failures"
    failures.mkdir()
    for number in range(num_failures):
        (failures / str(number)).touch()
    recorder = make_recorder()
    report = run_inline([shards[0], FlakyShard(shards[1].path, failures), shards[2]], job, recorder)
    mine = [(what, settled) for stem, what, settled in recorder.outcomes if stem == STEMS[1]]
    if num_failures < MAX_ATTEMPTS:
        assert mine == [("transient", False)] * num_failures + [("written", True)]
        assert report.failures == []
        assert contents(job.labels) == undisturbed
    else:
        assert mine == [("transient", False)] * (MAX_ATTEMPTS - 1) + [("transient", True)]
        reason = f"{shards[1].path}: [Errno {errno.EIO}] {os.strerror(errno.EIO)}"
        assert report.failures == [ShardFailure(STEMS[1], reason, "transient")]
        assert [shard.stem for shard in open_store(job.labels).shards] == [STEMS[0], STEMS[2]]


@pytest.mark.parametrize("other_finishes", [True, False], ids=["the other one finishes", "the other one dies"])
def test_a_shard_that_another_process_writes_comes_last(
    other_finishes: bool,
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
    contents: Contents,
    undisturbed: dict[str, bytes],
    undisturbed_labels: Path,
) -> None:
    def let_go(outcome: ShardReport | ShardFailure) -> None:
        if outcome.stem == STEMS[2]:
            if other_finishes:
                shutil.copytree(undisturbed_labels / f"{STEMS[0]}.zarr", job.labels / f"{STEMS[0]}.zarr")
                shutil.copy(undisturbed_labels / f"manifest/{STEMS[0]}.json", job.labels / "manifest")
            claim.close()

    recorder = make_recorder(on_outcome=let_go)
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


@pytest.mark.parametrize("at_pass", range(1, 7))
def test_control_c_leaves_whole_shards_only(
    at_pass: int,
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
    contents: Contents,
    undisturbed: dict[str, bytes],
) -> None:
    def press(num_passes: int) -> None:
        if num_passes == at_pass:
            signal.raise_signal(signal.SIGINT)

    recorder = make_recorder(on_images=press)
    with pytest.raises(KeyboardInterrupt):
        run_inline(shards, job, recorder)
    finished = {"labels.json": undisturbed["labels.json"]}
    for stem, _, _ in recorder.outcomes:
        finished |= {name: data for name, data in undisturbed.items() if stem in name}
    assert contents(job.labels) == finished
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "read"))]

    report = run_inline(shards, job, make_recorder())
    assert sum(shard.status == "finished before" for shard in report.reports) == len(recorder.outcomes)
    assert contents(job.labels) == undisturbed


@pytest.mark.parametrize("step", ["_describe_files", "fsync_tree", "seal"])
def test_control_c_while_a_shard_is_written(
    step: str,
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
    contents: Contents,
    undisturbed: dict[str, bytes],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, step, lambda _: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run_inline(shards[1:], job, make_recorder())
    assert not [name for name in contents(job.labels) if STEMS[1] in name or TEMPORARY_MARK in name]
    run_inline(shards, job, make_recorder())
    assert contents(job.labels) == undisturbed


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


def test_a_bug_stays_an_exception(job: Job, shards: list[ImageShard], make_recorder: MakeRecorder) -> None:
    def broken(_: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_inline(shards, job, make_recorder(on_images=broken))
