"""Figures that hold on a busy machine: two ways to do one thing in turn, and the memory that something takes."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Comparison:
    """Two ways to do the same work.

    Attributes:
        name: what is compared.
        ours, reference: images per second, median over the rounds.
        ratio: ours over reference, median of the ratios of each round.
        ratios: of each round.
    """

    name: str
    ours: float
    reference: float
    ratio: float
    ratios: tuple[float, ...]

    def __str__(self) -> str:
        low, high = min(self.ratios), max(self.ratios)
        return (
            f"{self.name}: {self.ratio:.3f} ({self.ours:.1f} / {self.reference:.1f} images/s, "
            f"rounds {low:.3f}..{high:.3f})"
        )


def interleave(
    name: str, num_items: int, rounds: int, ours: Callable[[], object], reference: Callable[[], object]
) -> Comparison:
    """Time both sides in turn, once to warm up and then `rounds` times, changing who goes first."""
    ours()
    reference()
    rates: list[tuple[float, float]] = []
    for number in range(rounds):
        seconds = dict.fromkeys((ours, reference), 0.0)
        for side in (ours, reference) if number % 2 else (reference, ours):
            start = time.perf_counter()
            side()
            seconds[side] = time.perf_counter() - start
        rates.append((num_items / seconds[ours], num_items / seconds[reference]))
    ratios = tuple(mine / theirs for mine, theirs in rates)
    medians = [statistics.median(side) for side in zip(*rates, strict=True)]
    return Comparison(name, medians[0], medians[1], statistics.median(ratios), ratios)


@dataclass
class PeakMemory:
    """Resident memory at the highest point of a block, above what the process had when it began, in bytes."""

    num_bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure a block. Take a fresh process: what an earlier block has freed but not returned would hide a part.

    Linux alone: the kernel keeps the high-water mark, and this resets it.
    """
    peak = PeakMemory()
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the high-water mark
    yield peak
    peak.num_bytes = _resident_bytes("VmHWM") - before


def run_fresh(code: str) -> str:
    """What Python code prints in a process of its own, which returns freed memory to the system at once.

    So a step before `peak_memory` hides no part of the peak.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
