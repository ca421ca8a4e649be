"""An image between the two maps that differ, with the same colour for the same class in both."""

from dataclasses import replace

import numpy as np
from PIL import Image

from tokenlabels.summary import ClassShare
from tokenlabels.types import ScoreMap
from tokenlabels.views.figure import Figure, across, down, draw
from tokenlabels.views.legend import class_table, text_lines
from tokenlabels.views.palette import ColouredMap, class_colours
from tokenlabels.views.panels import SPACE_PX, STRONGEST, Stage


def draw_difference(
    image: Image.Image,
    first: ScoreMap,
    second: ScoreMap,
    names: tuple[str, ...],
    *,
    titles: tuple[str, str],
    lines: tuple[str, ...] = (),
) -> Image.Image:
    """Side by side: the image, the first map, the second map; below each map its classes.

    Args:
        image: upright.
        first, second: maps of it, of the same classes.
        names: of the classes, by id.
        titles: of the maps.
        lines: below the image.
    """
    one, other = _same_colours(ColouredMap.of(first, names), ColouredMap.of(second, names))
    photo = Stage.of(image, first.view, first.grid).photo(f"image, {image.width} x {image.height} px")
    columns = [down([photo, text_lines(first.key, lines, None)], SPACE_PX)]
    for score_map, coloured, title in zip((first, second), (one, other), titles, strict=True):
        table = class_table("Classes", coloured, (), None)
        columns.append(down([_panel(image, score_map, coloured, title), table], SPACE_PX))
    return draw(across(columns, SPACE_PX).padded(SPACE_PX))


def _panel(image: Image.Image, score_map: ScoreMap, coloured: ColouredMap, title: str) -> Figure:
    rows, columns = score_map.grid
    stage = Stage.of(image, score_map.view, score_map.grid)
    opacity = np.where(coloured.valid, STRONGEST * coloured.confidence, np.nan)
    return stage.cells(f"{title}, {rows} x {columns}", coloured.cell_colours(), opacity)


def _same_colours(first: ColouredMap, second: ColouredMap) -> tuple[ColouredMap, ColouredMap]:
    """Colours by falling probability in either map, so that the most probable classes have different ones."""
    leading: list[ClassShare] = sorted(
        (*first.leading, *second.leading), key=lambda share: (-share.mean_probability, share.class_id)
    )
    ids = list(dict.fromkeys(share.class_id for share in leading))
    colour_of = dict(zip(ids, class_colours(ids), strict=True))
    one, other = (
        replace(
            coloured,
            colours=np.array([colour_of[share.class_id] for share in coloured.leading], np.uint8).reshape(-1, 3),
        )
        for coloured in (first, second)
    )
    return one, other
