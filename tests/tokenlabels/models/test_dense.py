"""Classifiers of timm with a classifier for their tokens, against the plain models and embeddings mixed by hand."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from tests.tokenlabels.models.families import (
    FAMILIES,
    NUM_CLASSES,
    VIT,
    WITH_EMBEDDING,
    Strided,
    dense,
    mixtoken,
    plain,
)
from tokenlabels.losses import token_label_loss
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier
from tokenlabels.sparse_targets import TokenTargets


def assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family(case: str) -> None:
    model = plain(case)
    plain_state = {name: value.clone() for name, value in model.state_dict().items()}
    *_, size, grid, _ = FAMILIES[case]
    classifier = DenseClassifier(model, size)
    assert (classifier.grid, classifier.num_classes, classifier.image_size) == (grid, NUM_CLASSES, size)
    assert classifier.model is model
    assert model.state_dict().keys() == plain_state.keys()
    assert all(torch.equal(value, plain_state[name]) for name, value in model.state_dict().items())
    assert classifier.state_dict().keys() == {
        *(f"model.{name}" for name in plain_state),
        "aux_head.weight",
        "aux_head.bias",
    }
    images = torch.randn(4, 3, *size)
    for training in (True, False):
        classifier.train(training)
        image_logits, token_logits = classifier(images)
        assert image_logits.shape == (4, NUM_CLASSES)
        assert token_logits.shape == (4, grid[0] * grid[1], NUM_CLASSES)
    torch.testing.assert_close(image_logits, model(images))


@pytest.mark.parametrize("case", FAMILIES)
def test_a_training_step_reaches_every_parameter(case: str) -> None:
    """What is left without a gradient stops distributed training."""
    classifier, images = dense(case)
    classifier.train()
    height, width = classifier.grid
    target = torch.rand(4, 1 + height * width, NUM_CLASSES).softmax(dim=-1)
    targets = TokenTargets.from_dense(target, classifier.grid)
    classifier.check_targets(targets)
    token_label_loss(*classifier(images), targets).backward()
    assert [name for name, parameter in classifier.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("case", WITH_EMBEDDING)
@torch.no_grad()
def test_a_plan_of_ones_changes_nothing_and_one_of_zeros_exchanges_images(case: str) -> None:
    classifier, images = dense(case)
    partner = torch.tensor([1, 2, 3, 0])
    own = torch.ones(4, *classifier.grid)
    unmixed = classifier(images)
    assert_close(classifier(images, MixPlan(partner, own)), unmixed)
    image_logits, token_logits = classifier(images, MixPlan(partner, 0 * own))
    assert_close((image_logits, token_logits), (unmixed[0][partner], unmixed[1][partner]))
    assert (token_logits - unmixed[1]).abs().max() > 1e-4
    assert_close(classifier(images), unmixed)


def by_box(plan: MixPlan, maps_bhwd: Tensor) -> Tensor:
    """Mixed by whole cells of the plan, cut out one at a time."""
    mixed = maps_bhwd.clone()
    rows, columns = maps_bhwd.shape[1] // plan.own.shape[1], maps_bhwd.shape[2] // plan.own.shape[2]
    for b, i, j in (plan.own == 0).nonzero().tolist():
        cell = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        mixed[b][cell] = maps_bhwd[plan.partner[b]][cell]
    return mixed


@torch.no_grad()
def test_vit_with_embeddings_mixed_by_hand() -> None:
    classifier, images = dense("deit")
    plan, vit = mixtoken(classifier), classifier.model
    tokens = by_box(plan, vit.patch_embed(images).reshape(4, 2, 3, -1)).flatten(1, 2)
    tokens = torch.cat([vit.cls_token.expand(4, -1, -1), tokens], dim=1) + vit.pos_embed
    for block in vit.blocks:
        tokens = block(tokens)
    tokens = vit.norm(tokens)
    assert_close(classifier(images, plan), (vit.head(tokens[:, 0]), classifier.aux_head(tokens[:, 1:])))


@torch.no_grad()
def test_swin_with_embeddings_mixed_by_hand() -> None:
    classifier, images = dense("swin")
    plan, swin = mixtoken(classifier), classifier.model
    embedded = swin.patch_embed(images)
    assert embedded.shape == (4, 16, 8, 12)
    maps = swin.norm(swin.layers(by_box(plan, embedded)))
    assert_close(classifier(images, plan), (swin.head.fc(maps.mean((1, 2))), classifier.aux_head(maps.flatten(1, 2))))


def test_gradients_reach_both_images() -> None:
    classifier, images = dense("deit")
    own = torch.ones(4, *classifier.grid)
    own[0, 0] = 0
    images.requires_grad_()
    classifier(images, MixPlan(torch.tensor([2, 3, 0, 1]), own))[0][0].sum().backward()
    assert images.grad is not None
    upper, lower = images.grad[..., :16, :].abs().amax((1, 2, 3)), images.grad[..., 16:, :].abs().amax((1, 2, 3))
    assert [bool(value) for value in upper > 0] == [False, False, True, False]
    assert [bool(value) for value in lower > 0] == [True, False, False, False]


@pytest.mark.parametrize(("layout", "num_prefix_tokens"), [("NCHW", 0), ("NHWC", 0), ("NLC", 0), ("NLC", 3)])
@torch.no_grad()
def test_a_changed_patch_moves_its_token_alone(layout: str, num_prefix_tokens: int) -> None:
    classifier = DenseClassifier(Strided(layout, num_prefix_tokens), (16, 24))
    images = torch.randn(1, 3, 16, 24)
    for i in range(2):
        for j in range(3):
            changed = images.clone()
            changed[:, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] += 1
            moved = (classifier(changed)[1] != classifier(images)[1]).any(dim=2)
            assert moved.nonzero().tolist() == [[0, 3 * i + j]]


@pytest.mark.parametrize("case", ["deit-distilled", "vit-registers", "swin", "mixer", "hiera", "xcit"])
@torch.no_grad()
def test_the_token_of_a_changed_patch_moves_most(case: str) -> None:
    classifier, images = dense(case)
    height, width = classifier.grid
    patch = classifier.image_size[0] // height
    before = classifier(images)[1]
    for token in range(height * width):
        i, j = divmod(token, width)
        changed = images.clone()
        changed[:, :, patch * i : patch * (i + 1), patch * j : patch * (j + 1)] += 3
        moved = (classifier(changed)[1] - before).norm(dim=2).mean(dim=0)
        assert int(moved.argmax()) == token


def test_distilled_training_averages_both_tokens() -> None:
    classifier, images = dense("deit-distilled")
    expected = classifier(images)
    classifier.model.set_distilled_training(True)
    classifier.train()
    assert isinstance(classifier.model(images), tuple)
    assert_close(classifier(images), expected)


def test_building_leaves_the_model_and_the_random_state_alone() -> None:
    model = plain("resnet").train()
    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][:2]
    for module in frozen:
        module.eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    classifier = DenseClassifier(model, 64)
    after = torch.rand(1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    torch.manual_seed(3)
    linear = nn.Linear(model.num_features, NUM_CLASSES)
    trunc_normal_(linear.weight, std=0.02)
    assert torch.equal(after, torch.rand(1)), "only the new layer draws numbers"
    assert torch.equal(classifier.aux_head.weight, linear.weight)
    assert not classifier.aux_head.bias.any()


def test_what_a_model_caches_in_evaluation_is_thrown_away() -> None:
    """LeViT keeps attention biases until its own `train` is called."""
    model = timm.create_model("levit_128s", img_size=128, num_classes=NUM_CLASSES)
    DenseClassifier(model, 128)
    caches = [module.attention_bias_cache for module in model.modules() if hasattr(module, "attention_bias_cache")]
    assert caches
    assert not any(caches)


def test_the_new_layer_is_like_the_model() -> None:
    classifier = DenseClassifier(plain("deit").to(torch.bfloat16))
    assert classifier.aux_head.weight.dtype == torch.bfloat16
    assert [logits.dtype for logits in classifier(torch.randn(1, 3, 32, 48).bfloat16())] == 2 * [torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "arguments", "image_size", "expected"),
    [
        pytest.param("deit_tiny_patch16_224", VIT, None, (32, 48), id="built-for"),
        pytest.param("mixer_s32_224", {"img_size": 64}, None, (64, 64), id="stem-built-for"),
        pytest.param("test_resnet", {}, None, (160, 160), id="configured"),
        pytest.param("test_resnet", {}, 64, (64, 64), id="square"),
        pytest.param("test_resnet", {}, [64, 32], (64, 32), id="oblong"),
    ],
)
def test_image_size(
    name: str, arguments: dict[str, Any], image_size: int | list[int] | None, expected: tuple[int, int]
) -> None:
    assert DenseClassifier(timm.create_model(name, **arguments), image_size).image_size == expected


def test_what_an_optimiser_and_a_trainer_ask_for() -> None:
    classifier, _ = dense("deit")
    assert classifier.no_weight_decay() == {f"model.{name}" for name in classifier.model.no_weight_decay()}
    assert "model.cls_token" in classifier.no_weight_decay() & dict(classifier.named_parameters()).keys()
    assert classifier.get_classifier() is classifier.model.head
    assert DenseClassifier(Strided("NCHW"), 16).no_weight_decay() == set()


@pytest.mark.parametrize("case", ["deit", "swin"])
def test_checkpointed_activations_give_the_same_gradients(case: str) -> None:
    classifier, images = dense(case)
    plan = mixtoken(classifier)
    gradients = []
    for enable in (False, True):
        classifier.zero_grad()
        classifier.set_grad_checkpointing(enable)
        sum(logits.square().sum() for logits in classifier(images, plan)).backward()
        gradients.append([parameter.grad for parameter in classifier.parameters()])
    torch.testing.assert_close(*gradients)


def test_one_graph_with_a_plan_and_one_without() -> None:
    classifier, images = dense("deit")
    counter = CompileCounter()  # type: ignore[no-untyped-call]
    compiled = torch.compile(classifier, backend=counter, fullgraph=True)
    for plan in (None, mixtoken(classifier), mixtoken(classifier, seed=2), None):
        assert_close(compiled(images, plan), classifier(images, plan))
    assert counter.frame_count == 2


@torch.no_grad()
def test_a_copy_mixes_on_its_own() -> None:
    classifier, images = dense("deit")
    plan = mixtoken(classifier)
    expected = classifier(images, plan)
    duplicate = copy.deepcopy(classifier)
    nn.init.zeros_(classifier.model.patch_embed.proj.weight)
    assert_close(duplicate(images, plan), expected)


def test_a_plan_does_not_outlive_a_failure() -> None:
    classifier, images = dense("deit")
    expected, plan = classifier(images), mixtoken(classifier)

    def fail(*_: object) -> None:
        raise RuntimeError("in a block")

    with classifier.model.blocks[1].register_forward_hook(fail), pytest.raises(RuntimeError, match="in a block"):
        classifier(images, plan)
    assert_close(classifier(images), expected)


def test_autocast_around_the_construction_changes_nothing() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        classifier = DenseClassifier(timm.create_model("test_resnet", num_classes=NUM_CLASSES), 64)
    assert classifier.aux_head.weight.dtype == torch.float32
    assert classifier(torch.randn(2, 3, 64, 64))[1].shape == (2, 4, NUM_CLASSES)


def test_images_of_other_channels() -> None:
    model = timm.create_model("test_vit", num_classes=NUM_CLASSES, in_chans=1, img_size=32)
    assert DenseClassifier(model)(torch.randn(2, 1, 32, 32))[1].shape == (2, 4, NUM_CLASSES)


def test_the_first_of_several_patch_embeddings_mixes() -> None:
    model = timm.create_model("twins_pcpvt_small", num_classes=NUM_CLASSES, img_size=64, depths=(1, 1, 1, 1))
    classifier = DenseClassifier(model, 64).eval()
    images, swap = torch.randn(2, 3, 64, 64), MixPlan(torch.tensor([1, 0]), torch.zeros(2, 2, 2))
    torch.testing.assert_close(classifier(images, swap)[0], classifier(images)[0].flip(0))
