"""Targets that are mixed by given shares, as `tokenlabels.align` finds them, instead of by area."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenlabels.losses import token_label_loss
from tokenlabels.mixing import MixPlan
from tokenlabels.sparse_targets import TokenTargets

NUM_CLASSES = 6


def case(
    batch_size: int = 4, grid: tuple[int, int] | None = (2, 3), seed: int = 0
) -> tuple[MixPlan, TokenTargets, Tensor, Tensor]:
    """A plan, dense targets of every class, and random shares of images and tokens."""
    generator = torch.Generator().manual_seed(seed)
    plan = MixPlan.cutmix(batch_size, image_size=12, generator=generator)
    num_tokens = 0 if grid is None else grid[0] * grid[1]
    dense = torch.rand(batch_size, 1 + num_tokens, NUM_CLASSES, generator=generator).softmax(dim=-1)
    share, token_share = (torch.rand(shape, generator=generator) for shape in ((batch_size,), (batch_size, num_tokens)))
    return plan, TokenTargets.from_dense(dense, grid), share, token_share


def twin(dense: Tensor, plan: MixPlan, shares: Tensor) -> Tensor:
    """``share * own + (1 - share) * partner's``, row by row in float64."""
    mixed = torch.empty_like(dense, dtype=torch.float64)
    for i in range(len(plan)):
        for row in range(dense.shape[1]):
            share, partner = float(shares[i, row]), int(plan.partner[i])
            mixed[i, row] = share * dense[i, row].double() + (1 - share) * dense[partner, row].double()
    return mixed


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.sampled_from([(1, 1), (2, 3), (4, 3)]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_dense_formula(batch_size: int, grid: tuple[int, int], images: bool, tokens: bool, seed: int) -> None:
    plan, targets, share, token_share = case(batch_size, grid, seed)
    mixed = plan.mix_targets(targets, share if images else None, token_share if tokens else None)
    of_images = share if images else plan.share()
    of_tokens = token_share if tokens else plan.coverage(grid).flatten(1)
    expected = twin(targets.dense(), plan, torch.cat([of_images[:, None], of_tokens], dim=1))
    torch.testing.assert_close(mixed.dense().double(), expected, rtol=0, atol=1e-6)


def test_targets_of_images_alone() -> None:
    plan, targets, share, _ = case(grid=None)
    expected = twin(targets.dense(), plan, share[:, None])
    torch.testing.assert_close(plan.mix_targets(targets, share).dense().double(), expected, rtol=0, atol=1e-6)


def test_shares_of_0_and_1_take_one_target() -> None:
    plan, targets, share, token_share = case()
    for value, expected in ((1.0, targets), (0.0, targets)):
        mixed = plan.mix_targets(targets, share.fill_(value), token_share.fill_(value)).dense()
        rows = expected.dense() if value else expected.dense()[plan.partner]
        torch.testing.assert_close(mixed, rows)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_rows_without_a_target(value: float) -> None:
    """The share that was given counts, not the area that the plan covers."""
    plan, targets, share, token_share = case()
    valid = targets.valid.clone()
    valid[2, 0] = valid[2, 3] = False
    keep = valid[..., None]
    targets = TokenTargets(
        targets.classes, targets.weights * keep, targets.background * valid, valid, targets.grid, NUM_CLASSES
    )
    mixed = plan.mix_targets(targets, share.fill_(value), token_share.fill_(value))
    takes_own, takes_other = value > 0, value < 1
    for i in range(len(plan)):
        for row in range(valid.shape[1]):
            own, other = bool(valid[i, row]), bool(valid[plan.partner[i], row])
            assert bool(mixed.valid[i, row]) == ((own or not takes_own) and (other or not takes_other))


def test_no_gradient_reaches_shares() -> None:
    plan, targets, share, token_share = case()
    share.requires_grad_()
    token_share.requires_grad_()
    mixed = plan.mix_targets(targets, share, token_share)
    assert not mixed.weights.requires_grad
    logits = torch.randn(4, NUM_CLASSES, requires_grad=True), torch.randn(4, 6, NUM_CLASSES, requires_grad=True)
    token_label_loss(*logits, mixed).backward()
    assert logits[0].grad is not None
    assert share.grad is None


SHARE, TOKENS = torch.full((4,), 0.5), torch.full((4, 6), 0.5)


@pytest.mark.parametrize(
    ("share", "token_share", "message"),
    [
        pytest.param(SHARE + 0.6, None, r"share must be in 0..1, got 1.1.* at \[0\]", id="above 1"),
        pytest.param(SHARE - 0.6, None, "share must be in 0..1, got -0.1", id="below 0"),
        pytest.param(SHARE * float("nan"), None, "share must be in 0..1, got nan", id="no number"),
        pytest.param(SHARE[:3], None, r"share must be float32 \[4\] on cpu, got float32 \[3\]", id="batch"),
        pytest.param(SHARE[:, None], None, r"share must be float32 \[4\] on cpu, got float32 \[4, 1\]", id="column"),
        pytest.param(SHARE.double(), None, r"share must be float32 \[4\] on cpu, got float64", id="float64"),
        pytest.param(SHARE.to("meta"), None, r"share must be float32 \[4\] on cpu, got .* on meta", id="device"),
        pytest.param(0.5, None, "share must be a torch.Tensor, got builtins.float", id="number"),
        pytest.param(SHARE, TOKENS + 0.6, "token_share must be in 0..1, got 1.1", id="tokens above 1"),
        pytest.param(SHARE, TOKENS[:, :5], r"token_share must be float32 \[4, 6\] on cpu, got", id="other grid"),
        pytest.param(SHARE, TOKENS.view(4, 2, 3), r"token_share must be float32 \[4, 6\] on cpu, got", id="maps"),
        pytest.param(None, TOKENS.bfloat16(), "token_share must be float32 .*got bfloat16", id="bfloat16 tokens"),
        pytest.param(None, [[0.5] * 6] * 4, "token_share must be a torch.Tensor, got builtins.list", id="list"),
    ],
)
def test_refused_shares(share: Tensor | None, token_share: Tensor | None, message: str) -> None:
    plan, targets, *_ = case()
    with pytest.raises(ValueError, match=message):
        plan.mix_targets(targets, share, token_share)


def test_shares_of_tokens_for_targets_without_tokens() -> None:
    plan, targets, share, _ = case(grid=None)
    with pytest.raises(ValueError, match=r"there is a token_share, but .* has no tokens; leave it out"):
        plan.mix_targets(targets, share, TOKENS)


def test_images_that_a_plan_can_have_mixed() -> None:
    plan, *_ = case()
    plan.check_images(torch.zeros(4, 3, 24, 36))
    MixPlan.mixup(4).check_images(torch.zeros(4, 3, 7, 5))
    with pytest.raises(ValueError, match=r"cannot have mixed float32 \[4, 144, 2\] on cpu; give \[4, C, H, W\]"):
        plan.check_images(torch.zeros(4, 144, 2))
    with pytest.raises(ValueError, match="whole multiples of 12 and 12"):
        plan.check_images(torch.zeros(4, 3, 24, 30))
