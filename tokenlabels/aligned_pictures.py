"""Pictures of mixed images and of the labels of their tokens, before and after TL-Align (arXiv 2210.06455, Figures 5
and 8): red is the own image, blue the partner's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tokenlabels.checks import Grid

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Pixels = NDArray[np.uint8]
Shares = NDArray[np.floating]

COLUMNS = ("own image", "partner", "mixed image", "labels by area", "labels after TL-Align")

# From the partner's to the own image over a light middle. Red against blue differs for all kinds of colour vision, and
# the ends are equally dark, so that in grey neither side looks like more.
_STOPS = np.array([(24, 99, 196), (146, 190, 240), (246, 244, 240), (245, 164, 148), (196, 30, 48)], np.float64)
_OPACITY = 0.72  # of cells over the photograph
_DIMMED = (40.0, 0.6)  # black level and contrast of the photograph below
_GRID_LINE, _MIN_LINED_CELL_PX = 0.3, 8  # opacity of lines, and the smallest cells that have them

_SMALLEST_PX, _WANTED_PX, _LARGEST_PX = 192, 256, 512  # of the longer side of a panel
_MARGIN_PX, _GAP_PX, _LINE_PX, _FONT_PX, _TITLE_PX = 24, 12, 22, 14, 18
_LEGEND_PX = (220, 12)
_PAPER, _INK, _FAINT_INK = (255, 255, 255), (32, 33, 36), (95, 99, 104)


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
        return _panel_size((height, width), [self.initial.shape, self.aligned.shape])


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
    step = max(max(pair.panel_size[1] for pair in pairs), _SMALLEST_PX) + _GAP_PX
    rows = [_row(pair, step) for pair in pairs]
    top = _MARGIN_PX + _LEGEND_PX[1] + 2 * _GAP_PX + 2 * _LINE_PX
    width = 2 * _MARGIN_PX + len(COLUMNS) * step - _GAP_PX
    picture = Image.new("RGB", (width, top + sum(row.height for row in rows) + _MARGIN_PX - _GAP_PX), _PAPER)
    draw, font, title_font = ImageDraw.Draw(picture), _font(_FONT_PX), _font(_TITLE_PX)
    room = width - 2 * _MARGIN_PX - _LEGEND_PX[0] - 2 * _GAP_PX
    draw.text((_MARGIN_PX, _MARGIN_PX), _fitted(title, room, title_font), _INK, title_font, anchor="lt")
    picture.paste(_legend(), (width - _MARGIN_PX - _LEGEND_PX[0], _MARGIN_PX))
    for index, heading in enumerate(COLUMNS):
        draw.text((_MARGIN_PX + index * step, top - _LINE_PX), heading, _FAINT_INK, font)
    for row in rows:
        picture.paste(row, (_MARGIN_PX, top))
        top += row.height
    return picture


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
        uint8 [H, W, 3]. A pixel belongs to the cell that holds its centre; lines between cells are the first pixels of
        the cells below and to the right.
    """
    black, contrast = _DIMMED
    grey = black + contrast * np.asarray(Image.fromarray(mixed).convert("L"), np.float64)[..., None]
    row, column = (_cells(pixels, cells) for pixels, cells in zip(mixed.shape[:2], shares.shape, strict=True))
    painted = grey + _OPACITY * (colours_of(shares)[np.ix_(row, column)] - grey)
    if min(mixed.shape[0] / shares.shape[0], mixed.shape[1] / shares.shape[1]) >= _MIN_LINED_CELL_PX:
        lines = (np.diff(row, prepend=0) > 0)[:, None] | (np.diff(column, prepend=0) > 0)
        painted = np.where(lines[..., None], painted + _GRID_LINE * (255 - painted), painted)
    return painted.round().astype(np.uint8)


def _cells(num_pixels: int, num_cells: int) -> NDArray[np.intp]:
    """The cell of every pixel along one side."""
    return (2 * np.arange(num_pixels) + 1) * num_cells // (2 * num_pixels)


def _panel_size(size: Grid, grids: Sequence[tuple[int, ...]]) -> Grid:
    """A readable size of the same aspect at which all cells are whole pixels: the image's own, if it is one."""
    longest = max(size)
    if _SMALLEST_PX <= longest <= _LARGEST_PX:
        return size
    unit = math.gcd(*size)
    sizes = [(size[0] // unit * k, size[1] // unit * k) for k in range(1, _LARGEST_PX * unit // longest + 1)]
    whole = [(h, w) for h, w in sizes if all(h % rows == 0 and w % columns == 0 for rows, columns in grids)]
    return min(whole, key=lambda fitting: abs(max(fitting) - _WANTED_PX), default=size)


def _row(pair: AlignedPair, step_px: int) -> Image.Image:
    """The five panels of a pair, `step_px` apart, each with a line below."""
    height, width = pair.panel_size
    own, partner, mixed = (
        Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        for pixels in (pair.own, pair.partner, pair.mixed)
    )
    maps = [Image.fromarray(paint_labels(np.asarray(mixed), shares)) for shares in (pair.initial, pair.aligned)]
    area = float(pair.initial.mean())
    lines = (*pair.names, "", f"own {area:.1%} of the image", f"own {pair.target:.1%} of what is classified")
    row = Image.new("RGB", (len(COLUMNS) * step_px, height + _LINE_PX + 2 * _GAP_PX), _PAPER)
    draw, font = ImageDraw.Draw(row), _font(_FONT_PX)
    for index, (panel, line) in enumerate(zip((own, partner, mixed, *maps), lines, strict=True)):
        row.paste(panel, (index * step_px, 0))
        draw.text((index * step_px, height + 4), _fitted(line, step_px - _GAP_PX, font), _INK, font)
    return row


def _legend() -> Image.Image:
    """The scale of colours, as they lie on a photograph of medium brightness."""
    width, height = _LEGEND_PX
    legend = Image.new("RGB", (width, height + _LINE_PX), _PAPER)
    medium = np.full((height, width, 3), 128, np.uint8)
    legend.paste(Image.fromarray(paint_labels(medium, np.linspace(0, 1, width)[None])))
    draw, font = ImageDraw.Draw(legend), _font(_FONT_PX)
    for x, anchor, text in ((0, "la", "all partner"), (width // 2, "ma", "half"), (width - 1, "ra", "all own")):
        draw.text((x, height + 3), text, _INK, font, anchor=anchor)
    return legend


def _fitted(text: str, width_px: float, font: Font) -> str:
    """The text, cut with an ellipsis where it would be wider."""
    shown = text = " ".join(text.split())
    while text and font.getlength(shown) > width_px:
        text = text[:-1]
        shown = f"{text.rstrip()}…"
    return shown


def _font(size_px: int) -> Font:
    return ImageFont.load_default(size_px)
