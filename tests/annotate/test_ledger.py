from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotate import ledger as ledger_module
from annotate.ledger import (
    FIRST_BACKOFF_SECONDS,
    MAX_ATTEMPTS,
    Ledger,
    RunReport,
    RunStoppedError,
    ShardFailure,
)
from annotate.shard import ShardReport
from tokenlabels.images import TarShard
from tokenlabels.store import SkippedRecord

Kind = Literal["busy", "transient", "final", "fatal"]

LONGEST_PAUSE_SECONDS = FIRST_BACKOFF_SECONDS * 2 ** (MAX_ATTEMPTS - 1)


@dataclass
class Clock:
    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


def ledger_of(stems: str, clock: Clock) -> Ledger:
    return Ledger([TarShard(f"{stem}.tar") for stem in stems], clock=clock)


def done(stem: str, **changes: object) -> ShardReport:
    fields = {"status": "written", "rows": 4, "skipped": (), "size_bytes": 10, "seconds": 1.0, **changes}
    return ShardReport(stem=stem, **fields)  # type: ignore[arg-type]


def failed(stem: str, kind: Kind) -> ShardFailure:
    return ShardFailure(stem, f"{stem} is {kind}", kind)


def take(ledger: Ledger) -> tuple[str, bool] | None:
    task = ledger.take()
    return None if task is None else (task[0].stem, task[1])


def test_shards_are_handed_out_in_order_and_once(clock: Clock) -> None:
    ledger = ledger_of("abc", clock)
    assert [take(ledger) for _ in range(4)] == [("a", False), ("b", False), ("c", False), None]
    assert bool(ledger)
    for stem in "bca":
        assert ledger.record(done(stem))
    assert not ledger
    assert [report.stem for report in ledger.result.reports] == ["b", "c", "a"]
    assert ledger.result.failures == []


def test_a_ledger_without_shards_is_done(clock: Clock) -> None:
    ledger = ledger_of("", clock)
    assert not ledger
    assert take(ledger) is None
    assert ledger.result == RunReport()


def test_it_goes_on_while_something_is_waiting_or_handed_out(clock: Clock) -> None:
    ledger = ledger_of("a", clock)
    assert ledger
    take(ledger)
    assert ledger
    ledger.record(failed("a", "transient"))
    assert ledger


class TestFinal:
    def test_it_is_not_tried_again(self, clock: Clock) -> None:
        ledger = ledger_of("ab", clock)
        take(ledger)
        assert ledger.record(failed("a", "final"))
        assert take(ledger) == ("b", False)
        assert ledger.record(done("b"))
        assert not ledger
        assert ledger.result.failures == [failed("a", "final")]

    def test_it_ends_the_attempts(self, clock: Clock) -> None:
        ledger = ledger_of("a", clock)
        take(ledger)
        assert not ledger.record(failed("a", "transient"))
        clock.seconds += LONGEST_PAUSE_SECONDS
        take(ledger)
        assert ledger.record(failed("a", "final"))
        assert ledger.result.failures == [failed("a", "final")]


class TestTransient:
    def test_it_is_tried_again_after_a_pause_and_then_given_up(self, clock: Clock) -> None:
        ledger = ledger_of("a", clock)
        for attempt in range(MAX_ATTEMPTS):
            assert take(ledger) == ("a", False)
            is_last = attempt == MAX_ATTEMPTS - 1
            assert ledger.record(failed("a", "transient")) == is_last
            clock.seconds += LONGEST_PAUSE_SECONDS
        assert not ledger
        assert ledger.result.failures == [failed("a", "transient")]

    def test_the_pause_doubles(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger_module, "MAX_ATTEMPTS", 10)
        ledger = ledger_of("a", clock)
        pauses = []
        for _ in range(9):
            take(ledger)
            ledger.record(failed("a", "transient"))
            pauses.append(ledger.seconds_until_ready())
            clock.seconds += pauses[-1] - 0.25
            assert take(ledger) is None
            clock.seconds += 0.25
        doubled = [FIRST_BACKOFF_SECONDS * 2**number for number in range(9)]
        assert pauses == doubled

    def test_others_do_not_wait_for_the_pause(self, clock: Clock) -> None:
        ledger = ledger_of("abc", clock)
        take(ledger)
        ledger.record(failed("a", "transient"))
        assert [take(ledger), take(ledger), take(ledger)] == [("b", False), ("c", False), None]

    def test_attempts_are_counted_per_shard(self, clock: Clock) -> None:
        ledger = ledger_of("ab", clock)
        for _ in range(MAX_ATTEMPTS - 1):
            take(ledger)
            take(ledger)
            assert not ledger.record(failed("a", "transient"))
            assert not ledger.record(failed("b", "transient"))
            clock.seconds += LONGEST_PAUSE_SECONDS
        assert {take(ledger), take(ledger)} == {("a", False), ("b", False)}
        assert ledger.record(done("a"))
        assert ledger.record(failed("b", "transient"))


