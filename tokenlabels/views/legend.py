"""The column beside the panels: classes in their colours, and the classes of a cell as bars."""

from collections.abc import Mapping, Sequence

from tokenlabels.geometry import valid_cells
from tokenlabels.summary import ClassShare
from tokenlabels.types import ScoreMap
from tokenlabels.views.drawing import FAINT_INK, INK, Rgb, rgb
from tokenlabels.views.figure import Figure, Frame, Item, down, words
from tokenlabels.views.palette import GREY, ColouredMap
from tokenlabels.views.panels import SMALL_PX, TEXT_PX

COLUMN_PX = 400
MAX_CLASSES, _MAX_OTHERS = 10, 3

_ROW_PX, _HEADING_PX = 24, 16
_SWATCH_PX, _NAME_LEFT = 14, 24
_CELLS_RIGHT = COLUMN_PX - 92
_NUMBER_PX = 60
_TRACK = (232, 234, 237)


def text_lines(heading: str, lines: Sequence[str], only: str | None) -> Figure:
    """A heading and lines of text."""
    items = [words(0, _ROW_PX - 8, heading, COLUMN_PX, size_px=_HEADING_PX, only=only)]
    for index, line in enumerate(lines, start=1):
        items.append(words(0, (index + 1) * _ROW_PX - 8, line, COLUMN_PX, size_px=TEXT_PX, ink=FAINT_INK, only=only))
    return Figure(COLUMN_PX, (1 + len(lines)) * _ROW_PX, tuple(items))


def class_table(
    heading: str,
    coloured: ColouredMap,
    others: Sequence[ClassShare],
    only: str | None,
    share_of: str = "cells",
) -> Figure:
    """A row for each class that leads somewhere, with its share of cells and mean probability; then `others`.

    Leading classes after the tenth share a row and a grey. Of the others, which lead nowhere, three are shown.
    """
    rows: list[tuple[Rgb | None, str, float, float]] = [
        (rgb(colour), share.name, share.share_of_cells, share.mean_probability)
        for colour, share in zip(coloured.colours, coloured.leading, strict=True)
    ]
    num_more, share_of_more, probability_of_more = coloured.beyond(MAX_CLASSES)
    if num_more:
        rows[MAX_CLASSES:] = [(GREY, f"{num_more} more", share_of_more, probability_of_more)]
    rows += [(None, other.name, 0.0, other.mean_probability) for other in others[:_MAX_OTHERS]]

    items: list[Item] = [
        words(0, _ROW_PX - 8, heading, _CELLS_RIGHT - _NUMBER_PX, size_px=_HEADING_PX, only=only),
        words(_CELLS_RIGHT, _ROW_PX - 8, share_of, _NUMBER_PX, size_px=SMALL_PX, ink=FAINT_INK, anchor="r", only=only),
        words(COLUMN_PX, _ROW_PX - 8, "probability", 90, size_px=SMALL_PX, ink=FAINT_INK, anchor="r", only=only),
    ]
    for index, (colour, name, share_of_cells, probability) in enumerate(rows, start=2):
        base = index * _ROW_PX - 8
        if colour is not None:
            items.append(Frame(0, base - _SWATCH_PX + 2, _SWATCH_PX, _SWATCH_PX, fill=colour))
        room = _CELLS_RIGHT - _NUMBER_PX - _NAME_LEFT
        items.append(words(_NAME_LEFT, base, name, room, size_px=TEXT_PX, only=only))
        for right, number in ((_CELLS_RIGHT, share_of_cells), (COLUMN_PX, probability)):
            text = percent(number)
            items.append(words(right, base, text, _NUMBER_PX, size_px=TEXT_PX, anchor="r", only=only))
    return Figure(COLUMN_PX, (1 + len(rows)) * _ROW_PX, tuple(items))


def cell_bars(
    score_map: ScoreMap,
    cell: tuple[int, int],
    names: tuple[str, ...],
    colours: Mapping[int, Rgb],
    only: str | None,
) -> Figure:
    """The classes of a cell with their probabilities, and what is left for all others, as bars."""
    probabilities = score_map.probabilities()[cell].tolist()
    bars = [
        (names[class_id], probability, colours.get(class_id, GREY))
        for class_id, probability in zip(score_map.classes[cell].tolist(), probabilities, strict=True)
    ]
    num_others = len(names) - score_map.k
    if num_others:
        bars.append((f"the other {num_others:,} classes (tail)", float(score_map.tail[cell]), FAINT_INK))
    row, column = cell
    note = "" if valid_cells(score_map.view, score_map.grid)[cell] else ": padding, beside the image"
    parts = [text_lines(f"Cell {row},{column}{note}", [], only)]
    parts += [_bar(name, probability, colour, only) for name, probability, colour in bars]
    return down(parts, 0)


def percent(share: float) -> str:
    """A share as it is written beside names: nothing that is there becomes 0 %, and only all of it 100 %."""
    text = f"{share:.0%}"
    if text == "0%" and share > 0:
        return "<1%"
    return ">99%" if text == "100%" and share < 1 else text


def _bar(name: str, probability: float, colour: Rgb, only: str | None) -> Figure:
    base, height = 16, 38
    track = Frame(0, base + 6, COLUMN_PX, 8, fill=_TRACK)
    filled = Frame(0, base + 6, COLUMN_PX * probability, 8, fill=colour)
    label = words(0, base, name, COLUMN_PX - 2 * _NUMBER_PX, size_px=TEXT_PX, ink=INK, only=only)
    number = words(COLUMN_PX, base, f"{probability:.1%}", _NUMBER_PX, size_px=TEXT_PX, anchor="r", only=only)
    return Figure(COLUMN_PX, height, (track, filled, label, number))
