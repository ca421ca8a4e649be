"""What pictures of models have in common: sizes, type, and cells over photographs."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from tokenlabels.checks import Grid

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Pixels = NDArray[np.uint8]

SMALLEST_PX, WANTED_PX, LARGEST_PX = 192, 256, 512  # of the longer side of a panel
MARGIN_PX, GAP_PX, LINE_PX, FONT_PX, TITLE_PX = 24, 12, 22, 14, 18
PAPER, INK, FAINT_INK = (255, 255, 255), (32, 33, 36), (95, 99, 104)

_DIMMED = (40.0, 0.6)  # black level and contrast of the photograph below
_GRID_LINE, _MIN_LINED_CELL_PX = 0.3, 8  # opacity of lines, and the smallest cells that have them


def paint_cells(image: Pixels, colours: Pixels, opacity: float) -> Pixels:
    """Coloured cells over a dimmed grey copy of an image.

    Args:
        image: uint8 [H, W, 3], at the size at which it is shown.
        colours: uint8 [h, w, 3], of the cells.
        opacity: of the cells over the image, 0..1.

    Returns:
        uint8 [H, W, 3]. A pixel belongs to the cell that holds its centre; lines between cells are the first pixels of
        the cells below and to the right.
    """
    black, contrast = _DIMMED
    grey = black + contrast * np.asarray(Image.fromarray(image).convert("L"), np.float64)[..., None]
    row, column = (_cells(pixels, cells) for pixels, cells in zip(image.shape[:2], colours.shape[:2], strict=True))
    painted = grey + opacity * (colours[np.ix_(row, column)] - grey)
    if min(image.shape[0] / colours.shape[0], image.shape[1] / colours.shape[1]) >= _MIN_LINED_CELL_PX:
        lines = (np.diff(row, prepend=0) > 0)[:, None] | (np.diff(column, prepend=0) > 0)
        painted = np.where(lines[..., None], painted + _GRID_LINE * (255 - painted), painted)
    return painted.round().astype(np.uint8)


def _cells(num_pixels: int, num_cells: int) -> NDArray[np.intp]:
    """The cell of every pixel along one side."""
    return (2 * np.arange(num_pixels) + 1) * num_cells // (2 * num_pixels)


def panel_size(size: Grid, grids: Sequence[tuple[int, ...]]) -> Grid:
    """A readable size of the same aspect at which all cells are whole pixels: the image's own, if it is one.

    Args:
        size: pixels of the image, (height, width).
        grids: rows and columns of the maps that lie on it.
    """
    longest = max(size)
    if SMALLEST_PX <= longest <= LARGEST_PX:
        return size
    unit = math.gcd(*size)
    sizes = [(size[0] // unit * k, size[1] // unit * k) for k in range(1, LARGEST_PX * unit // longest + 1)]
    whole = [(h, w) for h, w in sizes if all(h % rows == 0 and w % columns == 0 for rows, columns in grids)]
    return min(whole, key=lambda fitting: abs(max(fitting) - WANTED_PX), default=size)


def resized(image: Pixels, size: Grid) -> Image.Image:
    """The image at the size (height, width) at which it is shown."""
    return Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS)


def fitted(text: str, width_px: float, font: Font) -> str:
    """The text, cut with an ellipsis where it would be wider."""
    shown = text = " ".join(text.split())
    while text and font.getlength(shown) > width_px:
        text = text[:-1]
        shown = f"{text.rstrip()}…"
    return shown


def font_of(size_px: int) -> Font:
    """The font of all pictures."""
    return ImageFont.load_default(size_px)
