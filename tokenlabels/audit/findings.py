"""Which images and classes are worth a look, by rules that say why."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenlabels.audit.classes import ClassAudit
from tokenlabels.audit.measures import ImageMeasures

NEAR_UNIFORM = 0.9
"""Mean entropy of a cell, as a share of log K, from which a map says next to nothing.

At 0.9 a cell is as undecided as an even choice among K^0.9 classes: half of 1,000, two thirds of 50. The mass that is
not stored counts as spread evenly, so the true entropy is at most this one.
"""
LOW_AGREEMENT = 0.5
"""A class whose agreement is below this share of the agreement over all images is worth a look."""
FEW_IMAGES = 10
"""With fewer images the agreement of a class is too uncertain to be called low."""

BROKEN: Final = "broken"
CONSTANT: Final = "constant"
DUPLICATE_KEY: Final = "duplicate key"
NEAR_UNIFORM_MAP: Final = "near uniform"
IDENTICAL_IMAGES: Final = "identical images"
IDENTICAL_MAPS: Final = "identical maps"
NEVER_PREDICTED: Final = "never predicted"
LOW_CLASS: Final = "low agreement"
DISAGREES: Final = "disagrees"

KINDS: Final = {
    BROKEN: "NaN, infinite or impossible values",
    CONSTANT: "every cell says the same",
    DUPLICATE_KEY: "a key that an earlier row has",
    NEAR_UNIFORM_MAP: f"mean entropy of a cell of {NEAR_UNIFORM:.0%} of its maximum or more",
    IDENTICAL_IMAGES: "an image of the same bytes (64-bit hash) as an earlier one of the same most probable class",
    IDENTICAL_MAPS: "a map that an earlier row has, bit for bit, though its image is not known to be the same",
    NEVER_PREDICTED: "a class of the data set that no map has as its most probable one",
    LOW_CLASS: f"a class that agrees less than {LOW_AGREEMENT:.0%} as often as all images do",
    DISAGREES: "the most probable class is not the data set's own; those first whose own class is furthest behind",
}
"""Every kind of finding, in the order in which they are given, and what it means."""

NEED_CLASSES: Final = (NEVER_PREDICTED, LOW_CLASS, DISAGREES)
"""Kinds that can be looked for only where the data set's own classes are known."""

UNUSABLE: Final = (BROKEN, CONSTANT, DUPLICATE_KEY)
"""Kinds that make labels unfit to train with."""


@dataclass(frozen=True)
class Finding:
    """One thing that is worth a look.

    Attributes:
        kind: one of `KINDS`.
        key, shard: the image and the stem of its shard; both "" for a finding about a class.
        detail: what was found, with class names.
    """

    kind: str
    key: str
    shard: str
    detail: str


@dataclass(frozen=True)
class ImageFindings:
    """Findings of one kind: their rows in the label set, worst first, and the detail of a row."""

    kind: str
    rows: NDArray[np.int64]
    detail: Callable[[int], str]


def about_maps(measures: ImageMeasures, names: Sequence[str]) -> Iterator[ImageFindings]:
    """What single maps tell.

    Args:
        measures: of n images.
        names: of the classes, by id.
    """
    usable = ~measures.is_broken
    yield ImageFindings(
        BROKEN, np.flatnonzero(measures.is_broken), lambda _: f"{KINDS[BROKEN]}; `tokenlabels verify` says which"
    )
    yield ImageFindings(
        CONSTANT,
        np.flatnonzero(measures.is_constant & usable),
        lambda row: f"every cell says {names[measures.predicted[row]]} with {measures.top1[row]:.3f}",
    )
    uniform = np.flatnonzero((measures.entropy >= NEAR_UNIFORM) & usable)
    yield ImageFindings(
        NEAR_UNIFORM_MAP,
        uniform[np.argsort(-measures.entropy[uniform], kind="stable")],
        lambda row: f"mean entropy {measures.entropy[row]:.3f} of its maximum",
    )
    others = np.flatnonzero(measures.is_labelled & ~measures.agrees)
    behind = measures.top1[others] - measures.own_mass[others]
    yield ImageFindings(
        DISAGREES,
        others[np.argsort(-behind, kind="stable")],
        lambda row: (
            f"labelled {names[measures.label[row]]} with {measures.own_mass[row]:.3f}, "
            f"predicted {names[measures.predicted[row]]}, leading classes with {measures.top1[row]:.3f}"
        ),
    )


def about_copies(kind: str, first_of: Mapping[int, int], describe: Callable[[int], str]) -> ImageFindings:
    """Rows that repeat an earlier one: {copy: first}, and the words for a row."""
    return ImageFindings(kind, np.array([*first_of], np.int64), lambda row: f"the same as {describe(first_of[row])}")


def about_classes(classes: Sequence[ClassAudit]) -> Iterator[Finding]:
    """Classes of the data set that the teacher does not know; none where the data set's classes are not known.

    Only classes with images count: that the teacher names no other ones is as it should be.
    """
    num_images = sum(known.num_images for known in classes)
    agreement = sum(known.num_agreeing for known in classes) / max(num_images, 1)
    present = [known for known in classes if known.num_images]
    for known in present:
        if known.num_predicted == 0:
            yield Finding(NEVER_PREDICTED, "", "", f"{known.name}: 0 of {known.num_images:,}")
    low = [
        known
        for known in present
        if known.num_predicted
        and known.num_images >= FEW_IMAGES
        and known.agreement is not None
        and known.agreement < LOW_AGREEMENT * agreement
    ]
    for known in sorted(low, key=lambda known: known.agreement or 0.0):
        yield Finding(
            LOW_CLASS,
            "",
            "",
            f"{known.name}: {known.num_agreeing:,} of {known.num_images:,}, {agreement:.1%} of all images",
        )