class TestBusy:
    def test_it_goes_last_and_is_then_waited_for(self, clock: Clock) -> None:
        ledger = ledger_of("abc", clock)
        take(ledger)
        assert not ledger.record(failed("a", "busy"))
        assert [take(ledger), take(ledger), take(ledger)] == [("b", False), ("c", False), ("a", True)]
        assert ledger.record(done("a", status="finished before"))

    def test_it_costs_no_attempt(self, clock: Clock) -> None:
        ledger = ledger_of("a", clock)
        take(ledger)
        ledger.record(failed("a", "busy"))
        for _ in range(MAX_ATTEMPTS - 1):
            assert take(ledger) == ("a", True)
            assert not ledger.record(failed("a", "transient"))
            clock.seconds += LONGEST_PAUSE_SECONDS
        assert take(ledger) == ("a", True)
        assert ledger.record(done("a"))

    def test_it_goes_behind_a_shard_that_is_tried_again(self, clock: Clock) -> None:
        ledger = ledger_of("ab", clock)
        take(ledger)
        take(ledger)
        ledger.record(failed("a", "busy"))
        ledger.record(failed("b", "transient"))
        clock.seconds += LONGEST_PAUSE_SECONDS
        assert [take(ledger), take(ledger)] == [("b", False), ("a", True)]


def test_a_fatal_failure_stops_the_run(clock: Clock) -> None:
    ledger = ledger_of("ab", clock)
    take(ledger)
    ledger.record(done("a"))
    take(ledger)
    with pytest.raises(RunStoppedError, match="b is fatal"):
        ledger.record(failed("b", "fatal"))
    assert [report.stem for report in ledger.result.reports] == ["a"]


def test_an_outcome_of_a_shard_that_was_not_handed_out_is_a_bug(clock: Clock) -> None:
    ledger = ledger_of("a", clock)
    with pytest.raises(KeyError):
        ledger.record(done("a"))


def test_seconds_until_ready(clock: Clock) -> None:
    ledger = ledger_of("ab", clock)
    assert ledger.seconds_until_ready() == 0
    take(ledger)
    take(ledger)
    assert ledger.seconds_until_ready() == float("inf")
    ledger.record(failed("a", "transient"))
    clock.seconds += 0.5
    ledger.record(failed("b", "transient"))
    assert ledger.seconds_until_ready() == FIRST_BACKOFF_SECONDS - 0.5
    clock.seconds += 100
    assert ledger.seconds_until_ready() == 0


def test_the_report_counts_images_of_this_run_and_all_that_were_skipped() -> None:
    skipped = (SkippedRecord(key="k", reason="broken"),) * 2
    report = RunReport([done("a", rows=5, skipped=skipped), done("b", status="finished before", skipped=skipped[:1])])
    assert (report.num_images, report.num_skipped) == (5, 3)


# What happens to a shard, attempt by attempt; when nothing is left, it is labelled. A shard is busy at most once: the
# next time it is waited for.
FATES = st.lists(st.sampled_from(["busy", "transient", "transient", "final"]), max_size=MAX_ATTEMPTS + 2)


@given(
    fates=st.lists(FATES, max_size=6),
    num_workers=st.integers(1, 3),
    returns=st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_every_run_ends_with_every_shard_settled_once(
    fates: list[list[Kind]], num_workers: int, returns: Random
) -> None:
    clock = Clock()
    fate_by_stem = {f"s{number}": list(fate) for number, fate in enumerate(fates)}
    ledger = Ledger([TarShard(f"{stem}.tar") for stem in fate_by_stem], clock=clock)
    at_work: list[tuple[str, bool]] = []
    settled: Counter[str] = Counter()
    num_handed_out = 0
    while ledger:
        while len(at_work) < num_workers and (task := take(ledger)):
            at_work.append(task)
            num_handed_out += 1
            assert num_handed_out <= len(fates) * (MAX_ATTEMPTS + 1), "a run without end"
        assert len({stem for stem, _ in at_work}) == len(at_work), "two workers have the same shard"
        if not at_work:
            assert 0 < ledger.seconds_until_ready() <= LONGEST_PAUSE_SECONDS
            clock.seconds += ledger.seconds_until_ready()
            continue
        stem, wait = at_work.pop(returns.randrange(len(at_work)))
        fate = fate_by_stem[stem]
        while wait and fate and fate[0] == "busy":
            fate.pop(0)
        outcome = failed(stem, fate.pop(0)) if fate else done(stem)
        settled[stem] += ledger.record(outcome)
    assert settled == dict.fromkeys(fate_by_stem, 1)
    ended = [r.stem for r in ledger.result.reports] + [f.stem for f in ledger.result.failures]
    assert sorted(ended) == sorted(fate_by_stem)
