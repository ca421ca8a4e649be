"""A crop as the student sees it, beside its targets."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenlabels.geometry import Box
from tokenlabels.summary import ClassShare
from tokenlabels.views.drawing import WHOLE, Pixels, Rgb
from tokenlabels.views.figure import Figure, across
from tokenlabels.views.palette import GREY, PALETTE, ColouredMap, class_colours
from tokenlabels.views.panels import SPACE_PX, STRONGEST, Stage


@dataclass(frozen=True, eq=False)
class StudentCrop:
    """A crop and its targets.

    Attributes:
        box: of the image, xyxy in 0..1 of it.
        flip: whether the crop is mirrored left-right.
        pixels: uint8 [S, S, 3], RGB, as the student sees it but for normalisation.
        targets: float32 [h, w, K], probabilities of all classes for every token.
        image_target: float32 [K], of the crop as a whole.
        valid: bool [h, w], tokens that have a target.
    """

    box: Box
    flip: bool
    pixels: Pixels
    targets: NDArray[np.float32]
    image_target: NDArray[np.float32]
    valid: NDArray[np.bool_]


def coloured_targets(crop: StudentCrop, names: tuple[str, ...], known: Mapping[int, Rgb]) -> ColouredMap:
    """The targets as they are drawn; the classes of the map, `known`, keep their colours, others get the free ones."""
    best = crop.targets.argmax(axis=-1)
    ids, counts = np.unique(best[crop.valid], return_counts=True)
    order = np.argsort(-crop.image_target[ids], kind="stable").tolist()
    num_valid = int(crop.valid.sum())
    leading = tuple(
        ClassShare(ids[place], names[ids[place]], counts[place] / num_valid, float(crop.image_target[ids[place]]))
        for place in order
    )
    new = [share.class_id for share in leading if share.class_id not in known][: len(PALETTE) - len(known)]
    free = dict(zip(new, class_colours([*known, *new])[len(known) :], strict=True))
    colours = np.array([known.get(one.class_id, free.get(one.class_id, GREY)) for one in leading], np.uint8)
    rank_of = {share.class_id: rank for rank, share in enumerate(leading)}
    rank = np.array([rank_of.get(class_id, 0) for class_id in best.ravel().tolist()], np.intp).reshape(best.shape)
    return ColouredMap(leading, colours.reshape(-1, 3), rank, crop.targets.max(axis=-1), crop.valid)


def crop_panels(crop: StudentCrop, targets: ColouredMap, only: str | None, scale: int) -> Figure:
    """What the student sees, and what it is asked for."""
    view = np.array(WHOLE)
    stage = Stage.of(Image.fromarray(crop.pixels), view, targets.valid.shape, None, only, scale)
    rows, columns = targets.valid.shape
    corners = ",".join(f"{corner:.2f}" for corner in crop.box)
    mirrored = ", mirrored" if crop.flip else ""
    opacity = np.where(targets.valid, STRONGEST * targets.confidence, np.nan)
    panels = [
        stage.photo(f"crop {corners}{mirrored}, {len(crop.pixels)} px"),
        stage.cells(f"its {rows} x {columns} targets", targets.cell_colours(), opacity),
    ]
    return across(panels, SPACE_PX)
