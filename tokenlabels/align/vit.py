"""Labels through ViT, DeiT (also distilled, with register tokens or without a class token) and LV-ViT.

Legend: B images, P prefix tokens, N = h x w patch tokens, T = P + N, D channels, C columns of labels.
"""

from typing import Any

from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tokenlabels.align.attention import attend
from tokenlabels.align.families import Family, Features, FirstLabels, family
from tokenlabels.align.rules import Alignment, AlignmentError, block_rule, check_part, run_blocks
from tokenlabels.checks import Grid
from tokenlabels.models.lvvit import LVViT, ScaledBlock


def _check_attention(block: Any) -> None:
    check_part(block.attn, Attention, of=block)


@block_rule(Block, check=_check_attention)
def _block(alignment: Alignment, block: Any, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 10 and 11: tokens [B, T, D] and labels [B, T, C]."""
    attended, moved = self_attention(alignment, block.attn, block.norm1(x), labels)
    x = x + block.drop_path1(block.ls1(attended))
    x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return x, alignment.combine(labels, moved)


@block_rule(ScaledBlock, check=_check_attention)
def _scaled_block(alignment: Alignment, block: Any, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    attended, moved = self_attention(alignment, block.attn, block.norm1(x), labels)
    x = x + block.drop_path1(block.ls1(attended)) / block.residual_scale
    x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))) / block.residual_scale
    return x, alignment.combine(labels, moved)


def self_attention(alignment: Alignment, attn: Any, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """timm's multi-head attention: normalised tokens [B, T, D] and labels [B, T, C] -> the same."""
    num_images, num_tokens, _ = x.shape
    gate = None if attn.gate is None else attn.gate(x).sigmoid()
    qkv = attn.qkv(x).reshape(num_images, num_tokens, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    attended, moved = attend(
        attn.q_norm(q),
        attn.k_norm(k),
        v,
        labels,
        scale=attn.scale,
        fused=attn.fused_attn,
        backend=alignment.backend,
        dropout=attn.attn_drop.p if attn.training else 0.0,
        centred=alignment.centred,
    )
    attended = attn.norm(attended.transpose(1, 2).reshape(num_images, num_tokens, attn.attn_dim))
    if gate is not None:
        attended = attended * gate
    projected: Tensor = attn.proj_drop(attn.proj(attended))
    return projected, moved


@family(VisionTransformer, VisionTransformerDistilled, LVViT)
class _ViT(Family):
    """Of the distilled DeiT the class token's label counts, as published."""

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.blocks)

    def check(self, model: Any) -> None:
        if model.attn_pool is not None or model.global_pool not in ("token", "avg"):
            raise AlignmentError(
                f"labels cannot follow the tokens through {type(model).__name__}'s pooling {model.global_pool!r}; "
                "build it with global_pool='token' or 'avg'"
            )
        if not isinstance(model.patch_drop, nn.Identity):
            raise AlignmentError(
                f"{type(model).__name__} drops patches, and their labels would be lost; build it with patch_drop_rate=0"
            )

        if getattr(model.patch_embed, "dynamic_img_pad", False):
            raise AlignmentError(
                f"{type(model).__name__} pads images to whole patches, whose share of the padding nobody could tell; "
                "build it with dynamic_img_pad=False"
            )

    def stride(self, model: Any) -> Grid:
        rows, columns = model.patch_embed.feat_ratio(as_scalar=False)
        return rows, columns

    def features(self, model: Any, images: Tensor, first_labels: FirstLabels, alignment: Alignment) -> Features:
        x = model.patch_embed(images)
        grid = (x.shape[1], x.shape[2]) if x.ndim == 4 else tuple(model.patch_embed.grid_size)
        x = model.norm_pre(model._pos_embed(x))
        labels = first_labels(grid, model.num_prefix_tokens)
        x, labels = run_blocks(alignment, model.blocks, x, labels, checkpointing=model.grad_checkpointing)
        return Features(model.norm(x), labels, grid)

    def classified(self, model: Any, labels: Tensor) -> Tensor:
        if model.global_pool == "token":
            return labels[:, 0]
        return labels[:, 0 if model.pool_include_prefix else model.num_prefix_tokens :].mean(dim=1)
