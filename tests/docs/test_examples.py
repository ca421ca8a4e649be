"""The loops of docs/examples.md run, one after the other, with a small student."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from loaders import TokenLabelLoader
from tests.docs.pages import ROOT, section
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier

EXAMPLES = ROOT / "docs" / "examples.md"
NUM_EPOCHS, NUM_BATCHES = 2, 2

Seen = list[tuple[int, tuple[str, ...]]]

foreign = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
"""For what other packages warn of in themselves."""


class Student(nn.Module):
    """A small LV-ViT, which remembers the plans that it was given."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.model = timm.create_model(
            "lvvit_t", num_classes=num_classes, img_size=64, embed_dim=48, depth=2, num_heads=2, stem_channels=8
        )
        self.plans: list[MixPlan | None] = []

    def forward(self, images: torch.Tensor, plan: MixPlan | None) -> Any:
        self.plans.append(plan)
        return self.model(images, plan)


@pytest.fixture
def shared(workplace: Path) -> dict[str, Any]:
    """The names that the first block defines, made small: two epochs of two batches."""
    names: dict[str, Any] = {"__name__": "examples"}
    exec(section(EXAMPLES, "What all of them share"), names)
    assert (workplace / names["data"]["labels"]).is_dir()
    names["data"] |= {"image_size": 64, "batch_size": 8, "threads": 2}
    return names | {"num_epochs": NUM_EPOCHS, "device": "cpu", "make_model": Student}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Epoch and keys of every batch that a loader hands out."""
    batches: Seen = []
    plain = TokenLabelLoader.__iter__

    def recorded(loader: TokenLabelLoader) -> Iterator[Any]:
        for batch in plain(loader):
            batches.append((loader.state_dict()["epoch"], batch.keys))
            yield batch

    monkeypatch.setattr(TokenLabelLoader, "__iter__", recorded)
    return batches


def assert_trained(student: Any, seen: Seen, num_steps: int = NUM_EPOCHS * NUM_BATCHES) -> None:
    """Every image once per epoch, in two orders, mixed in the model, and every weight moved by a gradient."""
    assert [epoch for epoch, _ in seen] == [0, 0, 1, 1]
    keys = [sum((keys for epoch, keys in seen if epoch == one), ()) for one in range(NUM_EPOCHS)]
    assert sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != keys[1]
    assert len(student.plans) == num_steps
    assert all(plan is not None for plan in student.plans)
    assert all(parameter.grad is not None for parameter in student.parameters() if parameter.requires_grad)


def test_the_students_of_the_page_can_be_made(shared: dict[str, Any]) -> None:
    names: dict[str, Any] = {"__name__": "examples"}
    exec(section(EXAMPLES, "What all of them share"), names)
    names["student"] = "lvvit_t"
    assert names["make_model"](3).num_classes == 3
    assert DenseClassifier(timm.create_model("vit_tiny_patch16_224", num_classes=3)).grid == (14, 14)
    loader = shared["TokenLabelLoader"](**shared["data"], device="cpu")
    assert next(iter(loader)).targets.num_tokens == 16


def test_a_loop_of_your_own_stopped_and_gone_on_with(shared: dict[str, Any], seen: Seen) -> None:
    loop = section(EXAMPLES, "A loop of your own")
    exec(loop, shared | {"num_epochs": 1})
    assert len(seen) == NUM_BATCHES
    names = dict(shared)
    exec(loop, names)
    assert_trained(names["model"], seen, num_steps=NUM_BATCHES)


def test_the_train_script_of_timm(shared: dict[str, Any], seen: Seen) -> None:
    """The calls that the script makes, in its order."""
    exec(section(EXAMPLES, "timm's train.py"), shared)
    loader_train = shared["Pairs"](shared["TokenLabelLoader"](**shared["data"], device="cpu"))
    model = Student(3)
    task = shared["TokenLabelTask"](model, criterion_kwargs={"smoothing": 0.1}, device=torch.device("cpu"))
    task.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    for epoch in range(NUM_EPOCHS):
        assert hasattr(loader_train.sampler, "set_epoch")
        loader_train.sampler.set_epoch(epoch)
        assert len(loader_train) == NUM_BATCHES
        for images, target in loader_train:
            images, target = images.to(device="cpu"), target.to(device="cpu")
            result = task(images.contiguous(memory_format=torch.channels_last), target)
            assert result["output"].shape == (images.size(0), 3)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            task.update_ema()
    assert_trained(model, seen)
    ema = task.get_eval_model(ema=True).eval()
    assert ema(images, None).shape == (8, 3)


@pytest.mark.parametrize("framework", ["lightning", "accelerate"])
def test_frameworks_that_are_no_dependencies_compile(framework: str) -> None:
    code = section(EXAMPLES, framework.capitalize())
    assert framework in code
    compile(code, framework, "exec")


@foreign
def test_lightning(shared: dict[str, Any], seen: Seen) -> None:
    pytest.importorskip("lightning")
    exec(section(EXAMPLES, "Lightning"), shared)
    assert_trained(shared["trainer"].lightning_module.model, seen)
    assert shared["trainer"].train_dataloader is shared["loader"]


@foreign
def test_accelerate(shared: dict[str, Any], seen: Seen) -> None:
    pytest.importorskip("accelerate")
    exec(section(EXAMPLES, "Accelerate"), shared)
    assert_trained(shared["model"], seen)
    assert shared["accelerator"].prepare(shared["loader"]) is shared["loader"]
