"""Figures are what they say. No test looks at how fast anything is."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tokenlabels import measure
from tokenlabels.measure import interleave, run_fresh


class Side:
    """Takes the seconds that it is given, one after the other, on a clock that stands still in between."""

    def __init__(self, name: str, seconds: list[float], clock: SimpleNamespace, order: list[str]) -> None:
        self.name, self.seconds, self.clock, self.order = name, seconds, clock, order

    def __call__(self) -> None:
        self.order.append(self.name)
        self.clock.now += self.seconds.pop(0)


class TestInterleave:
    @pytest.fixture
    def sides(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float], list[float]], Any]:
        """sides(seconds of ours, seconds of the reference) -> both, and the order in which they will be called."""
        clock = SimpleNamespace(now=50.0)
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now))

        def make(ours: list[float], reference: list[float]) -> tuple[Side, Side, list[str]]:
            order: list[str] = []
            return Side("ours", ours, clock, order), Side("reference", reference, clock, order), order

        return make

    def test_rounds_follow_a_warm_up_and_alternate(self, sides: Callable[..., Any]) -> None:
        ours, reference, order = sides([1.0] * 4, [1.0] * 4)
        interleave("name", 10, 3, ours, reference)
        assert order[:2] == ["ours", "reference"]
        assert order[2:] == ["reference", "ours", "ours", "reference", "reference", "ours"]

    def test_figures(self, sides: Callable[..., Any]) -> None:
        ours, reference, _ = sides([99.0, 2.0, 4.0, 5.0], [77.0, 1.0, 8.0, 2.5])
        comparison = interleave("ours / theirs", 20, 3, ours, reference)
        assert comparison.ratios == (0.5, 2.0, 0.5)
        assert (comparison.ours, comparison.reference, comparison.ratio) == (5.0, 8.0, 0.5)
        assert str(comparison) == "ours / theirs: 0.500 (5.0 / 8.0 images/s, rounds 0.500..2.000)"

    def test_an_error_of_a_side_is_not_swallowed(self, sides: Callable[..., Any]) -> None:
        ours, reference, _ = sides([1.0], [1.0] * 3)
        with pytest.raises(IndexError):
            interleave("name", 1, 1, ours, reference)


def peak_of(block: str) -> int:
    """What a block of a fresh process takes, in bytes; `kept` is there before it."""
    code = f"""
import numpy as np
from tokenlabels.measure import peak_memory

kept = np.ones(50_000_000, np.uint8)
with peak_memory() as peak:
    {block}
print(peak.num_bytes)
"""
    return int(run_fresh(code))


class TestPeakMemory:
    def test_what_is_freed_counts(self) -> None:
        assert 45e6 < peak_of("np.ones(50_000_000, np.uint8).sum()") < 200e6

    def test_what_was_there_before_does_not(self) -> None:
        assert peak_of("kept.any()") < 45e6
