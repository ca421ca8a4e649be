"""TransMix: the formula, and the module against the explicit attention of the last block."""

from itertools import product

import pytest
import torch
from torch import Tensor

from tests.tokenlabels.align.cases import CASES, NUM_CLASSES, build, fused_attention, mixed, seeded
from tests.tokenlabels.align.twins import Twin
from tokenlabels.align import AlignmentError, Backend, TransMix, transmix
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier


def twin(attention: Tensor, plan: MixPlan, grid: tuple[int, int]) -> Tensor:
    """``sum(A * own) / sum(A)``, head by head and token by token."""
    own = plan.coverage(grid).double()
    shares = torch.zeros(len(plan), dtype=torch.float64)
    for b in range(len(plan)):
        kept = everything = 0.0
        for head, (i, j) in product(range(attention.shape[1]), product(*map(range, grid))):
            weight = float(attention[b, head, i * grid[1] + j])
            kept, everything = kept + weight * float(own[b, i, j]), everything + weight
        shares[b] = kept / everything
    return shares


def attention_of(case: str, images: Tensor, plan: MixPlan, num_prefix: int) -> Tensor:
    """Of the class token to patch tokens, in the last block, [B, 1, N] and not summing to one."""
    y = torch.eye(4, NUM_CLASSES)
    matrix = Twin(build(case), images, plan.own, plan.partner, y).vit_matrices()[-1]
    return matrix[:, :1, num_prefix:]


@pytest.mark.parametrize("area_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (16, 1)])
def test_the_formula(grid: tuple[int, int], area_weight: float) -> None:
    plan = MixPlan.cutmix(4, image_size=16, generator=seeded())
    attention = torch.rand(4, 3, 16, generator=seeded())
    expected = (1 - area_weight) * twin(attention, plan, grid) + area_weight * plan.share().double()
    share = transmix(attention, plan, grid=grid, area_weight=area_weight)
    assert (share.dtype, share.requires_grad) == (torch.float32, False)
    torch.testing.assert_close(share.double(), expected, rtol=0, atol=1e-6)
    one_head = transmix(attention.mean(dim=1), plan, grid=grid, area_weight=area_weight)
    torch.testing.assert_close(one_head, share)
    torch.testing.assert_close(transmix(7 * attention, plan, grid=grid, area_weight=area_weight), share)


def test_a_square_is_the_default_grid_and_half_precision_is_allowed() -> None:
    plan = MixPlan.cutmix(4, image_size=16, generator=seeded())
    attention = torch.rand(4, 16, generator=seeded())
    assert torch.equal(transmix(attention, plan), transmix(attention, plan, grid=(4, 4)))
    half = transmix(attention.bfloat16().requires_grad_(), plan)
    torch.testing.assert_close(half, transmix(attention.bfloat16().float(), plan))
    assert not half.requires_grad


def test_attention_to_one_token_takes_its_share() -> None:
    plan = MixPlan.cutmix(4, image_size=16, generator=seeded())
    for token in range(16):
        attention = torch.zeros(4, 16)
        attention[:, token] = 0.25
        torch.testing.assert_close(transmix(attention, plan), plan.coverage((4, 4)).flatten(1)[:, token])


def test_without_attention_the_area_is_left() -> None:
    plan = MixPlan.cutmix(4, image_size=16, generator=seeded())
    torch.testing.assert_close(transmix(torch.zeros(4, 16), plan), plan.share())


def test_mixup_is_not_changed() -> None:
    plan = MixPlan.mixup(4, generator=seeded())
    torch.testing.assert_close(transmix(torch.rand(4, 16), plan), plan.share())


@pytest.mark.parametrize("backend", ["explicit", "second_call", "padded", None])
@pytest.mark.parametrize("area_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("case", "num_prefix"), [("vit", 1), ("vit-registers", 4), ("distilled", 2), ("lvvit", 1)])
@torch.no_grad()
def test_the_module(case: str, num_prefix: int, area_weight: float, backend: Backend | None) -> None:
    images, plan = mixed(case)
    attention = attention_of(case, images, plan, num_prefix)
    expected = transmix(attention, plan, grid=(4, 6), area_weight=area_weight)
    model = TransMix(build(case), backend=backend, area_weight=area_weight)
    _, share, tokens = model(images, plan, return_token_share=True)
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-5)
    assert torch.equal(tokens, plan.coverage((4, 6)).flatten(1)), "tokens by area"
    if area_weight == 0:
        assert (share - plan.share()).abs().max() > 0.01


def test_half_of_the_area_is_the_default() -> None:
    images, plan = mixed("vit")
    with torch.no_grad():
        default, half = (TransMix(build("vit"), **options)(images, plan)[1] for options in [{}, {"area_weight": 0.5}])
    assert torch.equal(default, half)


def test_logits_and_gradients_are_the_models() -> None:
    images, plan = mixed("vit")
    model = build("vit")
    expected = model(images)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    logits, share = TransMix(model)(images, plan)
    logits.square().sum().backward()
    assert torch.equal(logits, expected)
    assert all(torch.equal(p.grad, right) for p, right in zip(model.parameters(), gradients, strict=True))
    assert not share.requires_grad


def test_around_a_dense_classifier_and_without_fused_attention() -> None:
    images, plan = mixed("distilled")
    with fused_attention(False):
        model = DenseClassifier(build("distilled"), CASES["distilled"][1]).train()
    with torch.no_grad():
        logits, share = TransMix(model)(images, plan)
        expected = TransMix(build("distilled"))(images, plan)[1]
    assert [part.ndim for part in logits] == [2, 3]
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-5)


