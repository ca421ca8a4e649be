"""What moves labels besides attention: the operations of TL-Align's Table 10.

Channel mixing and point-wise operations leave labels as they are and have no function here.

Legend: B images, H x W tokens on their grid, C columns of labels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenlabels.mixing import MixPlan
from tokenlabels.precision import without_autocast

_LEAST = 1e-30
"""Keeps a row of zeros from being divided by zero: all then have the same weight."""


def first_labels(plan: MixPlan, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Equation 5: the share of the own image in every token, float32 [B, P + H * W, 1].

    A patch that straddles the border of two images has the fraction that covers it, class and other prefix tokens the
    share of the whole image.
    """
    image = plan.share()[:, None].expand(-1, num_prefix_tokens)
    return torch.cat([image, plan.coverage(grid).flatten(1)], dim=1)[..., None]


def residual(labels: Tensor, moved: Tensor) -> Tensor:
    """``Norm(Y + g(Y))``, a plain average (equation 11).

    Neither layer scale, a scaled branch (LV-ViT) nor stochastic depth weighs it, as in the paper and its code.
    """
    return (labels + moved) / 2


def pool(labels: Tensor, conv: nn.Conv2d) -> Tensor:
    """Spatial aggregation ``Norm(sum of Y)`` over the windows of a convolution, [B, H, W, C] -> [B, H', W', C].

    What a window reads of the padding has no label and takes no part.
    """
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    maps = labels.permute(0, 3, 1, 2)
    assert not isinstance(padding, str), "timm pads by numbers here"
    pooled = functional.avg_pool2d(maps, kernel, stride, padding, count_include_pad=False)
    return pooled.permute(0, 2, 3, 1)


def merge(labels: Tensor) -> Tensor:
    """Patch merging (Swin), [B, H, W, C] -> [B, H/2, W/2, C]: means of 2 x 2 tokens, of fewer at an odd border."""
    return functional.avg_pool2d(labels.permute(0, 3, 1, 2), 2, ceil_mode=True).permute(0, 2, 3, 1)


def mix_depthwise(labels: Tensor, conv: nn.Conv2d) -> Tensor:
    """Spatial mixing by a depthwise convolution of stride 1, [B, H, W, C] -> the same.

    The weight of a place is the mean of the kernels' absolute values there (equation 2 counts absolute values), divided
    by what the weights within the map sum to.
    """
    with torch.no_grad(), without_autocast(labels.device):
        kernel = conv.weight.detach().float().abs().mean(dim=0, keepdim=True) + _LEAST
        maps = labels.permute(0, 3, 1, 2).flatten(0, 1)[:, None]
        total = _convolved(torch.ones_like(maps[:1]), kernel, conv)
        mixed = _convolved(maps, kernel, conv) / total
        return mixed.reshape(len(labels), -1, *labels.shape[1:3]).permute(0, 2, 3, 1)


def _convolved(maps: Tensor, kernel: Tensor, conv: nn.Conv2d) -> Tensor:
    return functional.conv2d(maps, kernel, padding=conv.padding, dilation=conv.dilation)


def mix_dense(labels: Tensor, linear: nn.Linear) -> Tensor:
    """Spatial mixing by a learned matrix over tokens, [B, N, C] -> [B, N', C]: ``Norm(|W|) Y``."""
    with torch.no_grad(), without_autocast(labels.device):
        weights = linear.weight.detach().float().abs() + _LEAST
        return weights / weights.sum(dim=1, keepdim=True) @ labels
