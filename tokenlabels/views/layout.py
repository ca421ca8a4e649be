"""Pictures of the semantic layouts that MoTo finds in images: every position in the colour of its most probable entity
(arXiv 2212.11115, section 5.2.2, Figure 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tokenlabels.views.drawing import (
    FAINT_INK,
    FONT_PX,
    GAP_PX,
    INK,
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
from tokenlabels.views.palette import PALETTE, class_colours
from tokenlabels.views.typeface import PILLOW, load_font

Entities = NDArray[np.integer]

_OPACITY = 0.8  # of cells over the photograph
_TOWARDS = (
    (PAPER, 0.0),
    (PAPER, 0.55),
    (INK, 0.5),
)  # what is mixed into the palette, and how much, from round to round
MAX_ENTITIES = len(PALETTE) * len(_TOWARDS)
_CHIP_PX, _SPACE_PX = 12, 4  # a square of the legend, and what is between it and its text
_LEGEND_FONT_PX = FONT_PX - 2


@dataclass(frozen=True, eq=False)
class ImageLayouts:
    """An image and the layouts that a model finds in it.

    Attributes:
        image: uint8 [H, W, 3], RGB, as the model sees it but for normalisation.
        entities: integer [h, w] of every MoTo, the most probable entity of each position, from 0.
        name: of the image.

    Raises:
        ValueError: no such image or maps.
    """

    image: Pixels
    entities: tuple[Entities, ...]
    name: str

    def __post_init__(self) -> None:
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ValueError(f"image must be uint8 [H, W, 3], got {self.image.dtype} {self.image.shape}")
        for layout in self.entities:
            is_map = layout.ndim == 2 and layout.size and np.issubdtype(layout.dtype, np.integer)
            if not is_map or layout.min() < 0:
                raise ValueError(f"entities must be integer [h, w] from 0, got {layout.dtype} {layout.shape}")

    @property
    def panel_size(self) -> tuple[int, int]:
        """(height, width) in pixels at which the image and its maps are drawn."""
        height, width, _ = self.image.shape
        return panel_size((height, width), [layout.shape for layout in self.entities])


def draw_layouts(images: Sequence[ImageLayouts], titles: Sequence[str], num_entities: int, title: str) -> Image.Image:
    """One row per image: the image, then the layouts, each with a legend: the entities and their shares of positions.

    Args:
        images: at least one, each with as many layouts.
        titles: of the layouts, such as names of modules.
        num_entities: n, at most 36. The same entity of the same MoTo has the same colour in all images.
        title: of the picture, such as the name of the model.

    Returns:
        RGB image.

    Raises:
        ValueError: there are no images, or layouts and their titles, or entities and their number do not fit.
    """
    if not images or not titles:
        raise ValueError("there is nothing to draw: give an image and a layout at least")
    for one in images:
        if len(one.entities) != len(titles) or max(int(layout.max()) for layout in one.entities) >= num_entities:
            raise ValueError(f"{one.name} must have {len(titles)} layouts of entities below {num_entities}")
    colours = entity_colours(num_entities)
    step = max(max(one.panel_size[1] for one in images), SMALLEST_PX) + GAP_PX
    texts = [[_shares(layout, num_entities) for layout in one.entities] for one in images]
    font = load_font(PILLOW, _LEGEND_FONT_PX)
    widest = max(font.getlength(text) for of_image in texts for of_layout in of_image for text in of_layout)
    columns = min(num_entities, max(1, int((step - GAP_PX) // (_CHIP_PX + 3 * _SPACE_PX + widest))))
    rows = [_row(one, step, colours, of_image, columns) for one, of_image in zip(images, texts, strict=True)]
    return sheet(title, ("image", *titles), rows, step)


def entity_colours(num_entities: int) -> Pixels:
    """Distinct colours uint8 [n, 3]: the palette, then lighter and darker ones of it.

    Raises:
        ValueError: more entities than there are colours.
    """
    if num_entities > MAX_ENTITIES:
        raise ValueError(f"pictures have colours for {MAX_ENTITIES} entities, got {num_entities}")
    base = class_colours(range(num_entities)).astype(np.float64)
    rounds = np.arange(num_entities) // len(PALETTE)
    towards = np.array([colour for colour, _ in _TOWARDS], np.float64)[rounds]
    share = np.array([share for _, share in _TOWARDS])[rounds, None]
    return (base + share * (towards - base)).round().astype(np.uint8)


def paint_layout(image: Pixels, entities: Entities, colours: Pixels) -> Pixels:
    """A layout over a dimmed grey copy of the image, see `paint_cells`.

    Args:
        image: uint8 [H, W, 3], at the size at which it is shown.
        entities: integer [h, w], from 0.
        colours: uint8 [n, 3].
    """
    return paint_cells(image, colours[entities], _OPACITY)


def _row(
    one: ImageLayouts, step_px: int, colours: Pixels, texts: Sequence[Sequence[str]], num_columns: int
) -> Image.Image:
    """The image and its layouts, `step_px` apart, its name and their legends below."""
    size = one.panel_size
    image, width = resized(one.image, size), step_px - GAP_PX
    legends = [_legend(of_layout, width, colours, num_columns) for of_layout in texts]
    row = Image.new("RGB", ((1 + len(legends)) * step_px, size[0] + legends[0].height + 2 * GAP_PX), PAPER)
    row.paste(image, (0, 0))
    write(ImageDraw.Draw(row), (0, size[0] + 4), one.name, width)
    for index, (layout, legend) in enumerate(zip(one.entities, legends, strict=True), start=1):
        row.paste(Image.fromarray(paint_layout(np.asarray(image), layout, colours)), (index * step_px, 0))
        row.paste(legend, (index * step_px, size[0] + 4))
    return row


def _legend(texts: Sequence[str], width_px: int, colours: Pixels, num_columns: int) -> Image.Image:
    """The entities in their colours as they lie on a medium grey, row by row; faint where they have no position."""
    legend = Image.new("RGB", (width_px, -(-len(texts) // num_columns) * LINE_PX), PAPER)
    draw = ImageDraw.Draw(legend)
    medium = np.full((1, len(texts), 3), 128, np.uint8)
    chips = paint_layout(medium, np.arange(len(texts))[None], colours)[0].tolist()
    for entity, (text, chip) in enumerate(zip(texts, chips, strict=True)):
        line, column = divmod(entity, num_columns)
        left, top = column * width_px // num_columns, line * LINE_PX + (LINE_PX - _CHIP_PX) // 2
        draw.rectangle((left, top, left + _CHIP_PX - 1, top + _CHIP_PX - 1), tuple(chip))
        ink = FAINT_INK if text.endswith(" 0%") else INK
        place = left + _CHIP_PX + _SPACE_PX, top + _CHIP_PX // 2
        write(draw, place, text, width_px, ink=ink, size_px=_LEGEND_FONT_PX, anchor="lm")
    return legend


def _shares(layout: Entities, num_entities: int) -> list[str]:
    """What the legend says of every entity: its number from 1, and its share of the positions."""
    shares = np.bincount(layout.ravel(), minlength=num_entities) / layout.size
    texts = ("<1%" if 0 < share < 0.005 else f"{share:.0%}" for share in shares.tolist())
    return [f"{number}: {text}" for number, text in enumerate(texts, start=1)]
