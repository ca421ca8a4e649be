"""Dense token labels, step by step as Token Labeling publishes them: the reference of the benchmarks.

Written for comparison alone: every map with all its K classes, every target with all its K classes.

Legend: B images, H x W cells, k stored classes per cell, K classes, N tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import roi_align


def dense_targets(
    scores: Tensor, classes: Tensor, boxes: Tensor, flip: Tensor, grid: tuple[int, int], num_classes: int
) -> Tensor:
    """Targets [B, 1 + N, K] of crops, image-level row first; arguments as `tokenlabels.token_targets`."""
    num_images, height, width, _ = scores.shape
    maps = torch.zeros(num_images, num_classes, height, width)
    maps.scatter_(1, classes.movedim(3, 1), scores.float().movedim(3, 1))
    size = torch.tensor([width, height, width, height])
    indexed_boxes = torch.cat([torch.arange(num_images)[:, None].float(), boxes * size], dim=1)
    image = roi_align(maps, indexed_boxes, (1, 1), aligned=True)
    tokens = roi_align(maps, indexed_boxes, grid, aligned=True)
    tokens = torch.where(flip[:, None, None, None], tokens.flip(3), tokens)
    logits = torch.cat([image.flatten(2), tokens.flatten(2)], dim=2)
    return logits.softmax(dim=1).transpose(1, 2)


def dense_loss(image_logits: Tensor, token_logits: Tensor, target: Tensor, dense_weight: float) -> Tensor:
    """Token Labeling, equation 4: H(image) + dense_weight * mean over tokens of H(token)."""
    return _cross_entropy(image_logits, target[:, 0]) + dense_weight * _cross_entropy(token_logits, target[:, 1:])


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return torch.sum(-target * functional.log_softmax(logits, dim=-1), dim=-1).mean()
