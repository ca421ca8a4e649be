"""Figures as SVG and PDF, with matplotlib: text stays text, cells are rectangles, photographs are embedded."""

import io
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from tokenlabels.views.drawing import GRID_LINE, PAPER, Rgb, has_lines
from tokenlabels.views.figure import Cells, Figure, Item, Photo, Words

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tokenlabels",
    "pdf.fonttype": 42,
    "font.family": ["DejaVu Sans", "sans-serif"],
}
_DPI = 72  # so that a point is a pixel


def encode(figure: Figure, kind: str) -> bytes:
    """A figure, whose texts have to be set in DejaVu Sans, as "svg" or "pdf"."""
    out = io.BytesIO()
    with rc_context(_STYLE):
        canvas = Canvas((figure.width / _DPI, figure.height / _DPI), _DPI, facecolor=_colour(PAPER))
        axes = canvas.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for place, item in enumerate(figure.items):
            _add(axes, item, place)
        axes.set_xlim(0, figure.width)
        axes.set_ylim(figure.height, 0)
        canvas.savefig(out, format=kind, metadata={"Date" if kind == "svg" else "CreationDate": None})
    return out.getvalue()


def _add(axes: Axes, item: Item, zorder: int) -> None:
    if isinstance(item, Photo):
        edges = (item.x, item.x + item.width, item.y + item.height, item.y)
        axes.imshow(item.pixels, extent=edges, aspect="auto", interpolation="none", zorder=zorder)
    elif isinstance(item, Cells):
        _add_cells(axes, item, zorder)
    elif isinstance(item, Words):
        ha: Any = {"l": "left", "m": "center", "r": "right"}[item.anchor]
        ink = _colour(item.ink)
        axes.text(item.x, item.y, item.text, size=item.size_px, color=ink, ha=ha, parse_math=False, zorder=zorder)
    else:
        line = item.line_px if item.outline else 0
        place, size = (item.x + line / 2, item.y + line / 2), (item.width - line, item.height - line)
        fill, outline = _colour(item.fill), _colour(item.outline)  # Pillow's outlines lie inside too
        axes.add_patch(Rectangle(place, *size, facecolor=fill, edgecolor=outline, linewidth=line, zorder=zorder))


def _add_cells(axes: Axes, cells: Cells, zorder: int) -> None:
    """Rectangles where the map is drawn, cut at the edges of the panel, and lines between them."""
    rows, columns = cells.colours.shape[:2]
    left, top, right, bottom = cells.view
    x = cells.x + cells.width * np.clip(left + (right - left) * np.arange(columns + 1) / columns, 0, 1)
    y = cells.y + cells.height * np.clip(top + (bottom - top) * np.arange(rows + 1) / rows, 0, 1)
    drawn = [
        (row, column)
        for row, column in np.argwhere(np.isfinite(cells.opacity)).tolist()
        if x[column] < x[column + 1] and y[row] < y[row + 1]
    ]
    corners = [[(x[c], y[r]), (x[c + 1], y[r]), (x[c + 1], y[r + 1]), (x[c], y[r + 1])] for r, c in drawn]
    colours = [(*cells.colours[cell] / 255, cells.opacity[cell]) for cell in drawn]
    axes.add_collection(PolyCollection(corners, facecolors=colours, linewidths=0, zorder=zorder), autolim=False)
    if has_lines((cells.height, cells.width), (rows, columns), cells.view):
        lines = [[(x[c], y[r + 1]), (x[c], y[r]), (x[c + 1], y[r])] for r, c in drawn]
        white = (1, 1, 1, GRID_LINE)
        axes.add_collection(LineCollection(lines, colors=[white], linewidths=1, zorder=zorder), autolim=False)


def _colour(colour: Rgb | None) -> Any:
    return "none" if colour is None else tuple(channel / 255 for channel in colour)
