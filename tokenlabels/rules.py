"""How the scores of a cell become probabilities: the rule of the papers, and the calibrated one.

Legend: B maps, H x W cells, k stored classes per cell, K classes, U listed classes per map, R rows of targets.
"""

import torch
from torch import Tensor

from tokenlabels.precision import work_dtype


def spread(values: Tensor, slots: Tensor, num_listed: int) -> Tensor:
    """The k values of every cell [B, H, W, k], put where their classes stand: [B, H, W, U], 0 elsewhere."""
    num_images, height, width, _ = values.shape
    spread = torch.zeros(num_images, height, width, num_listed, dtype=work_dtype(), device=values.device)
    return spread.scatter_(3, slots, values.to(spread.dtype))


def softmax_with_absent(logits_BRU: Tensor, is_listed_BU: Tensor, num_absent_B: Tensor) -> tuple[Tensor, Tensor]:
    """The rule of the papers: softmax over the listed classes and those of logit 0 that no cell mentions.

    Args:
        logits_BRU: interpolated logits [B, R, U]; overwritten.
        is_listed_BU: bool [B, U], false for slots that hold no class.
        num_absent_B: int64 [B], classes of logit 0.

    Returns:
        weights [B, R, U], the probability of a listed class above that of an absent one; background [B, R], the
        probability of an absent class.
    """
    unlisted, num_absent = ~is_listed_BU[:, None], num_absent_B[:, None, None]
    logits = logits_BRU.masked_fill_(unlisted, -torch.inf)
    # Absent classes take part in the maximum only where there are some: with all K listed, every logit may be tiny.
    none_absent = num_absent == 0
    highest = logits.amax(dim=2, keepdim=True)
    top = torch.where(none_absent, highest, highest.clamp(min=0))
    absent = torch.exp(-top).masked_fill(none_absent, 0)
    weights = logits.sub_(top).exp_()
    total = weights.sum(dim=2, keepdim=True) + num_absent * absent
    return weights.sub_(absent).div_(total).masked_fill_(unlisted, 0), (absent / total)[..., 0]


def calibrate(scores: Tensor, tail: Tensor | None, num_classes: int) -> tuple[Tensor, Tensor]:
    """The calibrated rule: what every class of a cell gets, before interpolation.

    Args:
        scores: floating [B, H, W, k], teacher logits.
        tail: floating [B, H, W], mass of the other classes, 0..1. None is 0, and so is the tail of maps that store
            all K classes.
        num_classes: K.

    Returns:
        the probability of each stored class [B, H, W, k], and that of each other class [B, H, W].
    """
    dtype = work_dtype()
    num_others = num_classes - scores.shape[-1]
    shares = scores.to(dtype).softmax(dim=-1)
    if tail is None or num_others == 0:
        return shares, shares.new_zeros(shares.shape[:-1])
    mass = tail.to(dtype)
    return shares * (1 - mass)[..., None], mass / num_others
