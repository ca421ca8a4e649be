"""Mixed embeddings against a loop over samples and positions, and layouts of the patch embeddings of timm."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from tokenlabels.mixing import MixPlan
from tokenlabels.models.embedding import PlanHook, embedding_format, find_patch_embedding, mix_embedding
from tokenlabels.models.features import FeatureFormat, Layout

CHANNELS = 3
LAYOUTS: tuple[Layout, ...] = ("NLC", "NHWC", "NCHW")


def laid_out(maps_bhwd: Tensor, layout: Layout) -> Tensor:
    return {"NLC": maps_bhwd.flatten(1, 2), "NHWC": maps_bhwd, "NCHW": maps_bhwd.permute(0, 3, 1, 2)}[layout]


def mixed_by_hand(plan: MixPlan, maps_bhwd: Tensor) -> Tensor:
    """Position by position, each looked up in the plan's cell above it."""
    batch, height, width, _ = maps_bhwd.shape
    rows, columns = plan.own.shape[1:]
    mixed = torch.empty_like(maps_bhwd)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                own = plan.own[b, i * rows // height, j * columns // width]
                mixed[b, i, j] = own * maps_bhwd[b, i, j] + (1 - own) * maps_bhwd[plan.partner[b], i, j]
    return mixed


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", [(4, 6), (2, 3), (2, 6), (1, 1)], ids=str)
def test_matches_a_loop(layout: Layout, grid: tuple[int, int]) -> None:
    maps = torch.randn(5, 4, 6, CHANNELS)
    plan = MixPlan(torch.tensor([3, 0, 1, 2, 0]), torch.rand(5, *grid))
    mixed = mix_embedding(plan, laid_out(maps, layout), layout, (4, 6))
    torch.testing.assert_close(mixed, laid_out(mixed_by_hand(plan, maps), layout))
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_stays_and_boxes_copy_exactly(layout: Layout) -> None:
    maps = torch.randn(4, 4, 4, CHANNELS).bfloat16()
    plan = MixPlan.mixtoken(4, grid=(2, 2), generator=torch.Generator().manual_seed(0))
    mixed = mix_embedding(plan, laid_out(maps, layout), layout, (4, 4))
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, laid_out(mixed_by_hand(plan, maps.float()).bfloat16(), layout))


@pytest.mark.parametrize(
    ("shape", "layout", "plan_grid", "message"),
    [
        pytest.param((2, 25, 3), "NLC", (4, 6), r"NLC on 4x6 was expected, got float32 \[2, 25, 3\]", id="class-token"),
        pytest.param((2, 3, 4, 6), "NHWC", (4, 6), "NHWC on 4x6 was expected", id="channels-first"),
        pytest.param((2, 4, 6, 3), "NCHW", (4, 6), "NCHW on 4x6 was expected", id="channels-last"),
        pytest.param((2, 24, 3), "NCHW", (4, 6), "NCHW on 4x6 was expected", id="tokens-for-maps"),
        pytest.param((2, 6, 4, 3), "NHWC", (4, 6), "NHWC on 4x6 was expected", id="transposed"),
        pytest.param((2, 24, 3), "NLC", (3, 6), "plan is on 3x6, the patch embedding has 4x6 tokens", id="straddles"),
        pytest.param((2, 24, 3), "NLC", (8, 12), "plan is on 8x12, the patch embedding has 4x6", id="finer-plan"),
        pytest.param((3, 24, 3), "NLC", (4, 6), "a plan of 2 samples", id="other-batch"),
        pytest.param((2, 24, 3), "NCL", (4, 6), "layout must be one of 'NCHW', 'NHWC', 'NLC', got 'NCL'", id="layout"),
    ],
)
def test_refused(shape: tuple[int, ...], layout: Any, plan_grid: tuple[int, int], message: str) -> None:
    plan = MixPlan(torch.tensor([1, 0]), torch.zeros(2, *plan_grid))
    with pytest.raises(ValueError, match=message):
        mix_embedding(plan, torch.randn(shape), layout, (4, 6))


