"""Losses between images that were made again and those that are wanted (arXiv 2212.11115, Table 7).

Legend: B images, C channels, h x w positions of a feature map.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tokenlabels.checks import check_choice
from tokenlabels.precision import without_autocast

Loss = Literal["l1", "l2", "perceptual", "contextual"]
_BANDWIDTH, _EPSILON = 0.5, 1e-5  # of the contextual loss, as published
_CHUNK = 1 << 24
"""Pairs of positions that the contextual loss holds at a time: 64 MB in float32."""


def reconstruction_loss(kind: Loss, vgg: nn.Module | None = None) -> nn.Module:
    """A module that compares made images with wanted ones, both floating [B, 3, H, W] -> scalar.

    Args:
        kind: "l1", "l2": mean of absolute or squared differences of pixels. "perceptual": mean of squared differences
            of features at relu2_2 (Johnson et al., arXiv 1603.08155). "contextual": see `contextual_loss`, at relu4_2.
        vgg: for the latter two, a VGG of torchvision with weights, which takes images normalised as these are. The
            paper has VGG-19, where relu2_2 is ``vgg.features[8]`` and relu4_2 ``vgg.features[22]``; a block of another
            VGG that has no second ReLU (VGG-11) is read at its only one. The part up to there is copied, frozen and
            kept in evaluation mode; `vgg` stays as it is.

    Raises:
        ValueError: there is no such loss, it needs a VGG, has no use for one, or this is none.
    """
    check_choice("loss", kind, Loss)
    if kind in ("l1", "l2"):
        if vgg is not None:
            raise ValueError(f"vgg is for the perceptual and the contextual loss, and {kind} would not use it")
        return nn.L1Loss() if kind == "l1" else nn.MSELoss()
    if vgg is None:
        raise ValueError(
            f"the {kind} loss needs a VGG with weights that you have: vgg=torchvision.models.vgg19(weights=...)"
        )
    return FeatureLoss(vgg, 2, nn.MSELoss()) if kind == "perceptual" else FeatureLoss(vgg, 4, _Contextual())


class FeatureLoss(nn.Module):
    """`compare` of the features of two batches of images, at the second ReLU of a block of a VGG.

    Args:
        vgg: has `features`, a sequence of convolutions, ReLUs and, between blocks, pooling.
        block: from 1.
        compare: features [B, C, h, w] twice -> scalar.

    Raises:
        ValueError: `vgg` has no such block.
    """

    def __init__(self, vgg: nn.Module, block: int, compare: nn.Module) -> None:
        super().__init__()
        features = getattr(vgg, "features", None)
        if not isinstance(features, nn.Sequential):
            raise ValueError(f"vgg must be a VGG of torchvision, with its layers in .features, got {type(vgg)}")
        self.features = copy.deepcopy(features[: _end_of(features, block)]).requires_grad_(False).eval()
        self.compare = compare

    def forward(self, made: Tensor, wanted: Tensor) -> Tensor:
        """Images [B, 3, H, W] twice -> scalar; gradients go to the first."""
        with torch.no_grad():
            features = self.features(wanted)
        loss: Tensor = self.compare(in_full(self.features(made)), in_full(features))
        return loss

    def train(self, mode: bool = True) -> "FeatureLoss":
        """Its features stay in evaluation mode."""
        super().train(mode)
        self.features.eval()
        return self


def contextual_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Contextual loss (Mechrez et al., arXiv 1803.02077): are all features of one image found somewhere in the other?

    Of positions i of `made` and j of `wanted`, distances d are one minus the cosine, of features around the mean of
    the wanted ones; they are divided by the smallest of their i (plus 1e-5), and a softmax over j of -d / 0.5 says how
    far i means j. The loss is -log of the mean over j of the largest over i.

    Args:
        made, wanted: features, float32 or float64 [B, C, h, w]. Pairs of positions are held for as many samples at a
            time as have 2^24 pairs (at least one), and computed again in backward where there are more.

    Returns:
        Scalar, the mean over samples.
    """
    pairs = (made.shape[2] * made.shape[3]) * (wanted.shape[2] * wanted.shape[3])
    num_samples = max(1, _CHUNK // pairs)
    if len(made) <= num_samples:
        return _contextual(made, wanted).mean()
    chunks = zip(torch.split(made, num_samples), torch.split(wanted, num_samples), strict=True)
    losses = [checkpoint(_contextual, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(losses).mean()


def _end_of(features: nn.Sequential, block: int) -> int:
    """The number of layers up to the second ReLU of a block, or its last one."""
    number, num_relus, end = 1, 0, 0
    for index, layer in enumerate(features):
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            number, num_relus = number + 1, 0
        elif isinstance(layer, nn.ReLU):
            num_relus += 1
            if number == block and num_relus <= 2:
                end = index + 1
    if not end:
        raise ValueError(f"vgg must have a ReLU in its block {block}, got {number} blocks")
    return end


class _Contextual(nn.Module):
    def forward(self, made: Tensor, wanted: Tensor) -> Tensor:
        return contextual_loss(made, wanted)


def _contextual(made: Tensor, wanted: Tensor) -> Tensor:
    """`contextual_loss` of each sample, [B]."""
    with without_autocast(made.device):
        made, wanted = made.flatten(2), wanted.flatten(2)
        mean = wanted.mean(dim=2, keepdim=True)
        made, wanted = functional.normalize(made - mean, dim=1), functional.normalize(wanted - mean, dim=1)
        distances = (1 - made.transpose(1, 2) @ wanted).clamp_min(0)
        relative = distances / (distances.amin(dim=2, keepdim=True) + _EPSILON)
        similarity = (-relative / _BANDWIDTH).softmax(dim=2)  # of exp((1 - relative) / bandwidth), normalised
        return -similarity.amax(dim=1).mean(dim=1).log()


def in_full(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
