"""Labels through PVT v1: attention to keys that convolutions have reduced, and a class token in the last stage.

Legend: B images, P prefix tokens of a stage, N = h x w patch tokens, D channels, C columns of labels.
"""

from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from tokenlabels.align.families import Family, Features, FirstLabels, family, on_grid
from tokenlabels.align.operations import pool
from tokenlabels.align.pvt import _attention
from tokenlabels.align.rules import Alignment, AlignmentError, block_rule, check_part, run_blocks
from tokenlabels.checks import Grid
from tokenlabels.models.pvt_stage import PVTBlock
from tokenlabels.models.pvt_v1 import PyramidVisionTransformer


@block_rule(PVTBlock)
def _block(alignment: Alignment, block: Any, x: Tensor, labels: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Tokens [B, P + N, D] and labels [B, P + N, C]. Attention is PVT v2's; the MLP mixes no tokens."""
    attended, moved = _attention(alignment, block.attn, block.norm1(x), labels, grid)
    x = x + block.drop_path1(attended)
    x = x + block.drop_path2(block.mlp(block.norm2(x)))
    return x, alignment.combine(labels, moved)


@family(PyramidVisionTransformer)
class _PVT(Family):
    """Four stages of blocks. The class token joins with the share of the whole image (equation 5)."""

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.stages for block in stage.blocks]

    def check(self, model: Any) -> None:
        for embed in model.patch_embeds:
            check_part(embed, PatchEmbed, of=model)
        if not model.global_pool:
            raise AlignmentError(
                f"labels cannot follow the tokens through {type(model).__name__} without pooling; build it with "
                "global_pool='token' or 'avg'"
            )

    def stride(self, model: Any) -> Grid:
        return model.strides[0], model.strides[0]

    def features(self, model: Any, images: Tensor, first_labels: FirstLabels, alignment: Alignment) -> Features:
        model.check_images(images)
        num_prefix, number = model.num_prefix_tokens, 0
        prefix, labels = first_labels(model.stages[0].grid_size, num_prefix).tensor_split([num_prefix], dim=1)
        x = images
        for embed, stage in zip(model.patch_embeds, model.stages, strict=True):
            x = stage.embed(embed(x))
            if number:
                labels = pool(labels, embed.proj).flatten(1, 2)
            if stage.num_prefix_tokens:
                labels = torch.cat([prefix, labels], dim=1)
            x, labels = run_blocks(
                alignment,
                stage.blocks,
                x,
                labels,
                stage.grid_size,
                first=number,
                checkpointing=stage.grad_checkpointing,
            )
            number += len(stage.blocks)
            if stage is not model.stages[-1]:
                x, labels = stage.maps(x), on_grid(labels, stage.grid_size)
        return Features(model.norm(x), labels, model.stages[-1].grid_size)

    def classified(self, model: Any, labels: Tensor) -> Tensor:
        if model.global_pool == "token":
            return labels[:, 0]
        return labels[:, model.num_prefix_tokens :].mean(dim=1)
