"""Two label sets of the same images: where they say the same, cell by cell, and where they differ most.

Cells are compared at points of the image: at the centres of the cells of the finer of the two grids, the first set's
if both have as many. In each map a point has the leading class of the cell that it lies in. Points outside of the
image, as in letterbox padding, or outside of what one of the maps covers do not count. Nor do broken maps.

Legend: n images, H x W points, k stored classes per cell, K classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenlabels.audit.measures import broken_maps
from tokenlabels.geometry import cell_centres, valid_cells
from tokenlabels.store import LabelStore, ShardReader
from tokenlabels.store.layout import ROWS_PER_CHUNK
from tokenlabels.types import ScoreMaps


@dataclass(frozen=True)
class ClassComparison:
    """Points where one of the sets has a class in the lead, summed over all compared images.

    Attributes:
        class_id, name: of the class.
        num_first, num_second: points where it leads in the first set, and in the second.
        num_both: points where it leads in both.
    """

    class_id: int
    name: str
    num_first: int
    num_second: int
    num_both: int

    @property
    def agreement(self) -> float | None:
        """Share of the points where either has it that both have, 0..1; None where neither has it."""
        num_either = self.num_first + self.num_second - self.num_both
        return self.num_both / num_either if num_either else None


@dataclass(frozen=True, eq=False)
class Comparison:
    """How much two label sets agree.

    Attributes:
        num_only_first, num_only_second: images of one set alone.
        num_broken: images of both sets of which a map has impossible values.
        num_apart: images of both sets without a point that both maps cover.
        grid: rows and columns of points.
        keys: of the n images that are compared, in the order of the first set.
        agreement: float32 [n], share of an image's points at which the leading classes are equal, 0..1.
        variation: float32 [n], total variation between the mean distributions of both maps over their cells, 0..1; the
            tails are one more class.
        classes: all classes, by id.
    """

    num_only_first: int
    num_only_second: int
    num_broken: int
    num_apart: int
    grid: tuple[int, int]
    keys: tuple[str, ...]
    agreement: NDArray[np.float32]
    variation: NDArray[np.float32]
    classes: tuple[ClassComparison, ...]

    def most_different(self, num: int) -> list[int]:
        """Rows of the images with the smallest agreement; of equal ones those with the largest variation first."""
        order = np.lexsort((-self.variation, self.agreement))
        return [int(row) for row in order[:num]]


def compare_stores(
    first: LabelStore, second: LabelStore, names: Sequence[str], on_shard: Callable[[str], None] = lambda _: None
) -> Comparison:
    """Compare the maps of all images that both sets have.

    Reads the first set once. A shard of the second is read once for every shard of the first that has images of it,
    which is once if both were made of the same tars. Holds one shard of each in memory.

    Args:
        first, second: of the same classes.
        names: of the classes, by id.
        on_shard: called with the stem before a shard of `first` is compared.

    Raises:
        ValueError: the sets have other classes, or no image in common; one is empty; a key is there twice.
        LabelStoreError: a shard is damaged.
    """
    if first.info.num_classes != second.info.num_classes:
        raise ValueError(
            f"{first.path} has {first.info.num_classes} classes, {second.path} has {second.info.num_classes}; "
            "only labels of the same classes can be compared"
        )
    for store in (first, second):
        if not len(store):
            raise ValueError(f"{store.path} has no labels yet: nothing to compare")
    places = _places(second)
    num_common = sum(key in places for key in _places(first))
    if not num_common:
        examples = " and ".join(f"{next(iter(store), 'nothing')!r}" for store in (first, second))
        raise ValueError(f"{first.path} and {second.path} have no image in common; their keys look like {examples}")
    tally = _Tally(finer_grid(first.info.grid, second.info.grid), first.info.num_classes)
    for shard in first.shards:
        on_shard(shard.stem)
        for ours, theirs in _pairs(shard, second.shards, places):
            tally.add(ours, theirs)
    return tally.result(len(first) - num_common, len(second) - num_common, names)


def finer_grid(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """The one with more cells, the first of equal ones."""
    return max(first, second, key=lambda grid: grid[0] * grid[1])


def leading_at_points(
    first: ScoreMaps, second: ScoreMaps, grid: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """The leading classes of both maps of n images, and where both have one.

    Args:
        first, second: maps of the same images. `grid` is that of one of them, whose cells have the points as centres.
        grid: rows and columns of points.

    Returns:
        int64 [n, H, W] twice, and bool [n, H, W].
    """
    finer = first if first.grid == grid else second
    shape = (len(first), *grid)
    classes = np.zeros((2, *shape), np.int64)
    counts = np.stack([valid_cells(view, grid) for view in finer.views])
    for row, view in enumerate(finer.views):
        x, y = cell_centres(view, grid)
        for which, maps in enumerate((first, second)):
            columns, in_columns = _cells_at(x, maps.views[row, 0::2], maps.grid[1])
            rows, in_rows = _cells_at(y, maps.views[row, 1::2], maps.grid[0])
            if maps is finer:  # its own centres, whatever rounding says
                rows, columns = np.arange(grid[0]), np.arange(grid[1])
            else:
                counts[row] &= in_rows[:, None] & in_columns
            classes[which, row] = maps.classes[row, :, :, 0][np.ix_(rows, columns)]
    return classes[0], classes[1], counts


def _cells_at(
    points: NDArray[np.float64], ends: NDArray[np.float32], num_cells: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Along one axis, the cell that each point lies in, and whether it lies in the map at all."""
    first, last = ends.astype(np.float64)
    cells = np.floor((points - first) / (last - first) * num_cells).astype(np.int64)
    return np.clip(cells, 0, num_cells - 1), (cells >= 0) & (cells < num_cells)


