"""One image of the gallery, as the page's script reads it.

The map of a cell is k classes and their probabilities. Classes are numbered within the image, so that a byte is enough
for most; probabilities are whole per mille, which is what the page shows. 24 x 24 cells of five classes take 13 kB.
"""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenlabels.audit.measures import OBJECT_SHARE, ImageMeasures
from tokenlabels.report.sample import Choice, disagreement
from tokenlabels.report.thumbnails import Thumbnail
from tokenlabels.types import ScoreMap
from tokenlabels.views.palette import ColouredMap

_NO_CELL = 65_535  # in the place of a tail: the cell shows nothing of the image


@dataclass(frozen=True)
class LeadingClass:
    """A class that leads in some cell: share of the cells in which it does, mean probability, "#rrggbb"."""

    class_id: int
    share_of_cells: float
    mean_probability: float
    colour: str


@dataclass(frozen=True)
class Item:
    """An image of the gallery.

    Attributes:
        key, shard: where it is.
        reasons: why it was chosen, keys of `tokenlabels.report.sample.REASONS`.
        label: the data set's own class, or None; `own_mass` and `disagreement` are None with it.
        predicted, top1, entropy, tail, own_mass, num_objects, num_distinct: see `ImageMeasures`.
        disagreement: see `tokenlabels.report.sample.disagreement`.
        view: what the map covers, xyxy in 0..1 of the image.
        leading: classes that lead in some cell, by falling mean probability.
        shows: ids of the classes under which the image is found: `label`, `predicted`, and the leading ones of 5 % of
            the cells or more.
        ids: of the classes of the map; `cells` counts into it.
        cells: base64 of uint8 (uint16 with more than 256 ids) [H, W, k], little endian as the others.
        permille: base64 of uint16 [H, W, k], probabilities.
        tails: base64 of uint16 [H, W], tails in per mille; 65535 for a cell that shows nothing of the image.
        width, height, photo: see `Thumbnail`.
    """

    key: str
    shard: str
    reasons: tuple[str, ...]
    label: int | None
    predicted: int
    top1: float
    entropy: float
    tail: float
    own_mass: float | None
    disagreement: float | None
    num_objects: int
    num_distinct: int
    view: tuple[float, ...]
    leading: tuple[LeadingClass, ...]
    shows: tuple[int, ...]
    ids: tuple[int, ...]
    cells: str
    permille: str
    tails: str
    width: int
    height: int
    photo: str


def item_of(choice: Choice, shard: str, score_map: ScoreMap, measures: ImageMeasures, photograph: Thumbnail) -> Item:
    """Put together what is known of an image; `measures` are of all images, `choice` says which row."""
    row = choice.row
    label = int(measures.label[row]) if measures.is_labelled[row] else None
    predicted = int(measures.predicted[row])
    coloured = ColouredMap.of(score_map, None)
    leading = tuple(
        LeadingClass(
            share.class_id, round(share.share_of_cells, 4), round(share.mean_probability, 4), "#" + bytes(colour).hex()
        )
        for share, colour in zip(coloured.leading, coloured.colours, strict=True)
    )
    objects = [known.class_id for known in leading if known.share_of_cells >= OBJECT_SHARE]
    own = [] if label is None else [label]
    ids, cells = np.unique(score_map.classes, return_inverse=True)
    tails = np.where(coloured.valid, permille(score_map.tail), np.uint16(_NO_CELL))
    return Item(
        key=score_map.key,
        shard=shard,
        reasons=choice.reasons,
        label=label,
        predicted=predicted,
        top1=_rounded(measures.top1[row]),
        entropy=_rounded(measures.entropy[row]),
        tail=_rounded(measures.tail[row]),
        own_mass=None if label is None else _rounded(measures.own_mass[row]),
        disagreement=None if label is None else _rounded(disagreement(measures)[row]),
        num_objects=int(measures.num_objects[row]),
        num_distinct=int(measures.num_distinct[row]),
        view=tuple(score_map.view.tolist()),
        leading=leading,
        shows=tuple(dict.fromkeys([*own, predicted, *objects])),
        ids=tuple(ids.tolist()),
        cells=_base64(cells.astype("u1" if len(ids) <= 256 else "<u2")),
        permille=_base64(permille(score_map.probabilities())),
        tails=_base64(tails),
        width=photograph.width_px,
        height=photograph.height_px,
        photo=photograph.uri,
    )


def permille(shares: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Shares of 0..1 in whole per mille."""
    return np.rint(shares.astype(np.float64) * 1000).astype(np.uint16)


def _rounded(value: Any) -> float:
    return round(float(value), 4)


def _base64(values: NDArray[Any]) -> str:
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()
