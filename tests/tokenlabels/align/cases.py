"""Tiny models of every family whose attention is far from uniform, and mixed images for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm.layers
import torch
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.mlp_mixer import MlpMixer
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenlabels.mixing import MixPlan
from tokenlabels.models import LVViT

NUM_CLASSES = 7
NUM_IMAGES = 4

VIT: dict[str, Any] = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
SWIN: dict[str, Any] = {
    "window_size": 4,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 3),
    "drop_path_rate": 0.0,
}
PVT: dict[str, Any] = {"depths": (1, 1, 2, 1), "embed_dims": (8, 12, 16, 24), "num_heads": (1, 2, 2, 3)}
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}

# family, size of the images (height, width)
CASES: dict[str, tuple[Callable[..., nn.Module], tuple[int, int]]] = {
    "vit": (partial(VisionTransformer, **VIT), (32, 48)),
    "vit-registers": (partial(VisionTransformer, **VIT, reg_tokens=3, qk_norm=True, init_values=0.5), (32, 48)),
    "vit-mean": (partial(VisionTransformer, **VIT, global_pool="avg", class_token=False), (32, 48)),
    "vit-mean-and-class-token": (partial(VisionTransformer, **VIT, global_pool="avg"), (32, 48)),
    "vit-mean-of-all": (partial(VisionTransformer, **VIT, global_pool="avg", pool_include_prefix=True), (32, 48)),
    "vit-any-size": (partial(VisionTransformer, **VIT, dynamic_img_size=True), (40, 24)),
    "distilled": (partial(VisionTransformerDistilled, **VIT), (32, 48)),
    "lvvit": (partial(LVViT, **VIT, stem_channels=8), (32, 48)),
    "swin": (partial(SwinTransformer, img_size=(32, 64), **SWIN), (32, 64)),
    "swin-padded": (partial(SwinTransformer, img_size=(36, 44), **SWIN), (36, 44)),
    "swin-any-size": (partial(SwinTransformer, img_size=32, strict_img_size=False, **SWIN), (20, 44)),
    "swin2": (partial(SwinTransformerV2, img_size=(32, 64), **SWIN), (32, 64)),
    "swin2-padded": (partial(SwinTransformerV2, img_size=(36, 44), **SWIN), (36, 44)),
    "pvt": (partial(PyramidVisionTransformerV2, **PVT, sr_ratios=(4, 2, 2, 1)), (48, 40)),
    "pvt-linear": (partial(PyramidVisionTransformerV2, **PVT, linear=True), (48, 40)),
    "mixer": (partial(MlpMixer, img_size=(32, 48), patch_size=8, num_blocks=3, embed_dim=24), (32, 48)),
    "convnext": (partial(ConvNeXt, **CONVNEXT, ls_init_value=0.5), (72, 56)),
    "convnext2": (
        partial(ConvNeXt, **CONVNEXT, use_grn=True, ls_init_value=None, conv_mlp=True, head_norm_first=True),
        (64, 48),
    ),
}
ATTENTION = [case for case in CASES if case != "mixer" and not case.startswith("convnext")]
ONE_OF_EACH = ["vit", "distilled", "lvvit", "swin-padded", "swin2", "pvt", "pvt-linear", "mixer", "convnext"]


def build(case: str, **changes: Any) -> Any:
    """The sharpened model in training mode, the same every time."""
    torch.manual_seed(0)
    model = CASES[case][0](**({"num_classes": NUM_CLASSES} | changes))
    sharpen(model)
    return model.train()


@torch.no_grad()
def sharpen(model: nn.Module) -> None:
    """The initial weights barely differ from nothing, and tokens would all get the mean of all labels."""
    for name, parameter in model.named_parameters():
        is_mixing = any(part in name for part in ("conv_dw", "dwconv", "mlp_tokens"))
        if is_mixing and name.endswith("weight"):
            # cubes: few places have most of the weight
            parameter.mul_(parameter.std().reciprocal()).pow_(3).mul_(0.1)
        elif name.endswith("logit_scale"):
            parameter.uniform_(2, 5)  # partly above Swin v2's limit
        elif name.endswith("attn.norm.weight"):
            parameter.mul_(3)
        elif any(part in name for part in ("attn.qkv.weight", "attn.q.weight", "attn.kv.weight")):
            parameter.mul_(1.2 / (parameter.std() * parameter.shape[1] ** 0.5))
        elif parameter.ndim > 1 and "cpb_mlp" not in name:
            parameter.mul_(8 if parameter.std() < 0.05 else 2)
        elif name.endswith("bias"):
            parameter.normal_(std=0.2)


def images_of(case: str, seed: int = 0) -> Tensor:
    return torch.randn(NUM_IMAGES, 3, *CASES[case][1], generator=torch.Generator().manual_seed(seed))


def cutmix(case: str, seed: int = 1) -> MixPlan:
    """Boxes of pixels, which straddle patches; sample 3 is mixed by a fraction everywhere."""
    generator = torch.Generator().manual_seed(seed)
    plan = MixPlan.cutmix(NUM_IMAGES, image_size=CASES[case][1], generator=generator)
    own = plan.own.clone()
    own[3] = torch.rand(own.shape[1:], generator=generator)
    return MixPlan(plan.partner, own)


def mixed(case: str) -> tuple[Tensor, MixPlan]:
    """Images that the plan has mixed, and the plan."""
    plan = cutmix(case)
    return plan.mix(images_of(case)), plan


@contextmanager
def fused_attention(enable: bool) -> Iterator[None]:
    """Whether models built inside call `scaled_dot_product_attention`, Swin v1 included."""
    before = timm.layers.config._USE_FUSED_ATTN
    timm.layers.set_fused_attn(enable, experimental=enable)
    try:
        yield
    finally:
        timm.layers.config._USE_FUSED_ATTN = before


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


STRATEGIES: dict[str, Callable[[tuple[int, int]], MixPlan]] = {
    "cutmix": lambda size: MixPlan.cutmix(NUM_IMAGES, image_size=size, generator=seeded()),
    "mixup": lambda _: MixPlan.mixup(NUM_IMAGES, generator=seeded()),
    "both": lambda size: MixPlan.cutmix(NUM_IMAGES, image_size=size, mixup_alpha=0.8, generator=seeded()),
    "random": lambda size: MixPlan.random_patches(NUM_IMAGES, grid=(size[0] // 8, size[1] // 8), generator=seeded()),
    "blockwise": lambda size: MixPlan.blockwise(NUM_IMAGES, grid=(size[0] // 8, size[1] // 8), generator=seeded()),
    "mixtoken": lambda size: MixPlan.mixtoken(NUM_IMAGES, grid=(size[0] // 8, size[1] // 8), generator=seeded()),
}
