import io
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from annotate import progress
from annotate.ledger import ShardFailure
from annotate.progress import JsonLines, ProgressBar
from annotate.shard import ShardReport
from tokenlabels.images import ImageShard, TarShard
from tokenlabels.store import LabelSet, SkippedRecord, TeacherRecord

INFO = LabelSet(
    grid=(7, 9),
    k=4,
    num_classes=20,
    class_names=None,
    teacher=TeacherRecord(models=(), flip=False, amp="none", digest="t0"),
    resize="squash",
    tars=(),
)
SHARDS: list[ImageShard] = [TarShard(f"{stem}.tar") for stem in "abc"]
SKIPPED = (SkippedRecord(key="k1", reason="broken [header]"), SkippedRecord(key="k2", reason="empty file"))


def report(stem: str, **changes: Any) -> ShardReport:
    fields = {"status": "written", "rows": 30, "skipped": (), "size_bytes": 4000, "seconds": 1.5, **changes}
    return ShardReport(stem=stem, **fields)


class TestJsonLines:
    def events(self, happen: Callable[[JsonLines], None]) -> list[dict[str, Any]]:
        stream = io.StringIO()
        with JsonLines(stream) as log:
            happen(log)
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    def test_start(self) -> None:
        assert self.events(lambda log: log.start(INFO, SHARDS)) == [
            {"event": "start", "num_shards": 3, "grid": [7, 9], "k": 4, "teacher_digest": "t0"}
        ]

    @pytest.mark.parametrize("status", ["written", "finished before"])
    def test_a_finished_shard(self, status: str) -> None:
        outcome = report("a", status=status, skipped=SKIPPED, redone="zarr.json: missing")
        assert self.events(lambda log: log.outcome(outcome, settled=True)) == [
            {
                "event": status,
                "stem": "a",
                "rows": 30,
                "skipped": [{"key": "k1", "reason": "broken [header]"}, {"key": "k2", "reason": "empty file"}],
                "size_bytes": 4000,
                "seconds": 1.5,
                "redone": "zarr.json: missing",
            }
        ]

    @pytest.mark.parametrize(("settled", "event"), [(True, "failed"), (False, "will be tried again")])
    def test_a_failure(self, settled: bool, event: str) -> None:
        outcome = ShardFailure("a", "line one\nline two", "transient")
        assert self.events(lambda log: log.outcome(outcome, settled=settled)) == [
            {"event": event, "stem": "a", "reason": "line one\nline two", "kind": "transient"}
        ]

    def test_a_run_is_one_line_per_event(self) -> None:
        def run(log: JsonLines) -> None:
            log.start(INFO, SHARDS)
            log.images(8)
            log.outcome(report("a"), settled=True)
            log.images(8)
            log.outcome(ShardFailure("b", "busy", "busy"), settled=False)
            log.outcome(report("c", redone=None), settled=True)

        assert [event["event"] for event in self.events(run)] == ["start", "written", "will be tried again", "written"]

    def test_every_line_is_there_at_once(self) -> None:
        class Stream(io.StringIO):
            flushed = ""

            def flush(self) -> None:
                self.flushed = self.getvalue()

        stream = Stream()
        JsonLines(stream).outcome(report("a"), settled=True)
        assert json.loads(stream.flushed)["stem"] == "a"


class TestProgressBar:
    def shown(self, happen: Callable[[ProgressBar], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The lines of a run that took 10 s from its start on; the last one is the bar."""
        seconds = iter([0.0, 100.0])
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds, 110.0)))
        stream = io.StringIO()
        with ProgressBar(Console(file=stream, width=200)) as bar:
            happen(bar)
        return stream.getvalue().splitlines()

    def test_before_the_teacher_is_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (line,) = self.shown(lambda _: None, monkeypatch)
        assert "loading the teacher" in line

    def test_it_counts_shards_images_and_skipped_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(bar: ProgressBar) -> None:
            bar.start(INFO, SHARDS)
            bar.images(16)
            bar.images(14)
            bar.outcome(report("a", rows=30, skipped=SKIPPED), settled=True)
            bar.outcome(report("b", rows=500, status="finished before", skipped=SKIPPED[:1]), settled=True)

        (line,) = self.shown(run, monkeypatch)
        for text in ("7x9 cells, top 4", "2/3 shards", "  3.0 images/s", "  3 skipped"):
            assert text in line

    def test_images_count_before_their_shard_is_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(bar: ProgressBar) -> None:
            bar.start(INFO, SHARDS)
            bar.images(30)
            bar.outcome(report("a", rows=30), settled=True)
            bar.images(16)
            bar.images(4)

        (line,) = self.shown(run, monkeypatch)
        assert "1/3 shards" in line
        assert "  5.0 images/s" in line

    def test_images_of_an_attempt_that_failed_do_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(bar: ProgressBar) -> None:
            bar.start(INFO, SHARDS)
            bar.images(16)
            bar.outcome(ShardFailure("a", "the disk vanished", "transient"), settled=False)

        *_, line = self.shown(run, monkeypatch)
        assert "0/3 shards" in line
        assert "  0.0 images/s" in line

    @pytest.mark.parametrize(
        ("outcome", "settled", "expected"),
        [
            pytest.param(
                ShardFailure("a", "a.tar: got [b] and [/b] at 'x[0]'", "final"),
                True,
                "a failed: a.tar: got [b] and [/b] at 'x[0]'",
                id="failed",
            ),
            pytest.param(
                ShardFailure("a", "read [Errno 5]", "transient"),
                False,
                "a will be tried again: read [Errno 5]",
                id="again",
            ),
            pytest.param(report("a", redone="c/[0]: missing"), True, "a was made again: c/[0]: missing", id="redone"),
            pytest.param(ShardFailure("a[/b]", "no", "final"), True, "a[/b] failed: no", id="failed-name"),
            pytest.param(
                ShardFailure("a[b]", "no", "transient"), False, "a[b] will be tried again: no", id="again-name"
            ),
            pytest.param(report("a[red]", redone="x"), True, "a[red] was made again: x", id="redone-name"),
        ],
    )
    def test_what_goes_wrong_gets_a_line(
        self, outcome: ShardReport | ShardFailure, settled: bool, expected: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        line, bar_line = self.shown(lambda bar: bar.outcome(outcome, settled=settled), monkeypatch)
        assert line == expected
        assert "shards" in bar_line

    @pytest.mark.parametrize(
        ("outcome", "settled"),
        [(report("a"), True), (ShardFailure("a", "another process writes it", "busy"), False)],
        ids=["written", "busy"],
    )
    def test_what_goes_well_does_not(
        self, outcome: ShardReport | ShardFailure, settled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (line,) = self.shown(lambda bar: bar.outcome(outcome, settled=settled), monkeypatch)
        assert "shards" in line
