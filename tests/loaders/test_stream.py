"""The threads of a pass, on made-up rows: order, the ring, open windows, and every way in which a pass ends."""

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from loaders.batch import HostBatch, SampleError
from loaders.prepare import OpenWindow, WindowedBatch
from loaders.rows import PreparedBatch
from loaders.shard_files import ShardFile
from loaders.stats import LoaderStats
from loaders.stream import OPEN_WINDOWS, BatchStream, StreamConfig

BATCH_SIZE = 4


def number_of(row: int) -> bytes:
    return row.to_bytes(2, "little")


@dataclass(eq=False)
class Window:
    """Stands in for `OpenWindow`."""

    num_batches: int
    is_closed: bool = False

    def close(self) -> None:
        assert not self.is_closed, "closed twice"
        self.is_closed = True

    def read_labels(self) -> None:
        pass

    maps = read_labels


@dataclass
class Shard:
    """Stands in for `ShardFile`: the image of a sample is its number."""

    read: Callable[[int], bytes]
    path: str = "shard"


@dataclass
class Rows:
    """A source of samples 0, 1, ...: windows of the given lengths, in batches. `num_good` windows can be opened."""

    lengths: Sequence[int]
    read: Callable[[int], bytes] = number_of
    num_good: int = 1000
    batch_size: int = BATCH_SIZE
    windows: list[Window] = field(default_factory=list)
    most_open: int = 0

    def __call__(self, *, on_open: Callable[[OpenWindow], None]) -> Iterator[list[WindowedBatch]]:
        total, begin, number = sum(self.lengths), 0, 0
        begins: list[int] = []
        for length in self.lengths:
            if len(self.windows) == self.num_good:
                raise OSError("no such window")
            end = begin + length
            window = Window((end - 1) // self.batch_size - begin // self.batch_size + 1)
            self.windows.append(window)
            begins.append(begin)
            self.most_open = max(self.most_open, sum(not other.is_closed for other in self.windows))
            on_open(cast(OpenWindow, window))
            ready = []
            while (last := min((number + 1) * self.batch_size, total)) <= end and number * self.batch_size < last:
                first = number * self.batch_size
                parts = zip(self.windows, begins, self.lengths, strict=False)
                of = [window for window, at, num in parts if at < last and at + num > first]
                windows, spans = cast(tuple[OpenWindow, ...], of), ((0, 0),) * len(of)
                ready.append(WindowedBatch(self.batch(number, range(first, last)), windows, spans))
                number += 1
            yield ready
            begin = end

    def batch(self, number: int, samples: Sequence[int]) -> PreparedBatch:
        num = len(samples)
        host = HostBatch(
            number=number,
            keys=tuple(f"sample {sample}" for sample in samples),
            labels=np.zeros(num, np.int64),
            boxes=np.zeros((num, 4)),
            flip=np.zeros(num, bool),
            warp=np.zeros((num, 2, 3)),
            is_warped=np.zeros(num, bool),
            hash=0,
        )
        return PreparedBatch(
            host, [cast(ShardFile, Shard(self.read))] * num, list(samples), list(host.keys), np.zeros((num, 0))
        )


class Numbers:
    """A decoder of what `number_of` encodes."""

    def decode(self, data: bytes) -> int:
        return int.from_bytes(data, "little")


def paint(decoder: object, image: int, batch: PreparedBatch, row: int, out: Tensor) -> None:  # noqa: ARG001
    out.fill_(image % 256)


def stream_of(
    source: Rows,
    *,
    num_threads: int = 2,
    prefetch: int = 2,
    finish: Callable[[HostBatch], None] = lambda host: None,  # noqa: ARG005
    crop: Any = paint,
) -> BatchStream:
    config = StreamConfig(source.batch_size, (2, 3), num_threads, prefetch, False, cast(Any, Numbers()), crop, finish)
    return BatchStream(source, config, LoaderStats())


def taken(stream: BatchStream) -> Iterator[list[int]]:
    """The numbers painted into each batch, in the order in which they come."""
    for number, host in enumerate(stream):
        assert host.number == number
        assert host.images.shape == (len(host), 2, 3, 3)
        assert bool((host.images == host.images[:, :1, :1, :1]).all())
        yield host.images[:, 0, 0, 0].tolist()
        stream.release(host)


def expected(num_samples: int, batch_size: int = BATCH_SIZE) -> list[list[int]]:
    return [
        [sample % 256 for sample in range(first, min(first + batch_size, num_samples))]
        for first in range(0, num_samples, batch_size)
    ]


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("waited ten seconds")


@pytest.mark.parametrize("prefetch", [1, 2, 5])
@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_order_is_kept_with_rows_of_random_duration(num_threads: int, prefetch: int) -> None:
    rng = random.Random(0)

    def read(row: int) -> bytes:
        time.sleep(rng.choice([0, 0, 0, 0.01]))
        return number_of(row)

    source = Rows([17, 30, 3, 10], read)
    with_gaps = stream_of(source, num_threads=num_threads, prefetch=prefetch)
    assert list(taken(with_gaps)) == expected(60)
    with_gaps.close()
    assert all(window.is_closed for window in source.windows)


@pytest.mark.parametrize(
    ("lengths", "batch_size"),
    [
        pytest.param([1] * 64, 64, id="a batch of many windows"),
        pytest.param([1] * 10, 4, id="windows smaller than batches"),
        pytest.param([4, 1, 1, 1], 4, id="the last batch is of several windows and not full"),
        pytest.param([8, 8], 4, id="windows end with batches"),
        pytest.param([2], 4, id="less than a batch"),
        pytest.param([], 4, id="nothing"),
    ],
)
def test_windows_and_batches_of_any_length(lengths: list[int], batch_size: int) -> None:
    source = Rows(lengths, batch_size=batch_size)
    stream = stream_of(source)
    assert list(taken(stream)) == expected(sum(lengths), batch_size)
    wait_for(lambda: all(window.is_closed for window in source.windows))
    stream.close()


def test_buffers_are_reused_and_none_is_overwritten_before_it_is_released() -> None:
    reads: list[int] = []

    def read(row: int) -> bytes:
        reads.append(row)
        return number_of(row)

    stream = stream_of(Rows([60], read), prefetch=2)
    buffers = set()
    for number, host in enumerate(stream):
        # Without this batch's buffer the ring holds two more batches, and then the threads have to stop.
        wait_for(lambda number=number: len(reads) == min(60, (number + 3) * BATCH_SIZE))  # type: ignore[misc]
        time.sleep(0.005)
        assert len(reads) == min(60, (number + 3) * BATCH_SIZE)
        assert host.images[:, 0, 0, 0].tolist() == expected(60)[number]
        buffers.add(host.images.data_ptr())
        stream.release(host)
    assert len(buffers) == 3
    stream.close()


def test_few_windows_are_open_at_a_time() -> None:
    source = Rows([10 * BATCH_SIZE] * 12)
    stream = stream_of(source, num_threads=2)
    assert len(list(taken(stream))) == 120
    # A thread that has just done with a window may not have closed it yet.
    assert OPEN_WINDOWS <= source.most_open <= OPEN_WINDOWS + 2
    stream.close()


def test_windows_are_closed_when_the_pass_is_given_up() -> None:
    source = Rows([6] * 20)
    stream = stream_of(source)
    next(stream)
    stream.close()
    assert len(source.windows) < 20
    assert all(window.is_closed for window in source.windows)
    assert not any(thread.is_alive() for thread in stream._threads)
    assert next(stream, None) is None


def test_what_keeps_a_window_from_being_opened_comes_after_the_batches_before_it() -> None:
    stream = stream_of(Rows([9, 9, 9], num_good=2))
    batches = taken(stream)
    assert [next(batches) for _ in range(4)] == expected(16)
    with pytest.raises(OSError, match="no such window"):
        next(batches)
    stream.close()


def test_a_bad_sample_is_a_problem_of_its_batch() -> None:
    def read(row: int) -> bytes:
        if row in (5, 6):
            raise ValueError(f"{row} is bad")
        return number_of(row)

    stream = stream_of(Rows([12], read))
    problems = []
    for host in stream:
        problems.append(dict(host.problems))
        stream.release(host)
    assert [list(rows) for rows in problems] == [[], [1, 2], []]
    assert isinstance(problems[1][1], SampleError)
    assert str(problems[1][1]) == "shard: sample 'sample 5': read: 5 is bad"
    assert isinstance(problems[1][1].__cause__, ValueError)
    stream.close()


def test_a_crash_in_a_thread_ends_the_pass_at_once() -> None:
    done = threading.Event()

    def read(row: int) -> bytes:
        if row == 1:
            raise RuntimeError("a mistake of ours")
        if row == 0:
            done.wait()
        return number_of(row)

    stream = stream_of(Rows([40], read))
    try:
        with pytest.raises(RuntimeError, match="a mistake of ours") as raised:
            next(stream)  # though row 0 never comes
        assert raised.value.__notes__ == ["shard: sample 'sample 1': read"]
    finally:
        done.set()
    stream.close()


def test_a_crash_of_what_finishes_batches_ends_the_pass() -> None:
    def finish(host: HostBatch) -> None:
        if host.number == 1:
            raise RuntimeError("a mistake of ours")

    stream = stream_of(Rows([40]), num_threads=1, prefetch=1, finish=finish)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        list(taken(stream))
    stream.close()


def test_torch_keeps_its_threads_everywhere_else() -> None:
    num_before, inside, later = torch.get_num_threads(), set(), []

    def crop(*args: Any) -> None:
        inside.add(torch.get_num_threads())
        paint(*args)

    torch.set_num_threads(3)
    try:
        stream = stream_of(Rows([20]), crop=crop)
        assert torch.get_num_threads() == 3
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        list(taken(stream))
        assert torch.get_num_threads() == 3
        stream.close()
    finally:
        torch.set_num_threads(num_before)
    assert inside == {1}
    assert later == [3]


def test_one_of_its_threads_may_let_go_of_the_last_reference() -> None:
    """The garbage collector runs in any thread, here in one that holds the lock the others wait for."""
    holder: list[BatchStream] = []
    go = threading.Event()

    class Keys(tuple[str, ...]):
        def __len__(self) -> int:  # asked for under the lock
            if go.is_set() and threading.current_thread().name.startswith("loader-"):
                holder.clear()
            return super().__len__()

    class RowsWithKeys(Rows):
        def batch(self, number: int, samples: Sequence[int]) -> PreparedBatch:
            prepared = super().batch(number, samples)
            prepared.host.keys = Keys(prepared.host.keys)
            return prepared

    holder.append(stream_of(RowsWithKeys([400]), num_threads=3, prefetch=5))
    threads, shared, host = holder[0]._threads, holder[0]._shared, next(holder[0])
    go.set()
    with shared.changed:
        shared.free.append(host.images)
        shared.changed.notify_all()
    wait_for(lambda: not holder)
    for thread in threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in threads)


def test_a_thread_that_cannot_be_started_is_an_error_and_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse_some(thread: threading.Thread) -> None:
        if thread.name == "loader-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_some)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        stream_of(Rows([20]), num_threads=3)
    gc.collect()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("loader-")]
