"""A score map as coloured blocks in a terminal."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.color import Color
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tokenlabels.summary import class_name
from tokenlabels.types import ScoreMap
from tokenlabels.views.palette import ColouredMap, ink_on

_MAX_NAME_CELLS = 48  # of a terminal
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_GAP = "  "
_LARGEST_PX = 512  # of the image, before it becomes blocks
_BAR_CELLS = 20
_UNSURE_BLOCK = np.array((40, 40, 44))


def block_map(
    score_map: ScoreMap,
    class_names: tuple[str, ...] | None,
    image: Image.Image | None = None,
    cell: tuple[int, int] | None = None,
) -> RenderableType:
    """The map as coloured blocks for a terminal, and its leading classes as a table.

    Every block carries the letter of its class too, for eyes and terminals without colour: a capital where the class
    holds more than half of the probability. Classes after the 26th share a dot.

    Args:
        score_map: the map.
        class_names: names by class id, or None where nobody knows them.
        image: what was labelled, RGB; drawn beside the map, two columns and a line to a cell, as far as the map covers
            it. For terminals with colours.
        cell: row and column of a cell whose classes are listed too.
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
    beside = lines if image is None else _beside(_half_blocks(image, score_map), lines)
    listed = [] if cell is None else [Text(), *_cell_lines(score_map, cell, class_names)]
    return Group(title, subtitle, *beside, "", _class_table(coloured), *listed)


def image_fits(score_map: ScoreMap, terminal_width: int) -> bool:
    """Whether a terminal that is so many characters wide has room for the image beside its map."""
    return 4 * score_map.grid[1] + len(_GAP) <= terminal_width


def _beside(left: list[Text], right: list[Text]) -> list[Text]:
    return [Text.assemble(one, _GAP, other, no_wrap=True) for one, other in zip(left, right, strict=True)]


def _half_blocks(image: Image.Image, score_map: ScoreMap) -> list[Text]:
    """What the map covers of the image, a character for two pixels, the upper one in ink on the lower one."""
    rows, columns = score_map.grid
    small = image.copy()
    small.thumbnail((_LARGEST_PX, _LARGEST_PX))
    corners = [side * corner for corner, side in zip(score_map.view.tolist(), 2 * small.size, strict=True)]
    left, top, right, bottom = (round(corner) for corner in corners)
    covered = small.crop((left, top, max(right, left + 1), max(bottom, top + 1)))  # black outside the image
    pixels = np.asarray(covered.resize((2 * columns, 2 * rows), Image.Resampling.BOX)).tolist()
    lines = [Text(no_wrap=True) for _ in range(rows)]
    for line, upper, lower in zip(lines, pixels[::2], pixels[1::2], strict=True):
        for ink, paper in zip(upper, lower, strict=True):
            line.append("▀", Style(color=Color.from_rgb(*ink), bgcolor=Color.from_rgb(*paper)))
    return lines


def _cell_lines(score_map: ScoreMap, cell: tuple[int, int], class_names: tuple[str, ...] | None) -> list[Text]:
    """The classes of a cell with their probabilities as bars, and the tail."""
    probabilities = score_map.probabilities()[cell].tolist()
    names = [class_name(class_names, class_id) for class_id in score_map.classes[cell].tolist()]
    entries = [*zip(names, probabilities, strict=True), ("all other classes (tail)", float(score_map.tail[cell]))]
    lines = [Text(f"cell {cell[0]},{cell[1]}", "bold")]
    for name, probability in entries:
        bar = "█" * round(_BAR_CELLS * probability)
        line = Text(f"{probability:6.1%} {bar:<{_BAR_CELLS}} {name}", no_wrap=True, overflow="ellipsis")
        lines.append(line)
    return lines


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
