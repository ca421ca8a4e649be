"""Work that runs ahead of its consumer in threads, in order, with a bound on the bytes it may hold."""

import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    size_of: Callable[[Item], int],
    num_threads: int,
    max_bytes: int,
) -> Generator[Result, None, None]:
    """`map(function, items)` with `num_threads` threads and one more that reads `items`.

    Args:
        size_of: bytes that an item and its result occupy. An item larger than `max_bytes` goes through alone.
        max_bytes: bound on the sizes of all items handed to the threads whose results were not yet taken. One more
            item may have been read and wait for room.

    Raises:
        Exception: what `items` or `function` raised, at the place of the item that raised it.
    """
    budget = _ByteBudget(max_bytes)
    results: SimpleQueue[tuple[Future[Result], int] | None] = SimpleQueue()

    def read() -> None:
        try:
            for item in items:
                size_bytes = size_of(item)
                if not budget.take(size_bytes):
                    return
                results.put((pool.submit(function, item), size_bytes))
        except BaseException as error:  # the consumer raises it
            failed: Future[Result] = Future()
            failed.set_exception(error)
            results.put((failed, 0))
        else:
            results.put(None)

    with ThreadPoolExecutor(num_threads, "decode") as pool:
        reader = threading.Thread(target=read, name="read", daemon=True)
        reader.start()
        try:
            while (entry := results.get()) is not None:
                future, size_bytes = entry
                yield future.result()
                budget.give_back(size_bytes)
        finally:
            budget.close()
            reader.join()
            pool.shutdown(cancel_futures=True)


class _ByteBudget:
    """A number of bytes shared between one thread that takes and one that gives back."""

    def __init__(self, num_bytes: int) -> None:
        self._limit, self._taken, self._closed = num_bytes, 0, False
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> bool:
        """Wait until there is room; False when nobody will want the result any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._taken or self._taken + num_bytes <= self._limit)
            self._taken += num_bytes
            return not self._closed

    def give_back(self, num_bytes: int) -> None:
        with self._changed:
            self._taken -= num_bytes
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
