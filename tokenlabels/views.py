"""Pictures of score maps: over the image, as a PIL image, and as coloured blocks in a terminal.

A cell takes the colour of its leading class, the stronger the surer the teacher was. Padding cells of a letterboxed
map, which show nothing of the image, stay empty.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.color import Color
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tokenlabels.palette import ColouredMap, ink_on
from tokenlabels.types import ScoreMap

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Rgb = tuple[int, int, int]

_PANEL_PX, _MIN_COLUMN_PX, _LEGEND_PX = 512, 220, 400
_MARGIN_PX, _ROW_PX, _FONT_PX = 24, 28, 16
_PAPER, _INK, _FAINT_INK = (255, 255, 255), (32, 33, 36), (112, 115, 122)
_STRONGEST = 0.8  # opacity of a cell of which the teacher is certain
_GRID_LINE = 0.25  # opacity of the lines between cells
_WIDE = 1.6  # width over height from which the panels lie below each other
_MAX_LEGEND_CLASSES = 10
_MAX_NAME_CELLS = 48  # of a terminal
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_UNSURE_BLOCK = np.array((40, 40, 44))


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


def block_map(score_map: ScoreMap, class_names: tuple[str, ...] | None) -> RenderableType:
    """The map as coloured blocks for a terminal, and its leading classes as a table.

    Every block carries the letter of its class too, for eyes and terminals without colour: a capital where the class
    holds more than half of the probability. Classes after the 26th share a dot.
    """
    coloured = ColouredMap.of(score_map, class_names)
    rows, columns = score_map.grid
    lines = [Text(no_wrap=True) for _ in range(rows)]
    for row, column in np.ndindex(rows, columns):
        rank = int(coloured.rank[row, column])
        if coloured.valid[row, column]:
            confidence = float(coloured.confidence[row, column])
            letter = _letter(rank) if confidence > 0.5 else _letter(rank).lower()
            lines[row].append(f"{letter} ", _block_style(coloured.colours[rank], confidence))
        else:
            lines[row].append("  ")

    title = Text(score_map.key, "bold", no_wrap=True, overflow="ellipsis")
    subtitle = Text(f"{rows} x {columns} cells, {score_map.k} classes kept in each\n")
    return Group(title, subtitle, *lines, "", _class_table(coloured))


def _class_table(coloured: ColouredMap) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("class")
    for header in ("id", "cells", "probability"):
        table.add_column(header, justify="right")
    for rank, share in enumerate(coloured.leading[: len(_LETTERS)]):
        swatch = Text(f"{_letter(rank)} ", _block_style(coloured.colours[rank], 1.0))
        name = Text(share.name)
        name.truncate(_MAX_NAME_CELLS, overflow="ellipsis")
        table.add_row(swatch, name, str(share.class_id), f"{share.share_of_cells:.0%}", f"{share.mean_probability:.1%}")
    num_more, share_of_cells, mean_probability = coloured.beyond(len(_LETTERS))
    if num_more:
        table.add_row("·", f"{num_more} more", "", f"{share_of_cells:.0%}", f"{mean_probability:.1%}")
    return table


def _letter(rank: int) -> str:
    return _LETTERS[rank] if rank < len(_LETTERS) else "·"


def _block_style(colour: NDArray[np.uint8], confidence: float) -> Style:
    """Colour and letter fade together, into dark grey."""
    block = (_UNSURE_BLOCK + confidence * (colour - _UNSURE_BLOCK)).astype(np.uint8)
    ink = (block + (0.4 + 0.6 * confidence) * (np.array(ink_on(block)) - block)).astype(np.uint8)
    return Style(color=Color.from_rgb(*ink.tolist()), bgcolor=Color.from_rgb(*block.tolist()))


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
