"""T2T-ViT (arXiv 2101.11986): timm's `VisionTransformer` behind a Tokens-to-Token module for a patch embedding.

That module is the published one with Performers, see `tokenlabels.models.t2t_embed`, which T2T-ViT-14 and -19 have;
``T2T-ViT_t`` is not here.

Legend: E channels of a token in the module, D channels of the blocks.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokenlabels.models.checkpoints import fit_positions
from tokenlabels.models.t2t_embed import PATCH_SIZE, T2TPatchEmbed


def sinusoids(num_positions: int, dim: int) -> Tensor:
    """Position embedding of Attention Is All You Need (arXiv 1706.03762, section 3.5), float32 [1, num_positions, dim].

    Channel 2i of position p is ``sin(p / 10000^(2i / dim))``, channel 2i + 1 its cosine.
    """
    channels = torch.arange(dim, device="cpu")
    wavelengths = 10_000.0 ** (2 * (channels // 2) / dim).double()
    angles = torch.arange(num_positions, device="cpu", dtype=torch.float64)[:, None] / wavelengths
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).float()[None]


class T2TViT(VisionTransformer):
    """T2T-ViT: timm's pre-norm blocks behind `T2TPatchEmbed`, with a class token.

    The position embedding is made of sinusoids over the class token and the tokens in row-major order, and is not
    trained, as published. `set_input_size` and dynamic sizes resample it, as timm does.

    Args:
        img_size: (height, width) in pixels, or the side of a square; multiples of 16.
        patch_size: 16.
        num_classes: K; 0 makes a backbone that returns features.
        embed_dim: D.
        depth, num_heads, mlp_ratio: of the blocks.
        token_dim, token_drop_rate: see `T2TPatchEmbed`.
        kwargs: further arguments of timm's `VisionTransformer` (drop_path_rate, global_pool, dynamic_img_size, ...).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = PATCH_SIZE,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        *,
        token_dim: int = 64,
        token_drop_rate: float = 0.1,
        **kwargs: Any,
    ) -> None:
        defaults: dict[str, Any] = {"qkv_bias": False, "norm_layer": partial(LayerNorm, eps=1e-5)}
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            embed_layer=partial(T2TPatchEmbed, token_dim=token_dim, token_drop_rate=token_drop_rate),
            **(defaults | kwargs),
        )
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's, but for the position embedding and the class token, as published."""
        super().init_weights(mode, needs_reset)
        if self.pos_embed is not None:
            self.pos_embed.copy_(sinusoids(self.pos_embed.shape[1], self.embed_dim))
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)


def _fit_checkpoint(state: dict[str, Tensor], model: T2TViT) -> dict[str, Tensor]:
    """A released state dict, where timm loads it: our names for the tokenizer, and the model's image size."""
    ours = {"tokens_to_token.project.": "patch_embed.proj.", "tokens_to_token.": "patch_embed."}
    for theirs, name in ours.items():
        state = {key.replace(theirs, name): tensor for key, tensor in state.items()}
    return fit_positions(model, state, "the checkpoint")


def _create(variant: str, pretrained: bool, **kwargs: Any) -> T2TViT:
    model: T2TViT = build_model_with_cfg(
        T2TViT,
        variant,
        pretrained,
        pretrained_filter_fn=_fit_checkpoint,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )
    return model


default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "classifier": "head",
            "paper_ids": "arXiv:2101.11986",
        }
        for name in ("t2t_vit_14", "t2t_vit_19")
    }
)


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14, 21.5 M parameters."""
    size = {"embed_dim": 384, "depth": 14, "num_heads": 6}
    return _create("t2t_vit_14", pretrained, **(size | kwargs))


@register_model
def t2t_vit_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-19, 39.2 M parameters."""
    size = {"embed_dim": 448, "depth": 19, "num_heads": 7}
    return _create("t2t_vit_19", pretrained, **(size | kwargs))
