"""An image beside its labels: the map, how sure it is, a cell, a class, and the targets of a crop.

A cell takes the colour of its leading class, the stronger the surer the teacher was. Padding cells of a letterboxed
map, which show nothing of the image, stay empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenlabels.audit.measures import cell_entropy
from tokenlabels.geometry import valid_cells
from tokenlabels.summary import ClassShare, class_name, summarise_map
from tokenlabels.types import ScoreMap
from tokenlabels.views.crop import StudentCrop, coloured_targets, crop_panels
from tokenlabels.views.drawing import FAINT_INK, MARGIN_PX, rgb
from tokenlabels.views.figure import Figure, across, down, draw, words
from tokenlabels.views.legend import MAX_CLASSES, cell_bars, class_table, percent, text_lines
from tokenlabels.views.palette import ColouredMap
from tokenlabels.views.panels import PANEL_PX, SMALL_PX, SPACE_PX, STRONGEST, TEXT_PX, WIDE_PX, Stage

_KEY_PX = 18
_WIDE = 1.6  # width over height
_FAINTER = "The fainter a cell, the less sure its label."


@dataclass(frozen=True, eq=False)
class Labelled:
    """An image, its labels, and what is to be drawn of them.

    Attributes:
        image: the image that was labelled, upright, any size and mode.
        score_map: its map.
        names: of all classes, by id.
        label: the data set's own class, or None.
        source: one line: the teacher and the settings.
        cell: row and column of a cell whose classes are listed, or None.
        class_id: a class that is drawn as a heat map, or None.
        crop: a crop and its targets, or None.
    """

    image: Image.Image
    score_map: ScoreMap
    names: tuple[str, ...]
    label: int | None = None
    source: str = ""
    cell: tuple[int, int] | None = None
    class_id: int | None = None
    crop: StudentCrop | None = None


def labelled_figure(labelled: Labelled, *, only: str | None = None, scale: int = 1) -> Figure:
    """Everything about one image.

    Args:
        labelled: what to draw.
        only: the one font to use, see `tokenlabels.views.typeface.typeset`.
        scale: pixels of photographs per pixel of the figure.
    """
    score_map, names = labelled.score_map, labelled.names
    arguments = (labelled.image, score_map.view, score_map.grid, labelled.cell, only, scale)
    stage, small = Stage.of(*arguments, _room(labelled.image)), Stage.of(*arguments)
    coloured = ColouredMap.of(score_map, names).with_distinct_colours(MAX_CLASSES)
    shares = summarise_map(score_map, names).classes
    width, height = labelled.image.size
    is_distorted = abs(stage.width * height - stage.height * width) > 2 * max(width, height)
    size = f"{width} x {height} px" + (", not to scale" if is_distorted else "")
    photo = stage.photo(f"image, {size}", labelled.crop.box if labelled.crop else None)
    rows = [_flowing([photo, _map_panel(stage, coloured)]), _flowing(_heat_panels(small, labelled))]
    side = [_classes(coloured, shares, only), _verdict(labelled, shares, only)]
    in_legend = zip(coloured.leading[:MAX_CLASSES], coloured.colours[:MAX_CLASSES], strict=True)
    colours = {share.class_id: rgb(colour) for share, colour in in_legend}
    if labelled.cell is not None:
        side.append(cell_bars(score_map, labelled.cell, names, colours, only))
    if labelled.crop is not None:
        targets = coloured_targets(labelled.crop, names, colours)
        rows.append(crop_panels(labelled.crop, targets, only, scale))
        side.append(class_table("Targets of the crop", targets, (), only, "tokens"))
    body = across([down(rows, SPACE_PX), down(side, SPACE_PX)], SPACE_PX)
    head = (
        words(0, _KEY_PX, score_map.key, body.width, size_px=_KEY_PX, only=only),
        words(0, _KEY_PX + 20, labelled.source, body.width, size_px=SMALL_PX, ink=FAINT_INK, only=only),
    )
    return down([Figure(body.width, _KEY_PX + 24, head), body], SPACE_PX // 2).padded(MARGIN_PX)


def overlay(image: Image.Image, score_map: ScoreMap, class_names: tuple[str, ...] | None) -> Image.Image:
    """Draw an image, its label map over a grey copy of it, and a legend.

    Args:
        image: the image that was labelled, upright, any size and mode.
        score_map: its map.
        class_names: names by class id, or None where nobody knows them.

    Returns:
        RGB image. What the map does not cover is dark; the legend gives, for each class that leads somewhere, the
        share of cells in which it does, and its mean probability over the map.
    """
    stage = Stage.of(image, score_map.view, score_map.grid, room_px=_room(image))
    coloured = ColouredMap.of(score_map, class_names).with_distinct_colours(MAX_CLASSES)
    pictures = _flowing([stage.photo(score_map.key), _map_panel(stage, coloured)])
    legend = _classes(coloured, summarise_map(score_map, class_names).classes, None)
    return draw(across([pictures, legend], SPACE_PX).padded(MARGIN_PX))


def _room(image: Image.Image) -> int:
    """Width of the two main panels: a wide image lies above its map, others beside it."""
    return WIDE_PX if image.width >= _WIDE * image.height else PANEL_PX


def _flowing(panels: Sequence[Figure]) -> Figure:
    """Panels of one size in rows of as many as there is room for."""
    per_row = max(1, (WIDE_PX + SPACE_PX) // (panels[0].width + SPACE_PX))
    rows = [across(panels[start : start + per_row], SPACE_PX) for start in range(0, len(panels), per_row)]
    return down(rows, SPACE_PX)


def _map_panel(stage: Stage, coloured: ColouredMap) -> Figure:
    rows, columns = stage.grid
    opacity = np.where(coloured.valid, STRONGEST * coloured.confidence, np.nan)
    return stage.cells(f"{rows} x {columns} token labels", coloured.cell_colours(), opacity)


def _heat_panels(stage: Stage, labelled: Labelled) -> list[Figure]:
    """Entropy, tail and, where one is asked for, a class."""
    score_map, num_classes = labelled.score_map, len(labelled.names)
    is_valid = valid_cells(score_map.view, score_map.grid)
    probabilities, tail = score_map.probabilities(), score_map.tail.astype(np.float32)

    def panel(what: str, values: NDArray[np.float32], unit: str, of: str = "") -> Figure:
        inside = values[is_valid]
        mean = percent(float(inside.mean(dtype=np.float64))) if inside.size else "unknown"
        return stage.heat(f"{what}, mean {mean}{of}", values, is_valid, unit)

    panels = [
        panel("entropy", cell_entropy(probabilities, tail, num_classes), f"share of log {num_classes:,}"),
        panel("tail", tail, f"mass of {num_classes - score_map.k:,} other classes"),
    ]
    if labelled.class_id is not None:
        of_class = np.where(score_map.classes == labelled.class_id, probabilities, 0).sum(axis=-1)
        panels.append(panel("class", of_class, "0% where it is not kept", f": {labelled.names[labelled.class_id]}"))
    return panels


def _classes(coloured: ColouredMap, shares: tuple[ClassShare, ...], only: str | None) -> Figure:
    others = sorted((one for one in shares if not one.share_of_cells), key=lambda one: -one.mean_probability)
    table = class_table("Classes of the map", coloured, others, only)
    hint = words(0, TEXT_PX, _FAINTER, table.width, size_px=SMALL_PX, ink=FAINT_INK, only=only)
    return down([table, Figure(table.width, TEXT_PX + 4, (hint,))], 0)


def _verdict(labelled: Labelled, shares: tuple[ClassShare, ...], only: str | None) -> Figure:
    """What the data set says, and whether the teacher agrees."""
    best = max(shares, key=lambda one: one.mean_probability, default=None)
    teacher = f"{best.name}, {percent(best.mean_probability)}" if best else "no cell shows the image"
    if labelled.label is None:
        return text_lines("Whole image", [f"teacher: {teacher}", "the data set gives no class"], only)
    own = class_name(labelled.names, labelled.label)
    verb = "agrees" if best is not None and best.class_id == labelled.label else "disagrees"
    heading = f"The teacher {verb} with the data set" if best is not None else "Nothing to agree with"
    return text_lines(heading, [f"teacher: {teacher}", f"data set: {own}"], only)
