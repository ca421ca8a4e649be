"""One pass over the data: threads on the host, the device's part, and batches out, in order."""

import logging
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from loaders.batch import HostBatch, TokenLabelBatch
from loaders.device import DeviceStage
from loaders.stats import LoaderStats
from loaders.stream import UPLOADS, BatchStream, Source, StreamConfig

logger = logging.getLogger(__name__)

Batches = Generator[tuple[int, TokenLabelBatch], None, None]
"""(number in the epoch, batch)."""


def run_pass(source: Source, config: StreamConfig, stage: DeviceStage, stats: LoaderStats) -> Batches:
    """The batches of a pass. Closing the generator stops all threads.

    Raises:
        SampleError: of the first row of a batch that cannot be used.
    """
    stats.start()
    stream = BatchStream(source, config, stats)
    try:
        hosts = _usable(stream, stats)
        deliver = _on_cuda if stage.device.type == "cuda" else _here
        yield from deliver(stream, hosts, stage, stats)
    finally:
        stats.stop()
        stream.close()


def _usable(stream: BatchStream, stats: LoaderStats) -> Iterator[HostBatch]:
    while True:
        started = time.perf_counter()
        host = next(stream, None)
        stats.wait_seconds += time.perf_counter() - started
        if host is None:
            return
        if host.problems:
            raise host.problems[min(host.problems)]
        stats.num_skipped += len(host.skipped)
        # Logged here and not in the threads, which must never wait for a lock that their consumer may hold.
        for problem in host.skipped:
            logger.warning("left out: %s", problem)
        if len(host):
            yield host
        else:
            stream.release(host)


def _here(stream: BatchStream, hosts: Iterator[HostBatch], stage: DeviceStage, stats: LoaderStats) -> Batches:
    for host in hosts:
        batch = _staged(host, stage, stats)
        stream.release(host)
        yield host.number, batch


def _on_cuda(stream: BatchStream, hosts: Iterator[HostBatch], stage: DeviceStage, stats: LoaderStats) -> Batches:
    """A batch ahead on a stream of its own, so that copies and augmentation overlap with the model."""
    side = torch.cuda.Stream(stage.device)  # type: ignore[no-untyped-call]
    uploads: deque[tuple[HostBatch, torch.cuda.Event]] = deque()
    ready: deque[tuple[int, TokenLabelBatch, torch.cuda.Event]] = deque()
    failure: Exception | None = None
    while True:
        try:
            host = next(hosts, None)
            if host is not None:
                with torch.cuda.stream(side):
                    batch = _staged(host, stage, stats)
                    done = side.record_event()
        except Exception as error:  # raised after the batch before it
            host, failure = None, error
        if host is not None:
            uploads.append((host, done))
            ready.append((host.number, batch, done))
            if len(uploads) > UPLOADS:
                finished, event = uploads.popleft()
                event.synchronize()
                stream.release(finished)
            if len(ready) < 2:
                continue
        if not ready:
            break
        number, batch, done = ready.popleft()
        current = torch.cuda.current_stream(stage.device)
        current.wait_event(done)
        for tensor in _tensors(batch):
            tensor.record_stream(current)
        yield number, batch
    if failure is not None:
        raise failure


def _staged(host: HostBatch, stage: DeviceStage, stats: LoaderStats) -> TokenLabelBatch:
    started = time.perf_counter()
    batch = stage(host)
    stats.device_seconds += time.perf_counter() - started
    stats.num_images += len(host)
    stats.num_batches += 1
    return batch


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a batch, its plan and its targets."""
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            yield item
        elif hasattr(item, "__dataclass_fields__"):
            yield from _tensors(item)
