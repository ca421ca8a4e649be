"""What is measured of every image's map: how sure it is, how many things it shows, whether it knows the image's class.

Legend: n images, H x W cells, k stored classes per cell, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tokenlabels.geometry import valid_cells
from tokenlabels.summary import image_level_class, num_distinct_classes
from tokenlabels.types import ScoreMaps

OBJECT_SHARE = 0.05
"""Share of the cells in which a class has to lead to count as something that the image shows."""


@dataclass(frozen=True, eq=False)
class ImageMeasures:
    """One row for every image, in the order of the label set. Means are over the cells that show the image.

    Attributes:
        predicted: int64 [n], class with the largest mean probability (`tokenlabels.summary.image_level_class`).
        label: int64 [n], the data set's own class, -1 where it has none.
        top1: float32 [n], mean probability of the leading class of a cell, 0..1.
        entropy: float32 [n], mean entropy of a cell as a share of log K, 0..1; the tail counts as spread evenly.
        tail: float32 [n], mean mass of the classes that are not stored, 0..1.
        own_mass: float32 [n], mean stored mass of the class `label`; NaN without one.
        num_distinct: int64 [n], different classes stored anywhere.
        num_objects: int64 [n], classes that lead in 5 % of the cells or more.
        is_broken: bool [n], NaN or infinite values, classes that do not exist, or a tail outside 0..1. All other
            columns are meaningless there.
        is_constant: bool [n], all cells that show the image hold the same scores and classes. Never where that is a
            single cell.
    """

    predicted: NDArray[np.int64]
    label: NDArray[np.int64]
    top1: NDArray[np.float32]
    entropy: NDArray[np.float32]
    tail: NDArray[np.float32]
    own_mass: NDArray[np.float32]
    num_distinct: NDArray[np.int64]
    num_objects: NDArray[np.int64]
    is_broken: NDArray[np.bool_]
    is_constant: NDArray[np.bool_]

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The rows of all, in this order.

        Raises:
            ValueError: there are none.
        """
        columns: dict[str, Any] = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)
        }
        return cls(**columns)

    @property
    def is_labelled(self) -> NDArray[np.bool_]:
        """Bool [n]: images whose data set gives a class, and whose map can be used."""
        return np.asarray((self.label >= 0) & ~self.is_broken)

    @property
    def agrees(self) -> NDArray[np.bool_]:
        """Bool [n]: of those, the ones whose `predicted` it is."""
        return np.asarray(self.is_labelled & (self.predicted == self.label))

    def __len__(self) -> int:
        return len(self.predicted)


def measure(maps: ScoreMaps, labels: NDArray[np.int64], num_classes: int) -> ImageMeasures:
    """Measure the images of a shard or a part of it.

    Args:
        maps: of n images.
        labels: int64 [n], the data set's own classes, -1 where there are none.
        num_classes: K.
    """
    is_broken = broken_maps(maps, num_classes)
    whole = _mended(maps, is_broken)
    inside_nHW = np.stack([valid_cells(view, maps.grid) for view in whole.views])
    num_inside = np.maximum(inside_nHW.sum(axis=(1, 2)), 1)

    def mean(values_nHW: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray((values_nHW * inside_nHW).sum(axis=(1, 2)) / num_inside, np.float32)

    probabilities, tail = whole.probabilities(), whole.tail.astype(np.float32)
    own_mass = mean((probabilities * (whole.classes == labels[:, None, None, None])).sum(axis=-1))
    return ImageMeasures(
        predicted=image_level_class(whole),
        label=labels,
        top1=mean(probabilities[..., 0]),
        entropy=mean(cell_entropy(probabilities, tail, num_classes)),
        tail=mean(tail),
        own_mass=np.where(labels >= 0, own_mass, np.float32(np.nan)),
        num_distinct=num_distinct_classes(whole),
        num_objects=_num_objects(whole.classes[..., 0], inside_nHW),
        is_broken=is_broken,
        is_constant=_is_constant(whole, inside_nHW),
    )


def cell_entropy(
    probabilities: NDArray[np.float32], tail: NDArray[np.float32], num_classes: int
) -> NDArray[np.float32]:
    """Entropy of every cell as a share of log K, float32 [..., H, W], 0..1; the tail is spread evenly over the others.

    Args:
        probabilities: float32 [..., H, W, k], of the stored classes.
        tail: float32 [..., H, W], mass of the others.
        num_classes: K.
    """
    num_others = max(num_classes - probabilities.shape[-1], 1)
    entropy = _surprise(probabilities).sum(axis=-1) + _surprise(tail) + tail * np.log(num_others)
    return np.asarray(entropy / np.log(max(num_classes, 2)), np.float32)


def _surprise(shares: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(-shares * np.log(np.where(shares > 0, shares, 1)), np.float32)


def broken_maps(maps: ScoreMaps, num_classes: int) -> NDArray[np.bool_]:
    """Bool [n]: `ImageMeasures.is_broken`."""
    wrong = ~np.isfinite(maps.scores).all(axis=(1, 2, 3)) | (maps.classes >= num_classes).any(axis=(1, 2, 3))
    wrong |= ~((maps.tail >= 0) & (maps.tail <= 1)).all(axis=(1, 2))  # NaN is neither
    wrong |= ~np.isfinite(maps.views).all(axis=1) | (maps.views[:, 2:] <= maps.views[:, :2]).any(axis=1)
    return np.asarray(wrong)


def _mended(maps: ScoreMaps, is_broken: NDArray[np.bool_]) -> ScoreMaps:
    """The maps with something harmless in the place of the broken ones, so that the arithmetic holds."""
    if not is_broken.any():
        return maps
    scores, tail, views = maps.scores.copy(), maps.tail.copy(), maps.views.copy()
    scores[is_broken], tail[is_broken], views[is_broken] = 0, 0, (0, 0, 1, 1)
    return ScoreMaps(maps.keys, scores, maps.classes, tail, views)


def _num_objects(leading_nHW: NDArray[Any], inside_nHW: NDArray[np.bool_]) -> NDArray[np.int64]:
    numbers = np.zeros(len(leading_nHW), np.int64)
    for row, (leading, inside) in enumerate(zip(leading_nHW, inside_nHW, strict=True)):
        _, counts = np.unique(leading[inside], return_counts=True)
        numbers[row] = (counts >= OBJECT_SHARE * inside.sum()).sum()
    return numbers


def _is_constant(maps: ScoreMaps, inside_nHW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    first_row, first_column = np.unravel_index(inside_nHW.reshape(len(maps), -1).argmax(axis=1), maps.grid)
    first = np.arange(len(maps)), first_row, first_column
    same = (maps.scores == maps.scores[first][:, None, None]) & (maps.classes == maps.classes[first][:, None, None])
    same_or_outside = same.all(axis=-1) | ~inside_nHW
    return np.asarray(same_or_outside.all(axis=(1, 2)) & (inside_nHW.sum(axis=(1, 2)) > 1))
