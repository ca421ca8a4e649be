"""How a run shows itself: a bar for people, JSON lines for machines."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from annotate.ledger import ShardFailure
from annotate.shard import ShardReport
from tokenlabels.images import ImageShard
from tokenlabels.store import LabelSet


class ProgressBar:
    """Shards, images/s, skipped images and time left, with a line for everything that goes wrong."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards  {task.fields[rate]:.1f} images/s  {task.fields[skipped]} skipped"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("loading the teacher", total=None, rate=0.0, skipped=0)
        self._num_images = self._num_skipped = self._num_counted = 0
        self._start_seconds = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, info: LabelSet, shards: Sequence[ImageShard]) -> None:
        """The teacher is loaded: from here on there is something to measure."""
        self._start_seconds = time.monotonic()
        height, width = info.grid
        self._bar.update(self._task, description=f"{height}x{width} cells, top {info.k}", total=len(shards))

    def images(self, num_images: int) -> None:
        """Images of a shard that this process is working on."""
        self._num_counted += num_images
        self._show(self._num_images + self._num_counted)

    def outcome(self, outcome: ShardReport | ShardFailure, *, settled: bool) -> None:
        """A shard ended."""
        self._num_counted = 0
        stem = escape(outcome.stem)
        if isinstance(outcome, ShardReport):
            self._num_images += outcome.rows if outcome.status == "written" else 0
            self._num_skipped += len(outcome.skipped)
            if outcome.redone:
                self._bar.print(f"[yellow]{stem} was made again:[/] {escape(outcome.redone)}")
        elif settled:
            self._bar.print(f"[red]{stem} failed:[/] {escape(outcome.reason)}")
        elif outcome.kind != "busy":
            self._bar.print(f"[yellow]{stem} will be tried again:[/] {escape(outcome.reason)}")
        self._bar.advance(self._task, 1 if settled else 0)
        self._show(self._num_images)

    def _show(self, num_images: int) -> None:
        seconds = max(time.monotonic() - self._start_seconds, 1e-9)
        self._bar.update(self._task, rate=num_images / seconds, skipped=self._num_skipped)


class JsonLines:
    """One JSON object per line and event: start, written, finished before, failed, will be tried again."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, info: LabelSet, shards: Sequence[ImageShard]) -> None:
        """The teacher is loaded."""
        self._write("start", num_shards=len(shards), grid=info.grid, k=info.k, teacher_digest=info.teacher.digest)

    def images(self, num_images: int) -> None:
        """Machines are told of whole shards only."""

    def outcome(self, outcome: ShardReport | ShardFailure, *, settled: bool) -> None:
        """A shard ended."""
        if isinstance(outcome, ShardReport):
            fields = asdict(outcome) | {"skipped": [record.model_dump() for record in outcome.skipped]}
            self._write(fields.pop("status"), **fields)
        else:
            self._write("failed" if settled else "will be tried again", **asdict(outcome))

    def _write(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self._stream, flush=True)
