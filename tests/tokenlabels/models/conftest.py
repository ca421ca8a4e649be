"""A small LV-ViT, and batches for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tokenlabels.models import LVViT


@pytest.fixture
def make_lvvit() -> Callable[..., LVViT]:
    """A function that builds an LV-ViT of 2 x 2 tokens with sharpened random weights; arguments override."""

    def make(**arguments: Any) -> LVViT:
        torch.manual_seed(0)
        small = {"img_size": 32, "num_classes": 10, "embed_dim": 24, "depth": 2, "num_heads": 2}
        model = LVViT(**(small | arguments))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name and "bn" not in name:
                    parameter.mul_(4)  # the initial weights barely differ from nothing
        return model

    return make
