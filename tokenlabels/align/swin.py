"""Labels through Swin v1 and v2: shifted windows, and patches that are merged.

Legend: B images, H x W tokens, W windows in all images, A tokens per window, D channels, C columns of labels.
"""

import math
from typing import Any

import torch
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from torch import Tensor, nn
from torch.nn import functional

from tokenlabels.align.attention import attend
from tokenlabels.align.families import Family, Features, FirstLabels, check_pool_type, family, on_grid
from tokenlabels.align.operations import merge
from tokenlabels.align.rules import Alignment, block_rule, check_part, run_blocks
from tokenlabels.checks import Grid

_MOST_LOGIT_SCALE = math.log(1 / 0.01)
"""Swin v2's upper limit of the learned scale of its cosines."""


@block_rule(v1.SwinTransformerBlock)
def _block(alignment: Alignment, block: Any, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, H, W, D] and labels [B, H, W, C]."""
    attended, moved = _windows(alignment, block, block.norm1(x), labels)
    x = x + block.drop_path1(attended)
    x = x + block.drop_path2(block.mlp(block.norm2(x)))
    return x, alignment.combine(labels, moved)


@block_rule(v2.SwinTransformerV2Block)
def _block_v2(alignment: Alignment, block: Any, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    attended, moved = _windows(alignment, block, x, labels)
    x = x + block.drop_path1(block.norm1(attended))
    x = x + block.drop_path2(block.norm2(block.mlp(x)))
    return x, alignment.combine(labels, moved)


def _windows(alignment: Alignment, block: Any, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Attention within windows that are shifted over the grid.

    Where the grid has no whole windows, the tokens that fill them up take part in attention, but have no label: those
    of the others share out their weight. A token that attends to nothing else keeps its own.
    """
    height, width = x.shape[1:3]
    pad_rows, pad_columns = (-side % window for side, window in zip((height, width), block.window_size, strict=True))
    is_padded = pad_rows > 0 or pad_columns > 0
    given = labels
    if is_padded:
        mean = labels.mean(dim=(1, 2), keepdim=True)
        labels = torch.cat([labels - mean, torch.ones_like(labels[..., :1])], dim=-1)
    padding = (0, 0, 0, pad_columns, 0, pad_rows)
    shifted = functional.pad(_rolled(x, block.shift_size, -1), padding)
    mask = block.get_attn_mask(shifted) if block.dynamic_mask else block.attn_mask
    grid = (height + pad_rows, width + pad_columns)
    attended, moved = _window_attention(
        alignment,
        block.attn,
        _partition(shifted, block.window_size),
        _partition(functional.pad(_rolled(labels, block.shift_size, -1), padding), block.window_size),
        mask,
        centred=not is_padded,
    )
    attended, moved = (
        _rolled(_together(windows, block.window_size, grid)[:, :height, :width], block.shift_size, 1)
        for windows in (attended, moved)
    )
    if is_padded:
        moved, present = moved[..., :-1], moved[..., -1:]
        moved = torch.where(present > torch.finfo(attended.dtype).tiny, mean + moved / present, given)
    return attended, moved


def _window_attention(
    alignment: Alignment, attn: Any, x: Tensor, labels: Tensor, mask: Tensor | None, *, centred: bool
) -> tuple[Tensor, Tensor]:
    """Tokens [W, A, D] and labels [W, A, C] of all windows -> the same; mask [windows of an image, A, A] or None."""
    inputs = _cosine_inputs if isinstance(attn, v2.WindowAttention) else _inputs
    q, k, v, bias, scale = inputs(attn, x)
    if mask is not None:
        # windows of an image follow each other, image by image
        bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
    attended, moved = attend(
        q,
        k,
        v,
        labels,
        scale=scale,
        fused=getattr(attn, "fused_attn", False),
        backend=alignment.backend,
        bias=bias,
        dropout=attn.attn_drop.p if attn.training else 0.0,
        centred=centred,
    )
    attended = attended.transpose(1, 2).flatten(2)
    return attn.proj_drop(attn.proj(attended)), moved


def _inputs(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """q, k, v of Swin v1, its bias [1, h, A, A] and scale."""
    q, k, v = _heads(attn.qkv(x), attn.num_heads)
    return q, k, v, attn._get_rel_pos_bias(), attn.scale


def _cosine_inputs(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """q, k, v of Swin v2, where products are cosines times a learned scale, and its bias."""
    bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if bias is not None and attn.qkv_bias_separate:
        qkv = attn.qkv(x) + bias
    else:
        qkv = functional.linear(x, attn.qkv.weight, bias)
    q, k, v = _heads(qkv, attn.num_heads)
    scale = attn.logit_scale.clamp(max=_MOST_LOGIT_SCALE).exp()
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
    area = len(attn.relative_position_index)
    position = table[attn.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
    q, k = functional.normalize(q, dim=-1) * scale, functional.normalize(k, dim=-1)
    return q, k, v, 16 * position.sigmoid()[None], 1.0


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.reshape(*qkv.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _rolled(maps: Tensor, shift: Grid, direction: int) -> Tensor:
    return maps.roll((direction * shift[0], direction * shift[1]), dims=(1, 2)) if any(shift) else maps


def _partition(maps: Tensor, window: Grid) -> Tensor:
    """[B, H, W, D] -> [W, A, D]."""
    windows: Tensor = v1.window_partition(maps, window)
    return windows.flatten(1, 2)


def _together(windows: Tensor, window: Grid, grid: Grid) -> Tensor:
    """[W, A, D] -> [B, H, W, D]."""
    maps: Tensor = v1.window_reverse(windows.reshape(-1, *window, windows.shape[-1]), window, *grid)
    return maps


@family(v1.SwinTransformer, v2.SwinTransformerV2)
class _Swin(Family):
    """Windows of all stages; classified is the mean of all tokens."""

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.layers for block in stage.blocks]

    def check(self, model: Any) -> None:
        check_pool_type(model, model.head.global_pool.pool_type)
        for stage in model.layers:
            check_part(stage.downsample, nn.Identity, v1.PatchMerging, v2.PatchMerging, of=stage)

    def stride(self, model: Any) -> Grid:
        rows, columns = model.patch_embed.feat_ratio(as_scalar=False)
        return rows, columns

    def features(self, model: Any, images: Tensor, first_labels: FirstLabels, alignment: Alignment) -> Features:
        x = model.patch_embed(images)
        labels = on_grid(first_labels((x.shape[1], x.shape[2]), 0), x.shape[1:3])
        first = 0
        for stage in model.layers:
            x = stage.downsample(x)
            labels = labels if isinstance(stage.downsample, nn.Identity) else merge(labels)
            x, labels = run_blocks(
                alignment, stage.blocks, x, labels, first=first, checkpointing=stage.grad_checkpointing
            )
            first += len(stage.blocks)
        return Features(model.norm(x), labels.flatten(1, 2), (x.shape[1], x.shape[2]))
