"""The pool of Ray actors on a Ray that is played in this process, and how Ray is started, joined and left.

What Ray itself does is in test_ray.py. Here are the events that cannot be had from it on demand.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import exceptions

from annotate import schedule
from annotate.images import ImageShard
from annotate.ledger import MAX_ATTEMPTS, RunStoppedError, ShardFailure
from annotate.schedule import Job, ray_session, run_ray
from annotate.shard import ShardReport

MakeRecorder = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]

STEMS = ("scenes-0000", "scenes-0001", "scenes-0002")

DEATHS = {
    "process died": exceptions.ActorDiedError(),
    "node unreachable": exceptions.ActorUnavailableError("no heartbeat", None),
    "killed to free memory": exceptions.OutOfMemoryError("1 worker(s) were killed\n..."),  # type: ignore[no-untyped-call]
}


@dataclass(eq=False)
class FakeActor:
    """Runs the worker in this process; `deaths` are what its next tasks of a shard end with."""

    worker: Any
    deaths: dict[str, list[Exception]]

    @property
    def describe(self) -> Any:
        return SimpleNamespace(remote=lambda: self._task("describe", self.worker.describe))

    @property
    def annotate(self) -> Any:
        return SimpleNamespace(
            remote=lambda shard, wait: self._task(shard.stem, lambda: self.worker.annotate(shard, wait))
        )

    def _task(self, name: str, run: Callable[[], Any]) -> Callable[[], Any]:
        def result() -> Any:
            if self.deaths.get(name):
                raise self.deaths[name].pop(0)
            return run()

        return result


@dataclass
class FakeRay:
    """As much of Ray as the pool uses. A task runs when its result is asked for.

    Attributes:
        resources: of the cluster.
        deaths: by stem, or "describe": the errors that the tasks end with, one after the other.
        actors, killed: all that were made, and killed by the pool.
        options: of the last actor.
        num_in_flight: of each wait.
    """

    resources: Mapping[str, float] = field(default_factory=lambda: {"CPU": 4.0})
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
            self.actors.append(FakeActor(worker(job), self.deaths))
            return self.actors[-1]

        def with_options(**options: Any) -> Any:
            self.options = options
            return SimpleNamespace(remote=make)

        return SimpleNamespace(options=with_options)

    def get(self, task: Callable[[], Any], **_: object) -> Any:
        return task()

    def wait(self, tasks: Sequence[Any], *, num_returns: int, **_: object) -> tuple[list[Any], list[Any]]:
        self.num_in_flight.append(len(tasks))
        return list(tasks[:num_returns]), list(tasks[num_returns:])

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


@pytest.mark.parametrize(
    "problem", [*DEATHS.values(), exceptions.GetTimeoutError("late")], ids=[*DEATHS, "never ready"]
)
def test_a_worker_that_never_gets_ready_stops_the_run(
    problem: Exception, fake_ray: FakeRay, job: Job, shards: list[ImageShard], make_recorder: MakeRecorder
) -> None:
    fake_ray.deaths = {"describe": [problem]}
    with pytest.raises(RunStoppedError, match=r"died while it loaded the teacher|no Ray worker was ready after"):
        run_ray(shards, job, make_recorder(), num_workers=2, address=None)
    assert len(fake_ray.killed) == 2
    assert not job.labels.exists()


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


class FakeStart:
    """The part of Ray that `ray_session` uses; `problems` are what the next starts end with."""

    def __init__(self, problems: Sequence[Exception], *, running: bool = False) -> None:
        self.problems, self.running = list(problems), running
        self.inits: list[dict[str, Any]] = []
        self.num_shutdowns = 0

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **options: Any) -> None:
        self.inits.append(options)
        if self.problems:
            raise self.problems.pop(0)

    def shutdown(self) -> None:
        self.num_shutdowns += 1


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[FakeStart, str | None], Any]]:
    for name in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.delenv(name, raising=False)

    def use(fake: FakeStart, address: str | None) -> AbstractContextManager[Any]:
        monkeypatch.setitem(sys.modules, "ray", fake)
        return ray_session(address)

    before = dict(os.environ)
    yield use
    os.environ.clear()
    os.environ.update(before)


def test_a_start_that_fails_once_is_repeated(start: Callable[..., Any]) -> None:
    fake = FakeStart([RuntimeError("busy")])
    with start(fake, None) as ray:
        assert ray is fake
        assert (len(fake.inits), fake.num_shutdowns) == (2, 1)
        assert fake.inits[1]["include_dashboard"] is False
    assert fake.num_shutdowns == 2


def test_a_start_that_fails_twice_is_an_error(start: Callable[..., Any]) -> None:
    fake = FakeStart([RuntimeError("busy"), TimeoutError("still busy")])
    message = r"Ray does not start here: still busy\. `--backend inline` needs no Ray\."
    with pytest.raises(RunStoppedError, match=message), start(fake, None):
        pass


@pytest.fixture
def address() -> Iterator[str]:
    """Where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_cluster_that_cannot_be_joined_is_asked_once(start: Callable[..., Any], address: str) -> None:
    fake = FakeStart([ConnectionError("no cluster")])
    message = f"cannot join the Ray cluster at {address}: no cluster"
    with pytest.raises(RunStoppedError, match=message), start(fake, address):
        pass
    assert [options["address"] for options in fake.inits] == [address]


@pytest.mark.parametrize("spelling", ["{}", "ray://{}"])
def test_ray_is_not_asked_where_nobody_listens(spelling: str, start: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = spelling.format(f"127.0.0.1:{listener.getsockname()[1]}")
    fake = FakeStart([])
    message = f"cannot join the Ray cluster at {address}: .*Connection refused"
    with pytest.raises(RunStoppedError, match=message), start(fake, address):
        pass
    assert fake.inits == []


def test_ray_looks_for_a_cluster_on_this_machine_itself(start: Callable[..., Any]) -> None:
    fake = FakeStart([])
    with start(fake, "auto"):
        assert [options["address"] for options in fake.inits] == ["auto"]


def test_a_ray_that_runs_already_is_joined_and_kept(start: Callable[..., Any]) -> None:
    fake = FakeStart([], running=True)
    with start(fake, None):
        pass
    assert (fake.inits, fake.num_shutdowns) == ([], 0)


@pytest.mark.parametrize(
    ("address", "chosen", "expected"),
    [(None, None, "disabled"), (None, "token", "token"), ("auto", None, None)],
    ids=["local", "local, chosen by the user", "joined"],
)
def test_ray_is_told_to_need_no_token_only_where_it_is_started_here(
    address: str | None, chosen: str | None, expected: str | None, start: Callable[..., Any]
) -> None:
    if chosen:
        os.environ["RAY_AUTH_MODE"] = chosen
    with start(FakeStart([]), address):
        assert os.environ.get("RAY_AUTH_MODE") == expected
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
