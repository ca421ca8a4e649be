"""The pool of Ray actors, on a Ray that is played in this process: events that cannot be had from Ray on demand.

What Ray itself does is in test_ray.py.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import exceptions

from annotate import schedule
from annotate.ledger import MAX_ATTEMPTS, RunStoppedError, ShardFailure
from annotate.schedule import Job, run_ray
from annotate.shard import ShardReport
from tokenlabels.images import ImageShard

MakeRecorder = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]

STEMS = ("scenes-0000", "scenes-0001", "scenes-0002")

DEATHS = {
    "process died": exceptions.ActorDiedError(),
    "node unreachable": exceptions.ActorUnavailableError("no heartbeat", None),
    "killed to free memory": exceptions.OutOfMemoryError("1 worker(s) were killed\n..."),  # type: ignore[no-untyped-call]
}


@dataclass(eq=False)
class FakeTask:
    """Runs when its result is asked for. `name` is a stem, or "describe"."""

    name: str
    run: Callable[[], Any]
    has_room: bool


@dataclass(eq=False)
class FakeActor:
    """Runs its worker in this process, if it `has_room`."""

    worker: Any
    has_room: bool

    @property
    def describe(self) -> Any:
        return SimpleNamespace(remote=lambda: FakeTask("describe", lambda: self.worker.describe(), self.has_room))

    @property
    def annotate(self) -> Any:
        return SimpleNamespace(
            remote=lambda shard, wait: FakeTask(shard.stem, lambda: self.worker.annotate(shard, wait), self.has_room)
        )


@dataclass
class FakeRay:
    """As much of Ray as the pool uses.

    Attributes:
        resources: of the cluster, all told.
        num_with_room: actors that find room; those that come later never start.
        deaths: by name of the task: the errors that such tasks end with, one after the other.
        actors, killed: all that were made, and killed by the pool.
        options: of the last actor.
        num_in_flight: shards in work at each wait.
    """

    resources: Mapping[str, float] = field(default_factory=lambda: {"CPU": 4.0})
    num_with_room: int = 100
    deaths: dict[str, list[Exception]] = field(default_factory=dict)
    actors: list[FakeActor] = field(default_factory=list)
    killed: list[FakeActor] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    num_in_flight: list[int] = field(default_factory=list)
    exceptions: Any = exceptions

    def cluster_resources(self) -> Mapping[str, float]:
        return self.resources

    def remote(self, worker: Callable[[Job], Any]) -> Any:
        def make(job: Job) -> FakeActor:
            self.actors.append(FakeActor(worker(job), len(self.actors) < self.num_with_room))
            return self.actors[-1]

        def with_options(**options: Any) -> Any:
            self.options = options
            return SimpleNamespace(remote=make)

        return SimpleNamespace(options=with_options)

    def get(self, task: FakeTask) -> Any:
        if self.deaths.get(task.name):
            raise self.deaths[task.name].pop(0)
        return task.run()

    def wait(
        self, tasks: Sequence[FakeTask], *, num_returns: int, timeout: float | None
    ) -> tuple[list[FakeTask], list[FakeTask]]:
        self.num_in_flight.append(sum(task.name != "describe" for task in tasks))
        done = [task for task in tasks if task.has_room][:num_returns]
        assert done or timeout is not None, "this would wait for ever"
        return done, [task for task in tasks if task not in done]

    def kill(self, actor: FakeActor) -> None:
        self.killed.append(actor)


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()

    def session(_: str | None) -> AbstractContextManager[FakeRay]:
        return nullcontext(ray)

    monkeypatch.setattr(schedule, "ray_session", session)
    return ray


@pytest.mark.parametrize("num_workers", [None, 1, 2, 4])
def test_workers_get_one_shard_at_a_time(
    num_workers: int | None,
    fake_ray: FakeRay,
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
    contents: Contents,
    undisturbed: dict[str, bytes],
) -> None:
    recorder = make_recorder()
    report = run_ray(shards, job, recorder, num_workers=num_workers, address=None)
    assert sorted(recorder.outcomes) == [(stem, "written", True) for stem in STEMS]
    assert (report.num_images, report.failures) == (10, [])
    assert [stems for _, stems in recorder.started] == [STEMS]
    assert max(fake_ray.num_in_flight) == min(num_workers or 1, len(shards))
    assert len(fake_ray.actors) == (num_workers or 1)
    assert {id(actor) for actor in fake_ray.killed} == {id(actor) for actor in fake_ray.actors}
    assert contents(job.labels) == undisturbed


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
@pytest.mark.usefixtures("no_pauses")
def test_a_dead_worker_is_replaced_and_its_shard_done(
    death: Exception,
    fake_ray: FakeRay,
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
    contents: Contents,
    undisturbed: dict[str, bytes],
) -> None:
    fake_ray.deaths = {STEMS[0]: [death], STEMS[2]: [death, death]}
    recorder = make_recorder()
    report = run_ray(shards, job, recorder, num_workers=2, address=None)
    by_stem = {stem: [what for name, what, _ in recorder.outcomes if name == stem] for stem in STEMS}
    assert by_stem == {
        STEMS[0]: ["transient", "written"],
        STEMS[1]: ["written"],
        STEMS[2]: ["transient", "transient", "written"],
    }
    assert report.failures == []
    assert len(fake_ray.actors) == 2 + 3
    assert contents(job.labels) == undisturbed


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
@pytest.mark.usefixtures("no_pauses")
def test_a_shard_that_kills_every_worker_is_given_up(
    death: Exception, fake_ray: FakeRay, job: Job, shards: list[ImageShard], make_recorder: MakeRecorder
) -> None:
    fake_ray.deaths = {STEMS[1]: [death] * MAX_ATTEMPTS}
    report = run_ray(shards, job, make_recorder(), num_workers=1, address=None)
    first_line = str(death).splitlines()[0]
    reason = f"the worker died in mid-shard ({first_line})"
    assert report.failures == [ShardFailure(STEMS[1], reason, "transient")]
    assert sorted(shard.stem for shard in report.reports) == [STEMS[0], STEMS[2]]


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
@pytest.mark.parametrize("num_deaths", [1, MAX_ATTEMPTS - 1, MAX_ATTEMPTS])
def test_a_worker_that_dies_at_the_start_is_replaced_a_few_times(
    num_deaths: int,
    death: Exception,
    fake_ray: FakeRay,
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
) -> None:
    fake_ray.deaths = {"describe": [death] * num_deaths}
    if num_deaths < MAX_ATTEMPTS:
        assert run_ray(shards, job, make_recorder(), num_workers=2, address=None).num_images == 10
        assert len(fake_ray.actors) == 2 + num_deaths
    else:
        with pytest.raises(RunStoppedError, match="3 Ray workers died while they loaded the teacher: "):
            run_ray(shards, job, make_recorder(), num_workers=2, address=None)
        assert not job.labels.exists()


def test_a_cluster_without_room_stops_the_run(
    fake_ray: FakeRay, job: Job, shards: list[ImageShard], make_recorder: MakeRecorder
) -> None:
    fake_ray.num_with_room = 0
    with pytest.raises(RunStoppedError, match="no Ray worker was ready after 900 s"):
        run_ray(shards, job, make_recorder(), num_workers=2, address=None)
    assert {id(actor) for actor in fake_ray.killed} == {id(actor) for actor in fake_ray.actors}
    assert not job.labels.exists()


@pytest.mark.usefixtures("no_pauses")
def test_workers_that_find_no_room_hold_nothing_up(
    fake_ray: FakeRay,
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
    contents: Contents,
    undisturbed: dict[str, bytes],
) -> None:
    fake_ray.num_with_room = 2
    fake_ray.deaths = {STEMS[1]: [exceptions.ActorDiedError()]}
    report = run_ray(shards, job, make_recorder(), num_workers=4, address=None)
    assert (report.num_images, report.failures) == (10, [])
    assert {id(actor) for actor in fake_ray.killed} >= {id(actor) for actor in fake_ray.actors[2:]}
    assert contents(job.labels) == undisturbed


def test_a_bug_in_a_worker_stays_an_exception_and_no_actor_stays_behind(
    fake_ray: FakeRay, job: Job, shards: list[ImageShard], make_recorder: MakeRecorder
) -> None:
    bug = exceptions.RayTaskError("annotate", "traceback", ZeroDivisionError())  # type: ignore[no-untyped-call]
    fake_ray.deaths = {STEMS[1]: [bug]}
    with pytest.raises(exceptions.RayTaskError):
        run_ray(shards, job, make_recorder(), num_workers=2, address=None)
    assert {id(actor) for actor in fake_ray.killed} == {id(actor) for actor in fake_ray.actors}


def test_control_c_leaves_no_actor_behind(
    fake_ray: FakeRay, job: Job, shards: list[ImageShard], make_recorder: MakeRecorder
) -> None:
    def press(_: ShardReport | ShardFailure) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ray(shards, job, make_recorder(on_outcome=press), num_workers=2, address=None)
    assert {id(actor) for actor in fake_ray.killed} == {id(actor) for actor in fake_ray.actors}


@pytest.mark.parametrize(
    ("device", "num_workers", "message"),
    [
        ("cpu", 5, "5 workers need a CPU each; the Ray cluster has 4"),
        ("cuda", 1, "1 workers need a GPU each; the Ray cluster has 0"),
        ("cuda", None, "1 workers need a GPU each; the Ray cluster has 0"),
    ],
)
def test_more_workers_than_the_cluster_can_hold_are_refused(
    device: str,
    num_workers: int | None,
    message: str,
    fake_ray: FakeRay,
    job: Job,
    shards: list[ImageShard],
    make_recorder: MakeRecorder,
) -> None:
    with pytest.raises(RunStoppedError, match=message):
        run_ray(shards, replace(job, device=device), make_recorder(), num_workers=num_workers, address=None)
    assert fake_ray.actors == []


@pytest.mark.parametrize(("asked", "num_workers", "given"), [(None, 1, 4), (None, 3, 1), (None, 4, 1), (3, 4, 3)])
def test_workers_share_the_cores(
    asked: int | None, num_workers: int, given: int, fake_ray: FakeRay, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(schedule, "_Worker", jobs.append)
    schedule.ActorPool(fake_ray, replace(job, torch_threads=asked), num_workers)
    assert [job.torch_threads for job in jobs] == [given] * num_workers


def test_every_gpu_gets_a_worker(fake_ray: FakeRay, job: Job) -> None:
    fake_ray.resources = {"CPU": 8.0, "GPU": 3.0}
    schedule.ActorPool(fake_ray, replace(job, device="cuda"), None)
    assert len(fake_ray.actors) == 3
    assert fake_ray.options == {"num_cpus": 1, "num_gpus": 1, "max_restarts": 0, "max_task_retries": 0}
