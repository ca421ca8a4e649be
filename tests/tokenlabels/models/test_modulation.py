"""Normalisations go where they are asked to, and the model around them does not notice."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from tokenlabels.align import TLAlign
from tokenlabels.align.rules import AlignmentError
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier, LVViT
from tokenlabels.models.modulation import (
    ModulatedBlock,
    ModulatedEmbedding,
    Modulation,
    ModulationError,
    modulate,
    modulations,
)
from tokenlabels.models.moto import MoTo
from tokenlabels.models.tokenprop import TokenProp

NUM_CLASSES = 7
VIT = {"img_size": (32, 48), "depth": 2, "embed_dim": 24, "num_heads": 2}
SWIN = {"embed_dim": 12, "depths": (1, 1, 2), "num_heads": (1, 2, 2), "window_size": 2, "img_size": (64, 32)}
PVT2 = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 1, 2, 2), "mlp_ratios": (2, 2, 2, 2)}

# name, arguments, size of the images, channels behind each patch embedding
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, int], list[int]]] = {
    "deit": ("deit_tiny_patch16_224", VIT, (32, 48), [24]),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", VIT, (32, 48), [24]),
    "vit-registers": ("vit_tiny_patch16_224", {**VIT, "reg_tokens": 4}, (32, 48), [24]),
    "vit-flexible": ("test_vit", {"dynamic_img_size": True}, (48, 32), [64]),
    "lvvit": ("lvvit_t", {**VIT, "aux_head": False}, (32, 48), [24]),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, (64, 32), [12, 24, 48]),
    "pvt-v2": ("pvt_v2_b0", PVT2, (64, 96), [8, 16, 16, 24]),
    "twins": ("twins_pcpvt_small", {"depths": (1, 1, 1, 1), "img_size": (64, 96)}, (64, 96), [64, 128, 320, 512]),
    "t2t": ("t2t_vit_14", {"depth": 1, "img_size": (32, 48)}, (32, 48), [384]),
    "pvt-v1": ("pvt_small", {"depths": (1, 1, 1, 1), "img_size": (64, 96)}, (64, 96), [64, 128, 320, 512]),
}
families = pytest.mark.parametrize("family", FAMILIES)


def plain(family: str, **arguments: Any) -> Any:
    """In evaluation mode, the same every time."""
    torch.manual_seed(0)
    name, defaults, *_ = FAMILIES[family]
    return timm.create_model(name, num_classes=NUM_CLASSES, **{**defaults, **arguments}).eval()


def images_of(family: str) -> Tensor:
    return torch.randn(3, 3, *FAMILIES[family][2], generator=torch.Generator().manual_seed(1))


def modulated(family: str, **arguments: Any) -> Any:
    return modulate(plain(family), **{"num_entities": 2, **arguments})


class Recorded:
    """What a module was given and returned."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[tuple[Tensor, Any]] = []
        module.register_forward_hook(lambda _, args, output: self.calls.append((args[0], output)))


