"""What `TLAlign` refuses: models without a rule, plans and images that do not fit, the wrong mode."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import GatedMlp, Mlp
from timm.models.mlp_mixer import MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from tests.tokenlabels.align.cases import CASES, NUM_CLASSES, VIT, build, images_of, mixed
from tokenlabels.align import AlignmentError, TLAlign
from tokenlabels.align.rules import block_rule, check_block
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier, LVViT


class OwnViT(VisionTransformer):
    """May do anything."""


class OwnBlock(Block):
    """May do anything."""


class OwnMlp(Mlp):
    """May do anything."""


def vit(**changes: Any) -> Callable[[], nn.Module]:
    return partial(VisionTransformer, **(VIT | changes))


def mixer(**changes: Any) -> Callable[[], nn.Module]:
    return partial(MlpMixer, img_size=32, patch_size=8, num_blocks=1, embed_dim=8, **changes)


NO_RULE = "labels cannot follow the tokens through timm.models.vision_transformer"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            partial(timm.create_model, "resnet50"),
            r"through timm.models.resnet.ResNet; choose a model of timm of type ConvNeXt, LVViT, .* or DenseClassifier",
            id="resnet",
        ),
        pytest.param(partial(timm.create_model, "eva02_tiny_patch14_224"), "through timm.models.eva.Eva;", id="eva02"),
        pytest.param(partial(nn.Linear, 3, 3), "through torch.nn.modules.linear.Linear;", id="a layer"),
        pytest.param(partial(OwnViT, **VIT), r"test_refused.OwnViT; choose a model", id="subclass of ViT"),
        pytest.param(
            vit(block_fn=OwnBlock), "test_refused.OwnBlock: it has no rule. Rules are", id="subclass of Block"
        ),
        pytest.param(vit(block_fn=ResPostBlock), f"{NO_RULE}.ResPostBlock: it has no rule", id="post-norm"),
        pytest.param(vit(block_fn=ParallelScalingBlock), f"{NO_RULE}.ParallelScalingBlock: it has", id="parallel"),
        pytest.param(vit(block_fn=ParallelThingsBlock), f"{NO_RULE}.ParallelThingsBlock: it has", id="two of each"),
        pytest.param(
            vit(block_fn=DiffParallelScalingBlock, num_heads=2), f"{NO_RULE}.DiffParallel", id="parallel difference"
        ),
        pytest.param(
            vit(attn_layer="diff", num_heads=2),
            r"DiffAttention in timm.models.vision_transformer.Block: the rule of this block knows "
            "timm.layers.attention.Attention",
            id="difference of attentions",
        ),
        pytest.param(
            vit(global_pool="max"), r"VisionTransformer's pooling 'max'; build it with global_pool='token'", id="max"
        ),
        pytest.param(vit(global_pool="map", class_token=False), "pooling 'map'; build it with", id="attention pooling"),
        pytest.param(vit(global_pool=""), "pooling ''; build it with global_pool='token' or 'avg'", id="no pooling"),
        pytest.param(vit(patch_drop_rate=0.1), "drops patches, and their labels would be lost", id="patch dropout"),
        pytest.param(
            partial(LVViT, **VIT, stem_channels=8, patch_drop_rate=0.1),
            "LVViT drops patches",
            id="patch dropout LV-ViT",
        ),
        pytest.param(
            vit(dynamic_img_size=True, dynamic_img_pad=True),
            "pads images to whole patches, .*=False",
            id="padded images",
        ),
        pytest.param(
            mixer(block_layer=SpatialGatingBlock, mlp_ratio=4, mlp_layer=GatedMlp),
            "mlp_mixer.SpatialGatingBlock: it has no rule",
            id="gmlp",
        ),
        pytest.param(
            mixer(block_layer=ResBlock, mlp_ratio=4), "timm.models.mlp_mixer.ResBlock: it has no", id="resmlp"
        ),
        pytest.param(mixer(mlp_layer=OwnMlp), "OwnMlp in timm.models.mlp_mixer.MixerBlock: the rule", id="other mlp"),
        pytest.param(
            mixer(global_pool=""), "MlpMixer's pooling ''; build it with global_pool='avg'", id="mixer pooling"
        ),
        *(
            pytest.param(
                partial(CASES["convnext"][0], output_stride=stride),
                "through dilated convolutions of ConvNeXt; build it with output_stride=32",
                id=f"convnext stride {stride}",
            )
            for stride in (8, 16)
        ),
        pytest.param(
            partial(CASES["convnext"][0], global_pool="max"),
            "ConvNeXt's pooling 'max'; build it",
            id="convnext pooling",
        ),
        pytest.param(
            partial(CASES["swin"][0], global_pool="max"), "SwinTransformer's pooling 'max'; build", id="swin pooling"
        ),
        pytest.param(
            partial(CASES["pvt"][0], global_pool=""), "PyramidVisionTransformerV2's pooling ''", id="pvt pooling"
        ),
    ],
)
def test_models(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    with pytest.raises(AlignmentError, match=message):
        TLAlign(model)


def test_a_model_inside_a_dense_classifier() -> None:
    model = DenseClassifier(timm.create_model("test_resnet", num_classes=NUM_CLASSES), 64)
    with pytest.raises(AlignmentError, match=r"through timm.models.resnet.ResNet;"):
        TLAlign(model)


def test_images_of_another_size_than_the_dense_classifier_is_built_for() -> None:
    """A model of any size would give other tokens than `grid` says."""
    model = TLAlign(DenseClassifier(timm.create_model("pvt_v2_b0", num_classes=7), (64, 64)))
    plan = MixPlan.cutmix(2, image_size=96, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"images must be \[B, C, 64, 64\], got float32 \[2, 3, 96, 96\]"):
        model(torch.zeros(2, 3, 96, 96), plan)


def test_one_block_of_another_kind_among_others() -> None:
    model = build("vit")
    model.blocks[2] = OwnBlock(24, 3)
    with pytest.raises(AlignmentError, match="OwnBlock: it has no rule"):
        TLAlign(model)


def test_a_rule_for_a_block_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the message advises."""
    from tokenlabels.align import rules

    monkeypatch.setattr(rules, "BLOCK_RULES", dict(rules.BLOCK_RULES))
    images, plan = mixed("vit")
    expected = TLAlign(build("vit"))(images, plan)
    block_rule(OwnBlock)(rules.BLOCK_RULES[Block])
    check_block(OwnBlock(24, 3))
    ours = TLAlign(build("vit", block_fn=OwnBlock))(images, plan)
    torch.testing.assert_close(ours, expected)