def test_predictions_need_no_plan() -> None:
    model = TransMix(build("vit")).eval()
    images, _ = mixed("vit")
    assert torch.equal(model(images), model.model(images))


PLAN = MixPlan(torch.tensor([1, 0]), torch.ones(2, 4, 4))


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        pytest.param([[0.5] * 16] * 2, {}, r"attention must be a torch.Tensor, got builtins.list", id="list"),
        pytest.param(torch.ones(3, 16), {}, r"\[2, N\] or \[2, heads, N\].*got float32 \[3, 16\]", id="batch"),
        pytest.param(torch.ones(16), {}, r"\[2, N\] or \[2, heads, N\].*got float32 \[16\]", id="one dimension"),
        pytest.param(torch.ones(2, 3, 16, 16), {}, r"got float32 \[2, 3, 16, 16\]", id="of all tokens"),
        pytest.param(torch.ones(2, 16).long(), {}, r"attention must be floating .*got int64", id="integers"),
        pytest.param(torch.ones(2, 16, device="meta"), {}, "attention must be on cpu as the plan is", id="device"),
        pytest.param(
            torch.ones(2, 17), {}, r"17 patch tokens are not on the grid \(4, 4\); give grid", id="class token"
        ),
        pytest.param(torch.ones(2, 16), {"grid": (3, 5)}, r"16 patch tokens are not on the grid \(3, 5\)", id="grid"),
        pytest.param(torch.ones(2, 16), {"grid": (0, 5)}, "grid must be two positive integers", id="empty grid"),
        pytest.param(torch.ones(2, 16), {"area_weight": 1.5}, "area_weight must be a number in 0..1", id="weight"),
    ],
)
def test_refused_attention(attention: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transmix(attention, PLAN, **options)


@pytest.mark.parametrize("case", ["swin", "vit-mean", "vit-mean-and-class-token", "pvt", "mixer", "convnext"])
def test_models_without_a_class_token_that_is_classified(case: str) -> None:
    model = build(case)
    with pytest.raises(AlignmentError, match=f"attention of a class token, and {type(model).__name__} classifies none"):
        TransMix(model)


def test_a_refused_weight_and_backend() -> None:
    with pytest.raises(ValueError, match=r"area_weight must be a number in 0..1, got -1"):
        TransMix(build("vit"), area_weight=-1)
    with pytest.raises(ValueError, match=r"backend must be one of 'explicit', 'second_call', 'padded', got 'fused'"):
        TransMix(build("vit"), backend="fused")
