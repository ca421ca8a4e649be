"""Many shards on real Ray workers: the same bytes as inline, whatever happens to the workers."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from annotate.ledger import RunStoppedError, ShardFailure
from annotate.schedule import Job, run_inline, run_ray
from annotate.shard import ShardReport
from annotate.specs import TeacherSpec
from annotate.teachers import TeacherError
from tokenlabels.images import EncodedImage, ImageShard, TarShard, find_shards
from tokenlabels.store import open_store, verify_store

MakeRecorder = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]

STEMS = ("scenes-0000", "scenes-0001", "scenes-0002")

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class DeadlyShard(TarShard):
    """Kills the first process that reads it, after one image; `pid` is a file that then tells which it was."""

    pid: Path

    def images(self) -> Iterator[EncodedImage]:
        images = super().images()
        yield next(images)
        if not self.pid.exists():
            self.pid.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        yield from images


@dataclass(frozen=True)
class BuggyShard(TarShard):
    """Reading it meets a bug."""

    def images(self) -> Iterator[EncodedImage]:
        raise ZeroDivisionError


class Tenant:
    """Somebody else on the cluster."""

    def ready(self) -> None: ...


@pytest.fixture
def cluster(ray_cluster: Any) -> Iterator[Any]:
    """The session's Ray, which can be sent the shards of this module: no worker could import them."""
    module = sys.modules[__name__]
    ray_cluster.cloudpickle.register_pickle_by_value(module)
    yield ray_cluster
    ray_cluster.cloudpickle.unregister_pickle_by_value(module)


@pytest.mark.usefixtures("cluster")
def test_two_workers_make_what_one_process_makes(
    job: Job, shards: list[ImageShard], make_recorder: MakeRecorder, contents: Contents, undisturbed: dict[str, bytes]
) -> None:
    recorder = make_recorder()
    report = run_ray(shards, job, recorder, num_workers=2, address=None)
    assert (report.num_images, report.failures) == (10, [])
    assert sorted(recorder.outcomes) == [(stem, "written", True) for stem in STEMS]
    assert recorder.started == [(open_store(job.labels).info, STEMS)]
    assert list(verify_store(job.labels)) == []
    assert contents(job.labels) == undisturbed

    again = make_recorder()
    assert run_ray(shards, job, again, num_workers=None, address=None).num_images == 0
    assert again.outcomes == [(stem, "finished before", True) for stem in STEMS]


@pytest.mark.usefixtures("cluster")
def test_a_worker_killed_in_mid_shard_costs_nothing(
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
    contents: Contents,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    pid = tmp_path / "pid"
    recorder = make_recorder()
    report = run_ray([DeadlyShard(shards[0].path, pid), *shards[1:]], job, recorder, num_workers=2, address=None)
    assert int(pid.read_text()) != os.getpid()
    assert sorted(recorder.outcomes) == [
        (STEMS[0], "transient", False),
        *((stem, "written", True) for stem in STEMS),
    ]
    assert report.failures == []
    assert contents(job.labels) == undisturbed


@pytest.mark.usefixtures("cluster")
def test_a_damaged_tar_is_reported_and_the_others_are_done(
    job: Job, scene_tars: Path, make_recorder: MakeRecorder, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(scene_tars, tmp_path / "images"))
    tar = images / f"{STEMS[1]}.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    report = run_ray(find_shards([f"{images}/*.tar"]), job, make_recorder(), num_workers=1, address=None)
    assert [(failure.stem, failure.kind) for failure in report.failures] == [(STEMS[1], "final")]
    assert str(tar) in report.failures[0].reason
    assert sorted(shard.stem for shard in report.reports) == [STEMS[0], STEMS[2]]


@pytest.mark.usefixtures("cluster")
def test_control_c_leaves_whole_shards_only(
    job: Job, shards: list[ImageShard], make_recorder: MakeRecorder, contents: Contents, undisturbed: dict[str, bytes]
) -> None:
    def press(_: ShardReport | ShardFailure) -> None:
        signal.raise_signal(signal.SIGINT)

    recorder = make_recorder(on_outcome=press)
    with pytest.raises(KeyboardInterrupt):
        run_ray(shards, job, recorder, num_workers=2, address=None)
    finished = {shard.stem for shard in open_store(job.labels).shards}
    assert finished >= {stem for stem, _, _ in recorder.outcomes}
    # A worker may still commit its shard before it is gone: what was finished stays, and nothing half-done shows.
    assert {finding.path.stem for finding in verify_store(job.labels)} <= {*STEMS} - finished

    assert run_inline(shards, job, make_recorder()).failures == []
    assert contents(job.labels) == undisturbed


@pytest.mark.usefixtures("cluster")
def test_a_bug_in_a_worker_ends_the_run(job: Job, shards: list[ImageShard], make_recorder: MakeRecorder) -> None:
    with pytest.raises(ZeroDivisionError):
        run_ray([BuggyShard(shards[0].path)], job, make_recorder(), num_workers=1, address=None)


@pytest.mark.usefixtures("cluster")
def test_a_teacher_that_cannot_be_loaded_is_the_teachers_own_error(
    job: Job, shards: list[ImageShard], make_recorder: MakeRecorder
) -> None:
    job = replace(job, teachers=(TeacherSpec("no_such_model", seed=0),))
    with pytest.raises(TeacherError, match="no model 'no_such_model'"):
        run_ray(shards, job, make_recorder(), num_workers=1, address=None)
    assert not job.labels.exists()


def test_more_workers_than_cpus_are_refused(
    cluster: Any, job: Job, shards: list[ImageShard], make_recorder: MakeRecorder
) -> None:
    num_cpus = int(cluster.cluster_resources()["CPU"])
    message = f"{num_cpus + 1} workers need a CPU each; the Ray cluster has {num_cpus}"
    with pytest.raises(RunStoppedError, match=message):
        run_ray(shards, job, make_recorder(), num_workers=num_cpus + 1, address=None)


def test_a_worker_that_finds_no_room_holds_nothing_up(
    cluster: Any,
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
    contents: Contents,
    undisturbed: dict[str, bytes],
) -> None:
    num_cpus = int(cluster.cluster_resources()["CPU"])
    taken = cluster.remote(Tenant).options(num_cpus=num_cpus - 1).remote()
    cluster.get(taken.ready.remote())
    try:
        report = run_ray(shards, job, make_recorder(), num_workers=2, address=None)
    finally:
        cluster.kill(taken)
    assert (report.num_images, report.failures) == (10, [])
    assert contents(job.labels) == undisturbed
