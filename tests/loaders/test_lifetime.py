"""How a pass ends: no thread, no open file and no hang is left, whoever stops it, and in whatever process."""

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loaders import TokenLabelBatch, TokenLabelLoader
from tests.loaders.photos import Photos

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

SECONDS = 60
"""After which a process counts as hanging."""


@pytest.fixture(scope="module")
def some(make_photos: Callable[..., Photos], tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """Three tars of 8, 6 and 6 images."""
    return make_photos(tmp_path_factory.mktemp("some"), (8, 6, 6), side=24)


@pytest.fixture
def loader(some: Photos) -> TokenLabelLoader:
    """Ten batches of 2."""
    small: Any = {"image_size": 16, "grid": 2, "batch_size": 2, "threads": 2, "shuffle_shards": 1}
    return TokenLabelLoader(some.tars, some.labels, index_dir=some.index_dir, **small)


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader-")]


def open_files(some: Photos) -> list[str]:
    """Those of the data set that this process holds open."""
    folder = Path(some.tars[0]).parent
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(link.readlink()))
        except FileNotFoundError:  # that of the listing itself
            continue
    return [target for target in targets if Path(target).is_relative_to(folder)]


@pytest.fixture(autouse=True)
def _nothing_is_left(some: Photos) -> Iterator[None]:
    yield
    gc.collect()
    assert loader_threads() == []
    assert open_files(some) == []


def fail_in_the_loop(loader: TokenLabelLoader) -> None:
    def train() -> None:
        for _ in loader:
            raise KeyError

    with pytest.raises(KeyError):
        train()


def break_the_loop(loader: TokenLabelLoader) -> None:
    for _ in loader:
        break


def close_the_iterator(loader: TokenLabelLoader) -> None:
    batches: Any = iter(loader)
    next(batches)
    assert loader_threads()
    batches.close()
    assert loader_threads() == []
    assert list(batches) == []


def interrupt_the_loop(loader: TokenLabelLoader) -> None:
    def train() -> None:
        for _ in loader:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train()


def abandon_in_a_cycle(loader: TokenLabelLoader) -> None:
    class Holder:
        pass

    holder: Any = Holder()
    holder.batches, holder.itself = iter(loader), holder
    next(holder.batches)
    gone = weakref.ref(holder)
    del holder
    assert loader_threads(), "only the garbage collector finds it"
    gc.collect()
    assert gone() is None


def never_begin(loader: TokenLabelLoader) -> None:
    iter(loader)
    assert loader_threads() == [], "an iterator does nothing before it is asked"


def read_to_the_end(loader: TokenLabelLoader) -> None:
    batches = iter(loader)
    assert len(list(batches)) == 10
    assert loader_threads() == [], "though the iterator lives on"


