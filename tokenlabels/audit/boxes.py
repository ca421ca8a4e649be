"""Whether labels know where the object is: the mass of an image's own class, and the boxes around it.

A cell belongs to a box if its centre lies inside. A box that holds no centre, as one smaller than a cell, has the cell
that is closest to its own centre, of those that show the image, so that every box that is seen can be hit. There is no
other tolerance: on coarse grids even one cell would make large boxes impossible to miss.

Legend: n images, m boxes, H x W cells of a map.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tokenlabels.audit.measures import ImageMeasures
from tokenlabels.geometry import valid_cells
from tokenlabels.types import ScoreMaps

NO_BOXES = np.zeros((0, 4), np.float64)


@dataclass(frozen=True, eq=False)
class BoxMeasures:
    """One row for every image. Cells that show nothing of the image do not count.

    Attributes:
        is_boxed: bool [n], a usable map that sees a box of the image's own class. The other columns are meaningless
            elsewhere.
        is_hit: bool [n], the pointing game (Zhang et al. 2016): the cell with the largest mass of the own class, the
            first of several, belongs to a box. Never where that class is not stored at all.
        mass_inside: float32 [n], share of the own class's mass that lies in the cells of boxes, 0..1; NaN where that
            class is not stored at all.
        cells_inside: float32 [n], share of the cells that belong to boxes, 0..1: what a map that knows nothing scores.
    """

    is_boxed: NDArray[np.bool_]
    is_hit: NDArray[np.bool_]
    mass_inside: NDArray[np.float32]
    cells_inside: NDArray[np.float32]

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The rows of all, in this order; there is at least one part."""
        columns: dict[str, Any] = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)
        }
        return cls(**columns)


@dataclass(frozen=True)
class Localisation:
    """How well the labels of some images know where the object is.

    Attributes:
        num_boxed: images with a box, see `BoxMeasures.is_boxed`.
        num_hits: those of them that win the pointing game.
        mass_inside: mean share of the own class's mass inside of the boxes, of the images that store it; None without.
        cells_inside: mean share of the cells inside of the boxes, None without images. A map without knowledge of the
            place has this `mass_inside` and this share of hits.
    """

    num_boxed: int
    num_hits: int
    mass_inside: float | None
    cells_inside: float | None

    @classmethod
    def of(cls, measures: BoxMeasures, chosen: NDArray[np.bool_]) -> Self:
        """Of those of the images that are `chosen`, bool [n]."""
        boxed = measures.is_boxed & chosen
        return cls(
            num_boxed=int(boxed.sum()),
            num_hits=int((measures.is_hit & boxed).sum()),
            mass_inside=_mean(measures.mass_inside[boxed]),
            cells_inside=_mean(measures.cells_inside[boxed]),
        )

    @property
    def hit_share(self) -> float | None:
        """Share of the images that win the pointing game, None without images."""
        return self.num_hits / self.num_boxed if self.num_boxed else None


def measure_boxes(maps: ScoreMaps, measures: ImageMeasures, boxes: Sequence[NDArray[np.float64]]) -> BoxMeasures:
    """Measure the images of a shard or a part of it.

    Args:
        maps: of n images.
        measures: of the same images.
        boxes: n times float64 [m, 4], the boxes of the image's own class, xyxy in 0..1 of the image; any m.
    """
    num_images = len(maps)
    is_boxed, is_hit = np.zeros(num_images, np.bool_), np.zeros(num_images, np.bool_)
    mass_inside, cells_inside = np.full(num_images, np.nan, np.float32), np.zeros(num_images, np.float32)
    for row in np.flatnonzero(measures.is_labelled).tolist():
        if not len(boxes[row]):
            continue
        view, label = maps.views[row], measures.label[row]
        valid = valid_cells(view, maps.grid)
        inside = valid & cells_of_boxes(np.tile(view, (len(boxes[row]), 1)), boxes[row], maps.grid).any(axis=0)
        is_boxed[row] = inside.any()
        cells_inside[row] = inside.sum() / max(valid.sum(), 1)
        score_map = maps[row]
        mass = (score_map.probabilities() * (score_map.classes == label)).sum(axis=-1) * valid
        if mass.any():
            is_hit[row] = inside.flat[mass.argmax()]
            mass_inside[row] = mass[inside].sum() / mass.sum()
    return BoxMeasures(is_boxed, is_hit, mass_inside, cells_inside)


def cells_of_boxes(
    views_m4: NDArray[np.float32], boxes_m4: NDArray[np.float64], grid: tuple[int, int]
) -> NDArray[np.bool_]:
    """Bool [m, H, W]: the cells of every box, see the module; none for a box that the map does not see.

    Args:
        views_m4: float32, what the map of every box covers, xyxy in 0..1 of the image.
        boxes_m4: float64, xyxy in 0..1 of the image.
        grid: rows and columns of the maps.
    """
    inside = centres_inside(views_m4, boxes_m4, grid)
    views = views_m4.astype(np.float64)
    first = np.maximum(np.maximum(boxes_m4[:, :2], views[:, :2]), 0)
    last = np.minimum(np.minimum(boxes_m4[:, 2:], views[:, 2:]), 1)
    without = np.flatnonzero(~inside.any(axis=(1, 2)) & (first < last).all(axis=1))
    place = ((first + last) / 2 - views[:, :2]) / (views[:, 2:] - views[:, :2])
    column, row = np.floor(place[without] * np.array(grid[::-1])).astype(np.int64).T
    for number, own_row, own_column in zip(without.tolist(), row.tolist(), column.tolist(), strict=True):
        rows, columns = np.nonzero(valid_cells(views_m4[number], grid))
        if rows.size:  # none in an image so long that it passes between the centres
            inside[number, np.clip(own_row, rows[0], rows[-1]), np.clip(own_column, columns[0], columns[-1])] = True
    return inside


def centres_inside(
    views_n4: NDArray[np.float32], boxes_n4: NDArray[np.float64], grid: tuple[int, int]
) -> NDArray[np.bool_]:
    """Bool [n, H, W]: where the centre of a cell, in coordinates of its image, lies inside the image's box.

    A centre on the left or upper edge is inside, one on the right or lower edge is not, so that boxes side by side
    share no cell.
    """
    inside = []
    for axis, num_cells in ((1, grid[0]), (0, grid[1])):
        first, last = views_n4[:, axis, None].astype(np.float64), views_n4[:, axis + 2, None].astype(np.float64)
        centres = first + (last - first) * (np.arange(num_cells) + 0.5) / num_cells
        inside.append((centres >= boxes_n4[:, axis, None]) & (centres < boxes_n4[:, axis + 2, None]))
    inside_nH, inside_nW = inside
    return np.asarray(inside_nH[:, :, None] & inside_nW[:, None, :])


def _mean(values: NDArray[np.float32]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if known.size else None
