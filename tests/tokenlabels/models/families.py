"""Classifiers of timm's families, small, for the tests of `DenseClassifier` and `TokenProp`; a VGG for losses."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier

NUM_CLASSES = 7


class SplitsSoftly(nn.Module):
    """A T2T-like classifier of timm's shape: overlapping patches are unfolded, tokens mixed once, a class token put in
    front. Its patch embedding names neither layout nor grid."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.num_prefix_tokens, self.feature_info = NUM_CLASSES, 1, [{"reduction": 8}]
        self.patch_embed = nn.Sequential(nn.Unfold(12, stride=8, padding=2), _Transposed(), nn.Linear(3 * 144, 6))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 6))
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward_features(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens + self.mix(tokens, tokens, tokens)[0]

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(features[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class _Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Strided(nn.Module):
    """The smallest classifier of timm's shape: one strided convolution, which sees nothing beyond its patch."""

    def __init__(self, layout: str, num_prefix_tokens: int = 0) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.num_prefix_tokens = NUM_CLASSES, 6, num_prefix_tokens
        self.layout, self.output_fmt, self.feature_info = layout, layout, [{"reduction": 8}]
        self.conv = nn.Conv2d(3, 6, 8, stride=8)
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward_features(self, images: Tensor) -> Tensor:
        cells = self.conv(images).permute(0, 2, 3, 1)
        if self.layout == "NLC":
            return torch.cat([cells.new_zeros(len(cells), self.num_prefix_tokens, 6), cells.flatten(1, 2)], dim=1)
        return cells if self.layout == "NHWC" else cells.permute(0, 3, 1, 2)

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.flatten(1).mean(dim=1, keepdim=True).expand(-1, 6))


VIT = {"img_size": (32, 48), "depth": 2}
SWIN = {"embed_dim": 12, "depths": (1, 1, 2), "num_heads": (1, 2, 2), "window_size": 2}

# name, arguments, size of the images, grid of the tokens, whether MixToken works
FAMILIES: dict[str, tuple[str | Callable[[], nn.Module], dict[str, Any], tuple[int, int], tuple[int, int], bool]] = {
    "deit": ("deit_tiny_patch16_224", VIT, (32, 48), (2, 3), True),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", VIT, (32, 48), (2, 3), True),
    "vit-registers": ("vit_tiny_patch16_224", {**VIT, "reg_tokens": 4}, (32, 48), (2, 3), True),
    "vit-mean": ("vit_tiny_patch16_224", {**VIT, "global_pool": "avg", "class_token": False}, (32, 48), (2, 3), True),
    "vit-flexible": ("test_vit", {"dynamic_img_size": True}, (32, 48), (2, 3), True),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": (64, 32), **SWIN}, (64, 32), (4, 2), True),
    "pvt": ("pvt_v2_b0", {}, (64, 96), (2, 3), True),
    "mixer": ("mixer_s32_224", {"img_size": (64, 96)}, (64, 96), (2, 3), True),
    "xcit": ("xcit_nano_12_p16_224", {"depth": 1}, (32, 48), (2, 3), True),
    "fasternet": ("fasternet_t0", {}, (64, 96), (2, 3), True),
    "hiera": ("hiera_tiny_224", {"img_size": (64, 64), "stages": (1, 1, 1, 1)}, (64, 64), (2, 2), True),
    "t2t": (SplitsSoftly, {}, (16, 24), (2, 3), True),
    "resnet": ("test_resnet", {}, (64, 96), (2, 3), False),
    "resnest": ("resnest14d", {}, (64, 96), (2, 3), False),
    "convnext": ("test_convnext", {}, (64, 96), (2, 3), False),
    "efficientnet": ("test_efficientnet", {}, (64, 96), (2, 3), False),
    "nfnet": ("test_nfnet", {}, (64, 96), (2, 3), False),
    "coatnet": ("test_coatnet", {}, (160, 160), (5, 5), False),
}
WITH_EMBEDDING = [case for case, (*_, mixes) in FAMILIES.items() if mixes]


def plain(case: str) -> Any:
    """The model alone, the same every time."""
    torch.manual_seed(0)
    build, arguments, *_ = FAMILIES[case]
    return timm.create_model(build, num_classes=NUM_CLASSES, **arguments) if isinstance(build, str) else build()


def dense(case: str) -> tuple[DenseClassifier, Tensor]:
    """The model in evaluation mode, and 4 images for it."""
    size = FAMILIES[case][2]
    return DenseClassifier(plain(case), size).eval(), torch.randn(4, 3, *size)


def mixtoken(classifier: DenseClassifier, seed: int = 1) -> MixPlan:
    """Whole tokens of 4 images exchanged, on the grid of the classifier."""
    plan = MixPlan.random_patches(4, grid=classifier.grid, generator=torch.Generator().manual_seed(seed))
    assert 0 < plan.own.mean() < 1
    return plan


def vgg(seed: int = 0) -> Any:
    """A network of torchvision's VGG's shape, four narrow blocks with 2 or 3 convolutions."""
    torch.manual_seed(seed)
    features: list[nn.Module] = []
    for block, width in enumerate((3, 4, 5, 6)):
        for width_in in (width, width + 1, width + 1)[: 2 + block % 2]:
            features += [nn.Conv2d(width_in, width + 1, 3, padding=1), nn.BatchNorm2d(width + 1), nn.ReLU(inplace=True)]
        features.append(nn.MaxPool2d(2))
    model = nn.Module()
    model.features = nn.Sequential(*features)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # so that not all is zero behind a few ReLUs
    return model
