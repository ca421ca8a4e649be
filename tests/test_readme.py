"""What the README shows, runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from annotate.bench_store import simulate_maps, write_simulated

README = Path(__file__).parents[1] / "README.md"


def python_blocks(containing: str) -> list[str]:
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block for block in blocks if containing in block]


def test_targets_and_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_simulated(tmp_path / "labels", simulate_maps(4, seed=0))
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks("token_label_loss")
    head = nn.Linear(8, 1000)

    def model(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return head(tokens.mean(dim=1)), head(tokens)

    names: dict[str, Any] = {
        "boxes_in_image": torch.tensor([[0.1, 0.2, 0.8, 0.9]] * 4),
        "flip": torch.tensor([False, True, False, True]),
        "images": torch.randn(4, 3, 224, 224),
        "patch_embedding": lambda images: images.unfold(2, 16, 16).unfold(3, 16, 16).reshape(4, 196, -1)[..., :8],
        "model": model,
    }
    exec(block, names)
    loss = names["loss"]
    assert loss.isfinite()
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() > 0
