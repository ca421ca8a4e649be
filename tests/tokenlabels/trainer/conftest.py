"""A small student, and a short run."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.tokenlabels.trainer.batches import NUM_CLASSES, SIDE
from tokenlabels.models import LVViT
from tokenlabels.trainer import OptimizerConfig, ScheduleConfig, TrainerConfig


@pytest.fixture(autouse=True)
def _flush_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, and flushing is most of the time of a small write."""
    monkeypatch.setattr(os, "fsync", os.fstat)


@pytest.fixture
def make_model() -> Callable[..., LVViT]:
    """A function that builds an LV-ViT of 2 x 2 tokens; arguments override."""

    def make(**arguments: Any) -> LVViT:
        torch.manual_seed(0)
        small = {"img_size": SIDE, "num_classes": NUM_CLASSES, "embed_dim": 24, "depth": 2, "num_heads": 2}
        return LVViT(**({"drop_path_rate": 0.3} | small | arguments))

    return make


@pytest.fixture
def make_config() -> Callable[..., TrainerConfig]:
    """A function that makes the configuration of a short run on the CPU; arguments override."""

    def make(**changes: Any) -> TrainerConfig:
        short: dict[str, Any] = {
            "optimizer": OptimizerConfig(base_lr=1e-2, lr_batch=4),
            "schedule": ScheduleConfig(epochs=3, warmup_epochs=0.5),
            "precision": "fp32",
            "ema_decay": 0.9,
            "log_every": 2,
        }
        return TrainerConfig(**(short | changes))

    return make
