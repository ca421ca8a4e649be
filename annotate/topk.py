"""Class logits of cells -> the k best classes, their scores, and the softmax mass of the rest.

Legend: B images, h x w cells, K classes, k of them kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The smallest normal float32: its logarithm is finite, and no probability below it matters.
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class TopK:
    """The k best classes at every cell of B images.

    Attributes:
        scores: float16 [B, h, w, k], logits, descending. Their softmax over all K classes (not only the k that are
            kept) is the teacher's probability.
        classes: int64 [B, h, w, k], the ids that belong to the scores, 0..K-1; the lower id first where scores tie.
        tail: float16 [B, h, w], the probability of the classes that are not kept, 0..1; exactly 0 if k equals K.
    """

    scores: Tensor
    classes: Tensor
    tail: Tensor

    def __post_init__(self) -> None:
        if self.scores.ndim != 4:
            raise ValueError(f"scores must be [B, h, w, k], got {tuple(self.scores.shape)}")
        shape = tuple(self.scores.shape)
        for name, array, expected_dtype, expected_shape in (
            ("scores", self.scores, torch.float16, shape),
            ("classes", self.classes, torch.int64, shape),
            ("tail", self.tail, torch.float16, shape[:-1]),
        ):
            if array.dtype != expected_dtype or tuple(array.shape) != expected_shape:
                raise ValueError(
                    f"{name} must be {expected_dtype} {expected_shape}, got {array.dtype} {tuple(array.shape)}"
                )

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        num_images, height, width, k = self.scores.shape
        return f"TopK({num_images} images, {height}x{width} cells, k={k}, {self.scores.device})"

    def cpu(self) -> "TopK":
        """The same on the CPU."""
        return TopK(self.scores.cpu(), self.classes.cpu(), self.tail.cpu())

    @staticmethod
    def cat(parts: Sequence["TopK"]) -> "TopK":
        """Join batches of images."""
        return TopK(
            torch.cat([part.scores for part in parts]),
            torch.cat([part.classes for part in parts]),
            torch.cat([part.tail for part in parts]),
        )


def top_k(logits: Tensor, k: int) -> TopK:
    """The k best classes by the logits of one model, float32 [B, h, w, K]; the scores are these logits."""
    classes = _largest(logits, k)
    scores = logits.gather(-1, classes)
    kept = torch.exp(scores - logits.logsumexp(-1, keepdim=True))
    return TopK(scores.half(), classes, _tail(kept, num_classes=logits.shape[-1]))


class ProbabilityMean:
    """Averages the class probabilities of several members, one at a time, and ranks the mean.

    A score is log(mean probability) + mean over the members of logsumexp(logits). It softmaxes to the averaged
    probabilities and keeps the offset of the teachers, so that it means what the logits of a single model mean.
    """

    def __init__(self) -> None:
        self._num_members = 0
        self._probabilities: Tensor | None = None
        self._offset: Tensor | None = None

    def add(self, logits: Tensor) -> None:
        """Take in one more member: float32 [B, h, w, K]."""
        probabilities, offset = logits.softmax(-1), logits.logsumexp(-1, keepdim=True)
        if self._probabilities is None or self._offset is None:
            self._probabilities, self._offset = probabilities, offset
        else:
            self._probabilities += probabilities
            self._offset += offset
        self._num_members += 1

    def top_k(self, k: int) -> TopK:
        """The k most probable classes of the mean."""
        assert self._probabilities is not None
        assert self._offset is not None
        mean = self._probabilities / self._num_members
        classes = _largest(mean, k)
        kept = mean.gather(-1, classes)
        scores = kept.clamp_min(_TINY).log() + self._offset / self._num_members
        return TopK(scores.half(), classes, _tail(kept, num_classes=mean.shape[-1]))


def _largest(values: Tensor, k: int) -> Tensor:
    """Ids of the k largest values along the last axis, descending; equal values in ascending order of id.

    `torch.topk` leaves open which of several equal values it takes, and in which order.
    """
    ids = values.topk(k).indices
    last_kept = values.gather(-1, ids).amin(-1, keepdim=True)
    tie_at_the_cut = (values >= last_kept).sum(-1) > k
    if tie_at_the_cut.any():
        ids[tie_at_the_cut] = torch.sort(values[tie_at_the_cut], stable=True, descending=True).indices[:, :k]
    ids = ids.sort(-1).values
    order = torch.sort(values.gather(-1, ids), stable=True, descending=True).indices
    return ids.gather(-1, order)


def _tail(kept_probabilities: Tensor, num_classes: int) -> Tensor:
    if kept_probabilities.shape[-1] == num_classes:
        return torch.zeros_like(kept_probabilities[..., 0], dtype=torch.float16)
    return (1 - kept_probabilities.sum(-1)).clamp(0, 1).half()
