"""Patch embeddings against loops over windows, and their place in timm's models."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional

from tokenlabels.models.tokenizers import ConvStemEmbed, RefinedPatchEmbed, Refinement, tokenizer

ROWS: dict[str, tuple[Refinement, ...]] = {
    "linear": (),
    "intra": ("intra",),
    "local": ("local",),
    "inter": ("inter",),
    "intra-local": ("intra", "local"),
    "all": ("intra", "local", "inter"),
    "frozen": ("frozen",),
    "conv_stem": ("conv_stem",),
}
rows = pytest.mark.parametrize("row", ROWS)


def build(row: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return tokenizer(*ROWS[row])(**{"img_size": (32, 48), "patch_size": 16, "embed_dim": 10, **arguments})


def windows_by_hand(images: Tensor, conv: nn.Conv2d, kernel: int, step: int, is_bent: bool) -> Tensor:
    """Of each patch, the mean over its windows; they begin early enough to lie evenly around it. [B, h, w, width]."""
    batch, _, height, width = images.shape
    early = (kernel - step) // 2
    padded = functional.pad(images, (early,) * 4)
    tokens = torch.zeros(batch, height // 16, width // 16, conv.out_channels)
    for i in range(height // 16):
        for j in range(width // 16):
            found = []
            for top in range(16 * i, 16 * (i + 1), step):
                for left in range(16 * j, 16 * (j + 1), step):
                    window = padded[:, :, top : top + kernel, left : left + kernel].flatten(1)
                    value = window @ conv.weight.flatten(1).T + conv.bias
                    found.append(functional.gelu(value) if is_bent else value)
            tokens[:, i, j] = torch.stack(found).mean(dim=0)
    return tokens


def attended_by_hand(tokens: Tensor, embedding: RefinedPatchEmbed) -> Tensor:
    """One head: every token looks at every other, one at a time. [N, D]."""
    assert embedding.attn is not None
    assert embedding.attn.num_heads == 1
    queries, keys, values = embedding.attn.qkv(embedding.attn_norm(tokens)).chunk(3, dim=1)
    rows = []
    for query in queries:
        weights = torch.stack([query @ key for key in keys]).div(tokens.shape[1] ** 0.5).softmax(dim=0)
        rows.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
    return tokens + embedding.attn.proj(torch.stack(rows))


@pytest.mark.parametrize("row", [row for row in ROWS if row != "conv_stem"])
@torch.no_grad()
def test_matches_loops_over_windows(row: str) -> None:
    embedding, images = build(row), torch.randn(2, 3, 32, 48)
    part = 2 if "local" in ROWS[row] else 1
    if "intra" in ROWS[row]:
        assert [conv.out_channels for conv in embedding.scales] == [7, 7, 6]
        pairs = zip(embedding.scales, (4, 8, 16), strict=True)
        scales = [windows_by_hand(images, conv, side, side // part, is_bent=True) for conv, side in pairs]
        expected = torch.cat(scales, dim=3) @ embedding.proj.weight.flatten(1).T + embedding.proj.bias
    else:
        expected = windows_by_hand(images, embedding.proj, 16, 16 // part, is_bent=False)
    expected = expected.flatten(1, 2)
    if "inter" in ROWS[row]:
        expected = torch.stack([attended_by_hand(tokens, embedding) for tokens in expected])
    torch.testing.assert_close(embedding(images), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_stem_halves_and_doubles() -> None:
    stem = build("conv_stem", embed_dim=24).train()
    convs = [layer for layer in stem.stem if isinstance(layer, nn.Conv2d)]
    assert [(conv.in_channels, conv.out_channels) for conv in convs] == [(3, 3), (3, 6), (6, 12), (12, 24)]
    assert stem.proj.kernel_size == (1, 1)
    images = torch.randn(4, 3, 32, 48)
    x = images
    for conv in convs:
        x = functional.conv2d(x, conv.weight, stride=2, padding=1)
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        x = x.clamp_min(0)
    expected = x.flatten(2).transpose(1, 2) @ stem.proj.weight.flatten(1).T + stem.proj.bias
    torch.testing.assert_close(stem(images), expected, rtol=1e-4, atol=1e-4)
    small = [layer.out_channels for layer in ConvStemEmbed().stem if isinstance(layer, nn.Conv2d)]
    assert small == [48, 96, 192, 384], "the ViT_C of 4 GFLOPs"


@pytest.mark.parametrize(("row", "reach"), [("intra", 0), ("intra-local", 4), ("local", 4)])
@torch.no_grad()
def test_what_a_token_sees(row: str, reach: int) -> None:
    """Half a patch more than its own with overlap: a quarter on each side."""
    embedding, images = build(row, img_size=48), torch.randn(1, 3, 48, 48)
    before = embedding(images)[0, 4]
    for offset, is_seen in ((0, True), (-reach, True), (-reach - 1, False), (15 + reach, True), (16 + reach, False)):
        changed = images.clone()
        changed[:, :, 16 + offset, 24] += 1
        assert torch.equal(embedding(changed)[0, 4], before) != is_seen, offset


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ("linear", 22_050_664),  # Table 1: 22.1
        ("frozen", 22_050_664),  # 22.1
        ("intra", 22_309_480),  # 22.3
        ("intra-local", 22_309_480),  # 22.3
        ("all", 22_901_608),  # 25.7 is not met
    ],
)
def test_parameters_of_deit_small(row: str, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224", embed_layer=tokenizer(*ROWS[row]))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@rows
def test_in_a_transformer_every_parameter_learns_but_frozen_ones(row: str) -> None:
    arguments = {"depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 3, "img_size": 32}
    model = timm.create_model("deit_tiny_patch16_224", embed_layer=tokenizer(*ROWS[row]), **arguments)
    projection = model.patch_embed.proj.weight.clone()
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.5)
    for _ in range(2):  # at first the class token sees what is nearly the same everywhere
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    frozen = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert idle == (frozen if row == "frozen" else set())
    assert torch.equal(model.patch_embed.proj.weight, projection) == (row == "frozen")
    assert model.state_dict().keys() >= frozen


def test_a_frozen_projection_is_drawn_as_moco_does() -> None:
    projection = RefinedPatchEmbed(32, embed_dim=64, frozen=True).proj
    bound = (6 / (3 * 16 * 16 + 64)) ** 0.5
    assert 0.99 * bound < float(projection.weight.abs().max()) <= bound
    assert not projection.bias.any()
    assert RefinedPatchEmbed(32, embed_dim=64, frozen=True, bias=False).proj.bias is None
    model = timm.create_model("deit_tiny_patch16_224", depth=1, embed_layer=tokenizer("frozen"))
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
    model.init_weights()  # timm draws the convolution again, and then this
    assert not model.patch_embed.proj.weight.requires_grad
    assert not model.patch_embed.proj.bias.any()
    assert float(model.patch_embed.proj.weight.abs().max()) > 0


@rows
@torch.no_grad()
def test_the_habits_of_patch_embed(row: str) -> None:
    embedding = build(row).eval()
    assert isinstance(embedding, PatchEmbed)
    assert (embedding.img_size, embedding.grid_size, embedding.num_patches) == ((32, 48), (2, 3), 6)
    images = torch.randn(2, 3, 32, 48)
    tokens = embedding(images)
    assert tokens.shape == (2, 6, 10)
    for layout, axes in (("NHWC", "bhwd"), ("NCHW", "bdhw")):
        other = build(row, output_fmt=layout, strict_img_size=False).eval()
        expected = tokens.reshape(2, 2, 3, 10)
        torch.testing.assert_close(other(images), expected if axes == "bhwd" else expected.permute(0, 3, 1, 2))
        assert other(torch.randn(1, 3, 16, 64)).shape == ((1, 1, 4, 10) if axes == "bhwd" else (1, 10, 1, 4))
        with pytest.raises(ValueError, match="40 x 48 pixels have no whole patches of 16"):
            other(torch.randn(1, 3, 40, 48))
    with pytest.raises(ValueError, match="images are 48 x 32 pixels, the model takes 32 x 48"):
        embedding(images.transpose(2, 3))
    embedding.set_input_size(img_size=(48, 32))
    assert embedding(images.transpose(2, 3)).shape == (2, 6, 10)
    with pytest.raises(ValueError, match="patch_size is 16 and cannot become 8"):
        embedding.set_input_size(patch_size=8)
    doubled = build(row, dtype=torch.float64, norm_layer=nn.LayerNorm, bias=False).eval()
    assert doubled(images.double()).dtype == torch.float64
    assert doubled.proj.bias is None
    assert torch.equal(copy.deepcopy(embedding).set_input_size((32, 48)) or tokens, tokens)


def test_the_factory_is_pickled_and_fits_swin() -> None:
    layer = pickle.loads(pickle.dumps(tokenizer("local", "inter")))
    arguments = {"img_size": 32, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_layer=layer, num_classes=3, **arguments)
    assert isinstance(model.patch_embed, RefinedPatchEmbed)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@rows
def test_compiles_to_one_graph_and_casts(row: str) -> None:
    embedding, images = build(row).eval(), torch.randn(2, 3, 32, 48)
    compiled = torch.compile(embedding, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), embedding(images))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = embedding(images)
    torch.testing.assert_close(rounded.float(), embedding(images), rtol=0.1, atol=0.02)
    assert (rounded != embedding(images)).any()


@pytest.mark.parametrize(
    ("refinements", "message"),
    [
        (("global",), "refinement must be one of 'intra', 'local', .* got 'global'"),
        ((["intra", "local"],), "refinement must be one of"),
        (("intra", "intra"), "refinements must differ"),
        (("frozen", "local"), r"frozen keeps the plain projection .* combined with \['local'\]"),
        (("conv_stem", "inter"), "conv_stem takes the place of the whole patch embedding and goes alone"),
        (("conv_stem", "frozen"), "goes alone"),
    ],
)
def test_refinements_refused(refinements: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer(*refinements)


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        ("intra", {"patch_size": 6}, "patch_size must be a multiple of 4 for intra"),
        ("local", {"patch_size": 6}, "patch_size must be a multiple of 4 for local"),
        ("all", {"patch_size": 8}, "patch_size must be a multiple of 16 for intra and local"),
        ("conv_stem", {"patch_size": 12}, "patch_size must be a power of two"),
        ("inter", {"patch_size": (16, 8)}, "patch_size must be an integer of at least 1"),
        ("local", {"dynamic_img_pad": True}, "dynamic_img_pad is not supported"),
    ],
)
def test_embeddings_refused(row: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(row, **arguments)
    with pytest.raises(ValueError, match="frozen keeps the plain projection"):
        RefinedPatchEmbed(frozen=True, inter=True)