@families
class TestEveryFamily:
    def test_one_after_every_patch_embedding(self, family: str) -> None:
        model = modulated(family)
        assert all(type(norm) is MoTo for norm in modulations(model))
        assert [norm.channels for norm in modulations(model)] == FAMILIES[family][3]
        assert not any(norm.training for norm in modulations(model))
        (first,) = modulations(modulated(family, placement="first"))
        assert first.channels == FAMILIES[family][3][0]

    def test_it_acts_on_maps_of_the_embedded_patches(self, family: str) -> None:
        model, images = modulated(family), images_of(family)
        seen = [Recorded(norm) for norm in modulations(model)]
        wrapped = [Recorded(part) for part in model.modules() if isinstance(part, ModulatedEmbedding)]
        model(images)
        strides = {1: [16], 3: [4, 8, 16], 4: [4, 8, 16, 32]}[len(seen)]
        for record, outer, stride in zip(seen, wrapped, strides, strict=True):
            ((maps, out),) = record.calls
            assert tuple(maps.shape[2:]) == (images.shape[2] // stride, images.shape[3] // stride)
            ((_, returned),) = outer.calls
            tokens = returned[0] if isinstance(returned, tuple) else returned
            assert torch.equal(tokens.flatten(1, -2), out.flatten(2).transpose(1, 2))

    def test_what_does_nothing_changes_nothing(self, family: str) -> None:
        model, images = modulated(family), images_of(family)
        for part in model.modules():
            if isinstance(part, ModulatedEmbedding):
                part.modulation = nn.Identity()
        assert torch.equal(model(images), plain(family)(images))

    def test_all_weights_have_gradients(self, family: str) -> None:
        model = modulated(family).train()
        model(images_of(family)).square().sum().backward()
        names = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
        assert names == []
        assert all(norm.beta.grad.abs().sum() > 0 for norm in modulations(model))

    def test_tokens_are_mixed_behind_it(self, family: str) -> None:
        images = images_of(family)
        dense = DenseClassifier(modulated(family), FAMILIES[family][2]).eval()
        plan = MixPlan.random_patches(3, grid=dense.grid, generator=torch.Generator().manual_seed(1))
        assert 0 < plan.own.mean() < 1
        nobody = MixPlan(plan.partner, torch.ones_like(plan.own))
        torch.testing.assert_close(dense(images, nobody)[1], dense(images)[1])
        assert not torch.allclose(dense(images, plan)[1], dense(images)[1])
        assert torch.equal(dense(images)[0], modulated(family)(images))

    def test_copies_and_state(self, family: str) -> None:
        model, images = modulated(family), images_of(family)
        expected = model(images)
        assert torch.equal(copy.deepcopy(model)(images), expected)
        other = modulate(plain(family), num_entities=2)
        for weight in other.parameters():
            nn.init.zeros_(weight)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(images), expected)


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        pytest.param("deit", {"blocks": [0]}, id="deit, block"),
        pytest.param("lvvit", {"placement": "stem"}, id="lvvit, stem"),
        pytest.param("swin", {}, id="swin"),
        pytest.param("twins", {}, id="twins"),
    ],
)
def test_one_graph(family: str, arguments: dict[str, Any]) -> None:
    model, images = modulated(family, **arguments), images_of(family)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))
    torch.compiler.reset()


class TestBlocks:
    @pytest.mark.parametrize("family", ["deit", "deit-distilled", "vit-registers", "lvvit", "t2t"])
    def test_patch_tokens_change_and_prefix_tokens_pass(self, family: str) -> None:
        model = modulated(family, placement="first", blocks=[0])
        before, after = (Recorded(block) for block in (model.blocks[0].wrapped, model.blocks[0]))
        model(images_of(family))
        ((_, inside),), ((_, outside),) = before.calls, after.calls
        num_prefix = model.num_prefix_tokens
        assert torch.equal(inside[:, :num_prefix], outside[:, :num_prefix])
        maps = inside[:, num_prefix:].transpose(1, 2).unflatten(2, (2, 3))
        torch.testing.assert_close(outside[:, num_prefix:], modulations(model)[1](maps).flatten(2).transpose(1, 2))
        assert [type(norm) for norm in modulations(model)] == [MoTo] * 2

    def test_they_follow_another_input_size(self) -> None:
        model = modulated("deit", blocks=[0, 1])
        model.set_input_size((64, 32))
        assert model.patch_embed.grid_size == (4, 2)
        assert model(torch.randn(2, 3, 64, 32)).shape == (2, NUM_CLASSES)
        moved = copy.deepcopy(model)
        moved.set_input_size((32, 32))
        assert moved(torch.randn(2, 3, 32, 32)).shape == model(torch.randn(2, 3, 64, 32)).shape

    def test_embedding_weights_are_there_once(self) -> None:
        model = modulated("deit", blocks=[0])
        assert sum(name.endswith("proj.weight") and "patch_embed" in name for name in model.state_dict()) == 1

    def test_checkpointing_and_lvvits_plan(self) -> None:
        model = modulate(plain("lvvit", aux_head=True), num_entities=2, blocks=[1]).train()
        assert isinstance(model, LVViT)
        plan = MixPlan.random_patches(3, grid=model.grid, generator=torch.Generator().manual_seed(1))
        expected = model(images_of("lvvit"), plan)[1]
        assert expected.shape == (3, 6, NUM_CLASSES)
        model.set_grad_checkpointing()
        torch.testing.assert_close(model(images_of("lvvit"), plan)[1], expected)


