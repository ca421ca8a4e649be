"""A picture as data, in pixels from its upper left corner, and how Pillow draws it; vector.py draws the same.

Parts are made at 0, 0, and put together with `across` and `down`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tokenlabels.geometry import Box
from tokenlabels.views.drawing import INK, PAPER, WHOLE, Pixels, Rgb, blend_cells, resized
from tokenlabels.views.typeface import Font, typeset


@dataclass(frozen=True, eq=False)
class Photo:
    """Pixels uint8 [h, w, 3], shown at `width` x `height`."""

    x: float
    y: float
    width: int
    height: int
    pixels: Pixels


@dataclass(frozen=True, eq=False)
class Cells:
    """A map over what was drawn before at `width` x `height`; colours, opacity and view as in `blend_cells`."""

    x: float
    y: float
    width: int
    height: int
    colours: Pixels
    opacity: NDArray[np.floating]
    view: Box = WHOLE


@dataclass(frozen=True)
class Frame:
    """A rectangle, filled or with an outline."""

    x: float
    y: float
    width: float
    height: float
    fill: Rgb | None = None
    outline: Rgb | None = None
    line_px: int = 1


@dataclass(frozen=True, eq=False)
class Words:
    """A line of text on its base line; `anchor` is l, m or r."""

    x: float
    y: float
    text: str
    font: Font
    size_px: int
    ink: Rgb
    anchor: str


Item = Photo | Cells | Frame | Words


@dataclass(frozen=True, eq=False)
class Figure:
    """Items in the order in which they are drawn."""

    width: int
    height: int
    items: tuple[Item, ...] = ()

    def moved(self, dx: float, dy: float) -> tuple[Item, ...]:
        """The items elsewhere."""
        return tuple(replace(item, x=item.x + dx, y=item.y + dy) for item in self.items)

    def padded(self, margin_px: int) -> "Figure":
        """With paper around it."""
        return Figure(self.width + 2 * margin_px, self.height + 2 * margin_px, self.moved(margin_px, margin_px))


def across(parts: Sequence[Figure], gap_px: int) -> Figure:
    """In a row, aligned at the top."""
    items: list[Item] = []
    x = 0
    for part in parts:
        items += part.moved(x, 0)
        x += part.width + gap_px
    return Figure(max(x - gap_px, 0), max((part.height for part in parts), default=0), tuple(items))


def down(parts: Sequence[Figure], gap_px: int) -> Figure:
    """In a column, aligned at the left."""
    items: list[Item] = []
    y = 0
    for part in parts:
        items += part.moved(0, y)
        y += part.height + gap_px
    return Figure(max((part.width for part in parts), default=0), max(y - gap_px, 0), tuple(items))


def words(
    x: float,
    y: float,
    text: str,
    width_px: float,
    *,
    size_px: int,
    ink: Rgb = INK,
    anchor: str = "l",
    only: str | None = None,
) -> Words:
    """Text that fits into its room; `only` as in `typeset`."""
    shown, font = typeset(text, size_px, width_px, only)
    return Words(x, y, shown, font, size_px, ink, anchor)


def draw(figure: Figure) -> Image.Image:
    """The figure in pixels, RGB."""
    picture = Image.new("RGB", (figure.width, figure.height), PAPER)
    pen = ImageDraw.Draw(picture)
    for item in figure.items:
        x, y = round(item.x), round(item.y)
        if isinstance(item, Photo):
            picture.paste(resized(item.pixels, (item.height, item.width)), (x, y))
        elif isinstance(item, Cells):
            below = np.asarray(picture.crop((x, y, x + item.width, y + item.height)), np.float64)
            painted = blend_cells(below, item.colours, item.opacity, item.view)
            picture.paste(Image.fromarray(painted.round().astype(np.uint8)), (x, y))
        elif isinstance(item, Words):
            pen.text((x, y), item.text, item.ink, item.font, anchor=f"{item.anchor}s")
        else:
            corners = (x, y, round(item.x + item.width) - 1, round(item.y + item.height) - 1)
            if corners[2] >= x and corners[3] >= y:  # a bar of nothing
                pen.rectangle(corners, item.fill, item.outline, item.line_px)
    return picture