def image_distributions(maps: ScoreMaps, num_classes: int) -> NDArray[np.float32]:
    """Mean distribution over the cells that show the image, float32 [n, K + 1]; the tail is the last one."""
    inside = np.stack([valid_cells(view, maps.grid) for view in maps.views])
    weights = inside / np.maximum(inside.sum(axis=(1, 2), keepdims=True), 1)
    rows = np.arange(len(maps))[:, None, None, None] * (num_classes + 1)
    sums = np.bincount(
        (rows + maps.classes).ravel(),
        (maps.probabilities() * weights[..., None]).ravel(),
        minlength=len(maps) * (num_classes + 1),
    ).reshape(len(maps), num_classes + 1)
    sums[:, -1] = (maps.tail.astype(np.float32) * weights).sum(axis=(1, 2))
    return np.asarray(sums, np.float32)


class _Tally:
    """Counts while the shards go by."""

    def __init__(self, grid: tuple[int, int], num_classes: int) -> None:
        self.grid, self.num_classes = grid, num_classes
        self.num_broken = self.num_apart = 0
        self.keys: list[str] = []
        self.agreement = [np.zeros(0, np.float32)]
        self.variation = [np.zeros(0, np.float32)]
        self.by_class = np.zeros((3, num_classes), np.int64)

    def add(self, first: ScoreMaps, second: ScoreMaps) -> None:
        """Maps of the same images."""
        broken = broken_maps(first, self.num_classes) | broken_maps(second, self.num_classes)
        first, second = _take(first, np.flatnonzero(~broken)), _take(second, np.flatnonzero(~broken))
        self.num_broken += int(broken.sum())
        if not len(first):
            return
        ours, theirs, counts = leading_at_points(first, second, self.grid)
        num_points = counts.sum(axis=(1, 2))
        seen = num_points > 0
        self.num_apart += int((~seen).sum())
        same = counts & (ours == theirs)
        distance = image_distributions(first, self.num_classes) - image_distributions(second, self.num_classes)
        self.keys += [key for key, is_seen in zip(first.keys, seen.tolist(), strict=True) if is_seen]
        self.agreement.append((same.sum(axis=(1, 2))[seen] / num_points[seen]).astype(np.float32))
        self.variation.append(np.abs(distance).sum(axis=1)[seen] / 2)
        for which, leading in enumerate((ours[counts], theirs[counts], ours[same])):
            self.by_class[which] += np.bincount(leading, minlength=self.num_classes)

    def result(self, num_only_first: int, num_only_second: int, names: Sequence[str]) -> Comparison:
        """All of it."""
        classes = (
            ClassComparison(class_id, name, *counts)
            for class_id, (name, counts) in enumerate(zip(names, self.by_class.T.tolist(), strict=True))
        )
        return Comparison(
            num_only_first,
            num_only_second,
            self.num_broken,
            self.num_apart,
            self.grid,
            tuple(self.keys),
            np.concatenate(self.agreement),
            np.concatenate(self.variation),
            tuple(classes),
        )


def _take(maps: ScoreMaps, rows: NDArray[np.intp]) -> ScoreMaps:
    """Some of the maps, in this order."""
    keys = tuple(maps.keys[row] for row in rows.tolist())
    return ScoreMaps(keys, maps.scores[rows], maps.classes[rows], maps.tail[rows], maps.views[rows])


def _places(store: LabelStore) -> dict[str, tuple[int, int]]:
    """Number of the shard and row in it of every key."""
    places: dict[str, tuple[int, int]] = {}
    for number, shard in enumerate(store.shards):
        for row, key in enumerate(shard.keys):
            if key in places:
                raise ValueError(
                    f"{store.path}: key {key!r} is in {store.shards[places[key][0]].stem} and in {shard.stem}; "
                    "`tokenlabels audit` lists all such keys"
                )
            places[key] = number, row
    return places


def _pairs(
    shard: ShardReader, others: Sequence[ShardReader], places: dict[str, tuple[int, int]]
) -> Iterator[tuple[ScoreMaps, ScoreMaps]]:
    """The maps of a shard and those of the same images in the other set, up to 256 at a time."""
    found = [(*places[key], row) for row, key in enumerate(shard.keys) if key in places]
    if not found:
        return
    ours = shard.read()
    numbers, their_rows, our_rows = np.array(found).T
    for number in np.unique(numbers).tolist():
        theirs = others[number].read()
        here = np.flatnonzero(numbers == number)
        for start in range(0, len(here), ROWS_PER_CHUNK):
            part = here[start : start + ROWS_PER_CHUNK]
            yield _take(ours, our_rows[part]), _take(theirs, their_rows[part])
