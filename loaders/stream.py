"""Threads that fill a ring of batch buffers, in the order of the plan and with nothing lost.

One thread opens windows of shards and reads their labels, a window ahead; the others each take the next row of the
batch in turn, whichever it is, so that no buffer waits for a slow thread. The consumer gets batch after batch in
order. Nothing here is random, and what goes wrong with a row stays with its batch until that is handed out.
"""

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from loaders.batch import HostBatch, SampleError
from loaders.decode import Decoder
from loaders.prepare import OpenWindow, WindowedBatch
from loaders.rows import Crop, fill_row
from loaders.stats import LoaderStats
from tokenlabels.checks import check_count

# The one that is being read and the one after it.
OPEN_WINDOWS = 2

_IMPORTED_IN = os.getpid()

# Batches whose pixels may still be on their way to a GPU: the one in use and the one after it.
UPLOADS = 2


class Source(Protocol):
    """`prepare_batches` with all of its arguments but one."""

    def __call__(self, *, on_open: Callable[[OpenWindow], None]) -> Iterator[list[WindowedBatch]]:
        """Begin with the first window."""


@dataclass(frozen=True)
class StreamConfig:
    """How batches are filled.

    Attributes:
        batch_size: the largest number of rows of a batch.
        image_size: (S_h, S_w) in pixels.
        num_threads: that read and decode.
        prefetch: batches that may be ready or being filled while one is being brought to the device, at least 1.
        pin_memory: whether the ring lies in memory from which CUDA copies without waiting.
        decoder, crop: from bytes to pixels.
        finish: called by a thread for every batch that is full.
    """

    batch_size: int
    image_size: tuple[int, int]
    num_threads: int
    prefetch: int
    pin_memory: bool
    decoder: Decoder[Any]
    crop: Crop
    finish: Callable[[HostBatch], None]

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        check_count("prefetch", self.prefetch)


@dataclass(eq=False)
class _Filling:
    """A batch that is being filled."""

    source: WindowedBatch
    slot: Tensor
    num_taken: int = 0
    num_filled: int = 0
    is_complete: bool = False
    failure: Exception | None = None


@dataclass(eq=False)
class _Shared:
    """What the threads and the consumer share; every change happens under `changed`."""

    config: StreamConfig
    stats: LoaderStats
    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[WindowedBatch] = field(default_factory=deque)
    filling: deque[_Filling] = field(default_factory=deque)
    free: list[Tensor] = field(default_factory=list)
    windows: set[OpenWindow] = field(default_factory=set)
    all_prepared: bool = False
    closed: bool = False
    failure: BaseException | None = None
    """What kept a window from being opened; the batches before it are still handed out."""
    crash: BaseException | None = None
    """What ended a thread; nothing is handed out any more."""
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class BatchStream:
    """An iterator of host batches, in order. Close it, or let go of it.

    A batch's images lie in the ring and are overwritten after `release`, which gives the buffer back.
    """

    def __init__(self, source: Source, config: StreamConfig, stats: LoaderStats) -> None:
        shared = _Shared(config, stats)
        shape = (config.batch_size, *config.image_size, 3)
        num_in_use = UPLOADS if config.pin_memory else 1
        # The threads write to it, and may not in inference mode, in which a pass for evaluation may be begun.
        with torch.inference_mode(False):
            shared.free = [
                torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=config.pin_memory)
                for _ in range(config.prefetch + num_in_use)
            ]
        self._shared, self._process = shared, os.getpid()
        self._lent: dict[int, Tensor] = {}
        self._threads = [threading.Thread(target=_prepare, args=(shared, source), name="loader-windows", daemon=True)]
        self._threads += [
            threading.Thread(target=_fill, args=(shared,), name=f"loader-{number}", daemon=True)
            for number in range(config.num_threads)
        ]
        if os.getpid() != _IMPORTED_IN:
            # The threads of OpenMP do not survive a fork, and torch would wait for them for ever.
            torch.set_num_threads(1)
        # The threads hold nothing of this object, so that it can be let go of in the middle of an epoch.
        self._finalizer = weakref.finalize(self, _close, shared, self._threads, self._process)
        self._finalizer.atexit = False
        _streams.add(self)
        intra_op_threads = torch.get_num_threads()
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            shared.started.acquire()
        # Each thread has asked for one intra-op thread; what later threads of others get is as it was.
        torch.set_num_threads(intra_op_threads)

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        """The next batch, complete, with the problems of its rows.

        Raises:
            Exception: what kept a window from being opened, after all batches before it.
        """
        shared = self._shared
        if os.getpid() != self._process:
            raise RuntimeError("this iterator was made before a fork and has no threads here; iterate anew")
        with shared.changed:
            shared.stats.queue_depth = sum(filling.is_complete for filling in shared.filling)
            shared.changed.wait_for(lambda: _is_decided(shared))
            if shared.closed:
                raise StopIteration
            if shared.crash is not None:
                raise shared.crash
            if shared.filling:
                filling = shared.filling.popleft()
                if filling.failure is not None:
                    raise filling.failure
                host = filling.source.batch.host
                self._lent[host.number] = filling.slot
                return host
            if shared.failure is not None:
                raise shared.failure
        raise StopIteration

    def release(self, batch: HostBatch) -> None:
        """Give the buffer of a batch back."""
        batch.images = torch.empty(0)
        with self._shared.changed:
            self._shared.free.append(self._lent.pop(batch.number))
            self._shared.changed.notify_all()

    def close(self) -> None:
        """Stop the threads and close all files."""
        self._finalizer()


