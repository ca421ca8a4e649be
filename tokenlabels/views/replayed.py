"""What training sees of an image in an epoch: its crop, its partner, the mixed input, and the targets of the loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tokenlabels.geometry import Box
from tokenlabels.views.aligned import paint_labels
from tokenlabels.views.drawing import (
    FAINT_INK,
    GAP_PX,
    INK,
    LINE_PX,
    MARGIN_PX,
    PAPER,
    SMALLEST_PX,
    TITLE_PX,
    Grid,
    Pixels,
    panel_size,
    resized,
    write,
)
from tokenlabels.views.targets import TABLE_PX, Targets, paint_targets, target_table

HEADINGS = ("the image and its crop", "its crop, augmented", "its partner", "what the model gets", "whose pixels")

_MAX_PER_ROW = 3
_OUTSIDE = 0.4  # brightness of what is not in the crop


@dataclass(frozen=True, eq=False)
class Shown:
    """An image with what is to be written below it.

    Attributes:
        pixels: uint8 [H, W, 3], RGB.
        lines: key, class and the like.
    """

    pixels: Pixels
    lines: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[2] != 3:
            raise ValueError(f"pixels must be uint8 [H, W, 3], got {self.pixels.dtype} {self.pixels.shape}")


@dataclass(frozen=True, eq=False)
class Mixed:
    """What becomes of a sample that is mixed.

    Attributes:
        partner: the augmented crop that it is mixed with.
        input: what the model gets.
        own_share: [h, w] of the plan, 0..1: what is left of the sample itself.
    """

    partner: Shown
    input: Shown
    own_share: NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class ReplayedSample:
    """A sample of a training batch.

    Attributes:
        source: the whole image.
        box: its crop, xyxy in 0..1.
        own: the crop, augmented.
        mixed: None where the sample stays as it is.
        targets: of what the model gets, or None.
    """

    source: Shown
    box: Box
    own: Shown
    mixed: Mixed | None
    targets: Targets | None


def draw_replayed(sample: ReplayedSample, names: Sequence[str], title: str, facts: Sequence[str]) -> Image.Image:
    """All panels with their captions, and a table of the targets.

    Args:
        sample: what is drawn.
        names: of the classes, by id.
        title, facts: lines above.

    Returns:
        RGB image.
    """
    panels = _panels(sample)
    table = None if sample.targets is None else target_table(sample.targets, names)
    rows = [panels[first : first + _MAX_PER_ROW] for first in range(0, len(panels), _MAX_PER_ROW)]
    step = max(SMALLEST_PX, *(panel.picture.width for panel in panels)) + GAP_PX
    heights = [max(panel.height for panel in row) for row in rows]
    top = MARGIN_PX + TITLE_PX + GAP_PX + len(facts) * LINE_PX + GAP_PX
    width = 2 * MARGIN_PX + max(map(len, rows)) * step - GAP_PX + (0 if table is None else MARGIN_PX + TABLE_PX)
    picture = Image.new("RGB", (width, top + max(sum(heights), table.height if table else 0) + MARGIN_PX), PAPER)
    draw, room = ImageDraw.Draw(picture), width - 2 * MARGIN_PX
    write(draw, (MARGIN_PX, MARGIN_PX), title, room, size_px=TITLE_PX, anchor="lt")
    for line, fact in enumerate(facts):
        write(draw, (MARGIN_PX, MARGIN_PX + TITLE_PX + GAP_PX + line * LINE_PX), fact, room, ink=FAINT_INK)
    if table is not None:
        picture.paste(table, (width - MARGIN_PX - TABLE_PX, top))
    for row, height in zip(rows, heights, strict=True):
        for index, panel in enumerate(row):
            panel.put(picture, MARGIN_PX + index * step, top, step - GAP_PX)
        top += height
    return picture


@dataclass(frozen=True, eq=False)
class _Panel:
    heading: str
    picture: Image.Image
    lines: tuple[str, ...]

    @property
    def height(self) -> int:
        return (1 + len(self.lines)) * LINE_PX + self.picture.height + 2 * GAP_PX

    def put(self, onto: Image.Image, left: int, top: int, room: int) -> None:
        draw = ImageDraw.Draw(onto)
        write(draw, (left, top), self.heading, room)
        onto.paste(self.picture, (left, top + LINE_PX))
        below = top + LINE_PX + self.picture.height + GAP_PX // 2
        for number, line in enumerate(self.lines):
            write(draw, (left, below + number * LINE_PX), line, room, ink=FAINT_INK)


def _panels(sample: ReplayedSample) -> list[_Panel]:
    height, width, _ = sample.own.pixels.shape
    grid = None if sample.targets is None else sample.targets.grid
    size = panel_size((height, width), [] if grid is None else [grid])
    source, own, partner, given, whose = HEADINGS
    panels = [
        _Panel(source, _with_crop(sample.source.pixels, sample.box, size), sample.source.lines),
        _Panel(own, resized(sample.own.pixels, size), sample.own.lines),
    ]
    if sample.mixed is not None:
        shown = ((partner, sample.mixed.partner), (given, sample.mixed.input))
        panels += [_Panel(heading, resized(image.pixels, size), image.lines) for heading, image in shown]
    given_pixels = np.asarray(panels[-1].picture)
    if sample.targets is not None and grid is not None:
        painted = Image.fromarray(paint_targets(given_pixels, sample.targets))
        lines: tuple[str, ...] = ("fainter: smaller targets",)
        if not sample.targets.valid[1:].all():
            lines += ("hatched: no target",)
        panels.append(_Panel(f"targets of its {grid[0]} x {grid[1]} tokens", painted, lines))
    if sample.mixed is not None:
        painted = Image.fromarray(paint_labels(given_pixels, sample.mixed.own_share))
        share = float(sample.mixed.own_share.mean())
        panels.append(_Panel(whose, painted, (f"red: {share:.1%} its own", f"blue: {1 - share:.1%} its partner's")))
    return panels


def _with_crop(image: Pixels, box: Box, size: Grid) -> Image.Image:
    """The image as large as fits into a panel, dimmed around the crop."""
    scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    shown = np.asarray(resized(image, (height, width)))
    left, top, right, bottom = (
        round(edge * side) for edge, side in zip(box, (width, height, width, height), strict=True)
    )
    inside = np.zeros((height, width, 1), np.bool_)
    inside[top:bottom, left:right] = True
    picture = Image.fromarray(np.where(inside, shown, shown * _OUTSIDE).round().astype(np.uint8))
    edges = (left, top, max(right - 1, left), max(bottom - 1, top))
    draw = ImageDraw.Draw(picture)
    draw.rectangle(edges, outline=INK, width=3)
    draw.rectangle(edges, outline=PAPER, width=2)
    return picture