class TestKinds:
    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            ("moto", MoTo),
            ("layer_norm", LayerNorm2d),
            ("batch_norm", nn.BatchNorm2d),
            ("instance_norm", nn.InstanceNorm2d),
        ],
    )
    @pytest.mark.parametrize("family", ["deit", "swin"])
    def test_of_table_6(self, family: str, kind: Modulation, expected: type[nn.Module]) -> None:
        entities = {"num_entities": 2} if kind == "moto" else {}
        model = modulate(plain(family), kind, **entities)
        assert [type(norm) for norm in modulations(model)] == [expected] * len(FAMILIES[family][3])
        images = images_of(family)
        embedded = model.patch_embed(images)
        maps = embedded.transpose(1, 2).unflatten(2, (2, 3)) if family == "deit" else embedded.permute(0, 3, 1, 2)
        over = {"layer_norm": (1,), "instance_norm": (2, 3)}.get(kind)
        if over:
            torch.testing.assert_close(maps.mean(over), torch.zeros_like(maps.mean(over)), rtol=0, atol=1e-5)
            spread = maps.var(over, unbiased=False)
            torch.testing.assert_close(spread, torch.ones_like(spread), rtol=0, atol=0.05)
        num_affine = sum(weight.numel() for weight in modulations(model)[0].parameters())
        assert kind == "moto" or num_affine == 2 * FAMILIES[family][3][0]

    def test_entities_and_partition_are_motos(self) -> None:
        (norm,) = modulations(modulate(plain("deit"), num_entities=3, partition="hard"))
        assert (norm.num_entities, norm.partition) == (3, "hard")
        with pytest.raises(ValueError, match="are of kind='moto' alone; leave them out for 'batch_norm'"):
            modulate(plain("deit"), "batch_norm", num_entities=3)


class TestStem:
    def test_it_acts_before_the_last_convolution(self) -> None:
        model = modulated("lvvit", placement="stem")
        (norm,) = modulations(model)
        record = Recorded(norm)
        out = model(images_of("lvvit"))
        ((maps, _),) = record.calls
        assert maps.shape == (3, 64, 16, 24)
        assert (maps >= 0).all()  # behind a ReLU
        assert model.patch_embed.proj.weight.shape == (24, 64, 8, 8)
        model.patch_embed.proj.modulation = nn.Identity()
        assert torch.equal(model(images_of("lvvit")), plain("lvvit")(images_of("lvvit")))
        assert not torch.equal(out, plain("lvvit")(images_of("lvvit")))

    def test_any_embedding_with_a_stem(self) -> None:
        model = plain("deit")
        model.patch_embed.stem = nn.Identity()
        modulate(model, num_entities=2, placement="stem")
        assert model.patch_embed.proj.modulation.channels == 3

    @pytest.mark.parametrize("make", [lambda: plain("deit"), lambda: plain("swin"), lambda: plain("lvvit", **NO_STEM)])
    def test_no_stem(self, make: Callable[[], nn.Module]) -> None:
        with pytest.raises(ModulationError, match="no convolutional stem before its projection; choose"):
            modulate(make(), placement="stem")


NO_STEM: dict[str, Any] = {"stem_kernels": (), "stem_strides": ()}


