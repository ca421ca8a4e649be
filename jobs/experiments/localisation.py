"""Whether labels know where the object is: the best classes of cells inside and outside of annotated boxes.

Legend: n images, H x W cells of a map.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenlabels.geometry import Box
from tokenlabels.store import LabelStore
from tokenlabels.types import ScoreMaps


@dataclass(frozen=True)
class Localisation:
    """Cells of label maps, counted apart by whether their centre lies inside the box of their image.

    Attributes:
        num_images: images with a map, a class and a box.
        num_inside, num_outside: their cells.
        num_right_inside, num_right_outside: those of them whose best class is the class of the image.
    """

    num_images: int = 0
    num_inside: int = 0
    num_outside: int = 0
    num_right_inside: int = 0
    num_right_outside: int = 0

    @property
    def share_inside(self) -> float:
        """Share of the cells inside whose best class is the class of the image, 0..1; 0 without such cells."""
        return self.num_right_inside / max(self.num_inside, 1)

    @property
    def share_outside(self) -> float:
        """The same share of the cells outside."""
        return self.num_right_outside / max(self.num_outside, 1)

    def __add__(self, other: "Localisation") -> "Localisation":
        return Localisation(
            self.num_images + other.num_images,
            self.num_inside + other.num_inside,
            self.num_outside + other.num_outside,
            self.num_right_inside + other.num_right_inside,
            self.num_right_outside + other.num_right_outside,
        )


def read_boxes(path: Path, image_size_px: int) -> dict[str, Box]:
    """Annotated boxes by key, xyxy in 0..1 of the image.

    Args:
        path: JSON, {key: [x0, y0, x1, y1]} in pixels, of which x1 and y1 are the last ones inside.
        image_size_px: side of all images.
    """
    boxes_px = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: (x0 / image_size_px, y0 / image_size_px, (x1 + 1) / image_size_px, (y1 + 1) / image_size_px)
        for key, (x0, y0, x1, y1) in boxes_px.items()
    }


def localise_store(store: LabelStore, class_of: Mapping[str, int], boxes: Mapping[str, Box]) -> Localisation:
    """Count the cells of a whole label set, see `localise`."""
    return sum((localise(shard.read(), class_of, boxes) for shard in store.shards), Localisation())


def localise(maps: ScoreMaps, class_of: Mapping[str, int], boxes: Mapping[str, Box]) -> Localisation:
    """Count the cells of images that have a class and a box.

    Args:
        maps: of n images.
        class_of: class index by key.
        boxes: xyxy in 0..1 of the image by key. A centre on the left or upper edge is inside, one on the right or
            lower edge is not, so that boxes side by side share no cell.
    """
    rows = [row for row, key in enumerate(maps.keys) if key in class_of and key in boxes]
    if not rows:
        return Localisation()
    keys = [maps.keys[row] for row in rows]
    is_inside_nHW = _centres_inside(maps.views[rows], np.array([boxes[key] for key in keys], np.float64), maps.grid)
    own_n = np.array([class_of[key] for key in keys])
    is_right_nHW = maps.classes[rows, :, :, 0] == own_n[:, None, None]
    return Localisation(
        len(rows),
        int(is_inside_nHW.sum()),
        int((~is_inside_nHW).sum()),
        int((is_right_nHW & is_inside_nHW).sum()),
        int((is_right_nHW & ~is_inside_nHW).sum()),
    )


def _centres_inside(
    views_n4: NDArray[np.float32], boxes_n4: NDArray[np.float64], grid: tuple[int, int]
) -> NDArray[np.bool_]:
    """Bool [n, H, W]: where the centre of a cell, in coordinates of its image, lies inside the image's box."""
    inside = []
    for axis, num_cells in ((1, grid[0]), (0, grid[1])):
        first, last = views_n4[:, axis, None].astype(np.float64), views_n4[:, axis + 2, None].astype(np.float64)
        centres = first + (last - first) * (np.arange(num_cells) + 0.5) / num_cells
        inside.append((centres >= boxes_n4[:, axis, None]) & (centres < boxes_n4[:, axis + 2, None]))
    inside_nH, inside_nW = inside
    return np.asarray(inside_nH[:, :, None] & inside_nW[:, None, :])
