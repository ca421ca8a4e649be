"""Labels through MLP-Mixer, whose MLP over tokens is two learned matrices (TL-Align, appendix D).

Legend: B images, N = h x w tokens, D channels, C columns of labels.
"""

from typing import Any

from timm.layers import Mlp
from timm.models.mlp_mixer import MixerBlock, MlpMixer
from torch import Tensor, nn

from tokenlabels.align.families import Family, Features, FirstLabels, check_pool_type, family
from tokenlabels.align.operations import mix_dense
from tokenlabels.align.rules import Alignment, block_rule, check_part, run_blocks
from tokenlabels.checks import Grid


def _check_mlp(block: Any) -> None:
    check_part(block.mlp_tokens, Mlp, of=block)


@block_rule(MixerBlock, check=_check_mlp)
def _block(alignment: Alignment, block: Any, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, N, D] and labels [B, N, C].

    The paper's appendix has a single matrix. A hidden unit of the MLP is taken for a token here: labels go through both
    matrices, and the activation between them, which is point-wise, leaves them as they are.
    """
    moved = mix_dense(mix_dense(labels, block.mlp_tokens.fc1), block.mlp_tokens.fc2)
    return block(x), alignment.combine(labels, moved)


@family(MlpMixer)
class _Mixer(Family):
    """Blocks of one size; classified is the mean of all tokens."""

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.blocks)

    def check(self, model: Any) -> None:
        check_pool_type(model, model.global_pool)

    def stride(self, model: Any) -> Grid:
        rows, columns = model.stem.feat_ratio(as_scalar=False)
        return rows, columns

    def features(self, model: Any, images: Tensor, first_labels: FirstLabels, alignment: Alignment) -> Features:
        x = model.stem(images)
        labels = first_labels(tuple(model.stem.grid_size), 0)
        x, labels = run_blocks(alignment, model.blocks, x, labels, checkpointing=model.grad_checkpointing)
        return Features(model.norm(x), labels, tuple(model.stem.grid_size))
