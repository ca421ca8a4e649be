"""How fast labels are made, as ratios from interleaved rounds: `tokenlabels bench annotate`.

The inline backend is held against the bare teacher over images that are ready in memory, and two Ray workers against
two processes that share out the same shards without Ray. Rounds alternate, so that a busy machine slows both sides.
"""

import copy
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from annotate.fitted import fitted_images, image_specs
from annotate.ledger import Ledger, ShardFailure
from annotate.schedule import ActorPool, Job, drain, ray_session, try_shard
from annotate.shard import ShardReport, annotate_shard
from annotate.teachers import Teacher
from tokenlabels.images import ImageShard
from tokenlabels.measure import Comparison, interleave
from tokenlabels.store import LabelSet

NUM_PARALLEL = 2


def bench_inline(shards: Sequence[ImageShard], job: Job, *, rounds: int) -> Comparison:
    """`annotate_shard` from encoded images to a committed shard, against the teacher alone on ready tensors."""
    teacher = job.load_teacher()
    batches = list(_ready_batches(shards, job, teacher))
    num_images = sum(len(batch[0]) for batch in batches)

    def inline() -> None:
        shutil.rmtree(job.labels, ignore_errors=True)
        for shard in shards:
            # A copy has no index of its tar yet, like the shards of a run.
            annotate_shard(copy.copy(shard), job.labels, teacher, job.config)

    def bare() -> None:
        for batch in batches:
            teacher(batch)

    return interleave("inline backend / bare teacher", num_images, rounds, inline, bare)


def bench_ray(shards: Sequence[ImageShard], job: Job, *, rounds: int) -> Comparison:
    """Two Ray workers against two processes; both have their teachers loaded before the clock starts."""
    job = replace(job, torch_threads=1)
    num_images = sum(len(shard.keys()) for shard in shards)
    with _processes(job) as processes, ray_session(None) as ray:
        pool = ActorPool(ray, job, NUM_PARALLEL)

        def with_ray() -> None:
            shutil.rmtree(job.labels, ignore_errors=True)
            report = drain(pool, Ledger(shards), _Silent())
            assert not report.failures, report.failures

        def with_processes() -> None:
            shutil.rmtree(job.labels, ignore_errors=True)
            failures = [outcome for outcome in processes.map(_label_one, shards) if isinstance(outcome, ShardFailure)]
            assert not failures, failures

        try:
            return interleave("two Ray workers / two processes", num_images, rounds, with_ray, with_processes)
        finally:
            pool.kill()


class _Silent:
    def start(self, info: LabelSet, shards: Sequence[ImageShard]) -> None: ...

    def images(self, num_images: int) -> None: ...

    def outcome(self, outcome: ShardReport | ShardFailure, *, settled: bool) -> None: ...


def _ready_batches(shards: Sequence[ImageShard], job: Job, teacher: Teacher) -> Iterator[list[torch.Tensor]]:
    """The batches that annotate_shard makes of these shards, decoded and resized."""
    specs, config = image_specs(teacher, job.config.resize), job.config
    for shard in shards:
        fitted = fitted_images(shard.images(), specs, num_threads=config.decode_threads, max_bytes=config.queue_bytes)
        images = [image for image in fitted if image.problem is None]
        for start in range(0, len(images), job.config.batch_size):
            arrays = [image.arrays for image in images[start : start + job.config.batch_size]]
            yield [torch.from_numpy(np.stack(side)) for side in zip(*arrays, strict=True)]


@contextmanager
def _processes(job: Job) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(NUM_PARALLEL, mp_context=context, initializer=_load, initargs=(job,)) as pool:
        yield pool


_loaded: dict[str, tuple[Job, Teacher]] = {}
"""What the initializer of a process leaves for its tasks."""


def _load(job: Job) -> None:
    _loaded["job"] = job, job.load_teacher()


def _label_one(shard: ImageShard) -> ShardReport | ShardFailure:
    job, teacher = _loaded["job"]
    return try_shard(shard, job, teacher, wait=False)


def scene_shards(folder: Path, shard_sizes: Sequence[int]) -> list[ImageShard]:
    """Generated scenes as image tars, to measure without any data set."""
    from annotate.scenes import write_scenes
    from tokenlabels.images import find_shards

    write_scenes(folder, shard_sizes=shard_sizes, seed=0)
    return find_shards([f"{folder}/*.tar"])
