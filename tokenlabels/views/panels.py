"""Panels: an image and what its labels say, at the same size, each with a caption; maps of values with a colour bar.

Legend: H x W cells, k stored classes per cell.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenlabels.geometry import Box
from tokenlabels.views.drawing import (
    FAINT_INK,
    INK,
    PAPER,
    Pixels,
    cells_of_pixels,
    dimmed,
    on_map,
)
from tokenlabels.views.figure import Cells, Figure, Frame, Item, Photo, words
from tokenlabels.views.palette import heat_colours

PANEL_PX, MIN_COLUMN_PX = 392, 240  # 392: cells of 7, 8, 14 and 28 rows are whole pixels
TEXT_PX, SMALL_PX, CAPTION_PX = 14, 12, 24
SPACE_PX = 24
WIDE_PX = 2 * PANEL_PX + SPACE_PX
STRONGEST = 0.8  # opacity of a cell of which the teacher is certain

_THINNEST_PX = 48
_HEAT_OPACITY, _SMALLEST_SCALE = 0.85, 0.001
_BAR_PX = 10
_UNCOVERED = 0.45  # brightness of what the map does not cover


@dataclass(frozen=True, eq=False)
class Stage:
    """An image at the size at which all of its panels show it.

    Attributes:
        pixels: uint8 [h, w, 3], RGB; `width` x `height` of the panels, or a multiple of it.
        view: the part of the image that the map covers.
        cell: row and column of the cell that is outlined in every panel, or None.
        only: the one font to use, or None, see `typeset`.
    """

    pixels: Pixels
    width: int
    height: int
    view: Box
    grid: tuple[int, int]
    cell: tuple[int, int] | None = None
    only: str | None = None

    @classmethod
    def of(
        cls,
        image: Image.Image,
        view: NDArray[np.floating],
        grid: tuple[int, int],
        cell: tuple[int, int] | None = None,
        only: str | None = None,
        scale: int = 1,
        room_px: int = PANEL_PX,
    ) -> "Stage":
        """The image as large as `room_px` across and `PANEL_PX` down allow, with `scale` pixels per pixel of a panel.

        Very long images are drawn wider than they are, so that something can be seen of them.
        """
        ratio = min(room_px / image.width, PANEL_PX / image.height)
        width, height = (max(_THINNEST_PX, round(side * ratio)) for side in image.size)
        shown = image.convert("RGB").resize((scale * width, scale * height), Image.Resampling.LANCZOS)
        left, top, right, bottom = view.tolist()
        return cls(np.asarray(shown), width, height, (left, top, right, bottom), grid, cell, only)

    @property
    def column_px(self) -> int:
        """Width of a panel with its caption."""
        return max(self.width, MIN_COLUMN_PX)

    def photo(self, caption: str, outline: Box | None = None) -> Figure:
        """The image itself; `outline` is a crop of it that is shown elsewhere."""
        items = [Photo(0, 0, self.width, self.height, self.pixels)]
        return self._panel(caption, (*items, *(self._outline(outline) if outline else ())))

    def cells(self, caption: str, colours: Pixels, opacity: NDArray[np.floating]) -> Figure:
        """A map over a grey copy; what no cell covers, or one of opacity NaN, is dark."""
        return self._panel(caption, self._map(colours, opacity))

    def heat(self, caption: str, values: NDArray[np.floating], is_valid: NDArray[np.bool_], unit: str) -> Figure:
        """Values [H, W] in 0..1 as colours, with a colour bar below that says per cent of what they are."""
        highest = nice_ceiling(float(values[is_valid].max(initial=0)))
        opacity = np.where(is_valid, _HEAT_OPACITY, np.nan)
        items = self._map(heat_colours(values / highest), opacity)
        return self._panel(caption, items, _colour_bar(self.column_px, highest, unit, self.only))

    def _map(self, colours: Pixels, opacity: NDArray[np.floating]) -> tuple[Item, ...]:
        row, column = cells_of_pixels(self.pixels.shape[:2], self.grid, self.view)
        is_covered = on_map(row, column) & np.isfinite(opacity)[np.ix_(row, column)]
        grey = dimmed(self.pixels) * np.where(is_covered, 1, _UNCOVERED)[..., None]
        below = np.repeat(grey.round().astype(np.uint8), 3, axis=2)
        size = (0, 0, self.width, self.height)
        return Photo(*size, below), Cells(*size, colours, opacity, self.view)

    def _panel(self, caption: str, items: tuple[Item, ...], below: Figure | None = None) -> Figure:
        rows, columns = self.grid
        if self.cell is not None:
            (row, column), (left, top, right, bottom) = self.cell, self.view
            wide, high = (right - left) / columns, (bottom - top) / rows
            x, y = left + column * wide, top + row * high
            items = (*items, *self._outline((x, y, x + wide, y + high)))
        return captioned(Figure(self.width, self.height, items), caption, self.column_px, self.only, below)

    def _outline(self, box: Box) -> tuple[Item, ...]:
        """White within black, which is seen on everything, around the box; nothing of one outside the image."""
        left, top, right, bottom = (
            round(side * min(max(corner, 0), 1))
            for corner, side in zip(box, 2 * (self.width, self.height), strict=True)
        )
        if left >= right or top >= bottom:
            return ()
        return tuple(
            Frame(left - by, top - by, right - left + 2 * by, bottom - top + 2 * by, outline=ink, line_px=line_px)
            for by, ink, line_px in ((2, PAPER, 2), (3, INK, 1))
        )


def captioned(
    panel: Figure, caption: str, width_px: int, only: str | None = None, below: Figure | None = None
) -> Figure:
    """A panel below its caption."""
    head = words(0, CAPTION_PX - 8, caption, width_px, size_px=TEXT_PX, ink=FAINT_INK, only=only)
    items: tuple[Item, ...] = (head, *panel.moved(0, CAPTION_PX))
    height = CAPTION_PX + panel.height
    if below is not None:
        items, height = (*items, *below.moved(0, height)), height + below.height
    return Figure(max(panel.width, width_px), height, items)


def nice_ceiling(value: float) -> float:
    """The smallest of 0.001, 0.002, 0.005, 0.01 ... 1 that is not below the value; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(max(value, _SMALLEST_SCALE)))
    return min(1.0, next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-6)))


def _colour_bar(width_px: int, highest: float, unit: str, only: str | None) -> Figure:
    """The colours as they lie on medium grey, from 0 % to the highest value."""
    medium = dimmed(np.full((1, 1, 3), 128, np.uint8))
    colours = heat_colours(np.linspace(0, 1, 256)[None])
    bar = (medium + _HEAT_OPACITY * (colours - medium)).round().astype(np.uint8)
    y, room = 8 + _BAR_PX + SMALL_PX + 2, width_px / 6
    low, middle, high = (
        words(x, y, text, of_room * room, size_px=SMALL_PX, ink=FAINT_INK, anchor=anchor, only=only)
        for x, text, of_room, anchor in (
            (0, "0%", 1, "l"),
            (width_px / 2, unit, 4, "m"),
            (width_px, f"{100 * highest:.4g}%", 1, "r"),
        )
    )
    return Figure(width_px, y + 4, (Photo(0, 8, width_px, _BAR_PX, bar), low, middle, high))
