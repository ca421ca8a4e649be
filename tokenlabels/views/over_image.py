"""An image, its score map over a grey copy of it, and a legend, as one PIL image.

A cell takes the colour of its leading class, the stronger the surer the teacher was. Padding cells of a letterboxed
map, which show nothing of the image, stay empty.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tokenlabels.types import ScoreMap
from tokenlabels.views.palette import ColouredMap

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Rgb = tuple[int, int, int]

_PANEL_PX, _MIN_COLUMN_PX, _LEGEND_PX = 512, 220, 400
_MARGIN_PX, _ROW_PX, _FONT_PX = 24, 28, 16
_PAPER, _INK, _FAINT_INK = (255, 255, 255), (32, 33, 36), (112, 115, 122)
_STRONGEST = 0.8  # opacity of a cell of which the teacher is certain
_GRID_LINE = 0.25  # opacity of the lines between cells
_WIDE = 1.6  # width over height from which the panels lie below each other
_MAX_LEGEND_CLASSES = 10


def overlay(image: Image.Image, score_map: ScoreMap, class_names: tuple[str, ...] | None) -> Image.Image:
    """Draw an image, its label map over a grey copy of it, and a legend.

    Args:
        image: the image that was labelled, upright, any size and mode.
        score_map: its map.
        class_names: names by class id, or None where nobody knows them.

    Returns:
        RGB image. What the map does not cover is dimmed; the legend gives, for each class that leads somewhere, the
        share of cells in which it does, and its mean probability over the map.
    """
    scale = _PANEL_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    photograph = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    coloured = ColouredMap.of(score_map, class_names)
    rows, columns = score_map.grid
    panels = [
        _with_caption(photograph, score_map.key),
        _with_caption(_paint_map(photograph, coloured, score_map.view), f"{rows} x {columns} token labels"),
    ]
    across = image.width < _WIDE * image.height
    pictures = _join(panels, "across" if across else "down")
    return _with_margin(_join([pictures, _legend(coloured)], "across"))


def _paint_map(photograph: Image.Image, coloured: ColouredMap, view: NDArray[np.float32]) -> Image.Image:
    """Colour the cells over a grey copy of the photograph, with lines between them; dim what no valid cell covers."""
    grey = np.asarray(photograph.convert("L"), np.float32)[..., None]
    dim = grey * 0.35
    if not coloured.valid.any():
        return Image.fromarray(np.repeat(dim, 3, axis=2).astype(np.uint8))
    left, top, right, bottom = view.tolist()
    row, on_row_edge = _cell_of_pixels(photograph.height, top, bottom, coloured.rank.shape[0])
    column, on_column_edge = _cell_of_pixels(photograph.width, left, right, coloured.rank.shape[1])
    covered = ((row >= 0)[:, None] & (column >= 0) & coloured.valid[np.ix_(row, column)])[..., None]
    colours = coloured.colours[coloured.rank][np.ix_(row, column)]
    opacity = _STRONGEST * coloured.confidence[np.ix_(row, column)][..., None]
    painted = grey + opacity * (colours - grey)
    lines = (on_row_edge[:, None] | on_column_edge)[..., None]
    painted = np.where(lines, painted + _GRID_LINE * (255 - painted), painted)
    return Image.fromarray(np.where(covered, painted, dim).astype(np.uint8))


def _cell_of_pixels(
    num_pixels: int, start: float, end: float, num_cells: int
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Cell of each pixel along one axis of an image, -1 outside the map, and whether the pixel begins a cell.

    `start` and `end` bound the map, as shares of the image.
    """
    centres = (np.arange(-1, num_pixels) + 0.5) / num_pixels
    cell = np.floor((centres - start) / (end - start) * num_cells).astype(np.intp)
    cell[(cell < 0) | (cell >= num_cells)] = -1
    return cell[1:], (cell[1:] != cell[:-1]) & (cell[1:] > 0)


def _legend(coloured: ColouredMap) -> Image.Image:
    """A row per leading class: swatch, name, share of cells, mean probability; classes after the tenth in one row."""
    rows: list[tuple[Rgb | None, str, float, float]] = [
        (tuple(colour.tolist()), share.name, share.share_of_cells, share.mean_probability)
        for colour, share in zip(coloured.colours, coloured.leading, strict=True)
    ]
    num_more, share_of_more, probability_of_more = coloured.beyond(_MAX_LEGEND_CLASSES)
    if num_more:
        rows[_MAX_LEGEND_CLASSES:] = [(None, f"{num_more} more", share_of_more, probability_of_more)]

    legend = Image.new("RGB", (_LEGEND_PX, _ROW_PX * (len(rows) + 3)), _PAPER)
    draw, font = ImageDraw.Draw(legend), _font()
    cells_right, probability_right = _LEGEND_PX - 96, _LEGEND_PX
    name_left = 26
    draw.text((cells_right, 0), "cells", _FAINT_INK, font, anchor="ra")
    draw.text((probability_right, 0), "probability", _FAINT_INK, font, anchor="ra")
    for index, (colour, name, share_of_cells, mean_probability) in enumerate(rows, start=1):
        y = index * _ROW_PX
        if colour is not None:
            draw.rounded_rectangle((0, y + 1, 16, y + 17), radius=3, fill=colour)
        draw.text((name_left, y), _shorten(name, cells_right - 50 - name_left, font), _INK, font, anchor="la")
        draw.text((cells_right, y), f"{share_of_cells:.0%}", _INK, font, anchor="ra")
        draw.text((probability_right, y), f"{mean_probability:.0%}", _INK, font, anchor="ra")
    draw.text((0, (len(rows) + 2) * _ROW_PX), "The fainter a cell, the less sure its label.", _FAINT_INK, font)
    return legend


def _with_caption(panel: Image.Image, caption: str) -> Image.Image:
    width = max(panel.width, _MIN_COLUMN_PX)
    captioned = Image.new("RGB", (width, panel.height + _ROW_PX), _PAPER)
    font = _font()
    ImageDraw.Draw(captioned).text((0, 0), _shorten(caption, width, font), _FAINT_INK, font, anchor="la")
    captioned.paste(panel, (0, _ROW_PX))
    return captioned


def _join(images: list[Image.Image], direction: Literal["across", "down"]) -> Image.Image:
    """Set images in a row or a column with a margin between them, aligned at the top left."""
    gaps = _MARGIN_PX * (len(images) - 1)
    widths, heights = [image.width for image in images], [image.height for image in images]
    across = direction == "across"
    size = (sum(widths) + gaps, max(heights)) if across else (max(widths), sum(heights) + gaps)
    joined = Image.new("RGB", size, _PAPER)
    x = y = 0
    for image in images:
        joined.paste(image, (x, y))
        x, y = (x + image.width + _MARGIN_PX, 0) if across else (0, y + image.height + _MARGIN_PX)
    return joined


def _with_margin(image: Image.Image) -> Image.Image:
    framed = Image.new("RGB", (image.width + 2 * _MARGIN_PX, image.height + 2 * _MARGIN_PX), _PAPER)
    framed.paste(image, (_MARGIN_PX, _MARGIN_PX))
    return framed


def _shorten(text: str, width_px: float, font: Font) -> str:
    """The text on one line, cut with an ellipsis where it would be wider."""
    text = " ".join(text.split())
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(f"{text}…") > width_px:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _font() -> Font:
    return ImageFont.load_default(_FONT_PX)
