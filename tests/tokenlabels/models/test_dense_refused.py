"""What `DenseClassifier` refuses: models, images, plans and targets that do not fit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.tokenlabels.models.families import NUM_CLASSES, Strided, dense, mixtoken
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier, LVViT
from tokenlabels.sparse_targets import TokenTargets


@pytest.mark.parametrize(
    ("case", "image_size", "grid", "message"),
    [
        pytest.param(
            "deit", (32, 32), None, r"images must be \[B, C, 32, 48\], got float32 \[4, 3, 32, 32\]", id="size"
        ),
        pytest.param("resnet", (64, 64), None, r"images must be \[B, C, 64, 96\]", id="size-of-a-flexible-model"),
        pytest.param("deit", (32, 48), (3, 2), r"plan must be on the grid \(2, 3\) of .*, got \(3, 2\)", id="plan"),
        pytest.param("deit", (32, 48), (32, 48), "none for images mixed already", id="plan-of-pixels"),
        pytest.param("swin", (64, 32), (16, 8), r"plan must be on the grid \(4, 2\)", id="plan-of-embedding"),
        pytest.param(
            "resnet", (64, 96), (2, 3), r'no patch embedding \(.*\); mix the pixels instead: mix="cutmix"', id="resnet"
        ),
    ],
)
def test_inputs_that_are_refused(
    case: str, image_size: tuple[int, int], grid: tuple[int, int] | None, message: str
) -> None:
    classifier, _ = dense(case)
    plan = None if grid is None else MixPlan(torch.tensor([1, 2, 3, 0]), torch.ones(4, *grid))
    with pytest.raises(ValueError, match=message):
        classifier(torch.randn(4, 3, *image_size), plan)


def test_a_plan_of_another_batch_is_refused() -> None:
    classifier, images = dense("deit")
    with pytest.raises(ValueError, match="a plan of 4 samples"):
        classifier(images[:3], mixtoken(classifier))


def test_an_exchanged_patch_embedding_does_not_pass_for_a_mixing_one() -> None:
    classifier, images = dense("deit")
    classifier.model.patch_embed = copy.deepcopy(classifier.model.patch_embed)
    classifier.model.patch_embed._forward_hooks.clear()
    with pytest.raises(ValueError, match="another module than when DenseClassifier was built, and nothing was mixed"):
        classifier(images, mixtoken(classifier))
    assert classifier(images)[1].shape == (4, 6, NUM_CLASSES)


class Unused(Strided):
    def __init__(self) -> None:
        super().__init__("NCHW")
        self.patch_embed = nn.Identity()


@pytest.mark.parametrize(
    ("build", "size", "message"),
    [
        pytest.param(
            lambda: timm.create_model("shvit_s1", num_classes=NUM_CLASSES),
            80,
            r"patch embedding is on \(5, 5\), which cannot be divided evenly among tokens on \(2, 2\)",
            id="straddles",
        ),
        pytest.param(Unused, 16, "does not use its patch embedding", id="unused"),
    ],
)
def test_embeddings_that_cannot_be_mixed(build: Callable[[], nn.Module], size: int, message: str) -> None:
    classifier, images = DenseClassifier(build(), size), torch.randn(4, 3, size, size)
    assert classifier.grid == (2, 2)
    assert classifier(images)[1].shape == (4, 4, NUM_CLASSES)
    with pytest.raises(ValueError, match=message):
        classifier(images, mixtoken(classifier))


@pytest.mark.parametrize(
    ("labels_grid", "num_classes", "message"),
    [
        pytest.param((3, 2), NUM_CLASSES, r"on the grid \(2, 3\) of .*, got \(3, 2\)", id="grid"),
        pytest.param(None, NUM_CLASSES, r"on the grid \(2, 3\) of .*, got None", id="no-tokens"),
        pytest.param((2, 3), 9, r"the 7 classes of .*, got 9; build the model with num_classes=9", id="classes"),
    ],
)
def test_targets_that_do_not_fit(labels_grid: tuple[int, int] | None, num_classes: int, message: str) -> None:
    num_rows = 1 if labels_grid is None else 7
    targets = TokenTargets.from_dense(torch.rand(4, num_rows, num_classes), labels_grid)
    with pytest.raises(ValueError, match=message):
        dense("deit")[0].check_targets(targets)


def create(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **arguments)


@pytest.mark.parametrize(
    ("build", "image_size", "message"),
    [
        pytest.param(create("test_resnet", num_classes=0), 64, "ResNet: it has no classifier", id="no-classes"),
        pytest.param(create("crossvit_tiny_240"), 240, "CrossVit: forward_features returns a list", id="several-maps"),
        pytest.param(create("coat_lite_tiny"), 224, "CoaT: cannot tell positions", id="unknown-layout"),
        pytest.param(
            create("test_vit", dynamic_img_size=False), 100, "does not take 100 x 100 images", id="other-size"
        ),
        pytest.param(create("test_resnet"), 0, "image_size must be two positive integers", id="no-pixels"),
        pytest.param(lambda: Strided("NCHW"), None, "Strided: it names no image size; give image_size", id="no-size"),
        pytest.param(lambda: nn.Linear(3, 3), 64, "Linear: it has no forward_features", id="no-model-of-timm"),
        pytest.param(
            lambda: LVViT(img_size=32, embed_dim=12, depth=1, num_heads=2),
            32,
            "LVViT: it classifies its tokens already; train it as it is",
            id="lvvit",
        ),
    ],
)
def test_models_that_are_refused(build: Callable[[], nn.Module], image_size: int | None, message: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=message):
        DenseClassifier(model, image_size)