def plan_of(batch_size: int = 4, grid: tuple[int, int] = (32, 48), device: str = "cpu") -> MixPlan:
    partner = (torch.arange(batch_size) + 1) % batch_size
    return MixPlan(partner.to(device), torch.ones(batch_size, *grid, device=device))


@pytest.mark.parametrize(
    ("case", "shape", "plan", "message"),
    [
        pytest.param(
            "vit", (4, 3, 32, 48), plan_of(grid=(5, 7)), "images whose sides are whole multiples of 5 and 7", id="grid"
        ),
        pytest.param(
            "vit", (4, 3, 32, 48), plan_of(grid=(48, 32)), r"a plan of 4 samples with own 48x32 mixes", id="turned grid"
        ),
        pytest.param(
            "vit",
            (3, 3, 32, 48),
            plan_of(),
            r"a plan of 4 samples .*cannot have mixed float32 \[3, 3, 32, 48\]",
            id="batch",
        ),
        pytest.param("vit", (4, 3, 32, 48), plan_of(6), r"a plan of 6 samples", id="larger batch"),
        pytest.param("vit", (4, 24, 5), plan_of(grid=(4, 6)), r"give \[4, C, H, W\]", id="tokens"),
        pytest.param("vit", (4, 32, 48, 3), plan_of(), "looks like channels last", id="channels last"),
        pytest.param("vit", (4, 3, 32, 48), plan_of(device="meta"), "the plan is on meta, got float32", id="device"),
        pytest.param(
            "pvt",
            (4, 3, 46, 40),
            plan_of(grid=(1, 1)),
            "images of 46 x 40 pixels have no whole patches of 4 x 4, .*crop or pad",
            id="pvt of no whole pixels",
        ),
        pytest.param(
            "convnext",
            (4, 3, 66, 64),
            plan_of(grid=(1, 1)),
            "66 x 64 pixels have no whole patches of 4",
            id="no whole pixels",
        ),
    ],
)
def test_plans_and_images(case: str, shape: tuple[int, ...], plan: MixPlan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TLAlign(build(case))(torch.zeros(shape), plan)


def test_pixels_that_no_token_reads() -> None:
    """60 pixels are 3 patches of 16 and a rest: they divide by 3, but a token does not show 20 of them."""
    model = VisionTransformer(img_size=60, patch_size=16, embed_dim=24, depth=1, num_heads=3)
    plan = MixPlan.cutmix(2, image_size=60)
    with pytest.raises(ValueError, match="images of 60 x 60 pixels have no whole patches of 16 x 16"):
        TLAlign(model)(torch.zeros(2, 3, 60, 60), plan)


def test_no_plan_in_training() -> None:
    with pytest.raises(ValueError, match=r"TLAlign needs the plan that mixed the images in training: model\(images, p"):
        TLAlign(build("vit"))(images_of("vit"))


def test_a_plan_in_evaluation() -> None:
    images, plan = mixed("vit")
    with pytest.raises(ValueError, match=r"TLAlign makes targets for training, and this is evaluation mode: call .tra"):
        TLAlign(build("vit")).eval()(images, plan)


def test_odd_batches_with_a_flip_partner() -> None:
    with pytest.raises(ValueError, match="flip"):
        MixPlan.cutmix(5, image_size=32, pairing="flip")


@pytest.mark.parametrize("layers", [(3,), (-4,), (0, 7), (), (1.5,), (True,), 2, "all"], ids=repr)
def test_layers(layers: Any) -> None:
    words = (
        rf"layers must be numbers of blocks in -3..2, such as \(-1,\), or None for all, got {re.escape(repr(layers))}"
    )
    with pytest.raises(ValueError, match=words):
        TLAlign(build("vit"), layers=layers)


def test_no_plan_at_all() -> None:
    images, plan = mixed("vit")
    with pytest.raises(ValueError, match="plan must be the MixPlan that mixed the images, got Tensor"):
        TLAlign(build("vit"))(images, plan.own)


def test_a_model_that_is_in_evaluation_mode_inside() -> None:
    model, (images, plan) = build("vit").eval(), mixed("vit")
    with pytest.raises(ValueError, match="this is evaluation mode"):
        TLAlign(model)(images, plan)
    torch.testing.assert_close(TLAlign(model)(images), model(images))


def test_what_was_changed_after_wrapping() -> None:
    model, (images, plan) = build("vit"), mixed("vit")
    aligned = TLAlign(model)
    model.reset_classifier(5, "avgmax")
    with pytest.raises(AlignmentError, match="VisionTransformer's pooling 'avgmax'"):
        aligned(images, plan)
    model.reset_classifier(5, "token")
    assert aligned(images, plan)[0].shape == (4, 5)
    model.blocks[1] = OwnBlock(24, 3)
    with pytest.raises(AlignmentError, match="OwnBlock: it has no rule"):
        aligned(images, plan)


@pytest.mark.parametrize("backend", ["flash", "", 3])
def test_backends(backend: object) -> None:
    with pytest.raises(ValueError, match="backend must be one of 'explicit', 'second_call', 'padded', got"):
        TLAlign(build("vit"), backend=backend)


def test_the_same_models_without_those_arguments_are_not_refused() -> None:
    for make in (vit(), mixer(), CASES["convnext"][0], CASES["swin"][0], CASES["pvt"][0]):
        assert TLAlign(make()).num_layers > 0
