"""Accuracy on held-out images: top-1, top-5, and ImageNet-ReaL.

Legend: B images, K classes.
"""

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenlabels.trainer.batches import EvaluationBatch, placed
from tokenlabels.trainer.ranks import sum_over_ranks

TOP = 5
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True)
class Accuracy:
    """Of a model on a set of images.

    Attributes:
        top1, top5: share of the images with a label whose label is the first, or among the first five; 0..1.
        num_images: images with a label.
        real_top1: share of the images with ReaL labels whose first class is one of them; None without a file.
        num_real: images with ReaL labels.
    """

    top1: float
    top5: float
    num_images: int
    real_top1: float | None = None
    num_real: int = 0

    def __str__(self) -> str:
        real = "" if self.real_top1 is None else f", ReaL {self.real_top1:.2%} of {self.num_real}"
        return f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%} of {self.num_images} images{real}"


class RealLabels:
    """The reassessed labels of ImageNet's validation set (arXiv 2006.07159).

    Args:
        path: real.json of the authors: a list of class lists, one for each of the 50,000 validation images.

    Raises:
        ValueError: the file is something else.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            lists = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: there is no such file of ReaL labels") from error
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); real.json of ImageNet-ReaL is expected") from error
        if not isinstance(lists, list) or not all(isinstance(classes, list) for classes in lists):
            raise ValueError(
                f"{path}: not real.json of ImageNet-ReaL, which is a list with a list of classes per image"
            )
        self.path = Path(path)
        self._classes = [frozenset(classes) for classes in lists]

    def of(self, key: str) -> frozenset[int]:
        """Classes of a validation image; none where the annotators found none.

        Raises:
            ValueError: the key does not name an image of ImageNet's validation set.
        """
        found = _VAL_NUMBER.search(key)
        number = int(found[1]) if found else 0
        if not 1 <= number <= len(self._classes):
            raise ValueError(
                f"{key!r} is no image that {self.path} has labels for; keys must hold a name like "
                f"ILSVRC2012_val_00000001, up to {len(self._classes):08d}. Leave the file out for other images"
            )
        return self._classes[number - 1]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[EvaluationBatch],
    *,
    autocast: torch.autocast | None = None,
    real: RealLabels | None = None,
) -> Accuracy:
    """Accuracy of a model over batches, and over all ranks, whose batches together are the images.

    Args:
        model: gives logits [B, K], or a pair that begins with them. Put into evaluation mode for the time.
        batches: on any device.
        autocast: context of the forward pass.
        real: labels of ImageNet-ReaL.

    Raises:
        ValueError: no image has a label, or a label that the model has no class for.
    """
    counts: Tensor | None = None
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for given in batches:
            batch: EvaluationBatch = placed(given, device)
            with autocast or nullcontext():
                outputs = model(batch.images)
            logits = outputs[0] if isinstance(outputs, tuple) else outputs
            more = _counts(logits, batch.labels, batch.keys, real)
            counts = more if counts is None else counts + more
    finally:
        model.train(was_training)
    if counts is None:  # a rank of few images may have none
        counts = torch.zeros(6, dtype=torch.float64, device=device)
    first, among, num_images, num_wrong, real_first, num_real = (
        int(count) for count in sum_over_ranks(counts).tolist()
    )
    if num_wrong:
        raise ValueError(f"{num_wrong} images have labels that the model has no class for; is this another data set?")
    if num_images == 0:
        raise ValueError("none of the images has a label, so there is no accuracy; give images with labels")
    return Accuracy(
        first / num_images,
        among / num_images,
        num_images,
        None if real is None else real_first / max(num_real, 1),
        num_real,
    )


def _counts(logits_BK: Tensor, labels_B: Tensor, keys: Sequence[str], real: RealLabels | None) -> Tensor:
    """float64 [6]: first right, among the top, labelled, labels out of range, ReaL right, ReaL labelled."""
    num_classes = logits_BK.shape[1]
    best_BT = logits_BK.float().topk(min(TOP, num_classes), dim=1).indices
    is_right_BT = best_BT == labels_B[:, None]
    counts = [
        is_right_BT[:, 0].sum(),
        is_right_BT.any(dim=1).sum(),
        (labels_B >= 0).sum(),
        (labels_B >= num_classes).sum(),
    ]
    num_right = num_real = 0
    if real is not None:
        for key, best in zip(keys, best_BT[:, 0].tolist(), strict=True):
            classes = real.of(key)
            num_right, num_real = num_right + (best in classes), num_real + bool(classes)
    counts += [labels_B.new_tensor(count) for count in (num_right, num_real)]
    return torch.stack(counts).double()
