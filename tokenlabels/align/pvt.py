"""Labels through PVT v2: attention to keys that convolutions have reduced, and convolutions inside MLPs.

Legend: B images, N = h x w tokens, M reduced keys, D channels, C columns of labels.
"""

from typing import Any

from timm.models.pvt_v2 import Block, PyramidVisionTransformerV2
from torch import Tensor, nn
from torch.nn import functional

from tokenlabels.align.attention import attend
from tokenlabels.align.families import Family, Features, FirstLabels, check_pool_type, family, on_grid
from tokenlabels.align.operations import mix_depthwise, pool
from tokenlabels.align.rules import Alignment, block_rule, run_blocks
from tokenlabels.checks import Grid


@block_rule(Block)
def _block(alignment: Alignment, block: Any, x: Tensor, labels: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Tokens [B, N, D] and labels [B, N, C]. The depthwise convolution of the MLP mixes tokens, by Table 10."""
    attended, moved = _attention(alignment, block.attn, block.norm1(x), labels, grid)
    x = x + block.drop_path1(attended)
    x = x + block.drop_path2(block.mlp(block.norm2(x), grid))
    labels = alignment.combine(labels, moved)
    mixed = mix_depthwise(on_grid(labels, grid), block.mlp.dwconv).flatten(1, 2)
    return x, alignment.combine(labels, mixed)


def _attention(alignment: Alignment, attn: Any, x: Tensor, labels: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    num_images, num_tokens, _ = x.shape
    q = attn.q(x).reshape(num_images, num_tokens, attn.num_heads, attn.head_dim).transpose(1, 2)
    x, labels = _keys(attn, x, labels, grid)
    kv = attn.kv(x).reshape(num_images, -1, 2, attn.num_heads, attn.head_dim)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    attended, moved = attend(
        q,
        k,
        v,
        labels,
        scale=attn.scale,
        fused=attn.fused_attn,
        backend=alignment.backend,
        dropout=attn.attn_drop.p if attn.training else 0.0,
    )
    return attn.proj_drop(attn.proj(attended.transpose(1, 2).flatten(2))), moved


def _keys(attn: Any, x: Tensor, labels: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Tokens that keys are made of, [B, M, D], and their labels [B, M, C]."""
    if attn.sr is None:
        return x, labels
    maps, labels = on_grid(x, grid).permute(0, 3, 1, 2), on_grid(labels, grid)
    if attn.pool is not None:  # "linear" attention: 7 x 7 keys, whatever the grid
        maps = attn.pool(maps)
        size = attn.pool.output_size
        labels = functional.adaptive_avg_pool2d(labels.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    labels = pool(labels, attn.sr).flatten(1, 2)
    x = attn.norm(attn.sr(maps).flatten(2).transpose(1, 2))
    return x if attn.act is None else attn.act(x), labels


@family(PyramidVisionTransformerV2)
class _PVTv2(Family):
    """Four stages of blocks; classified is the mean of all tokens."""

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.stages for block in stage.blocks]

    def check(self, model: Any) -> None:
        check_pool_type(model, model.global_pool)

    def stride(self, model: Any) -> Grid:
        stride: int = model.feature_info[0]["reduction"]
        return stride, stride

    def features(self, model: Any, images: Tensor, first_labels: FirstLabels, alignment: Alignment) -> Features:
        x = model.patch_embed(images)
        labels = on_grid(first_labels((x.shape[1], x.shape[2]), 0), x.shape[1:3])
        first = 0
        for stage in model.stages:
            if stage.downsample is not None:
                x = stage.downsample(x)  # channels first in, channels last out
                labels = pool(labels, stage.downsample.proj)
            grid = (x.shape[1], x.shape[2])
            x, tokens = run_blocks(
                alignment,
                stage.blocks,
                x.flatten(1, 2),
                labels.flatten(1, 2),
                grid,
                first=first,
                checkpointing=stage.grad_checkpointing,
            )
            x, labels = on_grid(stage.norm(x), grid).permute(0, 3, 1, 2).contiguous(), on_grid(tokens, grid)
            first += len(stage.blocks)
        return Features(x, labels.flatten(1, 2), (x.shape[2], x.shape[3]))
