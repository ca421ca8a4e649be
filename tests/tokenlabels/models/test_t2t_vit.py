"""T2T-ViT against the published numbers and timm's habits."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tokenlabels.align import AlignmentError, TLAlign
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier, T2TViT, load_checkpoint
from tokenlabels.models.t2t_embed import T2TPatchEmbed
from tokenlabels.models.t2t_vit import sinusoids


def small(**arguments: Any) -> T2TViT:
    """2 x 3 tokens, 2 blocks, without dropout; with weights that do something."""
    torch.manual_seed(0)
    sizes = {"img_size": (32, 48), "embed_dim": 24, "depth": 2, "num_heads": 2, "token_dim": 8, "token_drop_rate": 0.0}
    model = T2TViT(**({"num_classes": 10} | sizes | arguments))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and name != "pos_embed":
                parameter.mul_(4)
    return model


def images(num_images: int = 2, size: tuple[int, int] = (32, 48)) -> Tensor:
    return torch.randn(num_images, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "trained", "fixed"), [("t2t_vit_14", 21.47, 0.08), ("t2t_vit_19", 39.09, 0.09)])
def test_parameters_are_the_published_ones(name: str, trained: float, fixed: float) -> None:
    """In millions. The published 21.5 and 39.2 count the fixed position embedding and the random features as well."""
    with torch.device("meta"):
        model = timm.create_model(name)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_fixed = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    num_fixed += sum(buffer.numel() for buffer in model.buffers())
    assert (round(num_trained / 1e6, 2), round(num_fixed / 1e6, 2)) == (trained, fixed)
    assert round((num_trained + num_fixed) / 1e6, 1) == {"t2t_vit_14": 21.5, "t2t_vit_19": 39.2}[name]


def test_the_registered_model() -> None:
    model = timm.create_model("t2t_vit_14", depth=1).eval()
    assert isinstance(model.patch_embed, T2TPatchEmbed)
    assert (model.patch_embed.img_size, model.patch_embed.grid_size, model.patch_embed.num_patches) == (
        (224, 224),
        (14, 14),
        196,
    )
    assert model.patch_embed.feat_ratio() == 16
    assert model.patch_embed.dynamic_feat_size((32, 48)) == (2, 3)
    assert model.patch_embed.proj.in_features == 576
    assert model.blocks[0].attn.qkv.bias is None
    assert model.blocks[0].norm1.eps == model.norm.eps == 1e-5
    assert model.patch_embed.attention1.drop.p == 0.1
    with torch.no_grad():
        assert model(images(1, (224, 224))).shape == (1, 1000)


def test_positions_are_sinusoids() -> None:
    """Position by position and channel by channel."""
    table = sinusoids(7, 6)
    for position, channel in product(range(7), range(6)):
        angle = position / 10000 ** (2 * (channel // 2) / 6)
        expected = math.cos(angle) if channel % 2 else math.sin(angle)
        assert float(table[0, position, channel]) == pytest.approx(expected, abs=1e-6)
    model = small()
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed, sinusoids(7, 24))
    assert model.cls_token.std().item() == pytest.approx(0.08, rel=0.5)
    again = small(weight_init="skip")
    again.init_weights()
    assert torch.equal(again.pos_embed, sinusoids(7, 24))
    assert torch.isfinite(again(images())).all()


def test_every_parameter_has_a_gradient() -> None:
    model = small(drop_path_rate=0.0)
    model(images()).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    model = small().eval()
    with torch.autocast("cpu", dtype):
        logits = model(images())
    torch.testing.assert_close(logits.float(), model(images()), rtol=0.1, atol=0.3)
    assert torch.isfinite(model.to(dtype)(images().to(dtype))).all()


class TestAsTimmHasIt:
    """What users of timm expect of a model."""

    @torch.no_grad()
    def test_features_and_head(self) -> None:
        model = small().eval()
        features = model.forward_features(images())
        assert features.shape == (2, 7, 24)
        torch.testing.assert_close(model.forward_head(features), model(images()))
        assert model.forward_head(features, pre_logits=True).shape == (2, 24)

    @torch.no_grad()
    def test_classifier(self) -> None:
        model = small()
        assert model.get_classifier() is model.head
        model.reset_classifier(7)
        assert model(images()).shape == (2, 7)
        model.reset_classifier(0)
        assert model(images()).shape == (2, 24)
        assert small(num_classes=0)(images()).shape == (2, 24)
        assert small(global_pool="avg")(images()).shape == (2, 10)

    @torch.no_grad()
    def test_intermediates(self) -> None:
        model = small().eval()
        last, maps = model.forward_intermediates(images(), indices=[0, 1])
        assert [tuple(map_.shape) for map_ in maps] == [(2, 24, 2, 3)] * 2
        torch.testing.assert_close(last, model.forward_features(images()))

    @torch.no_grad()
    def test_features_only(self) -> None:
        backbone = timm.create_model(
            "t2t_vit_14", features_only=True, out_indices=(0, 1), img_size=32, depth=2, embed_dim=24, num_heads=2
        )
        assert backbone.feature_info.reduction() == [16, 16]
        assert [tuple(map_.shape) for map_ in backbone(images(1, (32, 32)))] == [(1, 24, 2, 2)] * 2

    def test_groups_and_decay(self) -> None:
        model = small()
        assert {"pos_embed", "cls_token"} <= set(model.no_weight_decay())
        groups = timm.models.group_parameters(model, model.group_matcher())
        assert all(name.startswith(("patch_embed", "cls_token", "pos_embed")) for name in groups[0])
        assert sum(map(len, groups.values())) == len(list(model.named_parameters()))

    def test_gradient_checkpointing_changes_no_gradient(self) -> None:
        found = []
        for enable in (False, True):
            model = small(token_drop_rate=0.3)  # what is dropped is the same again
            model.set_grad_checkpointing(enable)
            assert model.patch_embed.grad_checkpointing == enable
            torch.manual_seed(5)
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            found.append(torch.autograd.grad(model(images()).square().sum(), parameters))
        for without, with_checkpoints in zip(*found, strict=True):
            torch.testing.assert_close(without, with_checkpoints)

    def test_compiles_to_one_graph(self) -> None:
        torch.compiler.reset()
        model = small()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images()), model(images()))

    @torch.no_grad()
    def test_other_sizes(self) -> None:
        model = small().eval()
        model.set_input_size(img_size=(64, 32))
        assert model(images(1, (64, 32))).shape == (1, 10)
        assert not model.pos_embed.requires_grad
        assert torch.equal(small(img_size=(64, 32)).pos_embed, sinusoids(9, 24))

    @torch.no_grad()
    def test_dynamic_size_equals_a_model_of_that_size(self) -> None:
        dynamic, fixed = small(dynamic_img_size=True).eval(), small().eval()
        torch.testing.assert_close(dynamic(images()), fixed(images()))
        fixed.set_input_size(img_size=(64, 32))
        torch.testing.assert_close(dynamic(images(1, (64, 32))), fixed(images(1, (64, 32))))

    @torch.no_grad()
    def test_released_names(self, tmp_path: Path) -> None:
        """Through timm, into a model of another size; and our own names through `load_checkpoint`."""
        options: dict[str, Any] = {"embed_dim": 24, "depth": 1, "num_heads": 2, "token_dim": 8}
        source = timm.create_model("t2t_vit_14", img_size=32, **options).eval()
        released = {
            name.replace("patch_embed.proj", "patch_embed.project").replace("patch_embed", "tokens_to_token"): tensor
            for name, tensor in source.state_dict().items()
        }
        torch.save(released, tmp_path / "t2t.pth")
        torch.save(source.state_dict(), tmp_path / "ours.pth")
        overlay = {"file": str(tmp_path / "t2t.pth")}
        loaded = timm.create_model(
            "t2t_vit_14", pretrained=True, pretrained_cfg_overlay=overlay, img_size=32, **options
        )
        torch.testing.assert_close(loaded.eval()(images(1, (32, 32))), source(images(1, (32, 32))))
        other = timm.create_model("t2t_vit_14", pretrained=True, pretrained_cfg_overlay=overlay, img_size=48, **options)
        ours = timm.create_model("t2t_vit_14", img_size=48, **options)
        load_checkpoint(ours, tmp_path / "ours.pth")
        torch.testing.assert_close(other.eval()(images(1, (48, 48))), ours.eval()(images(1, (48, 48))))


@torch.no_grad()
def test_in_a_dense_classifier() -> None:
    model = small()
    dense = DenseClassifier(model, (32, 48)).eval()
    assert dense.grid == (2, 3)
    batch = images(4)
    logits, token_logits = dense(batch)
    assert (logits.shape, token_logits.shape) == ((4, 10), (4, 6, 10))
    torch.testing.assert_close(logits, model(batch))
    plan = MixPlan.random_patches(4, grid=(2, 3), generator=torch.Generator().manual_seed(1))
    embedded = model.patch_embed(batch)
    own = plan.own.flatten(1)[..., None]
    features = model.norm(model.blocks(model._pos_embed(embedded * own + embedded[plan.partner] * (1 - own))))
    torch.testing.assert_close(dense(batch, plan)[0], model.forward_head(features))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 8}, "patch_size must be 16"),
        ({"img_size": (32, 40)}, "images of 32 x 40 pixels have no whole patches of 16"),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, "dynamic_img_pad is not supported"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_refused_images_and_uses() -> None:
    model = small()
    with pytest.raises(ValueError, match="images are 48 x 32 pixels, the model takes 32 x 48"):
        model(images(1, (48, 32)))
    with pytest.raises(ValueError, match="40 x 32 pixels have no whole patches"):
        small(dynamic_img_size=True)(images(1, (40, 32)))
    with pytest.raises(ValueError, match="patch_size must be 16"):
        model.set_input_size(patch_size=8)
    with pytest.raises(ValueError, match="no whole patches"):
        model.set_input_size(img_size=100)
    with pytest.raises(AlignmentError, match="T2TViT"):
        TLAlign(model)
