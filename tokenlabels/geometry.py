"""Where things are in images, maps and outputs: one convention for boxes, views, cells and affine maps.

Coordinates are normalised to 0..1 of the thing named, boxes are xyxy, x first. Pixels and cells are areas: cell j of
W covers [j / W, (j + 1) / W] of its map, and its centre is (j + 0.5) / W.

Here in numpy: which part of an image a map covers, the view, for the three ways to bring an image to a teacher's input
size. The functions on batches, in torch, are written in `tokenlabels.boxes` (crops, views, mirror images) and
`tokenlabels.affine` (everything else that happens to an image); they have their names here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenlabels.affine import (
        affine_from_boxes,
        affine_in_map,
        apply_affine,
        compose_affine,
        invert_affine,
        rotation,
        shear,
        token_centres,
        translation,
        valid_tokens,
    )
    from tokenlabels.boxes import box_in_image, box_in_map, image_in_map, mirror_boxes, valid_range

__all__ = [
    "BORDER_TOLERANCE",
    "Box",
    "Letterbox",
    "ResizeMode",
    "affine_from_boxes",
    "affine_in_map",
    "apply_affine",
    "box_in_image",
    "box_in_map",
    "cell_centres",
    "compose_affine",
    "image_in_map",
    "invert_affine",
    "letterbox_placement",
    "mirror_boxes",
    "rotation",
    "shear",
    "token_centres",
    "translation",
    "valid_cells",
    "valid_range",
    "valid_tokens",
    "view_center",
    "view_letterbox",
    "view_squash",
]
_IN_BOXES = ("box_in_image", "box_in_map", "image_in_map", "mirror_boxes", "valid_range")

ResizeMode = Literal["squash", "center", "letterbox"]
"""squash: the whole image, its aspect given up. center: the centre square. letterbox: the whole image, padded."""

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1."""

# Views are stored as float32: a centre that lies on the border of the image must not fall outside by its rounding.
BORDER_TOLERANCE = 1e-6


def __getattr__(name: str) -> Any:
    """Import the functions on batches on first use: torch takes seconds, and labels can be inspected without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("tokenlabels.boxes" if name in _IN_BOXES else "tokenlabels.affine"), name)


@dataclass(frozen=True)
class Letterbox:
    """Where a letterboxed image lies on its canvas, in whole pixels of the canvas.

    Attributes:
        left: canvas columns in front of the image.
        top: canvas rows above the image.
        width: canvas columns that the image takes, at least 1.
        height: canvas rows that the image takes, at least 1.
    """

    left: int
    top: int
    width: int
    height: int


def letterbox_placement(width_px: int, height_px: int, canvas_hw: tuple[int, int]) -> Letterbox:
    """The largest placement of a `width_px` x `height_px` image on a canvas (H, W) that keeps its aspect, centred.

    Whole pixels, so the aspect is kept up to half a canvas pixel, and an odd remainder goes right and below.
    """
    _check_size(width_px, height_px)
    canvas_height, canvas_width = canvas_hw
    _check_size(canvas_width, canvas_height)
    scale = min(canvas_width / width_px, canvas_height / height_px)
    width = max(1, round(width_px * scale))
    height = max(1, round(height_px * scale))
    return Letterbox((canvas_width - width) // 2, (canvas_height - height) // 2, width, height)


def view_squash() -> Box:
    """The view of an image resized to the input size as a whole."""
    return 0.0, 0.0, 1.0, 1.0


def view_center(width_px: int, height_px: int, crop_pct: float) -> Box:
    """The view of timm's evaluation crop: the centre square with a side of min(width, height) * crop_pct.

    timm resizes to a whole number of pixels and crops at a whole pixel; this is the square that both stand for.
    """
    _check_size(width_px, height_px)
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be above 0 and at most 1, got {crop_pct}")
    side_px = min(width_px, height_px) * crop_pct
    margin_x, margin_y = (1 - side_px / width_px) / 2, (1 - side_px / height_px) / 2
    return margin_x, margin_y, 1 - margin_x, 1 - margin_y


def view_letterbox(width_px: int, height_px: int, canvas_hw: tuple[int, int]) -> Box:
    """The view of a letterboxed image: the whole canvas, so it reaches outside 0..1 where the canvas is padding."""
    placed = letterbox_placement(width_px, height_px, canvas_hw)
    canvas_height, canvas_width = canvas_hw
    return (
        -placed.left / placed.width,
        -placed.top / placed.height,
        (canvas_width - placed.left) / placed.width,
        (canvas_height - placed.top) / placed.height,
    )


def cell_centres(
    view: Sequence[float] | NDArray[np.floating], grid: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The centres of the cells of a map, in coordinates of the image.

    Args:
        view: [4], the part of the image that the map covers.
        grid: rows and columns of cells, (H, W).

    Returns:
        x of every column, float64 [W], and y of every row, float64 [H], in 0..1 of the image (outside in padding).
    """
    x0, y0, x1, y1 = (float(value) for value in view)
    num_rows, num_columns = grid
    x = x0 + (x1 - x0) * (np.arange(num_columns) + 0.5) / num_columns
    y = y0 + (y1 - y0) * (np.arange(num_rows) + 0.5) / num_rows
    return x, y


def valid_cells(view: Sequence[float] | NDArray[np.floating], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Which cells of a map show the image: bool [H, W], true where the centre of the cell lies inside the image.

    Only a letterboxed map has others. A centre on the very border counts as inside.
    """
    inside_W, inside_H = (
        (centres >= -BORDER_TOLERANCE) & (centres <= 1 + BORDER_TOLERANCE) for centres in cell_centres(view, grid)
    )
    return inside_H[:, None] & inside_W[None, :]


def _check_size(width_px: int, height_px: int) -> None:
    if width_px < 1 or height_px < 1:
        raise ValueError(f"an image and its canvas have at least one pixel, got {width_px} x {height_px}")