_streams: weakref.WeakSet[BatchStream] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """At exit, before zarr stops the thread without which those that read labels would wait for ever.

    What was registered last runs first, and zarr is imported above.
    """
    for stream in list(_streams):
        stream.close()


def _is_decided(shared: _Shared) -> bool:
    """Whether the consumer has something to get: a batch, an error or the end."""
    if shared.closed or shared.crash is not None:
        return True
    return shared.filling[0].is_complete if shared.filling else _is_all_taken(shared)


def _close(shared: _Shared, threads: list[threading.Thread], process: int) -> None:
    if os.getpid() != process:
        return  # a fork has the locks and the files, but no threads
    with shared.changed:
        shared.closed = True
        shared.changed.notify_all()
    if threading.current_thread() in threads:
        return  # let go of in the middle of a thread's work, perhaps with the lock: the files go with the last thread
    for thread in threads:
        if thread.is_alive():  # one that the system refused to start cannot be joined
            thread.join()
    for window in shared.windows:
        window.close()
    shared.windows.clear()


def _begin(shared: _Shared) -> None:
    """Ask for one intra-op thread in this thread, and say so."""
    torch.get_num_threads()  # torch gives a thread its number when it is first used, and would forget ours then
    torch.set_num_threads(1)
    shared.started.release()


def _prepare(shared: _Shared, source: Source) -> None:
    """Body of the thread that opens windows and reads their labels."""
    _begin(shared)
    unlabelled: deque[OpenWindow] = deque()

    def on_open(window: OpenWindow) -> None:
        unlabelled.append(window)
        with shared.changed:
            shared.windows.add(window)

    try:
        batches = source(on_open=on_open)
        while True:
            with shared.changed:
                # Without waiting batches there is more to open, whatever is open: a batch may need many small windows.
                shared.changed.wait_for(
                    lambda: shared.closed or len(shared.windows) < OPEN_WINDOWS or not shared.waiting
                )
                if shared.closed:
                    return
            window_batches = next(batches, None)
            with shared.changed:
                if window_batches is None:
                    shared.all_prepared = True
                else:
                    shared.waiting.extend(window_batches)
                shared.changed.notify_all()
            while unlabelled:
                unlabelled[0].read_labels()
                unlabelled.popleft()
            if window_batches is None:
                return
    except BaseException as error:  # the consumer raises it
        with shared.changed:
            shared.failure = error
            shared.changed.notify_all()
    finally:
        for window in unlabelled:
            window.give_up_labels()


def _fill(shared: _Shared) -> None:
    """Body of the threads that read and decode."""
    _begin(shared)
    decoder, crop = shared.config.decoder, shared.config.crop
    try:
        while (task := _next_row(shared)) is not None:
            filling, row = task
            batch, seconds = filling.source.batch, (0.0, 0.0)
            if row not in batch.host.problems:
                try:
                    seconds = fill_row(batch, row, filling.slot[row], decoder, crop)
                except SampleError as error:
                    batch.host.problems[row] = error
            _row_is_filled(shared, filling, seconds)
    except BaseException as error:  # the consumer raises it
        with shared.changed:
            shared.crash = error
            shared.changed.notify_all()


def _next_row(shared: _Shared) -> tuple[_Filling, int] | None:
    """Wait for the next row to fill; None when there will be none."""
    with shared.changed:
        shared.changed.wait_for(lambda: shared.closed or _has_row(shared) or _is_all_taken(shared))
        if shared.closed or not _has_row(shared):
            return None
        filling = _open_filling(shared)
        if filling is None:
            filling = _Filling(shared.waiting.popleft(), shared.free.pop())
            shared.filling.append(filling)
            if not shared.waiting:
                shared.changed.notify_all()  # it is time to open the next window
        filling.num_taken += 1
        return filling, filling.num_taken - 1


def _open_filling(shared: _Shared) -> _Filling | None:
    """The batch that has rows to take; only the newest can have."""
    newest = shared.filling[-1] if shared.filling else None
    return newest if newest is not None and newest.num_taken < len(newest.source.batch.host) else None


def _has_row(shared: _Shared) -> bool:
    return _open_filling(shared) is not None or bool(shared.waiting and shared.free)


def _is_all_taken(shared: _Shared) -> bool:
    return not shared.waiting and (shared.all_prepared or shared.failure is not None)


def _row_is_filled(shared: _Shared, filling: _Filling, seconds: tuple[float, float]) -> None:
    """Count a row; the last one finishes its batch."""
    host = filling.source.batch.host
    with shared.changed:
        shared.stats.read_seconds += seconds[0]
        shared.stats.decode_seconds += seconds[1]
        filling.num_filled += 1
        if filling.num_filled < len(host):
            return
    host.images = filling.slot[: len(host)]
    try:
        filling.source.attach_labels()
        shared.config.finish(host)
    except Exception as error:  # raised where the batch would be handed out
        filling.failure = error
    unused: list[OpenWindow] = []
    with shared.changed:
        filling.is_complete = True
        for window in filling.source.windows:
            window.num_batches -= 1
            if window.num_batches == 0:
                unused.append(window)
        shared.windows.difference_update(unused)
        # A window that is still open keeps the next one from being read: tell its thread, and the consumer.
        shared.changed.notify_all()
    for window in unused:
        window.close()
