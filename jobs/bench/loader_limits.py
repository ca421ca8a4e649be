"""The loader's memory and its start, each in a process of its own: `tokenlabels bench loader`."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from jobs.bench.loader import write_labels, write_tar
from loaders import TokenLabelLoader

NUM_EPOCHS = 3
NUM_SHARDS, SAMPLES_PER_SHARD = 1024, 1251


@dataclass(frozen=True)
class Memory:
    """Resident memory over several epochs.

    Attributes:
        largest_bytes: of the whole process, with all libraries.
        growth: largest of the last epoch over the largest of the first.
    """

    largest_bytes: int
    growth: float

    def __str__(self) -> str:
        return (
            f"resident memory over {NUM_EPOCHS} epochs: {self.largest_bytes / 1e6:.0f} MB at most, "
            f"last epoch / first: {self.growth:.3f}"
        )


@dataclass(frozen=True)
class Start:
    """Seconds from nothing to the first batch, the imports of the libraries apart.

    Attributes:
        fresh: of an epoch.
        resumed: in the middle of one.
    """

    fresh: float
    resumed: float

    def __str__(self) -> str:
        shards = f"{NUM_SHARDS:,} indexed shards of {SAMPLES_PER_SHARD:,} samples with labels"
        return f"first batch on {shards}: {self.fresh:.2f} s, resumed in the middle of an epoch: {self.resumed:.2f} s"


def measure_memory(tars: list[str], labels: Path, *, threads: int, batch_size: int) -> Memory:
    """Three epochs in a fresh process."""
    largest = _in_a_process("_print_memory", tars, str(labels), threads, batch_size)
    return Memory(int(max(largest)), largest[-1] / largest[0])


def measure_start(image: bytes, folder: Path, *, threads: int, batch_size: int) -> Start:
    """The first batch of a data set of ImageNet's size whose tars are indexed.

    One tar stands for all, by links, and its index is copied; labels have one cell, so that only their number counts.
    """
    names = [f"start-{number:04d}.tar" for number in range(NUM_SHARDS)]
    tars = [str(folder / name) for name in names]
    keys = [f"{row:04d}" for row in range(SAMPLES_PER_SHARD)]
    write_tar(Path(tars[0]), dict.fromkeys(keys, image))
    TokenLabelLoader(tars[0], batch_size=1)
    for tar in tars[1:]:
        os.link(tars[0], tar)
        shutil.copy2(f"{tars[0]}.index", f"{tar}.index")
    for name in names:
        write_labels(folder / "labels", names, name, keys, grid=(1, 1))
    seconds = _in_a_process("_print_start", tars, str(folder / "labels"), threads, batch_size)
    return Start(*seconds)


def _in_a_process(function: str, *arguments: object) -> list[float]:
    code = f"import json, sys; from jobs.bench.loader_limits import {function}; {function}(*json.load(sys.stdin))"
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(arguments), stdout=subprocess.PIPE, text=True, check=True
    )
    return [float(value) for value in json.loads(run.stdout)]


def _print_memory(tars: list[str], labels: str, threads: int, batch_size: int) -> None:
    loader = TokenLabelLoader(tars, labels, batch_size=batch_size, threads=threads)
    largest = []
    for _ in range(NUM_EPOCHS):
        largest.append(max(_resident_bytes() for _ in loader))
    print(json.dumps(largest))  # noqa: T201


def _print_start(tars: list[str], labels: str, threads: int, batch_size: int) -> None:
    started = time.perf_counter()
    loader = TokenLabelLoader(tars, labels, batch_size=batch_size, threads=threads, grid=1)
    next(iter(loader))
    seconds = [time.perf_counter() - started]
    state = loader.state_dict() | {"batch": len(loader) // 2}
    started = time.perf_counter()
    loader = TokenLabelLoader(tars, labels, batch_size=batch_size, threads=threads, grid=1)
    loader.load_state_dict(state)
    next(iter(loader))
    print(json.dumps([*seconds, time.perf_counter() - started]))  # noqa: T201


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
