"""What is still to do, what failed and when to try it again. Knows neither Ray nor teachers."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from annotate.shard import ShardReport
from tokenlabels.images import ImageShard

MAX_ATTEMPTS = 3
FIRST_BACKOFF_SECONDS = 5.0


@dataclass(frozen=True)
class ShardFailure:
    """A shard that was not labelled.

    Attributes:
        stem: name of the shard.
        reason: the error, for people.
        kind: "busy" (another process writes it), "transient" (worth another attempt: a worker died, a read failed),
            "final" (would fail again), or "fatal" (the next shards would fail too, such as a full disk).
    """

    stem: str
    reason: str
    kind: Literal["busy", "transient", "final", "fatal"]


@dataclass
class RunReport:
    """What became of all shards of a run."""

    reports: list[ShardReport] = field(default_factory=list)
    failures: list[ShardFailure] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        """Images labelled by this run."""
        return sum(report.rows for report in self.reports if report.status == "written")

    @property
    def num_skipped(self) -> int:
        """Images of finished shards without labels."""
        return sum(len(report.skipped) for report in self.reports)


class RunStoppedError(RuntimeError):
    """The run cannot go on. What is finished stays, and the same command goes on from there."""


@dataclass
class _Entry:
    shard: ImageShard
    attempts: int = 0
    ready_at_seconds: float = 0.0
    wait: bool = False


class Ledger:
    """Shards in order, each handed out to one worker at a time until it is done or failed for good.

    A shard that another process is writing goes to the end and is then waited for. A shard that failed for a passing
    reason is tried again after a pause, which doubles, until it failed `MAX_ATTEMPTS` times.
    """

    def __init__(self, shards: Iterable[ImageShard], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._waiting = [_Entry(shard) for shard in shards]
        self._handed_out: dict[str, _Entry] = {}
        self._clock = clock
        self.result = RunReport()

    def __bool__(self) -> bool:
        """Whether anything is left to hand out or to come back."""
        return bool(self._waiting or self._handed_out)

    def take(self) -> tuple[ImageShard, bool] | None:
        """The next shard, and whether to wait for another process that writes it; None if none is ready now."""
        now = self._clock()
        # Shards that others write come last: nothing may be held up by them while there is work.
        ready = [entry for entry in self._waiting if entry.ready_at_seconds <= now]
        entry = min(ready, key=lambda entry: entry.wait, default=None)
        if entry is None:
            return None
        self._waiting.remove(entry)
        self._handed_out[entry.shard.stem] = entry
        return entry.shard, entry.wait

    def seconds_until_ready(self) -> float:
        """Time until `take` gives something, 0 if at once; infinite when nothing waits."""
        return max(0.0, min((e.ready_at_seconds for e in self._waiting), default=float("inf")) - self._clock())

    def record(self, outcome: ShardReport | ShardFailure) -> bool:
        """Take note of how a handed-out shard ended.

        Returns:
            Whether the shard is settled; False if it will be handed out again.

        Raises:
            RunStoppedError: the failure is fatal.
        """
        entry = self._handed_out.pop(outcome.stem)
        if isinstance(outcome, ShardReport):
            self.result.reports.append(outcome)
            return True
        if outcome.kind == "fatal":
            raise RunStoppedError(outcome.reason)
        if outcome.kind == "busy":
            entry.wait = True
            self._waiting.append(entry)
            return False
        entry.attempts += 1
        if outcome.kind == "transient" and entry.attempts < MAX_ATTEMPTS:
            pause_seconds = FIRST_BACKOFF_SECONDS * 2 ** (entry.attempts - 1)
            entry.ready_at_seconds = self._clock() + pause_seconds
            self._waiting.append(entry)
            return False
        self.result.failures.append(outcome)
        return True
