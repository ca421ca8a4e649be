"""What the README, docs/training.md, docs/align.md and docs/tokenizers.md show, runs."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from annotate.bench_store import simulate_maps, write_simulated
from tests.docs.pages import ROOT, blocks
from tests.loaders.photos import write_photos
from tokenlabels.align import TLAlign
from tokenlabels.align.rules import BLOCK_RULES
from tokenlabels.mixing import MixPlan

README, TRAINING = ROOT / "README.md", ROOT / "docs" / "training.md"
ALIGN, TOKENIZERS = ROOT / "docs" / "align.md", ROOT / "docs" / "tokenizers.md"


def python_blocks(containing: str, page: Path = README) -> list[str]:
    return [block for block in blocks(page, "python") if containing in block]


def test_targets_and_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_simulated(tmp_path / "labels", simulate_maps(4, seed=0))
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks("box_in_map")
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


def test_training_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches on the CPU, of two small tars of the same names."""
    photos = write_photos(tmp_path, (300, 230), num_classes=1000, stem="imagenet1k-train-{:04d}")
    assert Path(photos.tars[1]).name == "imagenet1k-train-0001.tar"
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks("TokenLabelLoader")
    for there, here in (("{0000..1023}", "{0000..0001}"), ('"cuda"', '"cpu"'), ("threads=16", "threads=2")):
        assert there in block
        block = block.replace(there, here)
    head = nn.Linear(3, 1000)

    def model(images: torch.Tensor, plan: MixPlan) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = plan.mix(nn.functional.avg_pool2d(images, 16).flatten(2).mT)
        return head(tokens.mean(dim=1)), head(tokens)

    names: dict[str, Any] = {"model": model, "range": lambda first, _: range(first, 1)}
    exec(block, names)
    assert names["batch"].images.shape == (256, 3, 224, 224)
    assert names["loss"].isfinite()
    names["loss"].backward()
    assert head.weight.grad is not None


def test_models_and_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/training.md, one after the other, with small tars."""
    photos = write_photos(tmp_path, (9, 4), num_classes=10)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"tars": photos.tars, "labels": photos.labels}
    models, loop = python_blocks("", TRAINING)
    exec(models, names)
    assert [tuple(names[name].shape) for name in ("logits", "image_logits", "token_logits")] == [
        (2, 10),
        (2, 10),
        (2, 49, 10),
    ]
    assert type(names["plain"]).__name__ == "SwinTransformer"
    assert [tuple(map_.shape) for map_ in names["maps"]] == [(1, 240, 4, 4)] * 3
    exec(loop, names)
    assert names["accuracy"].num_images == 13
    assert Path("runs/mine/last.pt").exists()


def test_targets_that_follow_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/align.md, one after the other, with small tars."""
    photos = write_photos(tmp_path, (9, 4), num_classes=10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokenlabels.align.rules.BLOCK_RULES", dict(BLOCK_RULES))
    names: dict[str, Any] = {"tars": photos.tars, "labels": photos.labels}
    images, tokens, rule = python_blocks("", ALIGN)
    exec(images, names)
    assert names["predictions"].shape == (4, 10)
    assert names["student"].head.weight.grad is not None
    assert torch.load("student.pt").keys() == timm.create_model("vit_tiny_patch16_224", img_size=64).state_dict().keys()
    exec(tokens, names)
    assert names["loss"].isfinite()
    exec(rule, names)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, block_fn=ResPostBlock)
    plan = MixPlan.cutmix(4, image_size=64)
    mixed = plan.mix(torch.randn(4, 3, 64, 64))
    logits, share = TLAlign(model)(mixed, plan)
    torch.testing.assert_close(logits, model(mixed))
    assert ((share - plan.share()).abs() > 0).all()


def test_other_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks("", TOKENIZERS)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["predictions"].shape == (4, 10)
    assert names["moto"].beta.grad.abs().max() > 0
    assert not any("decoder" in name for name in torch.load("student.pt"))
