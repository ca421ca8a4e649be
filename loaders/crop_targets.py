"""The targets of a batch on its device: RoIAlign for crops, point sampling for what was warped as well.

Which rows take which path is known on the host, so nothing waits for the device.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loaders.batch import HostBatch
from loaders.upload import upload
from tokenlabels.affine import affine_from_boxes, affine_in_map, compose_affine
from tokenlabels.boxes import box_in_map
from tokenlabels.checks import Grid, check_choice
from tokenlabels.geometry import BORDER_TOLERANCE
from tokenlabels.sparse_targets import TokenTargets
from tokenlabels.target_inputs import InterpolationRule
from tokenlabels.targets import affine_token_targets, token_targets
from tokenlabels.vocabulary import Vocabulary


@dataclass(frozen=True)
class CropTargets:
    """Makes targets.

    Attributes:
        num_classes: of the label set.
        grid: (h, w) tokens; None makes the image-level row alone.
        interpolate: see `token_targets`.
        fills_beyond_crop: whether warped images show a fill colour beyond their crop (augmented after the crop), or
            the image as far as it goes.
        device: of the targets.
    """

    num_classes: int
    grid: Grid | None
    interpolate: InterpolationRule
    fills_beyond_crop: bool
    device: torch.device

    def __post_init__(self) -> None:
        check_choice("interpolate", self.interpolate, InterpolationRule)

    def __call__(self, host: HostBatch) -> TokenTargets:
        """The targets of all rows, before any mixing."""
        assert host.maps is not None, "a loader with labels reads them"
        assert host.vocabulary is not None, "and lists their classes"
        maps = _Maps(
            self._moved(host.maps.scores),
            self._moved(host.maps.classes.astype(np.int32)),
            self._moved(host.maps.tail),
            self._moved(host.maps.views),
            replace(
                host.vocabulary,
                classes=upload(host.vocabulary.classes, self.device),
                num_distinct=upload(host.vocabulary.num_distinct, self.device),
                slots=upload(host.vocabulary.slots, self.device),
            ),
        )
        boxes, flip = self._moved(host.boxes), self._moved(host.flip)
        is_affine = host.is_warped | _reaches_beyond(host.boxes, host.maps.views)
        if not is_affine.any():
            return self._straight(maps, boxes, flip)
        affine_rows, straight_rows = (self._moved(np.flatnonzero(rows)) for rows in (is_affine, ~is_affine))
        warp = self._moved(host.warp)
        warped = self._affine(maps.take(affine_rows), boxes[affine_rows], flip[affine_rows], warp[affine_rows])
        if is_affine.all():
            return warped
        straight = self._straight(maps.take(straight_rows), boxes[straight_rows], flip[straight_rows])
        back = torch.cat([straight_rows, affine_rows]).argsort()
        return _joined(straight, warped, back)

    def _straight(self, maps: "_Maps", boxes: Tensor, flip: Tensor) -> TokenTargets:
        return token_targets(
            maps.scores,
            maps.classes,
            box_in_map(boxes, maps.views.double()),
            flip=flip,
            grid=self.grid,
            num_classes=self.num_classes,
            interpolate=self.interpolate,
            tail=maps.tail,
            views=maps.views,
            vocabulary=maps.vocabulary,
        )

    def _affine(self, maps: "_Maps", boxes: Tensor, flip: Tensor, warp: Tensor) -> TokenTargets:
        views = maps.views.double()
        to_image = compose_affine(output_to_middle=warp, middle_to_source=affine_from_boxes(boxes, flip))
        targets = affine_token_targets(
            maps.scores,
            maps.classes,
            affine_in_map(to_image, views),
            grid=(1, 1) if self.grid is None else self.grid,
            num_classes=self.num_classes,
            interpolate=self.interpolate,
            tail=maps.tail,
            views=maps.views,
            region=box_in_map(boxes, views) if self.fills_beyond_crop else None,
            vocabulary=maps.vocabulary,
        )
        return targets if self.grid is not None else _image_row(targets)

    def _moved(self, array: NDArray[np.generic]) -> Tensor:
        return upload(torch.from_numpy(array), self.device)


@dataclass(frozen=True, eq=False)
class _Maps:
    """Maps on the device; fields as in `LabelBlock`."""

    scores: Tensor
    classes: Tensor
    tail: Tensor
    views: Tensor
    vocabulary: Vocabulary

    def take(self, rows: Tensor) -> "_Maps":
        vocabulary = replace(
            self.vocabulary,
            classes=self.vocabulary.classes[rows],
            num_distinct=self.vocabulary.num_distinct[rows],
            slots=self.vocabulary.slots[rows],
        )
        return _Maps(self.scores[rows], self.classes[rows], self.tail[rows], self.views[rows], vocabulary)


def _reaches_beyond(boxes: NDArray[np.float64], views: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Rows whose crop shows more of the image than their map covers: RoIAlign would have nothing to read there."""
    low, high = np.maximum(views[:, :2], 0), np.minimum(views[:, 2:], 1)
    outside = (boxes[:, :2] < low - BORDER_TOLERANCE) | (boxes[:, 2:] > high + BORDER_TOLERANCE)
    return np.asarray(outside.any(axis=1))


def _joined(first: TokenTargets, second: TokenTargets, order: Tensor) -> TokenTargets:
    """The rows of both, in this order of those of the first and then of the second. They list equally many classes."""
    return replace(
        first,
        classes=torch.cat([first.classes, second.classes])[order],
        weights=torch.cat([first.weights, second.weights])[order],
        background=torch.cat([first.background, second.background])[order],
        valid=torch.cat([first.valid, second.valid])[order],
    )


def _image_row(targets: TokenTargets) -> TokenTargets:
    return replace(
        targets,
        weights=targets.weights[:, :1],
        background=targets.background[:, :1],
        valid=targets.valid[:, :1],
        grid=None,
    )
