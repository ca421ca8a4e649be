"""The share of the own image says what the whole label embedding says: every family against its brute-force twin."""

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from tests.tokenlabels.align.cases import (
    ATTENTION,
    CASES,
    NUM_CLASSES,
    STRATEGIES,
    build,
    cutmix,
    fused_attention,
    images_of,
    mixed,
)
from tests.tokenlabels.align.twins import Twin
from tokenlabels.align import Backend, TLAlign, attention
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier


def twin_labels(case: str, twin: Twin) -> tuple[Tensor, Tensor]:
    """By the twin of this family: of what is classified [B, K], and of tokens [B, N, K]."""
    family = case.partition("-")[0].rstrip("2")
    return getattr(twin, {"distilled": "vit", "lvvit": "vit"}.get(family, family))()


def labels(smoothing: float = 0.0) -> Tensor:
    """Hard labels of the images, or smoothed."""
    hard = nn.functional.one_hot(torch.tensor([2, 5, 0, 3]), NUM_CLASSES).double()
    return (1 - smoothing) * hard + smoothing / NUM_CLASSES


def assert_equal(shares: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], y: Tensor, plan: MixPlan) -> None:
    """``share * own label + (1 - share) * partner's label``, of images and of tokens."""
    share, token_share = (share.double()[..., None] for share in shares)
    partner = y[plan.partner]
    torch.testing.assert_close(share * y + (1 - share) * partner, expected[0], rtol=0, atol=1e-5)
    tokens = token_share * y[:, None] + (1 - token_share) * partner[:, None]
    torch.testing.assert_close(tokens, expected[1], rtol=0, atol=1e-5)


def check(case: str, model: nn.Module, images: Tensor, plan: MixPlan, y: Tensor, backend: Backend | None) -> Tensor:
    backbone = model.model if isinstance(model, DenseClassifier) else model
    expected = twin_labels(case, Twin(backbone, images, plan.own, plan.partner, y))
    torch.testing.assert_close(expected[0].sum(dim=1), torch.ones(len(images), dtype=torch.float64))
    aligned = TLAlign(model, backend=backend)
    _, share, token_share = aligned(images, plan, return_token_share=True)
    assert share.dtype == token_share.dtype == torch.float32
    assert not share.requires_grad
    assert not token_share.requires_grad
    assert_equal((share, token_share), expected, y, plan)
    return share


@pytest.mark.parametrize("case", CASES)
def test_every_family(case: str) -> None:
    images, plan = mixed(case)
    share = check(case, build(case), images, plan, labels(), None)
    assert (share - plan.share()).abs().max() > 0.01, "attention is far from uniform"


@pytest.mark.parametrize("backend", ["explicit", "second_call", "padded"])
@pytest.mark.parametrize("case", ["vit", "swin-padded", "swin2", "pvt"])
def test_every_backend(case: str, backend: Backend) -> None:
    images, plan = mixed(case)
    check(case, build(case), images, plan, labels(), backend)


@pytest.mark.parametrize("case", ["vit", "swin-padded", "pvt-linear", "mixer", "convnext2"])
def test_label_smoothing_changes_nothing(case: str) -> None:
    images, plan = mixed(case)
    check(case, build(case), images, plan, labels(smoothing=0.1), None)


@pytest.mark.parametrize("case", ["swin", "swin-padded"])
def test_swin_with_fused_attention(case: str) -> None:
    images, plan = mixed(case)
    with fused_attention(True):
        model = build(case)
    assert all(block.attn.fused_attn for stage in model.layers for block in stage.blocks)
    check(case, model, images, plan, labels(), "padded")


@pytest.mark.parametrize("case", ["vit", "distilled", "swin-padded", "mixer"])
def test_in_a_dense_classifier(case: str) -> None:
    images, plan = mixed(case)
    check(case, DenseClassifier(build(case), CASES[case][1]).train(), images, plan, labels(), None)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", ["vit", "swin"])
def test_every_mixing_strategy(case: str, strategy: str) -> None:
    plan = STRATEGIES[strategy](CASES[case][1])
    check(case, build(case), plan.mix(images_of(case)), plan, labels(), None)


