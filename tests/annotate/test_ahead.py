import itertools
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotate import ahead
from annotate.ahead import map_ahead

TIMEOUT_SECONDS = 30  # only a broken map_ahead ever waits that long


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def itself(size_bytes: int) -> int:
    return size_bytes


def squares(items: Iterable[int], *, num_threads: int = 2) -> Generator[int, None, None]:
    return map_ahead(lambda item: item**2, items, size_of=lambda _: 1, num_threads=num_threads, max_bytes=4)


class Probe:
    """Items that are their own size, and a count of the bytes that map_ahead has let in and not got back.

    When the next item is asked for, all before it were let in. The consumer reports before map_ahead can know, so
    what is counted here is never more than what map_ahead counts.
    """

    def __init__(self, sizes: list[int], max_bytes: int) -> None:
        self.sizes, self.max_bytes = sizes, max_bytes
        self.num_done = 0
        self.peak_bytes = 0

    def __iter__(self) -> Iterator[int]:
        for index, size in enumerate(self.sizes):
            yield size
            outstanding = sum(self.sizes[self.num_done : index + 1])
            assert outstanding <= max(self.max_bytes, size), "more was let in than there is room for"
            self.peak_bytes = max(self.peak_bytes, outstanding)


class TestOrder:
    @pytest.mark.parametrize("num_threads", [1, 2, 5])
    @pytest.mark.parametrize("num_items", [0, 1, 50])
    def test_results_are_those_of_map_in_order(self, num_items: int, num_threads: int) -> None:
        assert list(squares(range(num_items), num_threads=num_threads)) == [item**2 for item in range(num_items)]

    def test_a_slow_item_does_not_let_others_pass(self) -> None:
        second_is_done = threading.Event()

        def wait_for_the_second(item: str) -> str:
            if item == "first":
                assert second_is_done.wait(TIMEOUT_SECONDS)
            else:
                second_is_done.set()
            return item

        results = map_ahead(wait_for_the_second, ["first", "second"], size_of=len, num_threads=2, max_bytes=100)
        assert list(results) == ["first", "second"]

    def test_items_are_worked_on_at_the_same_time(self) -> None:
        meeting = threading.Barrier(3)

        def meet(item: int) -> int:
            meeting.wait(TIMEOUT_SECONDS)
            return item

        assert list(map_ahead(meet, range(6), size_of=itself, num_threads=3, max_bytes=100)) == list(range(6))

    def test_nothing_is_read_before_it_is_asked_for(self) -> None:
        items = iter(range(3))
        results = squares(items)
        assert next(items) == 0
        assert list(results) == [1, 4]


