"""The layouts that MoTo finds in images (arXiv 2212.11115, section 5.2.2, Figure 5); `tokenlabels show --layout` draws
them."""

from typing import Any

import torch
from torch import Tensor, nn

from tokenlabels.models.modulation import modulations
from tokenlabels.models.moto import MoTo


@torch.no_grad()
def entity_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The most probable entity of every position, by every MoTo of a model (Figure 5).

    Args:
        model: of timm, modulated by `tokenlabels.models.modulation.modulate`. It runs once, in the mode that it is in;
            evaluation mode is the meaningful one.
        images: float [B, 3, H_px, W_px], normalised.

    Returns:
        By the name of the modulated module, in the order in which they run: int64 [B, h, w], entities 0..n-1.

    Raises:
        ValueError: the model has no MoTo.
    """
    names = {module: name.removesuffix(".modulation") for name, module in model.named_modules()}
    found: dict[str, Tensor] = {}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, MoTo), "the hook is on these alone"
        found[names[module]] = module.layout(args[0]).argmax(dim=1)

    motos = [module for module in modulations(model) if isinstance(module, MoTo)]
    if not motos:
        raise ValueError(f"{type(model).__name__} has no MoTo that could find a layout; modulate it first")
    hooks = [moto.register_forward_pre_hook(look) for moto in motos]
    try:
        model.forward_features(images)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    return found