ENDS = [
    fail_in_the_loop,
    break_the_loop,
    close_the_iterator,
    interrupt_the_loop,
    abandon_in_a_cycle,
    never_begin,
    read_to_the_end,
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_threads_and_files_go_with_the_pass(end: Callable[[TokenLabelLoader], None], loader: TokenLabelLoader) -> None:
    first = next(iter(loader)).keys
    end(loader)
    gc.collect()
    assert loader_threads() == []
    loader.set_epoch(1)
    loader.set_epoch(0)
    assert next(iter(loader)).keys == first, "the loader is as good as new"


def test_the_loader_itself_may_go_before_its_iterator(loader: TokenLabelLoader, some: Photos) -> None:
    expected = [batch.keys for batch in loader]
    loader.set_epoch(0)
    batches = iter(loader)
    del loader
    assert [batch.keys for batch in batches] == expected
    assert open_files(some) == []


def test_two_passes_at_once_do_not_disturb_each_other(loader: TokenLabelLoader) -> None:
    expected = [batch.keys for batch in loader]
    loader.set_epoch(0)
    first, second = iter(loader), iter(loader)
    pairs = list(zip(first, second, strict=True))
    assert [a.keys for a, _ in pairs] == [b.keys for _, b in pairs] == expected


def cycles(loader: TokenLabelLoader, num: int) -> None:
    for _ in range(num):
        next(iter(loader))


@pytest.mark.parametrize("num", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_cycle_of_create_iterate_abandon_leaks(num: int, some: Photos) -> None:
    def one() -> TokenLabelLoader:
        return TokenLabelLoader(some.tars[0], image_size=8, batch_size=2, threads=1, grid=1, index_dir=some.index_dir)

    cycles(one(), 2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(num // 10):
        cycles(one(), 10)
    assert loader_threads() == []
    assert open_files(some) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def measure_cycles(loader: TokenLabelLoader, num: int, report: Callable[[int], None]) -> None:
    cycles(loader, num)
    gc.collect()
    before = resident_kib()
    for _ in range(3):
        cycles(loader, num)
    gc.collect()
    report(resident_kib() - before)


@pytest.mark.slow
def test_memory_does_not_grow_over_cycles(loader: TokenLabelLoader) -> None:
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    in_child(lambda: measure_cycles(loader, 200, sender.send))
    # 600 passes, each with maps, keys and a ring of 3 x 2 x 16 x 16 pixels: 4 kB of any of them would show.
    assert receiver.poll()
    assert receiver.recv() < 2048


def in_child(work: Callable[[], None], *, while_it_runs: Callable[[int], None] = lambda pid: None) -> int:  # noqa: ARG005
    """Do something in a fork of this process; its exit code, 0 required unless something is done to it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    assert process.pid is not None
    while_it_runs(process.pid)
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        pytest.fail("the child hangs")
    assert process.exitcode is not None
    return process.exitcode


def keys_and_sums(batches: Iterator[TokenLabelBatch]) -> list[tuple[tuple[str, ...], float]]:
    return [(batch.keys, batch.images.sum(dtype=torch.float64).item()) for batch in batches]


def test_a_fork_can_iterate_anew_while_the_parent_goes_on(loader: TokenLabelLoader, some: Photos) -> None:
    expected = keys_and_sums(iter(loader))
    loader.set_epoch(0)
    running = iter(loader)
    seen = keys_and_sums(iter([next(running), next(running)]))

    def child() -> None:
        assert keys_and_sums(iter(loader)) == expected
        assert loader_threads() == []

    assert in_child(child) == 0
    assert in_child(child) == 0, "again"
    assert seen + keys_and_sums(running) == expected
    assert open_files(some) == []


def test_a_running_iterator_is_of_no_use_in_a_fork(loader: TokenLabelLoader) -> None:
    holder = [iter(loader)]
    expected = [next(holder[0]).keys]

    def use() -> None:
        with pytest.raises(RuntimeError, match="made before a fork and has no threads here; iterate anew"):
            next(holder[0])

    def drop() -> None:
        holder.clear()
        gc.collect()
        assert len(list(loader)) == 10

    assert in_child(use) == 0
    assert in_child(drop) == 0
    expected += [batch.keys for batch in holder.pop()]
    loader.set_epoch(0)
    assert expected == [batch.keys for batch in loader]


def test_a_fork_while_the_threads_are_busy_never_hangs(loader: TokenLabelLoader) -> None:
    """The fork gets locks as they are at that moment, held or not."""
    holder = [iter(loader)]
    for _ in range(8):
        next(holder[0])
        assert in_child(holder.clear) == 0


def test_control_c_in_the_middle_of_an_epoch(loader: TokenLabelLoader, tmp_path: Path) -> None:
    def child() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            while True:
                for _ in loader:
                    (tmp_path / "begun").touch()
        except KeyboardInterrupt:
            gc.collect()
            sys.exit(130 if loader_threads() == [] else 1)

    def interrupt(pid: int) -> None:
        started = time.monotonic()
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < started + SECONDS
            time.sleep(0.01)
        os.kill(pid, signal.SIGINT)

    assert in_child(child, while_it_runs=interrupt) == 130


PROGRAM = """
    import pickle, signal, sys
    from pathlib import Path

    signal.signal(signal.SIGINT, signal.default_int_handler)
    loader = pickle.loads(Path(sys.argv[1]).read_bytes())
    batches = iter(loader)
    assert len(next(batches)) == 2
"""
ALIVE = """
    # The threads are waiting for labels, and so for a thread of zarr, when the program ends.
    import asyncio
    from loaders.label_windows import LabelJoin
    from zarr.core.sync import sync
    read = LabelJoin.read
    LabelJoin.read = lambda *given: sync(asyncio.sleep(0.5)) or read(*given)
    loader.set_epoch(1)
    holder = [batches, iter(loader)]
    next(holder[1])
"""
EXIT = """
    for _ in batches:
        sys.exit(3)
"""
FAIL = """
    for _ in batches:
        raise KeyError("in the loop")
"""
INTERRUPT = """
    import os, threading
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        for _ in loader:
            pass
"""


@pytest.mark.parametrize(
    ("rest", "code", "told"),
    [
        pytest.param(ALIVE, 0, "", id="iterator alive at the end"),
        pytest.param(EXIT, 3, "", id="sys.exit", marks=pytest.mark.slow),
        pytest.param(FAIL, 1, "KeyError: 'in the loop'\n", id="exception", marks=pytest.mark.slow),
        pytest.param(INTERRUPT, -signal.SIGINT, "KeyboardInterrupt\n", id="Control-C", marks=pytest.mark.slow),
    ],
)
def test_a_program_ends(rest: str, code: int, told: str, loader: TokenLabelLoader, tmp_path: Path) -> None:
    """With the exit code and the message of what ended it, and nothing else."""
    (tmp_path / "loader").write_bytes(pickle.dumps(loader))
    program = textwrap.dedent(PROGRAM) + textwrap.dedent(rest)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path / "loader")],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.endswith(told) if told else done.stderr == ""
    assert done.stderr.count("Traceback") == (1 if told else 0)
