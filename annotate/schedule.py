"""Many shards: one after the other in this process, or on Ray actors. The only module that imports Ray.

Both ways hand out shards from the same `Ledger`, run the same `annotate_shard`, and write the same bytes. A worker
that dies takes nothing with it but the time since its last commit: its shard goes back to the ledger.
"""

import copy
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import torch

from annotate.ledger import MAX_ATTEMPTS, Ledger, RunReport, RunStoppedError, ShardFailure
from annotate.shard import AnnotateConfig, ShardReport, annotate_shard, label_set
from annotate.teachers import Teacher, TeacherSpec, load_teacher
from tokenlabels.images import ImageShard
from tokenlabels.store import DiskFullError, LabelSet, ShardBusyError, StoreWriteError, create_label_set

ACTOR_START_SECONDS = 900
REACH_SECONDS = 10


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know; picklable.

    Attributes:
        labels: folder of the label set, on a file system that every worker sees.
        teachers: one model, or several whose probabilities are averaged.
        config: how images get to the teacher.
        topk: classes to keep per cell.
        flip: average the view of the mirrored image.
        amp: autocast on GPUs.
        device: "cpu", "cuda", or "auto" for CUDA where this machine, or the Ray cluster, has a GPU. Each Ray worker on
            "cuda" has a GPU of its own.
        torch_threads: intra-op threads of one worker on the CPU, or None for torch's own choice.
        tars: names of all tars of the label set, where a run labels only a part of them; else those of the run.
    """

    labels: Path
    teachers: tuple[TeacherSpec, ...]
    config: AnnotateConfig = field(default_factory=AnnotateConfig)
    topk: int = 5
    flip: bool = False
    amp: Literal["none", "bf16", "fp16"] = "none"
    device: str = "cpu"
    torch_threads: int | None = None
    tars: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A worker has a working directory of its own.
        object.__setattr__(self, "labels", self.labels.absolute())

    def load_teacher(self) -> Teacher:
        """Load the teacher on this job's device."""
        if self.torch_threads:
            torch.set_num_threads(self.torch_threads)
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_teacher(self.teachers, topk=self.topk, flip=self.flip, amp=self.amp, device=device)

    def names(self, shards: Sequence[ImageShard]) -> list[str]:
        """Names of the tars that the label set is to list, for a run over `shards`."""
        return sorted({*self.tars, *(shard.name for shard in shards)})


class Progress(Protocol):
    """Who wants to know how a run goes."""

    def start(self, info: LabelSet, shards: Sequence[ImageShard]) -> None:
        """The teacher is loaded and the label set is open."""

    def images(self, num_images: int) -> None:
        """That many more images went through a teacher in this process."""

    def outcome(self, outcome: ShardReport | ShardFailure, *, settled: bool) -> None:
        """A shard is done or has failed; it will be tried again unless `settled`."""


def job_array_part(shards: Sequence[ImageShard], index: int, num_parts: int) -> list[ImageShard]:
    """The shards of one job of an array: every `num_parts`-th, starting at `index`.

    Raises:
        ValueError: `index` is not in 0..num_parts - 1.
    """
    if not 0 <= index < num_parts:
        raise ValueError(f"--shard-index must be in 0..{num_parts - 1} for --num-shards {num_parts}, got {index}")
    return list(shards[index::num_parts])


def run_inline(shards: Sequence[ImageShard], job: Job, progress: Progress) -> RunReport:
    """Label all shards in this process, one after the other.

    Raises:
        RunStoppedError: the disk is full.
        LabelStoreError: the folder holds labels made in another way.
    """
    teacher = job.load_teacher()
    info = label_set(teacher, job.config, job.names(shards))
    progress.start(create_label_set(job.labels, info), shards)
    ledger = Ledger(shards)
    while ledger:
        task = ledger.take()
        if task is None:
            time.sleep(ledger.seconds_until_ready())
            continue
        shard, wait = task
        outcome = try_shard(shard, job, teacher, wait=wait, on_images=progress.images)
        progress.outcome(outcome, settled=ledger.record(outcome))
    return ledger.result


