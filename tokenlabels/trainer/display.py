"""What a run shows while it works: a progress bar in a terminal, and a line per epoch anywhere."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Throughput:
    """Images per second since the line before."""

    def __init__(self) -> None:
        self._num_images, self._since = 0, time.perf_counter()

    def count(self, num_images: int) -> None:
        """So many more went through."""
        self._num_images += num_images

    def lap(self) -> float:
        """Images per second since this was asked last."""
        now = time.perf_counter()
        rate = self._num_images / (now - self._since)
        self._num_images, self._since = 0, now
        return rate


class Display:
    """The bar and the lines of one run, on stderr.

    Args:
        is_shown: false on all ranks but one.
    """

    def __init__(self, is_shown: bool) -> None:
        self._console = Console(stderr=True, quiet=not is_shown, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            transient=True,
            disable=not (is_shown and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("", figures="")

    def begin(self, description: str, total: int, done: int) -> None:
        """An epoch, or the evaluation after it, begins."""
        self._bar.reset(self._task, total=total, completed=done, description=description, figures="")

    def advance(self, num_batches: int) -> None:
        """So many more batches are done."""
        self._bar.advance(self._task, num_batches)

    def show(self, figures: str) -> None:
        """Beside the bar."""
        self._bar.update(self._task, figures=figures)

    def line(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