@pytest.mark.parametrize(
    ("name", "before", "after", "channels"),
    [
        pytest.param("pvt_v2_b2", "25.4", "25.6", [64, 128, 320, 512], id="PVTv2-B2"),
        pytest.param("pvt_small", "24.5", "24.7", [64, 128, 320, 512], id="PVT-Small"),
        pytest.param("pvt_medium", "44.2", "44.4", [64, 128, 320, 512], id="PVT-Medium, 44.5 in the paper"),
        pytest.param("swin_tiny_patch4_window7_224", "28.3", "28.6", [96, 192, 384, 768], id="Swin-T"),
        pytest.param("swin_small_patch4_window7_224", "49.6", "49.9", [96, 192, 384, 768], id="Swin-S"),
        pytest.param("deit_small_patch16_224", "22.1", "22.1", [384], id="DeiT-S, 22.5 in the paper"),
        pytest.param("deit_base_patch16_224", "86.6", "86.7", [768], id="DeiT-B, 86.9 in the paper"),
        pytest.param("t2t_vit_14", "21.5", "21.6", [384], id="T2T-ViT-14, 21.8 in the paper"),
    ],
)
def test_parameters_of_table_2(name: str, before: str, after: str, channels: list[int]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
    counts = [sum(weight.numel() for weight in model.parameters())]
    modulate(model)
    counts.append(sum(weight.numel() for weight in model.parameters()))
    assert [f"{count / 1e6:.1f}" for count in counts] == [before, after]
    convolutions, dictionary, affine = (
        3 * 8 * (9 * sum(channels) + len(channels)),
        8 * len(channels),
        16 * sum(channels),
    )
    assert counts[1] - counts[0] == convolutions + dictionary + affine
    assert all(weight.is_meta for weight in model.parameters())


def test_the_dtype_is_that_of_the_model() -> None:
    model = modulate(plain("deit").to(torch.bfloat16).train())
    (norm,) = modulations(model)
    assert norm.training
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_labels_follow_tokens_through_a_modulated_embedding_but_not_through_blocks() -> None:
    plan = MixPlan.cutmix(3, image_size=(32, 48), generator=torch.Generator().manual_seed(1))
    logits, share = TLAlign(modulated("deit").train())(images_of("deit"), plan)
    assert logits.shape == (3, NUM_CLASSES)
    assert share.shape == (3,)
    with pytest.raises(AlignmentError, match=ModulatedBlock.__name__):
        TLAlign(modulated("deit", blocks=[0]))


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "arguments", "message"),
        [
            pytest.param(
                lambda: timm.create_model("test_resnet"),
                {},
                "ResNet has no patch embedding .* before Dense",
                id="resnet",
            ),
            pytest.param(
                lambda: DenseClassifier(plain("deit")), {}, "DenseClassifier has no patch .* before Dense", id="dense"
            ),
            pytest.param(lambda: modulated("deit"), {}, "modulated already", id="twice"),
            pytest.param(lambda: plain("swin"), {"blocks": [0]}, "blocks are those of a ViT", id="blocks of Swin"),
            pytest.param(lambda: plain("deit"), {"blocks": [2]}, r"in 0..1, got \[2\]", id="no such block"),
            pytest.param(lambda: plain("deit"), {"blocks": [0, 0]}, "different numbers", id="a block twice"),
            pytest.param(lambda: plain("vit-flexible"), {"blocks": [0]}, "must stay on one grid", id="flexible"),
            pytest.param(lambda: plain("deit", patch_drop_rate=0.5), {"blocks": [0]}, "one grid", id="patches dropped"),
            pytest.param(lambda: plain("deit"), {"kind": "group_norm"}, "kind must be one of", id="kind"),
            pytest.param(lambda: plain("deit"), {"placement": "last"}, "placement must be one of", id="placement"),
            pytest.param(lambda: plain("deit"), {"num_entities": 0}, "num_entities must be", id="entities"),
            pytest.param(lambda: plain("deit"), {"partition": "firm"}, "partition must be one of", id="partition"),
        ],
    )
    def test_and_nothing_is_changed(
        self, make: Callable[[], nn.Module], arguments: dict[str, Any], message: str
    ) -> None:
        model = make()
        names = list(model.state_dict())
        with pytest.raises(ValueError, match=message):
            modulate(model, **arguments)
        assert list(model.state_dict()) == names

    def test_more_entities_than_tokens(self) -> None:
        with pytest.raises(ValueError, match="8 entities are more than the 2 x 3 positions"):
            modulate(plain("deit"))(images_of("deit"))

    def test_an_embedding_that_does_not_say_its_channels(self) -> None:
        model = nn.Module()
        model.patch_embed = nn.Sequential(nn.Conv2d(3, 4, 2, 2))
        with pytest.raises(ModulationError, match="Sequential does not say how many channels it returns"):
            modulate(model)

    def test_an_embedding_without_a_grid(self) -> None:
        model = modulated("deit")
        embedding = model.patch_embed.wrapped
        embedding.grid_size, embedding.dynamic_feat_size = None, None
        with pytest.raises(ValueError, match="6 tokens are not on the grid of their PatchEmbed, None"):
            model(images_of("deit"))

    def test_an_attribute_that_nobody_has(self) -> None:
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = modulated("deit").patch_embed.no_such_thing


def test_hooks_that_were_there_before_would_see_other_tokens() -> None:
    for wrap in (lambda model: DenseClassifier(model, 64), lambda model: TokenProp(model, 64)):
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
        wrap(model)
        with pytest.raises(ModulationError, match=r"has forward hooks, .*; modulate first"):
            modulate(model)


def test_blocks_are_a_sequence() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    with pytest.raises(ValueError, match=r"blocks must be a sequence of numbers, such as \(0, 1\), got 1"):
        modulate(model, num_entities=4, blocks=1)  # type: ignore[arg-type]
