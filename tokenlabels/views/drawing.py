"""What pictures have in common: sizes, type, sheets of panels, and cells over photographs."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tokenlabels.geometry import Box
from tokenlabels.views.typeface import typeset

Pixels = NDArray[np.uint8]
Rgb = tuple[int, int, int]
Grid = tuple[int, int]

SMALLEST_PX, WANTED_PX, LARGEST_PX = 192, 256, 512  # of the longer side of a panel
MARGIN_PX, GAP_PX, LINE_PX, FONT_PX, TITLE_PX = 24, 12, 22, 14, 18
PAPER, INK, FAINT_INK = (255, 255, 255), (32, 33, 36), (95, 99, 104)
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

_DIMMED = (40.0, 0.6)  # black level and contrast of the photograph below
GRID_LINE, MIN_LINED_CELL_PX = 0.3, 8  # opacity of lines, and the smallest cells that have them


def paint_cells(image: Pixels, colours: Pixels, opacity: float) -> Pixels:
    """Coloured cells over a dimmed grey copy of an image.

    Args:
        image: uint8 [H, W, 3], at the size at which it is shown.
        colours: uint8 [h, w, 3], of the cells.
        opacity: of the cells over the image, 0..1.

    Returns:
        uint8 [H, W, 3], see `blend_cells`.
    """
    return blend_cells(dimmed(image), colours, np.full(colours.shape[:2], opacity)).round().astype(np.uint8)


def dimmed(image: Pixels) -> NDArray[np.float64]:
    """A grey copy of low contrast, [H, W, 1], 0..255, of uint8 [H, W, 3]."""
    black, contrast = _DIMMED
    return black + contrast * np.asarray(Image.fromarray(image).convert("L"), np.float64)[..., None]


def blend_cells(
    below: NDArray[np.float64], colours: Pixels, opacity: NDArray[np.floating], view: Box = WHOLE
) -> NDArray[np.float64]:
    """Coloured cells over a picture.

    Args:
        below: [H, W, 1 or 3], 0..255.
        colours: uint8 [h, w, 3], of the cells.
        opacity: [h, w] of the cells, 0..1; nothing at all is drawn of cells of NaN.
        view: the part of the picture that the map covers, xyxy in 0..1 of it; it may reach beyond.

    Returns:
        [H, W, 3]. A pixel belongs to the cell that holds its centre; lines between cells are the first pixels of
        the cells below and to the right.
    """
    row, column = cells_of_pixels(below.shape[:2], colours.shape[:2], view)
    opacity_HW = np.where(on_map(row, column), opacity[np.ix_(row, column)], np.nan)[..., None]
    is_drawn = np.isfinite(opacity_HW)
    blended = below + np.where(is_drawn, opacity_HW, 0) * (colours[np.ix_(row, column)] - below)
    if has_lines(below.shape[:2], colours.shape[:2], view):
        on_row, on_column = ((cell > 0) & (np.diff(cell, prepend=cell[0]) != 0) for cell in (row, column))
        lines = on_row[:, None] | on_column
        blended = np.where(lines[..., None] & is_drawn, blended + GRID_LINE * (255 - blended), blended)
    return blended


def cells_of_pixels(size: Grid, grid: Grid, view: Box) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The row of every row of pixels and the column of every column, -1 outside the map; `view` as in `blend_cells`."""

    def along(num_pixels: int, num_cells: int, start: float, end: float) -> NDArray[np.intp]:
        # in this order, so that whole numbers stay whole where the map covers the picture
        twice_centres = 2 * np.arange(num_pixels) + 1 - 2 * num_pixels * start
        cell = np.floor(twice_centres * num_cells / (2 * num_pixels * (end - start))).astype(np.intp)
        return np.where((cell < 0) | (cell >= num_cells), -1, cell)

    left, top, right, bottom = view
    return along(size[0], grid[0], top, bottom), along(size[1], grid[1], left, right)


def on_map(row: NDArray[np.intp], column: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Bool [H, W]: pixels that belong to a cell."""
    return (row >= 0)[:, None] & (column >= 0)


def has_lines(size: Grid, grid: Grid, view: Box) -> bool:
    """Whether cells are large enough for lines between them."""
    left, top, right, bottom = view
    return min(size[0] * (bottom - top) / grid[0], size[1] * (right - left) / grid[1]) >= MIN_LINED_CELL_PX


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


def rgb(colour: Pixels) -> Rgb:
    """A colour uint8 [3] as Pillow takes it."""
    red, green, blue = colour.tolist()
    return red, green, blue


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    width_px: float,
    *,
    ink: Rgb = INK,
    size_px: int = FONT_PX,
    anchor: str = "la",
) -> None:
    """Write a line of text, cut where it would be wider."""
    shown, font = typeset(text, size_px, width_px)
    draw.text(place, shown, ink, font, anchor=anchor)


def sheet(
    title: str, headings: Sequence[str], rows: Sequence[Image.Image], step_px: int, corner: Image.Image | None = None
) -> Image.Image:
    """A title, headings of columns that are `step_px` apart, and rows of panels below each other.

    Args:
        corner: what stands right of the title, such as a legend.
    """
    header_px = TITLE_PX + GAP_PX if corner is None else corner.height + 2 * GAP_PX
    top, width = MARGIN_PX + header_px + LINE_PX, 2 * MARGIN_PX + len(headings) * step_px - GAP_PX
    picture = Image.new("RGB", (width, top + sum(row.height for row in rows) + MARGIN_PX - GAP_PX), PAPER)
    draw, room = ImageDraw.Draw(picture), width - 2 * MARGIN_PX
    if corner is not None:
        picture.paste(corner, (width - MARGIN_PX - corner.width, MARGIN_PX))
        room -= corner.width + 2 * GAP_PX
    write(draw, (MARGIN_PX, MARGIN_PX), title, room, size_px=TITLE_PX, anchor="lt")
    for index, heading in enumerate(headings):
        write(draw, (MARGIN_PX + index * step_px, top - LINE_PX), heading, step_px - GAP_PX, ink=FAINT_INK)
    for row in rows:
        picture.paste(row, (MARGIN_PX, top))
        top += row.height
    return picture
