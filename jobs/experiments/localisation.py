"""Whether labels know where the object is: the best classes of cells inside and outside of annotated boxes.

Legend: n images, H x W cells of a map.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenlabels.audit.box_files import read_boxes as read_boxes_px
from tokenlabels.audit.boxes import centres_inside
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
    boxes: dict[str, Box] = {}
    for key, boxes_px in read_boxes_px(path).items():
        x0, y0, x1, y1 = (boxes_px[0] / image_size_px).tolist()
        boxes[key] = (x0, y0, x1, y1)
    return boxes


def localise_store(store: LabelStore, class_of: Mapping[str, int], boxes: Mapping[str, Box]) -> Localisation:
    """Count the cells of a whole label set, see `localise`."""
    return sum((localise(shard.read(), class_of, boxes) for shard in store.shards), Localisation())


def localise(maps: ScoreMaps, class_of: Mapping[str, int], boxes: Mapping[str, Box]) -> Localisation:
    """Count the cells of images that have a class and a box.

    Args:
        maps: of n images.
        class_of: class index by key.
        boxes: xyxy in 0..1 of the image by key; see `centres_inside` for what lies in them.
    """
    rows = [row for row, key in enumerate(maps.keys) if key in class_of and key in boxes]
    if not rows:
        return Localisation()
    keys = [maps.keys[row] for row in rows]
    is_inside_nHW = centres_inside(maps.views[rows], np.array([boxes[key] for key in keys], np.float64), maps.grid)
    own_n = np.array([class_of[key] for key in keys])
    is_right_nHW = maps.classes[rows, :, :, 0] == own_n[:, None, None]
    return Localisation(
        len(rows),
        int(is_inside_nHW.sum()),
        int((~is_inside_nHW).sum()),
        int((is_right_nHW & is_inside_nHW).sum()),
        int((is_right_nHW & ~is_inside_nHW).sum()),
    )
