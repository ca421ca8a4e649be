"""What the threads fill and what the training loop gets.

Legend: B samples of a batch, H x W cells of their maps, k stored classes per cell, S_h x S_w pixels of the student's
input.
"""

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loaders.label_windows import LabelBlock
from loaders.rand_augment import AugmentDraw
from tokenlabels.mixing import MixPlan
from tokenlabels.sparse_targets import TokenTargets
from tokenlabels.vocabulary import Vocabulary


class SampleError(ValueError):
    """A sample that cannot be used; the message names the tar (or tree), the key, the stage and the reason.

    Attributes:
        is_of_tar: whether its whole tar is to blame (cut off, or another one by now), so that nothing can be skipped.
    """

    is_of_tar = False


@dataclass(eq=False)
class HostBatch:
    """One batch in the memory of the host, filled row by row by several threads.

    Attributes:
        number: of the batch in its epoch.
        keys: WebDataset keys, B of them.
        labels: int64 [B], class index of the data set; -1 where it has none.
        images: uint8 [B, S_h, S_w, 3], a slot of the ring, valid until it is given back.
        boxes: float64 [B, 4], the part of the image that the pixels show, xyxy in 0..1.
        flip: bool [B], whether they are mirrored left-right.
        crops, mirrored: the crop and the flip that were drawn. Other than `boxes` and `flip` only where an image is
            warped before it is cropped: the pixels then show all that the crop needs, and `warp` mirrors.
        warp: float64 [B, 2, 3], from the output image to the pixels here; the identity for most.
        is_warped: bool [B], where it is not.
        augment: what RandAugment drew for each row, or None without it.
        erased: int64 [B, 4], xyxy in pixels of the boxes to erase, empty for most; None without Random Erasing.
        maps: score maps of the rows, or None without token labels.
        vocabulary: the distinct classes of the maps.
        hash: stands for the contents, 64 bits: the same seed, epoch and keys.
        problems: rows that cannot be used.
        skipped: problems of rows that were left out.
    """

    number: int
    keys: tuple[str, ...]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]
    flip: NDArray[np.bool_]
    warp: NDArray[np.float64]
    is_warped: NDArray[np.bool_]
    hash: int
    augment: AugmentDraw | None = None
    erased: Tensor | None = None
    maps: LabelBlock | None = None
    vocabulary: Vocabulary | None = None
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    problems: dict[int, SampleError] = field(default_factory=dict)
    skipped: tuple[SampleError, ...] = ()

    def __post_init__(self) -> None:
        self.crops, self.mirrored = self.boxes.copy(), self.flip.copy()

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, eq=False)
class TokenLabelBatch:
    """One batch on the device, ready for the model.

    Attributes:
        images: float32 [B, 3, S_h, S_w], augmented and normalised.
        targets: what the loss takes, mixed already but with mix_targets=False; None where there are neither maps nor
            known classes.
        plan: who is mixed with whom; None without mixing.
        is_mixed: whether the images are mixed by the plan already. False for MixToken, where the model applies it to
            its patch embedding.
        has_mixed_targets: whether the targets are those of the mixed images. False leaves it to `TLAlign`, which finds
            the shares: ``plan.mix_targets(targets, share)``.
        labels: int64 [B], class index of the data set of every image itself; -1 where it has none.
        keys: WebDataset keys, B of them.
        boxes: float32 [B, 4], the crop, xyxy in 0..1 of the image; with RandAugment "before crop", of the image as its
            geometric operations left it.
        flip: bool [B], whether the crop was mirrored left-right.
    """

    images: Tensor
    targets: TokenTargets | None
    plan: MixPlan | None
    is_mixed: bool
    has_mixed_targets: bool
    labels: Tensor
    keys: tuple[str, ...]
    boxes: Tensor
    flip: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same batch on another device, for frameworks that move batches themselves."""
        names = ("images", "targets", "plan", "labels", "boxes", "flip")
        values = {name: getattr(self, name) for name in names}
        moved = {
            name: value.to(device, non_blocking=non_blocking) for name, value in values.items() if value is not None
        }
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return (
            f"TokenLabelBatch({list(self.images.shape)} images on {self.images.device}, targets {self.targets!r}, "
            f"plan {self.plan!r})"
        )
