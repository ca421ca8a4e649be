"""Pictures of mixed images and of the labels of their tokens, before and after TL-Align (arXiv 2210.06455, Figures 5
and 8): red is the own image, blue the partner's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tokenlabels.views.drawing import (
    GAP_PX,
    LINE_PX,
    PAPER,
    SMALLEST_PX,
    Pixels,
    paint_cells,
    panel_size,
    resized,
    sheet,
    write,
)

Shares = NDArray[np.floating]

COLUMNS = ("own image", "partner", "mixed image", "labels by area", "labels after TL-Align")

# From the partner's to the own image over a light middle. Red against blue differs for all kinds of colour vision, and
# the ends are equally dark, so that in grey neither side looks like more.
_STOPS = np.array([(24, 99, 196), (146, 190, 240), (246, 244, 240), (245, 164, 148), (196, 30, 48)], np.float64)
_OPACITY = 0.72  # of cells over the photograph
_LEGEND_PX = (220, 12)


@dataclass(frozen=True, eq=False)
class AlignedPair:
    """A mixed image and its labels.

    Attributes:
        own, partner, mixed: uint8 [H, W, 3], RGB, as the model sees them but for normalisation.
        initial: floating [h0, w0], share of the own image in the embedded patches, 0..1.
        aligned: floating [h, w], share of the own image in the tokens behind the last block.
        target: share of the own image in what is classified, 0..1.
        names: of the own image and of the partner's.

    Raises:
        ValueError: images of different sizes, or shares outside 0..1 or not in two dimensions.
    """

    own: Pixels
    partner: Pixels
    mixed: Pixels
    initial: Shares
    aligned: Shares
    target: float
    names: tuple[str, str]

    def __post_init__(self) -> None:
        for name in ("own", "partner", "mixed"):
            pixels = getattr(self, name)
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape != (*self.own.shape[:2], 3):
                raise ValueError(f"{name} must be uint8 [H, W, 3] of one size, got {pixels.dtype} {pixels.shape}")
        for name in ("initial", "aligned"):
            shares = getattr(self, name)
            if shares.ndim != 2 or not shares.size or not ((shares >= 0) & (shares <= 1)).all():
                raise ValueError(f"{name} must be shares [h, w] in 0..1, got {shares.dtype} {shares.shape}")

    @property
    def panel_size(self) -> tuple[int, int]:
        """(height, width) in pixels at which the images and maps are drawn."""
        height, width, _ = self.own.shape
        return panel_size((height, width), [self.initial.shape, self.aligned.shape])


def draw_pairs(pairs: Sequence[AlignedPair], title: str) -> Image.Image:
    """One row per pair: own image, partner, mixed image, labels by area and labels after TL-Align; and a legend.

    Args:
        pairs: at least one.
        title: of the picture, such as the name of the model.

    Returns:
        RGB image.

    Raises:
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("there is nothing to draw: give a pair at least")
    step = max(max(pair.panel_size[1] for pair in pairs), SMALLEST_PX) + GAP_PX
    return sheet(title, COLUMNS, [_row(pair, step) for pair in pairs], step, _legend())


def colours_of(shares: Shares) -> Pixels:
    """Colours uint8 [..., 3] of shares of the own image [...]: blue 0, light 0.5, red 1."""
    places = np.linspace(0, 1, len(_STOPS))
    return np.stack([np.interp(shares, places, channel) for channel in _STOPS.T], axis=-1).round().astype(np.uint8)


def paint_labels(mixed: Pixels, shares: Shares) -> Pixels:
    """The cells of a label map over a dimmed grey copy of the mixed image.

    Args:
        mixed: uint8 [H, W, 3], the image at the size at which it is shown.
        shares: [h, w], of the own image, 0..1.

    Returns:
        uint8 [H, W, 3], see `paint_cells`.
    """
    return paint_cells(mixed, colours_of(shares), _OPACITY)


def _row(pair: AlignedPair, step_px: int) -> Image.Image:
    """The five panels of a pair, `step_px` apart, each with a line below."""
    size = pair.panel_size
    own, partner, mixed = (resized(pixels, size) for pixels in (pair.own, pair.partner, pair.mixed))
    maps = [Image.fromarray(paint_labels(np.asarray(mixed), shares)) for shares in (pair.initial, pair.aligned)]
    area = float(pair.initial.mean())
    lines = (*pair.names, "", f"own {area:.1%} of the image", f"own {pair.target:.1%} of what is classified")
    row = Image.new("RGB", (len(COLUMNS) * step_px, size[0] + LINE_PX + 2 * GAP_PX), PAPER)
    draw = ImageDraw.Draw(row)
    for index, (panel, line) in enumerate(zip((own, partner, mixed, *maps), lines, strict=True)):
        row.paste(panel, (index * step_px, 0))
        write(draw, (index * step_px, size[0] + 4), line, step_px - GAP_PX)
    return row


def _legend() -> Image.Image:
    """The scale of colours, as they lie on a photograph of medium brightness."""
    width, height = _LEGEND_PX
    legend = Image.new("RGB", (width, height + LINE_PX), PAPER)
    medium = np.full((height, width, 3), 128, np.uint8)
    legend.paste(Image.fromarray(paint_labels(medium, np.linspace(0, 1, width)[None])))
    draw = ImageDraw.Draw(legend)
    for x, anchor, text in ((0, "la", "all partner"), (width // 2, "ma", "half"), (width - 1, "ra", "all own")):
        write(draw, (x, height + 3), text, width, anchor=anchor)
    return legend
