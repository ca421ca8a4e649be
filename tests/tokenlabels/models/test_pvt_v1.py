"""PVT v1 against the published numbers, slow twins, and timm's habits."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier, PyramidVisionTransformer, load_checkpoint

SMALL: dict[str, Any] = {"embed_dims": (8, 12, 16, 24), "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 3)}


def small(**arguments: Any) -> PyramidVisionTransformer:
    """Images of 64 x 96, maps of 16 x 24 down to 2 x 3; with weights that do something."""
    torch.manual_seed(0)
    model = PyramidVisionTransformer(**({"img_size": (64, 96), "num_classes": 10} | SMALL | arguments))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.ndim == 2:
                parameter.mul_(5)
    return model


def images(num_images: int = 2, size: tuple[int, int] = (64, 96)) -> Tensor:
    return torch.randn(num_images, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "millions"), [("pvt_tiny", 13.2), ("pvt_small", 24.5), ("pvt_medium", 44.2)])
def test_parameters_are_the_published_ones(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions
    assert not list(model.buffers())
    assert [embed.grid_size for embed in model.patch_embeds] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [stage.pos_embed.shape[1] for stage in model.stages] == [3136, 784, 196, 50]
    assert model.stages[0].blocks[0].norm1.eps == model.norm.eps == 1e-6
    assert model.patch_embeds[3].norm.eps == model.stages[0].blocks[0].attn.norm.eps == 1e-5


def plain_attention(attn: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Section 3.3, key by key: a square of tokens becomes a key, by one matrix over all that is in the square."""
    keys = x
    if attn.sr is not None:
        side, (rows, columns) = attn.sr.stride[0], grid
        maps = x.reshape(len(x), rows, columns, -1)
        keys = torch.zeros(len(x), (rows // side) * (columns // side), x.shape[2], dtype=x.dtype)
        for number, (i, j) in enumerate(product(range(rows // side), range(columns // side))):
            total = attn.sr.bias.expand(len(x), -1)
            for down, right in product(range(side), repeat=2):
                total = total + maps[:, i * side + down, j * side + right] @ attn.sr.weight[:, :, down, right].T
            keys[:, number] = total
        keys = (keys - keys.mean(-1, keepdim=True)) / (keys.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        keys = keys * attn.norm.weight + attn.norm.bias
    dim = x.shape[2]
    width = dim // attn.num_heads
    query, (key, value) = attn.q(x), attn.kv(keys).split(dim, dim=-1)
    heads = []
    for head in range(attn.num_heads):
        part = slice(head * width, (head + 1) * width)
        weights = (query[..., part] @ key[..., part].mT / math.sqrt(width)).softmax(dim=-1)
        heads.append(weights @ value[..., part])
    return attn.proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("stage", range(4))
@torch.no_grad()
def test_spatial_reduction_attention_key_by_key(stage: int) -> None:
    model = small().double()
    attn, grid = model.stages[stage].blocks[0].attn, model.stages[stage].grid_size
    assert (1 if attn.sr is None else attn.sr.stride[0]) == (8, 4, 2, 1)[stage]
    num_tokens = grid[0] * grid[1] + (stage == 3)
    x = torch.randn(2, num_tokens, SMALL["embed_dims"][stage], dtype=torch.float64)
    torch.testing.assert_close(attn(x, grid), plain_attention(attn, x, grid))


@torch.no_grad()
def test_the_whole_forward_step_by_step() -> None:
    model = small().double().eval()
    x = images().double()
    for number, (embed, stage) in enumerate(zip(model.patch_embeds, model.stages, strict=True)):
        rows, columns = stage.grid_size
        assert embed.proj.kernel_size == embed.proj.stride == ((4, 4) if number == 0 else (2, 2))
        x = embed.norm(embed.proj(x).permute(0, 2, 3, 1)).reshape(2, rows * columns, -1)
        if number == 3:
            x = torch.cat([stage.cls_token.expand(2, -1, -1), x], dim=1)
        x = x + stage.pos_embed
        for block in stage.blocks:
            x = x + plain_attention(block.attn, block.norm1(x), stage.grid_size)
            x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
        if number < 3:
            x = x.mT.reshape(2, -1, rows, columns)
    torch.testing.assert_close(model(images().double()), model.head(model.norm(x)[:, 0]))


def test_initial_weights_and_stochastic_depth() -> None:
    torch.manual_seed(0)
    model = timm.create_model("pvt_tiny", img_size=64, drop_path_rate=0.7, num_classes=100)
    for weights in (model.stages[1].pos_embed, model.stages[3].cls_token, model.head.weight):
        assert weights.std().item() == pytest.approx(0.02, rel=0.1)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * number for number in range(8)])


def test_every_parameter_has_a_gradient() -> None:
    model = small()
    model(images()).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_what_stands_behind_a_patch_embedding_is_called() -> None:
    """A normalisation may be put after each of them; it sees [B, h, w, D]."""
    model = small().eval()
    before, seen = model(images()), []
    for number in range(4):
        after = nn.Identity()
        after.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
        model.patch_embeds[number] = nn.Sequential(model.patch_embeds[number], after)
    assert torch.equal(model(images()), before)
    assert seen == [(2, 16, 24, 8), (2, 8, 12, 12), (2, 4, 6, 16), (2, 2, 3, 24)]
    model.set_input_size((96, 64))
    assert model(images(1, (96, 64))).shape == (1, 10)


class TestAsTimmHasIt:
    """What users of timm expect of a model."""

    @torch.no_grad()
    def test_features_and_head(self) -> None:
        model = small().eval()
        features = model.forward_features(images())
        assert (features.shape, model.num_prefix_tokens) == ((2, 7, 24), 1)
        torch.testing.assert_close(model.forward_head(features), model(images()))
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])

    @torch.no_grad()
    def test_classifier(self) -> None:
        model = small().eval()
        assert model.get_classifier() is model.head
        model.reset_classifier(7)
        assert model(images()).shape == (2, 7)
        assert not model.head.training
        model.reset_classifier(0, "avg")
        torch.testing.assert_close(model(images()), model.forward_features(images())[:, 1:].mean(dim=1))
        assert small(num_classes=0)(images()).shape == (2, 24)
        assert small(global_pool="")(images()).shape == (2, 7, 10)

    @torch.no_grad()
    def test_intermediates(self) -> None:
        model = small().eval()
        last, maps = model.forward_intermediates(images(), norm=True)
        shapes = [(2, 8, 16, 24), (2, 12, 8, 12), (2, 16, 4, 6), (2, 24, 2, 3)]
        assert [tuple(map_.shape) for map_ in maps] == shapes
        torch.testing.assert_close(last, model.forward_features(images()))
        torch.testing.assert_close(maps[3].flatten(2).mT, last[:, 1:])
        tokens, early = model.forward_intermediates(images(), indices=[0, 1], stop_early=True)
        torch.testing.assert_close(early, maps[:2])
        torch.testing.assert_close(tokens, maps[1].flatten(2).mT)
        with pytest.raises(ValueError, match="output_fmt must be 'NCHW'"):
            model.forward_intermediates(images(), output_fmt="NLC")

    @pytest.mark.parametrize("indices", [(0, 1, 2, 3), (0, 2)])
    @torch.no_grad()
    def test_features_only(self, indices: tuple[int, ...]) -> None:
        options = {"img_size": 64, **SMALL}
        torch.manual_seed(0)
        whole = timm.create_model("pvt_tiny", **options).eval()
        torch.manual_seed(0)
        backbone = timm.create_model("pvt_tiny", features_only=True, out_indices=indices, **options).eval()
        assert backbone.feature_info.channels() == [SMALL["embed_dims"][index] for index in indices]
        assert backbone.feature_info.reduction() == [4 * 2**index for index in indices]
        maps = backbone(images(1, (64, 64)))
        expected = whole.forward_intermediates(images(1, (64, 64)), indices=list(indices), intermediates_only=True)
        torch.testing.assert_close(maps, expected)

    def test_groups_and_decay(self) -> None:
        model = small()
        assert model.no_weight_decay() == {"stages.3.cls_token"}
        names = {name for name, _ in model.named_parameters()}
        for coarse in (False, True):
            groups = timm.models.group_parameters(model, model.group_matcher(coarse))
            assert {name for group in groups.values() for name in group} == names
            of = {name: number for number, group in groups.items() for name in group}
            assert of["stages.0.pos_embed"] == of["patch_embeds.0.proj.weight"] == 0
            order = ("stages.0.blocks.0.norm1.bias", "patch_embeds.1.proj.bias", "stages.3.pos_embed")
            assert [of[name] for name in order] == sorted({of[name] for name in order})

    def test_gradient_checkpointing_changes_no_gradient(self) -> None:
        found = []
        for enable in (False, True):
            model = small()
            model.set_grad_checkpointing(enable)
            found.append(torch.autograd.grad(model(images()).square().sum(), list(model.parameters())))
        for without, with_checkpoints in zip(*found, strict=True):
            torch.testing.assert_close(without, with_checkpoints)

    def test_compiles_to_one_graph(self) -> None:
        torch.compiler.reset()
        model = small()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images()), model(images()))

    @torch.no_grad()
    def test_another_size_resamples_positions(self) -> None:
        model = small().eval()
        before = [stage.pos_embed.clone() for stage in model.stages]
        model.set_input_size((128, 64))
        assert model(images(1, (128, 64))).shape == (1, 10)
        for number, (old, stage) in enumerate(zip(before, model.stages, strict=True)):
            prefix, rows, columns = int(number == 3), 16 // 2**number, 24 // 2**number
            assert stage.grid_size == (32 // 2**number, 16 // 2**number)
            maps = old[:, prefix:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
            expected = nn.functional.interpolate(maps, size=stage.grid_size, mode="bicubic", align_corners=False)
            torch.testing.assert_close(stage.pos_embed[:, prefix:], expected.flatten(2).mT)
            assert torch.equal(stage.pos_embed[:, :prefix], old[:, :prefix])

    @torch.no_grad()
    def test_released_names(self, tmp_path: Path) -> None:
        """Through timm, into a model of another size; and our own names through `load_checkpoint`."""
        source = timm.create_model("pvt_tiny", img_size=64, **SMALL).eval()
        released = {}
        for name, tensor in source.state_dict().items():
            kind, number, *rest = name.split(".")
            if kind == "patch_embeds":
                name = ".".join([f"patch_embed{int(number) + 1}", *rest])
            elif kind == "stages" and rest[0] == "blocks":
                name = ".".join([f"block{int(number) + 1}", *rest[1:]])
            elif kind == "stages":
                name = rest[0] if rest[0] == "cls_token" else f"{rest[0]}{int(number) + 1}"
            released[name] = tensor
        assert {"patch_embed1.proj.weight", "block2.1.attn.sr.bias", "pos_embed4", "cls_token"} <= released.keys()
        torch.save(released, tmp_path / "pvt.pth")
        torch.save(source.state_dict(), tmp_path / "ours.pth")
        options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "pvt.pth")}, **SMALL}
        loaded = timm.create_model("pvt_tiny", img_size=64, **options).eval()
        torch.testing.assert_close(loaded(images(1, (64, 64))), source(images(1, (64, 64))))
        source.set_input_size((96, 64))
        other = timm.create_model("pvt_tiny", img_size=(96, 64), **options).eval()
        torch.testing.assert_close(other(images(1, (96, 64))), source(images(1, (96, 64))))
        ours = timm.create_model("pvt_tiny", img_size=(96, 64), **SMALL).eval()
        load_checkpoint(ours, tmp_path / "ours.pth")
        torch.testing.assert_close(ours(images(1, (96, 64))), source(images(1, (96, 64))))


