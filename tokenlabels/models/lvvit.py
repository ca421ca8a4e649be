"""LV-ViT (Token Labeling, arXiv 2104.10858): a vision transformer whose patch tokens are classified as well.

It is timm's `VisionTransformer` with four things of its own: convolutions before the patch tokens, residual branches
that are scaled down, a classifier for tokens, and MixToken behind the patch embedding.

Legend: B images, N = h x w patch tokens, P prefix tokens (the class token), D channels, K classes.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tokenlabels.mixing import MixPlan
from tokenlabels.models.checkpoints import fit_positions
from tokenlabels.models.embedding import mix_embedding
from tokenlabels.models.patch_embed import ConvPatchEmbed

TOKEN_SHARE = 0.5
"""Weight of the most confident token in the logits of evaluation, as in the published code."""


class ScaledBlock(Block):
    """timm's pre-norm block with ``x + F(x) / residual_scale`` (Token Labeling, Table 10)."""

    def __init__(self, *args: Any, residual_scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.residual_scale = residual_scale

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [B, P + N, D] -> the same."""
        attended = self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        x = x + attended / self.residual_scale
        expanded: Tensor = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x + expanded / self.residual_scale


class LVViT(VisionTransformer):
    """LV-ViT. In training ``model(images, plan)`` returns logits of the image and of its tokens, in evaluation one.

    State-dict keys are the published ones. The steps of the ablations are arguments: Table 8 begins with
    ``LVViT(depth=12, mlp_ratio=4, residual_scale=1, stem_kernels=(), stem_strides=(), qkv_bias=True, aux_head=False)``
    (DeiT-S), Table 9 varies `stem_kernels`, `stem_strides` and `proj_kernel`, Table 10 `residual_scale`.

    Args:
        img_size: (height, width) in pixels, or the side of a square.
        patch_size: side of a patch in pixels.
        num_classes: K; 0 makes a backbone that returns features.
        embed_dim: D.
        depth, num_heads, mlp_ratio: of the blocks.
        residual_scale: what the output of attention and MLP is divided by. The paper's text has 2 for all sizes; the
            published code, and `timm.create_model` here, have 1 for T, 2 for S and M, 3 for L.
        aux_head: whether tokens have a classifier. Without it the model returns image logits only: for hard labels.
        stem_kernels, stem_strides, stem_channels, proj_kernel: see `ConvPatchEmbed`.
        kwargs: further arguments of timm's `VisionTransformer` (drop_path_rate, global_pool, dynamic_img_size, ...).

    Attributes:
        aux_head: classifier of the tokens, or None.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        residual_scale: float = 2.0,
        *,
        aux_head: bool = True,
        stem_kernels: tuple[int, ...] = (7, 3, 3),
        stem_strides: tuple[int, ...] = (2, 1, 1),
        stem_channels: int = 64,
        proj_kernel: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not residual_scale > 0:
            raise ValueError(f"residual_scale must be above 0 (the branches are divided by it), got {residual_scale!r}")
        embed_layer = partial(
            ConvPatchEmbed,
            stem_kernels=stem_kernels,
            stem_strides=stem_strides,
            stem_channels=stem_channels,
            proj_kernel=proj_kernel,
        )
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
            embed_layer=embed_layer,
            block_fn=partial(ScaledBlock, residual_scale=residual_scale),  # type: ignore[arg-type]
            **(defaults | kwargs),
        )
        self.aux_head = self._new_classifier(num_classes) if aux_head else None

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's, but that the class token begins like the position embedding, as published."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def _new_classifier(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        like = self.patch_embed.proj.weight
        classifier = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
        trunc_normal_(classifier.weight, std=0.02)
        nn.init.zeros_(classifier.bias)
        return classifier

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens (h, w) at the model's image size: what loaders and targets need."""
        rows, columns = self.patch_embed.grid_size
        return rows, columns

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Classify images, and tokens if they were classified, into other classes. 0 leaves the features."""
        super().reset_classifier(num_classes, global_pool)
        if self.aux_head is not None:
            self.aux_head = self._new_classifier(num_classes)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size: the position embedding is resampled as in the published fine-tuning."""
        old_grid, old = self.grid, self.pos_embed
        super().set_input_size(img_size, patch_size)
        if old is not None and self.grid != old_grid:  # timm has resampled with antialiasing
            resampled = self._resampled(old, old_grid, self.grid).detach()
            self.pos_embed = nn.Parameter(resampled, requires_grad=old.requires_grad)

    def _resampled(self, positions: Tensor, old_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        num_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        resampled: Tensor = resample_abs_pos_embed(positions, grid, old_grid, num_prefix, antialias=False)
        return resampled

    def _pos_embed(self, x: Tensor) -> Tensor:
        """timm's, but that a dynamic size too is resampled without antialiasing, as the published checkpoints were."""
        if not self.dynamic_img_size or self.pos_embed is None or x.shape[1:3] == self.grid:
            tokens: Tensor = super()._pos_embed(x)
            return tokens
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        positions = self._resampled(self.pos_embed, self.grid, (x.shape[1], x.shape[2]))
        x = x.flatten(1, 2)
        x = (
            torch.cat([*prefix, x + positions], dim=1)
            if self.no_embed_class
            else torch.cat([*prefix, x], 1) + positions
        )
        dropped: Tensor = self.pos_drop(x)
        return dropped

    def forward_features(  # type: ignore[override]
        self, x: Tensor, plan: MixPlan | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Images [B, 3, H_px, W_px] -> normalised tokens [B, P + N, D], the class token first.

        Args:
            x: images.
            plan: mixes the output of the patch embedding (MixToken, section 3.3), on the grid of the tokens.
            attn_mask, is_causal: as in timm.
        """
        x = self.patch_embed(x)
        if plan is not None:
            is_map = x.ndim == 4  # a dynamic size keeps the tokens on their grid
            x = mix_embedding(plan, x, "NHWC" if is_map else "NLC", (x.shape[1], x.shape[2]) if is_map else self.grid)
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        if attn_mask is not None or is_causal:
            for block in self.blocks:
                x = block(x, attn_mask=attn_mask, is_causal=is_causal)
        elif self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        normalised: Tensor = self.norm(x)
        return normalised

    def forward_head(  # type: ignore[override]
        self, x: Tensor, pre_logits: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens [B, P + N, D] -> in training logits of images [B, K] and tokens [B, N, K], in evaluation [B, K].

        The logits of evaluation are those of the image plus half of the highest of all tokens, class by class, as
        published. Without `aux_head`, classes or pooling and for `pre_logits` it is timm's head.
        """
        image_logits: Tensor = super().forward_head(x, pre_logits=pre_logits)
        is_pooled = image_logits.ndim == 2  # global_pool="" classifies all tokens by the image's classifier
        if self.aux_head is None or pre_logits or not self.num_classes or not is_pooled:
            return image_logits
        token_logits: Tensor = self.aux_head(x[:, self.num_prefix_tokens :])
        if self.training:
            return image_logits, token_logits
        return image_logits + TOKEN_SHARE * token_logits.amax(dim=1)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        plan: MixPlan | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``forward_head(forward_features(x, plan))``."""
        return self.forward_head(self.forward_features(x, plan, attn_mask=attn_mask, is_causal=is_causal))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> LVViT:
    model: LVViT = build_model_with_cfg(
        LVViT,
        variant,
        pretrained,
        pretrained_filter_fn=_fit_checkpoint,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )
    return model


def _fit_checkpoint(state: dict[str, Tensor], model: LVViT) -> dict[str, Tensor]:
    """A released state dict for this model, where timm loads it: its image size, and no classifier that it has not."""
    state = fit_positions(model, state, "the checkpoint")
    return state if model.aux_head else {name: value for name, value in state.items() if "aux_head" not in name}


def _config(crop_pct: float) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        "paper_ids": "arXiv:2104.10858",
    }


default_cfgs = generate_default_cfgs(
    {f"lvvit_{size}": _config(crop_pct) for size, crop_pct in (("t", 0.9), ("s", 0.9), ("m", 1.0), ("l", 1.0))}
)


@register_model
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T, 8.5 M parameters."""
    size = {"embed_dim": 240, "depth": 12, "num_heads": 4, "residual_scale": 1.0}
    return _create("lvvit_t", pretrained, **(size | kwargs))


@register_model
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S, 26.2 M parameters."""
    size = {"embed_dim": 384, "depth": 16, "num_heads": 6, "residual_scale": 2.0}
    return _create("lvvit_s", pretrained, **(size | kwargs))


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M, 55.8 M parameters."""
    size = {"embed_dim": 512, "depth": 20, "num_heads": 8, "residual_scale": 2.0}
    return _create("lvvit_m", pretrained, **(size | kwargs))


@register_model
def lvvit_l(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-L, 150.0 M parameters."""
    size = {"embed_dim": 768, "depth": 24, "num_heads": 12, "residual_scale": 3.0, "stem_channels": 128}
    return _create("lvvit_l", pretrained, **(size | kwargs))
