"""Weights of PVT v1 (arXiv 2102.12122): those that it begins with, and those that were published."""

import re
from functools import partial
from typing import Any

from timm.layers import trunc_normal_
from torch import Tensor, nn

from tokenlabels.models.checkpoints import fit_positions
from tokenlabels.models.pvt_stage import PVTStage

_RELEASED_NAMES = {
    r"^patch_embed(\d)\.": "patch_embeds.{}.",
    r"^pos_embed(\d)$": "stages.{}.pos_embed",
    r"^block(\d)\.": "stages.{}.blocks.",
}


def init_weights(module: nn.Module) -> None:
    """As published: linear layers, positions and class token by a truncated normal; convolutions are as torch's."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, PVTStage):
        trunc_normal_(module.pos_embed, std=0.02)
        if module.cls_token is not None:
            trunc_normal_(module.cls_token, std=0.02)


def fit_checkpoint(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A released state dict, where timm loads it: our names, and the image size of the
    `PyramidVisionTransformer`."""
    for pattern, name in _RELEASED_NAMES.items():
        ours = partial(_renamed, name)
        state = {re.sub(pattern, ours, key): tensor for key, tensor in state.items()}
    if "cls_token" in state:
        state[f"stages.{len(model.stages) - 1}.cls_token"] = state.pop("cls_token")
    return fit_positions(model, state, "the checkpoint")


def _renamed(name: str, match: re.Match[str]) -> str:
    return name.format(int(match[1]) - 1)