@torch.no_grad()
def test_in_a_dense_classifier() -> None:
    """A plan on the tokens of the last stage mixes blocks of 8 x 8 patches of the first."""
    model = small()
    dense = DenseClassifier(model, (64, 96)).eval()
    assert dense.grid == (2, 3)
    batch = images(4)
    logits, token_logits = dense(batch)
    assert (logits.shape, token_logits.shape) == ((4, 10), (4, 6, 10))
    torch.testing.assert_close(logits, model(batch))
    torch.testing.assert_close(token_logits, dense.aux_head(model.forward_features(batch)[:, 1:]))
    plan = MixPlan.random_patches(4, grid=(2, 3), generator=torch.Generator().manual_seed(1))
    own = plan.own.repeat_interleave(32, dim=1).repeat_interleave(32, dim=2)[:, None]
    mixed = batch * own + batch[plan.partner] * (1 - own)  # patches of the first stage do not overlap
    torch.testing.assert_close(dense(batch, plan), dense(mixed))
    assert DenseClassifier(model).image_size == (64, 96)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": (64, 80)}, "images of 64 x 80 pixels have no whole patches .* multiple of 32"),
        ({"sr_ratios": (8, 4, 2, 2)}, "sr_ratios must end in 1"),
        ({"depths": (1, 1, 1)}, "must name the same stages, got 4, 3, 4, 4, 4"),
        ({"global_pool": "max"}, "global_pool must be one of"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_refused_images() -> None:
    model = small()
    with pytest.raises(ValueError, match="images are 96 x 64 pixels, the model takes 64 x 96"):
        model(images(1, (96, 64)))
    with pytest.raises(ValueError, match="multiple of 32"):
        model.set_input_size((64, 100))
    with pytest.raises(ValueError, match="global_pool must be one of"):
        model.reset_classifier(7, "max")
    assert (model.img_size, model.global_pool) == ((64, 96), "token")