SMALL_SWIN = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
EMBEDDINGS: dict[str, tuple[str, dict[str, Any], tuple[int, int], FeatureFormat]] = {
    "vit": (
        "test_vit",
        {"img_size": (32, 48), "dynamic_img_size": False},
        (32, 48),
        FeatureFormat("NLC", (2, 3), 64, 0),
    ),
    "vit-of-flexible-size": ("test_vit", {}, (32, 48), FeatureFormat("NHWC", (2, 3), 64, 0)),
    "oblong-patches": (
        "vit_tiny_patch16_224",
        {"img_size": (32, 64), "patch_size": (16, 8), "depth": 1},
        (32, 64),
        FeatureFormat("NLC", (2, 8), 192, 0),
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": (64, 32), **SMALL_SWIN},
        (64, 32),
        FeatureFormat("NHWC", (16, 8), 12, 0),
    ),
    "mixer": ("mixer_s32_224", {"img_size": (64, 96)}, (64, 96), FeatureFormat("NLC", (2, 3), 512, 0)),
    "pvt": ("pvt_v2_b0", {}, (64, 96), FeatureFormat("NHWC", (16, 24), 32, 0)),
    "pvt-as-many-channels-as-rows": ("pvt_v2_b0", {}, (128, 128), FeatureFormat("NHWC", (32, 32), 32, 0)),
    "fasternet-as-many-channels-as-rows": ("fasternet_t0", {}, (160, 160), FeatureFormat("NCHW", (40, 40), 40, 0)),
    "xcit-with-grid": ("xcit_nano_12_p16_224", {"depth": 1}, (64, 96), FeatureFormat("NLC", (4, 6), 128, 0)),
}


@pytest.mark.parametrize("case", EMBEDDINGS)
@torch.no_grad()
def test_layouts_of_patch_embeddings(case: str) -> None:
    name, arguments, image_size, expected = EMBEDDINGS[case]
    embedding = find_patch_embedding(timm.create_model(name, **arguments).eval())
    assert embedding is not None
    images = torch.randn(1, 3, *image_size)
    assert embedding_format(embedding, images, embedding(images)) == expected


@torch.no_grad()
def test_an_embedding_of_flexible_size_keeps_its_nominal_grid() -> None:
    embedding = PatchEmbed((32, 48), patch_size=8, embed_dim=5, strict_img_size=False)
    images = torch.randn(1, 3, 48, 32)
    assert embedding.grid_size == (4, 6)
    assert embedding_format(embedding, images, embedding(images)).grid == (6, 4)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_convolutional_models_have_none(name: str) -> None:
    assert find_patch_embedding(timm.create_model(name)) is None


class _Everywhere(nn.Module):
    """Every output depends on every pixel."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 4) + images.mean()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        pytest.param([torch.ones(1, 4, 3)], "its output is a list, not one tensor", id="list"),
        pytest.param((), "its output is a tuple", id="empty-tuple"),
        pytest.param(
            torch.ones(1, 5, 3), "its 5 tokens are no grid of square patches of a 8 x 8 image", id="class-token"
        ),
        pytest.param(torch.ones(1, 3), r"output \[1, 3\] is unknown", id="vector"),
        pytest.param(torch.zeros(1, 3, 2, 2), "cannot be told", id="global"),
    ],
)
def test_outputs_without_known_layout(output: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedding_format(_Everywhere(), torch.randn(1, 3, 8, 8), output)


@pytest.mark.parametrize("extra", [(), ((2, 2),)], ids=["tensor", "tuple"])
def test_the_hook_mixes_while_it_has_a_plan(extra: tuple[Any, ...]) -> None:
    tokens = torch.randn(2, 4, 3)
    output: Any = (tokens, *extra) if extra else tokens
    hook = PlanHook(FeatureFormat("NLC", (2, 2), 3, 0))
    assert hook(nn.Identity(), (), output) is output
    hook.plan = MixPlan(torch.tensor([1, 0]), torch.zeros(2, 2, 2))
    mixed = hook(nn.Identity(), (), output)
    assert torch.equal(mixed[0] if extra else mixed, tokens.flip(0))
    assert not extra or mixed[1:] == extra