class TestByteBound:
    @pytest.mark.parametrize(
        ("sizes", "max_bytes"),
        [
            pytest.param([1] * 30, 4, id="equal"),
            pytest.param([3, 1, 2, 4, 1, 1, 1, 3, 2], 4, id="unequal"),
            pytest.param([1, 1, 10, 1, 1, 10, 10, 1], 4, id="larger-than-the-bound"),
            pytest.param([2] * 10, 1, id="one-at-a-time"),
            pytest.param([0, 0, 5, 0, 3, 0], 5, id="empty-items"),
        ],
    )
    def test_a_slow_consumer_holds_up_the_reader(self, sizes: list[int], max_bytes: int) -> None:
        probe = Probe(sizes, max_bytes)
        results = []
        for result in map_ahead(itself, probe, size_of=itself, num_threads=2, max_bytes=max_bytes):
            results.append(result)
            time.sleep(0.002)  # long enough for a reader without a bound to run away
            probe.num_done += 1
        assert results == sizes

    def test_the_room_is_used_up_while_the_consumer_is_busy(self) -> None:
        probe = Probe([1] * 20, max_bytes=4)
        with closing(map_ahead(itself, probe, size_of=itself, num_threads=1, max_bytes=4)) as results:
            next(results)
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while probe.peak_bytes < 4 and time.monotonic() < deadline:
                time.sleep(0.001)
        assert probe.peak_bytes == 4

    @given(
        sizes=st.lists(st.integers(0, 12), max_size=40),
        max_bytes=st.integers(1, 20),
        num_threads=st.integers(1, 4),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_sizes(self, sizes: list[int], max_bytes: int, num_threads: int) -> None:
        probe = Probe(sizes, max_bytes)
        results = []
        for result in map_ahead(itself, probe, size_of=itself, num_threads=num_threads, max_bytes=max_bytes):
            results.append(result)
            probe.num_done += 1
        assert results == sizes


class TestErrors:
    @pytest.mark.parametrize("place", [0, 1, 7])
    @pytest.mark.parametrize("raiser", ["function", "items", "size_of"])
    def test_an_error_comes_at_its_place(self, raiser: str, place: int) -> None:
        def check(item: int, name: str) -> int:
            if (item, name) == (place, raiser):
                raise ValueError(f"{name} of {item}")
            return item

        results = map_ahead(
            lambda item: check(item, "function"),
            (check(item, "items") for item in range(10)),
            size_of=lambda item: check(item, "size_of"),
            num_threads=2,
            max_bytes=4,
        )
        seen: list[int] = []
        with pytest.raises(ValueError, match=f"{raiser} of {place}"):
            seen.extend(results)
        assert seen == list(range(place))

    def test_the_first_error_in_order_is_raised_though_a_later_one_came_sooner(self) -> None:
        second_has_failed = threading.Event()

        def fail(item: str) -> None:
            if item == "first":
                assert second_has_failed.wait(TIMEOUT_SECONDS)
            else:
                second_has_failed.set()
            raise ValueError(item)

        with pytest.raises(ValueError, match="first"):
            list(map_ahead(fail, ["first", "second"], size_of=len, num_threads=2, max_bytes=100))

    def test_it_ends_with_the_error(self) -> None:
        results = squares([1, 2, "three", 4])  # type: ignore[list-item]
        assert [next(results), next(results)] == [1, 4]
        with pytest.raises(TypeError):
            next(results)
        assert list(results) == []


class TestClosing:
    """`_no_thread_is_left` is half of each of these tests."""

    @pytest.mark.parametrize("num_taken", [1, 5])
    def test_endless_items_are_left_and_closed(self, num_taken: int) -> None:
        is_closed = threading.Event()

        def items() -> Iterator[int]:
            try:
                yield from itertools.count()
            finally:
                is_closed.set()

        with closing(squares(items())) as results:
            assert list(itertools.islice(results, num_taken)) == [item**2 for item in range(num_taken)]
        assert is_closed.is_set()

    def test_an_error_of_the_consumer(self) -> None:
        def consume() -> None:
            with closing(squares(itertools.count())) as results:
                for result in results:
                    if result > 9:
                        raise RuntimeError("the disk is full")

        with pytest.raises(RuntimeError, match="the disk is full"):
            consume()

    def test_work_that_nobody_wants_any_more_is_not_begun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        begun: list[int] = []
        may_go_on = threading.Event()

        class Pool(ThreadPoolExecutor):
            def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
                super().shutdown(wait=False, cancel_futures=cancel_futures)
                may_go_on.set()
                super().shutdown(wait=wait)

        def work(item: int) -> int:
            begun.append(item)
            assert item == 0 or may_go_on.wait(TIMEOUT_SECONDS)
            return item

        monkeypatch.setattr(ahead, "ThreadPoolExecutor", Pool)
        with closing(map_ahead(work, range(100), size_of=lambda _: 1, num_threads=1, max_bytes=50)) as results:
            assert next(results) == 0
        assert set(begun) <= {0, 1}

    def test_before_the_first_result(self) -> None:
        results = squares(itertools.count())
        results.close()
        assert list(results) == []
