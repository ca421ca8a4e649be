"""A score map as coloured blocks in a terminal."""

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tokenlabels.types import ScoreMap
from tokenlabels.views.palette import ColouredMap, ink_on

_MAX_NAME_CELLS = 48  # of a terminal
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_UNSURE_BLOCK = np.array((40, 40, 44))


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
