"""The targets of a sample: its tokens in the colours of their classes, and a table of these classes.

Legend: N tokens, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tokenlabels.views.drawing import (
    FAINT_INK,
    GAP_PX,
    LINE_PX,
    PAPER,
    WHOLE,
    Grid,
    Pixels,
    Rgb,
    blend_cells,
    cells_of_pixels,
    dimmed,
    write,
)
from tokenlabels.views.palette import class_colours

TABLE_PX = 400

_MAX_COLOURS, _MAX_OTHERS, _SMALLEST_OTHER = 10, 3, 0.005
_REST: Rgb = (176, 180, 186)  # of classes behind the tenth
_FAINTEST, _STRONGEST = 0.15, 0.85  # opacity of a token whose largest target is 0 and 1
_HATCH_PX, _HATCH_LINE_PX, _HATCH = 8, 2, 0.45  # distance of the lines, their width, and their opacity
_NUMBER_PX, _SWATCH_PX, _NAME_LEFT = 64, 14, 20

_Row = tuple[Rgb | None, str, tuple[str, ...]]
"""Of the table: colour, name, numbers."""


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of one sample.

    Attributes:
        probabilities: floating [1 + N, K], of the image, then of its tokens row-major.
        valid: bool [1 + N], false where there is no target.
        grid: (h, w) tokens, h * w = N; None for the image alone.
    """

    probabilities: NDArray[np.floating]
    valid: NDArray[np.bool_]
    grid: Grid | None

    def __post_init__(self) -> None:
        num_rows = 1 + (0 if self.grid is None else self.grid[0] * self.grid[1])
        shape = self.probabilities.shape
        if len(shape) != 2 or shape[0] != num_rows or self.valid.shape != (num_rows,):
            raise ValueError(
                f"targets of grid {self.grid} must be [{num_rows}, K], and valid [{num_rows}]; got {shape} and "
                f"{self.valid.shape}"
            )

    @property
    def of_tokens(self) -> NDArray[np.floating]:
        """[n, K], of the tokens that have one."""
        return self.probabilities[1:][self.valid[1:]]

    def leading(self) -> list[int]:
        """The classes that lead in some token, by falling mean target."""
        of_tokens = self.of_tokens
        ids = np.unique(of_tokens.argmax(axis=1))
        order = np.argsort(-of_tokens[:, ids].sum(axis=0), kind="stable")
        leading: list[int] = ids[order].tolist()
        return leading


def paint_targets(image: Pixels, targets: Targets) -> Pixels:
    """The tokens of an image in the colours of their leading classes, over a dimmed grey copy of it.

    Args:
        image: uint8 [H, W, 3], at the size at which it is shown.
        targets: with tokens.

    Returns:
        uint8 [H, W, 3]. The larger the target of a leading class, the stronger its colour; tokens without target are
        hatched. Ten classes have colours of their own, the others are grey.
    """
    assert targets.grid is not None, "tokens are painted"
    colour_of, grid = _colours(targets.leading()), targets.grid
    leading, largest = targets.probabilities[1:].argmax(axis=1), targets.probabilities[1:].max(axis=1)
    colours = np.array([colour_of.get(id_, _REST) for id_ in leading.tolist()], np.uint8).reshape(*grid, 3)
    valid = targets.valid[1:].reshape(grid)
    opacity = np.where(valid, _FAINTEST + (_STRONGEST - _FAINTEST) * largest.reshape(grid), np.nan)
    painted = blend_cells(np.repeat(dimmed(image), 3, axis=2), colours, opacity)
    height, width, _ = image.shape
    diagonals = (np.arange(height)[:, None] + np.arange(width)) % _HATCH_PX < _HATCH_LINE_PX
    row, column = cells_of_pixels((height, width), grid, WHOLE)
    hatched = (diagonals & ~valid[np.ix_(row, column)])[..., None]
    return np.where(hatched, painted + _HATCH * (255 - painted), painted).round().astype(np.uint8)


def target_table(targets: Targets, names: Sequence[str]) -> Image.Image:
    """A row per class: in how many of the tokens it leads, its mean target over them, and its target for the image.

    Classes that lead in tokens come first, those after the tenth in one row; then others that the image has.

    Args:
        targets: of one sample.
        names: of the classes, by id.
    """
    image, of_tokens, leading = targets.probabilities[0], targets.of_tokens, targets.leading()
    has_tokens = len(of_tokens) > 0

    def numbers(ids: list[int]) -> tuple[str, ...]:
        if not has_tokens:
            return (_percent(float(image[ids].sum())),)
        leads, mean = np.isin(of_tokens.argmax(axis=1), ids).mean(), of_tokens[:, ids].sum(axis=1).mean()
        return tuple(_percent(float(share)) for share in (leads, mean, image[ids].sum()))

    rows: list[_Row] = [(colour, names[id_], numbers([id_])) for id_, colour in _colours(leading).items()]
    if rest := leading[_MAX_COLOURS:]:
        rows.append((_REST, f"{len(rest)} more", numbers(rest)))
    by_target = np.argsort(-image, kind="stable").tolist()
    others = [id_ for id_ in by_target if image[id_] >= _SMALLEST_OTHER and id_ not in leading]
    rows += [(None, names[id_], numbers([id_])) for id_ in others[: _MAX_OTHERS if has_tokens else _MAX_COLOURS]]
    if not has_tokens:
        return _draw_table(("image",), rows, ("image: the image as a whole",))
    notes = (f"leads in, mean: of the {len(of_tokens)} tokens with a target", "image: the image as a whole")
    return _draw_table(("leads in", "mean", "image"), rows, notes)


def _colours(leading: list[int]) -> dict[int, Rgb]:
    shown = leading[:_MAX_COLOURS]
    return {id_: tuple(colour) for id_, colour in zip(shown, class_colours(shown).tolist(), strict=True)}


def _draw_table(headings: Sequence[str], rows: Sequence[_Row], notes: Sequence[str]) -> Image.Image:
    table = Image.new("RGB", (TABLE_PX, (1 + len(rows) + len(notes)) * LINE_PX + GAP_PX), PAPER)
    draw = ImageDraw.Draw(table)
    rights = [TABLE_PX - _NUMBER_PX * number for number in reversed(range(len(headings)))]
    room = rights[0] - _NUMBER_PX - _NAME_LEFT
    write(draw, (0, 0), "targets", room)
    for right, heading in zip(rights, headings, strict=True):
        write(draw, (right, 0), heading, _NUMBER_PX, ink=FAINT_INK, anchor="ra")
    for line, (colour, name, numbers) in enumerate(rows, start=1):
        y = line * LINE_PX
        if colour is not None:
            draw.rectangle((0, y + 2, _SWATCH_PX - 1, y + 1 + _SWATCH_PX), fill=colour)
        write(draw, (_NAME_LEFT, y), name, room)
        for right, number in zip(rights, numbers, strict=True):
            write(draw, (right, y), number, _NUMBER_PX, anchor="ra")
    for line, note in enumerate(notes, start=1 + len(rows)):
        write(draw, (0, line * LINE_PX + GAP_PX), note, TABLE_PX, ink=FAINT_INK)
    return table


def _percent(share: float) -> str:
    return "<1%" if 0 < share < _SMALLEST_OTHER else f"{share:.0%}"