@pytest.mark.parametrize("backend", ["explicit", "second_call", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_tokens_that_look_at_padding_alone_keep_their_labels(backend: Backend, dtype: torch.dtype) -> None:
    """Nothing is left to share out their weight, and 0 / 0 would become the target of the whole image."""
    model = SwinTransformer(
        img_size=20, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,), num_classes=NUM_CLASSES, drop_path_rate=0
    )
    block = model.layers[0].blocks[0]
    nn.init.zeros_(block.norm1.weight)
    nn.init.ones_(block.norm1.bias)  # tokens are ones and padding zeros
    nn.init.zeros_(block.attn.qkv.weight)
    block.attn.qkv.weight[8:16] = -100.0
    nn.init.zeros_(block.attn.qkv.bias)
    block.attn.qkv.bias[:8] = 1.0
    nn.init.zeros_(block.attn.relative_position_bias_table)
    plan = MixPlan(torch.tensor([1, 0]), torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0)))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        features = TLAlign(model, backend=backend).align(torch.randn(2, 3, 20, 20), plan)
    expected = plan.own.clone()
    whole = expected[:, :4, :4]  # the only window without padding, where attention is uniform
    expected[:, :4, :4] = (whole + whole.mean(dim=(1, 2), keepdim=True)) / 2
    error = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(features.labels[..., 0], expected.flatten(1), rtol=0, atol=error)


@pytest.mark.parametrize("backend", ["explicit", "second_call", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_tokens_that_hardly_look_at_anything_but_padding(backend: Backend, dtype: torch.dtype) -> None:
    """A corner of 4 tokens in a window of 16, and keys of padding that are 3 nats ahead: 1.6 % of the weight is left.

    Shares are ratios of such small sums, whose error has to be small in proportion.
    """
    model = SwinTransformer(
        img_size=24, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,), num_classes=NUM_CLASSES, drop_path_rate=0
    )
    block = model.layers[0].blocks[0]
    nn.init.zeros_(block.norm1.weight)
    nn.init.ones_(block.norm1.bias)  # tokens are ones and padding zeros
    nn.init.zeros_(block.attn.qkv.weight)
    block.attn.qkv.weight[8:16] = -3 / (8 * 2)  # 8 inputs of 1, times q = 1 in 4 channels, halved by the scale
    nn.init.zeros_(block.attn.qkv.bias)
    block.attn.qkv.bias[:8] = 1.0
    nn.init.zeros_(block.attn.relative_position_bias_table)
    plan = MixPlan(torch.tensor([1, 0]), torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        features = TLAlign(model, backend=backend).align(torch.randn(2, 3, 24, 24), plan)
    labels = features.labels[..., 0].reshape(2, 6, 6)
    for rows in (slice(0, 4), slice(4, 6)):
        for columns in (slice(0, 4), slice(4, 6)):
            window = plan.own[:, rows, columns]
            expected = (window + window.mean(dim=(1, 2), keepdim=True)) / 2
            error = 1e-6 if dtype == torch.float32 else 4e-3
            torch.testing.assert_close(labels[:, rows, columns], expected, rtol=0, atol=error)


@pytest.mark.parametrize("case", ATTENTION)
@torch.no_grad()
def test_attention_is_sharp(case: str) -> None:
    """The strongest key of a query has a multiple of its even share."""
    matrices: list[Tensor] = []

    def see(weights: Tensor, moved: Tensor) -> Tensor:
        matrices.append(weights)
        return through(weights, moved)

    through = attention._through
    images, plan = mixed(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_through", see)
        TLAlign(build(case), backend="explicit")(images, plan)
    assert all(float((w.amax(dim=-1) * w.shape[-1]).mean()) > 2 for w in matrices if w.shape[-1] > 6)


def test_cases_are_what_they_are_called() -> None:
    """Padded windows, odd grids, shifts along one side alone: so that the twins meet them."""
    swin = build("swin")
    assert [block.shift_size for stage in swin.layers for block in stage.blocks] == [(0, 0), (2, 2), (0, 0), (0, 2)]
    padded = build("swin-padded")
    assert [stage.blocks[0].input_resolution for stage in padded.layers] == [(9, 11), (5, 6)]
    any_size = build("swin-any-size")
    assert all(block.dynamic_mask for stage in any_size.layers for block in stage.blocks)
    assert build("pvt").stages[0].blocks[0].attn.sr.stride == (4, 4)
    assert all(stage.blocks[0].attn.pool is not None for stage in build("pvt-linear").stages)
    fractions = cutmix("vit").coverage((4, 6))[:3]
    assert ((fractions > 0) & (fractions < 1)).any(), "some patches straddle the box"
    assert set(ATTENTION) < set(CASES)
