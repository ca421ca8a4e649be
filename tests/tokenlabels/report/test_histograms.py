"""Bars, their axes, and what is said of them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenlabels.audit.maps import maps_of
from tokenlabels.audit.measures import ImageMeasures, measure
from tokenlabels.report.histograms import histograms, steps


def measures_of(num: int = 50) -> ImageMeasures:
    return measure(maps_of(num), np.full(num, -1), 20)


def test_every_image_is_in_one_bar() -> None:
    measures = measures_of()
    columns = (measures.top1 * 100, measures.entropy * 100, measures.tail * 100, measures.num_distinct)
    for data, values in zip(histograms(measures), columns, strict=True):
        for bar in data.bars:
            last = bar is data.bars[-1]
            inside = [bar.low <= value < bar.high or (last and value == bar.high) for value in values.tolist()]
            assert bar.count == sum(inside), data.title
        assert sum(bar.count for bar in data.bars) == len(measures)
        assert all(bar.high == after.low for bar, after in zip(data.bars, data.bars[1:], strict=False))
        assert data.lower <= data.median <= data.upper
        assert data.median == pytest.approx(float(np.median(values)), rel=1e-5)


def test_broken_maps_do_not_count() -> None:
    maps = maps_of(10)
    maps.scores[:4] = np.nan
    measures = measure(maps, np.full(10, -1), 20)
    assert [sum(bar.count for bar in data.bars) for data in histograms(measures)] == [6] * 4
    maps.scores[:] = np.nan
    assert histograms(measure(maps, np.full(10, -1), 20)) == ()


@pytest.mark.parametrize(
    ("largest", "high"), [(0.0, 1), (0.004, 1), (0.03, 5), (0.19, 20), (0.21, 50), (1.0, 100), (1.0000001, 100)]
)
def test_shares_have_an_axis_that_fits(largest: float, high: float) -> None:
    measures = replace(measures_of(), tail=np.linspace(0, largest, 50, dtype=np.float32))
    data = histograms(measures)[2]
    assert (data.low, data.high) == (0, high)
    assert sum(bar.count for bar in data.bars) == 50


@given(low=st.integers(1, 300), spread=st.integers(0, 500))
def test_bars_of_numbers_are_whole(low: int, spread: int) -> None:
    measures = measures_of(2)
    data = histograms(replace(measures, num_distinct=np.array([low, low + spread])))[3]
    assert {bar.high - bar.low for bar in data.bars} == {data.bars[0].high - data.bars[0].low}
    assert 1 <= len(data.bars) <= 20
    assert sum(bar.count for bar in data.bars) == 2
    assert all(tick == int(tick) and data.low <= tick + data.shift <= data.high for tick in data.ticks)
    assert data.shift == (0.5 if len(data.bars) == spread + 1 else 0)


def test_values_in_words() -> None:
    of_shares, _, _, of_numbers = histograms(measures_of())
    assert [of_shares.shown(value) for value in (16.0, 47.32)] == ["16.0\N{NO-BREAK SPACE}%", "47.3\N{NO-BREAK SPACE}%"]
    assert [of_numbers.shown(value) for value in (33.0, 33.5, 1234.0)] == ["33", "33.5", "1,234"]


@given(low=st.floats(0, 1e6), width=st.floats(1e-3, 1e6), smallest=st.sampled_from([0, 1]))
def test_steps_are_round_and_even(low: float, width: float, smallest: int) -> None:
    ticks = steps(low, low + width, smallest=smallest)
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 6
    assert np.allclose(np.diff(ticks), step)
    assert step >= smallest * (1 - 1e-9)
    assert float(f"{step:.6e}"[:1]) in (1, 2, 5) or f"{step:.0e}"[:1] in ("1", "2", "5")
    assert ticks[0] >= low - 1e-6 * step


@pytest.mark.parametrize(("count", "last"), [(1, 1), (3, 3), (7, 8), (100, 100), (101, 150)])
def test_the_axis_of_counts_holds_the_highest_bar(count: int, last: int) -> None:
    measures = measures_of(count)
    data = histograms(replace(measures, num_distinct=np.full(count, 7)))[3]
    assert data.count_ticks[0] == 0
    assert data.count_ticks[-1] == last
