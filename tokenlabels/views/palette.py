"""Colours for classes, and how a map is put into colours: which class leads where, and how surely."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tokenlabels.geometry import valid_cells
from tokenlabels.summary import ClassShare, summarise_map
from tokenlabels.types import ScoreMap

# chosen by maximising the smallest OKLab distance of any two, both as they are and as seen by people without red, green
# or blue cones (Machado et al. 2009); in farthest-first order
PALETTE = (
    *("#ff8800", "#3300ee", "#990033", "#77ffdd", "#229999", "#ffdd00"),
    *("#cc66ff", "#996600", "#770099", "#ff1166", "#7766bb", "#ff99dd"),
)
# from low to high, ever lighter; from blue to yellow, which differ for people without red or green cones too
_HEAT_RGB = np.array([(10, 24, 88), (60, 78, 150), (128, 128, 142), (204, 184, 96), (255, 240, 130)], np.float64)
GREY = (128, 132, 138)
"""Of classes that have no colour of their own."""

_PALETTE_RGB = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in PALETTE], np.uint8)
# of linear light, as ITU-R BT.709 weighs red, green and blue
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def class_colours(class_ids: Sequence[int]) -> NDArray[np.uint8]:
    """A colour for every class of a picture, uint8 [n, 3] RGB.

    A class has the same colour in every picture, unless an earlier class of this picture has it already; then it gets
    the next one that is free. So the first twelve, given in order of importance, never share a colour; from the
    thirteenth on colours repeat.
    """
    size = len(PALETTE)
    slots: list[int] = []
    for class_id in class_ids:
        taken = slots[len(slots) // size * size :]
        slots.append(next(slot % size for slot in range(class_id, class_id + size) if slot % size not in taken))
    return _PALETTE_RGB[slots]


def heat_colours(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours uint8 [..., 3] of values [...] in 0..1."""
    places = np.linspace(0, 1, len(_HEAT_RGB))
    channels = [np.interp(values, places, channel) for channel in _HEAT_RGB.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def ink_on(colour: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Black or white, whichever reads better on the colour uint8 [3]."""
    luminance = ((colour / 255) ** 2.2) @ _LUMINANCE
    # the contrast ratios of WCAG 2.1 with black and with white are equal at this luminance
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


@dataclass(frozen=True, eq=False)
class ColouredMap:
    """A score map as it is drawn.

    Attributes:
        leading: the classes that lead in some cell, by falling probability over the whole map.
        colours: uint8 [n, 3] RGB, of `leading`.
        rank: int [H, W], index into `leading`; 0 where not `valid`.
        confidence: float32 [H, W], probability of the leading class, 0..1.
        valid: bool [H, W], false for the padding of a letterboxed map.
    """

    leading: tuple[ClassShare, ...]
    colours: NDArray[np.uint8]
    rank: NDArray[np.intp]
    confidence: NDArray[np.float32]
    valid: NDArray[np.bool_]

    @classmethod
    def of(cls, score_map: ScoreMap, class_names: tuple[str, ...] | None) -> "ColouredMap":
        """Colour a map; `class_names` by class id, or None where nobody knows them."""
        shares = summarise_map(score_map, class_names).classes
        leading = sorted((share for share in shares if share.share_of_cells), key=lambda share: -share.mean_probability)
        ids = np.array([share.class_id for share in leading], dtype=np.int64)
        by_id = np.argsort(ids)
        valid = valid_cells(score_map.view, score_map.grid)
        rank = np.zeros(score_map.grid, np.intp)
        rank[valid] = by_id[np.searchsorted(ids, score_map.classes[valid, 0], sorter=by_id)]
        return cls(
            leading=tuple(leading),
            colours=class_colours(ids.tolist()),
            rank=rank,
            confidence=score_map.probabilities()[..., 0],
            valid=valid,
        )

    def with_distinct_colours(self, num_colours: int) -> "ColouredMap":
        """The same with grey for the classes from that rank on."""
        colours = self.colours.copy()
        colours[num_colours:] = GREY
        return replace(self, colours=colours)

    def cell_colours(self) -> NDArray[np.uint8]:
        """Uint8 [H, W, 3], of the leading class of every cell; black where not `valid`."""
        colours = np.zeros((*self.rank.shape, 3), np.uint8)
        colours[self.valid] = self.colours[self.rank[self.valid]]
        return colours

    def beyond(self, rank: int) -> tuple[int, float, float]:
        """Of the leading classes from `rank` on: their number, share of cells, and mean probability over the map."""
        rest = self.leading[rank:]
        return len(rest), sum(share.share_of_cells for share in rest), sum(share.mean_probability for share in rest)
