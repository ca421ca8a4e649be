"""What is measured of all images, as bars."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenlabels.audit.measures import ImageMeasures

_NUM_BARS = 20
_NUM_TICKS = 4


@dataclass(frozen=True)
class Bar:
    """Images with a value from `low` up to `high`; `high` itself belongs to the next bar, but for the last one."""

    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Histogram:
    """How many images have which value.

    Attributes:
        title, meaning: in words.
        unit: of the values with the space before it, "" for plain numbers.
        bars: side by side, of one width; at least one.
        median, lower, upper: of the values; a quarter of the images is below `lower`, a quarter above `upper`.
    """

    title: str
    meaning: str
    unit: str
    bars: tuple[Bar, ...]
    median: float
    lower: float
    upper: float

    @property
    def low(self) -> float:
        """Where the first bar begins."""
        return self.bars[0].low

    @property
    def high(self) -> float:
        """Where the last bar ends."""
        return self.bars[-1].high

    @property
    def shift(self) -> float:
        """How far right of its place a value is marked: the middle of the bar, where every whole number has its own."""
        return 0 if self.unit or self.bars[0].high - self.low > 1 else 0.5

    @property
    def ticks(self) -> tuple[float, ...]:
        """Where the axis of values is marked."""
        ticks = steps(self.low, self.high, smallest=0 if self.unit else 1)
        return tuple(tick for tick in ticks if tick + self.shift <= self.high)

    def shown(self, value: float) -> str:
        """A value in words: 12.3 %; plain numbers have no digit behind the point where they are whole."""
        return f"{value:,.1f}{self.unit}" if self.unit else f"{value:,.1f}".removesuffix(".0")

    @property
    def count_ticks(self) -> tuple[float, ...]:
        """Where the axis of counts is marked; the last one is at the highest bar or above."""
        highest = max(bar.count for bar in self.bars)
        ticks = steps(0, highest, smallest=1)
        step = ticks[1] - ticks[0]
        return ticks if ticks[-1] >= highest else (*ticks, ticks[-1] + step)


def histograms(measures: ImageMeasures) -> tuple[Histogram, ...]:
    """Of all images whose maps are not broken; none where all are."""
    usable = ~measures.is_broken
    if not usable.any():
        return ()
    return (
        _of_shares("Confidence", "Mean probability of the leading class of a cell.", measures.top1[usable]),
        _of_shares(
            "Entropy",
            "Mean entropy of a cell, as a share of its maximum; 0 % is certain.",
            measures.entropy[usable],
        ),
        _of_shares("Tail", "Mean probability of the classes that are not stored.", measures.tail[usable]),
        _of_numbers("Distinct classes", "Different classes stored anywhere in the map.", measures.num_distinct[usable]),
    )


def steps(low: float, high: float, *, smallest: float) -> tuple[float, ...]:
    """Round numbers from `low` to `high`, which is larger: 1, 2 or 5 times a power of ten apart, and `smallest` at
    least. There are two or more, the last of which may be beyond `high`."""
    rough = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    step = max(step, smallest)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(number * step for number in range(first, max(last, first + 1) + 1))


def _of_shares(title: str, meaning: str, shares: NDArray[np.float32]) -> Histogram:
    """From 0 to a round number of per cent."""
    values = shares.astype(np.float64) * 100
    high = next(bound for bound in (1, 2, 5, 10, 20, 50, 100) if bound >= min(values.max(), 100))
    return _histogram(
        title, meaning, "\N{NO-BREAK SPACE}%", np.minimum(values, 100), np.linspace(0, high, _NUM_BARS + 1)
    )


def _of_numbers(title: str, meaning: str, numbers: NDArray[np.int64]) -> Histogram:
    """Every bar holds equally many whole numbers."""
    low, high = int(numbers.min()), int(numbers.max()) + 1
    width = math.ceil((high - low) / _NUM_BARS)
    edges = low + width * np.arange(math.ceil((high - low) / width) + 1)
    return _histogram(title, meaning, "", numbers, edges)


def _histogram(title: str, meaning: str, unit: str, values: NDArray[np.number], edges: NDArray[np.number]) -> Histogram:
    counts, _ = np.histogram(values, edges)
    lower, median, upper = np.percentile(values, [25, 50, 75]).tolist()
    bars = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    return Histogram(title, meaning, unit, tuple(Bar(*bar) for bar in bars), median, lower, upper)