def run_ray(
    shards: Sequence[ImageShard], job: Job, progress: Progress, *, num_workers: int | None, address: str | None
) -> RunReport:
    """Label all shards on Ray actors, one shard at a time each.

    Args:
        num_workers: number of actors; None for one per GPU of the cluster, or one on the CPU.
        address: a running cluster to join ("auto" or host:port); None to start Ray on this machine.

    Raises:
        RunStoppedError: the disk is full, Ray does not start, or no worker gets ready.
        LabelStoreError: the folder holds labels made in another way.
    """
    with ray_session(address) as ray:
        pool = ActorPool(ray, job, num_workers)
        try:
            info = pool.describe().model_copy(update={"tars": tuple(job.names(shards))})
            progress.start(create_label_set(job.labels, info), shards)
            return drain(pool, Ledger(shards), progress)
        finally:
            pool.kill()


def drain(pool: "ActorPool", ledger: Ledger, progress: Progress) -> RunReport:
    """Hand out shards to a pool of actors until none is left."""
    while ledger:
        while pool.has_idle() and (task := ledger.take()):
            pool.submit(*task)
        for outcome in pool.wait(timeout_seconds=ledger.seconds_until_ready()):
            progress.outcome(outcome, settled=ledger.record(outcome))
    return ledger.result


def try_shard(
    shard: ImageShard, job: Job, teacher: Teacher, *, wait: bool, on_images: Callable[[int], None] = lambda _: None
) -> ShardReport | ShardFailure:
    """Label one shard; what is wrong with the shard or the disk becomes a value, a bug stays an exception."""
    try:
        # A copy: the index that a shard keeps of its tar goes with it, so that a thousand of them do not pile up.
        return annotate_shard(copy.copy(shard), job.labels, teacher, job.config, wait=wait, on_images=on_images)
    except ShardBusyError as error:
        return ShardFailure(shard.stem, str(error), "busy")
    except DiskFullError as error:
        return ShardFailure(shard.stem, str(error), "fatal")
    except StoreWriteError as error:
        return ShardFailure(shard.stem, str(error), "transient")
    except ValueError as error:
        return ShardFailure(shard.stem, str(error), "final")
    except OSError as error:
        return ShardFailure(shard.stem, f"{shard.path}: {error}", "transient")


