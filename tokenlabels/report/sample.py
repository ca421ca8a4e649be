"""Which images the gallery shows, and why.

A fifth of the gallery for each of four reasons, and a random rest. An image may be there for several of these reasons;
then, and where fewer images have a reason, the rest is the larger.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenlabels.audit.measures import ImageMeasures

CONFIDENT: Final = "confident"
UNCERTAIN: Final = "uncertain"
DISAGREES: Final = "disagrees"
OBJECTS: Final = "objects"
RANDOM: Final = "random"

REASONS: Final = {
    CONFIDENT: "the most confident: highest mean probability of the leading class of a cell",
    UNCERTAIN: "the most uncertain: highest mean entropy of a cell",
    DISAGREES: "the teacher disagrees with the data set the most: own class furthest behind",
    OBJECTS: "the most objects: classes that lead in 5 % of the cells or more, two at least",
    RANDOM: "drawn at random from the rest",
}
"""Every reason, in the order in which they are given, and what it means."""

MULTI_OBJECT: Final = 2
"""Leading classes from which an image shows several objects."""


@dataclass(frozen=True)
class Choice:
    """An image of the gallery: its row in the label set, and the reasons, in the order of `REASONS`."""

    row: int
    reasons: tuple[str, ...]


def choose(measures: ImageMeasures, at_hand: NDArray[np.bool_], number: int, seed: int) -> tuple[Choice, ...]:
    """Choose images, in the order of the set. One that is taken out of `at_hand` makes room for the next one of the
    same reason.

    Args:
        measures: of all n images.
        at_hand: bool [n], those that can be shown; broken maps are left out too.
        number: of images to choose, 1 or more; fewer come back where fewer are at hand.
        seed: of the random rest.
    """
    usable = at_hand & ~measures.is_broken
    each = number // len(REASONS)
    reasons_of: dict[int, tuple[str, ...]] = {}
    for reason, ranking in rankings(measures).items():
        for row in ranking[usable[ranking]][:each].tolist():
            reasons_of[row] = (*reasons_of.get(row, ()), reason)
    order = np.random.default_rng(seed).permutation(len(measures))
    is_rest = usable.copy()
    is_rest[list(reasons_of)] = False
    rest = order[is_rest[order]][: number - len(reasons_of)]
    reasons_of |= dict.fromkeys(rest.tolist(), (RANDOM,))
    return tuple(Choice(row, reasons_of[row]) for row in sorted(reasons_of))


def rankings(measures: ImageMeasures) -> dict[str, NDArray[np.intp]]:
    """Rows of the images that have a reason, those first that have it the most; equal ones in the order of the set."""
    ranks: dict[str, tuple[NDArray[Any], NDArray[np.bool_]]] = {
        CONFIDENT: (measures.top1, np.ones(len(measures), np.bool_)),
        UNCERTAIN: (measures.entropy, np.ones(len(measures), np.bool_)),
        DISAGREES: (disagreement(measures), measures.is_labelled & ~measures.agrees),
        OBJECTS: (measures.num_objects + measures.top1 / 2, measures.num_objects >= MULTI_OBJECT),
    }
    return {
        reason: np.argsort(np.where(has_it, -values, np.inf), kind="stable")[: np.count_nonzero(has_it)]
        for reason, (values, has_it) in ranks.items()
    }


def disagreement(measures: ImageMeasures) -> NDArray[np.float32]:
    """How far the data set's own class is behind the leading ones, float32 [n], -1..1.

    0 where teacher and data set agree, NaN where the data set gives no class.
    """
    behind = np.where(measures.agrees, np.float32(0), measures.top1 - measures.own_mass)
    return np.asarray(np.where(measures.is_labelled, behind, np.float32(np.nan)), np.float32)
