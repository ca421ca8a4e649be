"""Labels through ConvNeXt v1 and v2, whose depthwise convolutions mix tokens (TL-Align, appendix D).

Legend: B images, h x w tokens, D channels, C columns of labels.
"""

from typing import Any

from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from tokenlabels.align.families import Family, Features, FirstLabels, check_pool_type, family, on_grid
from tokenlabels.align.operations import mix_depthwise, pool
from tokenlabels.align.rules import Alignment, AlignmentError, block_rule, check_part, run_blocks
from tokenlabels.checks import Grid


def _check_shortcut(block: Any) -> None:
    check_part(block.shortcut, nn.Identity, of=block)


@block_rule(ConvNeXtBlock, check=_check_shortcut)
def _block(alignment: Alignment, block: Any, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, D, h, w] and labels [B, h, w, C]."""
    return block(x), alignment.combine(labels, mix_depthwise(labels, block.conv_dw))


@family(ConvNeXt)
class _ConvNeXt(Family):
    """Four stages; classified is the mean of all tokens."""

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.stages for block in stage.blocks]

    def check(self, model: Any) -> None:
        check_pool_type(model, model.head.global_pool.pool_type)
        for stage in model.stages:
            if any(block.conv_dw.dilation != (1, 1) for block in stage.blocks):
                raise AlignmentError(
                    "labels cannot follow the tokens through dilated convolutions of ConvNeXt; build it with "
                    "output_stride=32"
                )

    def stride(self, model: Any) -> Grid:
        stride: int = model.feature_info[0]["reduction"]
        return stride, stride

    def features(self, model: Any, images: Tensor, first_labels: FirstLabels, alignment: Alignment) -> Features:
        x = model.stem(images)
        labels = on_grid(first_labels((x.shape[2], x.shape[3]), 0), x.shape[2:])
        first = 0
        for stage in model.stages:
            x = stage.downsample(x)
            labels = labels if isinstance(stage.downsample, nn.Identity) else pool(labels, stage.downsample[1])
            x, labels = run_blocks(
                alignment, stage.blocks, x, labels, first=first, checkpointing=stage.grad_checkpointing
            )
            first += len(stage.blocks)
        return Features(model.norm_pre(x), labels.flatten(1, 2), (x.shape[2], x.shape[3]))