@contextmanager
def ray_session(address: str | None) -> Iterator[Any]:
    """Ray, started or joined, and left again at the end. A local start is tried twice: it can fail on a busy machine.

    Raises:
        RunStoppedError: Ray does not start, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        # A local Ray would otherwise write a token file into the home directory.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        _start_ray(ray, address)
    try:
        yield ray
    finally:
        if started_here:
            ray.shutdown()


def _start_ray(ray: Any, address: str | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    # "local": without it Ray joins whatever cluster it finds.
    options |= {"address": address} if address else {"address": "local", "include_dashboard": False}
    for is_last in (False, True):
        try:
            _require_listener(address)
            ray.init(**options)
        except (RuntimeError, ConnectionError, TimeoutError, OSError, ValueError) as error:
            ray.shutdown()
            if is_last or address:
                where = f"cannot join the Ray cluster at {address}" if address else "Ray does not start here"
                raise RunStoppedError(f"{where}: {error}. `--backend inline` needs no Ray.") from error
        else:
            return


def _require_listener(address: str | None) -> None:
    """Raise OSError where nobody listens: Ray itself goes on trying to connect for a quarter of an hour."""
    place = urlsplit(address if address and "://" in address else f"//{address or ''}")
    if place.port is not None:  # not "auto", which Ray looks up
        socket.create_connection((place.hostname, place.port), timeout=REACH_SECONDS).close()


class _Worker:
    """A Ray actor: one teacher, one shard at a time."""

    def __init__(self, job: Job) -> None:
        self._job = job

    @cached_property
    def _teacher(self) -> Teacher:
        # Loaded on first use: an error in an actor's constructor reaches the driver only as text.
        return self._job.load_teacher()

    def describe(self) -> LabelSet:
        return label_set(self._teacher, self._job.config, [])

    def annotate(self, shard: ImageShard, wait: bool) -> ShardReport | ShardFailure:
        return try_shard(shard, self._job, self._teacher, wait=wait)


class ActorPool:
    """Actors with at most one shard each; one that dies is replaced, and its shard reported as failed.

    Shards go to actors that have loaded their teacher. One that finds no room on the cluster, because others hold it
    or a machine is gone, waits for room and holds nothing up.
    """

    def __init__(self, ray: Any, job: Job, num_workers: int | None) -> None:
        resources = ray.cluster_resources()
        if job.device == "auto":
            # The driver's own machine need not be like the workers'.
            job = replace(job, device="cuda" if resources.get("GPU", 0) >= 1 else "cpu")
        resource = "GPU" if job.device == "cuda" else "CPU"
        available = int(resources.get(resource, 0))
        num_workers = num_workers or (max(1, available) if resource == "GPU" else 1)
        if num_workers > available:
            raise RunStoppedError(f"{num_workers} workers need a {resource} each; the Ray cluster has {available}")
        if resource == "CPU" and job.torch_threads is None:
            job = replace(job, torch_threads=max(1, available // num_workers))
        self._ray, self._job = ray, job
        # A worker that Ray kills because memory runs low is dead too, but Ray has another error for it.
        self._deaths = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, ImageShard]] = {}
        self._num_failed_starts = 0
        for _ in range(num_workers):
            self._start_actor()

    def describe(self) -> LabelSet:
        """What the first actor that is ready says of its teacher: a label set without tars."""
        while True:
            ready, _ = self._ray.wait(list(self._starting), num_returns=1, timeout=ACTOR_START_SECONDS)
            if not ready:
                raise RunStoppedError(f"no Ray worker was ready after {ACTOR_START_SECONDS} s")
            if info := self._welcome(ready[0]):
                return info

    def has_idle(self) -> bool:
        return bool(self._idle)

    def submit(self, shard: ImageShard, wait: bool) -> None:
        actor = self._idle.pop()
        self._busy[actor.annotate.remote(shard, wait)] = actor, shard

    def wait(self, *, timeout_seconds: float) -> Iterator[ShardReport | ShardFailure]:
        """Outcomes of actors that are done; waits for one, or for the time given if an actor is idle until then."""
        timeout = None if not self._idle or timeout_seconds == float("inf") else timeout_seconds
        pending = [*self._starting, *self._busy]
        if not pending:
            time.sleep(timeout or 0)
            return
        done, _ = self._ray.wait(pending, num_returns=1, timeout=timeout)
        for reference in done:
            if reference in self._starting:
                self._welcome(reference)
            else:
                yield self._outcome(reference)

    def kill(self) -> None:
        busy = [actor for actor, _ in self._busy.values()]
        for actor in [*self._starting.values(), *self._idle, *busy]:
            self._ray.kill(actor)

    def _start_actor(self) -> None:
        # No restarts or retries by Ray: a task that Ray runs again on its own would run twice.
        options = {"num_cpus": 1, "num_gpus": int(self._job.device == "cuda"), "max_restarts": 0, "max_task_retries": 0}
        actor = self._ray.remote(_Worker).options(**options).remote(self._job)
        self._starting[actor.describe.remote()] = actor

    def _welcome(self, reference: Any) -> LabelSet | None:
        """Take an actor that has loaded its teacher into service, or replace one that died of it."""
        try:
            info: LabelSet = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as failure:
            # The worker's own error (an unknown name, a missing checkpoint) says more than Ray's wrapping of it.
            raise failure.cause from None
        except self._deaths as failure:
            del self._starting[reference]
            self._num_failed_starts += 1
            if self._num_failed_starts == MAX_ATTEMPTS:
                raise RunStoppedError(
                    f"{MAX_ATTEMPTS} Ray workers died while they loaded the teacher: {failure}"
                ) from failure
            self._start_actor()
            return None
        self._num_failed_starts = 0
        self._idle.append(self._starting.pop(reference))
        return info

    def _outcome(self, reference: Any) -> ShardReport | ShardFailure:
        actor, shard = self._busy[reference]
        try:
            outcome: ShardReport | ShardFailure = self._ray.get(reference)
        except self._deaths as error:
            reason = f"the worker died in mid-shard ({str(error).splitlines()[0]})"
            outcome = ShardFailure(shard.stem, reason, "transient")
            # One that only cannot be reached would keep its GPU.
            self._ray.kill(actor)
            self._start_actor()
        else:
            self._idle.append(actor)
        del self._busy[reference]
        return outcome
