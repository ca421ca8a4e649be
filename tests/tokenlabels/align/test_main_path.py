"""Logits and gradients of `TLAlign` are the plain model's, whatever training does: dropout, autocast, checkpointing."""

from contextlib import ExitStack
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from tests.tokenlabels.align.cases import (
    ATTENTION,
    CASES,
    ONE_OF_EACH,
    build,
    fused_attention,
    mixed,
)
from tokenlabels.align import Backend, TLAlign, TransMix
from tokenlabels.align.families import find_family
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier

BACKENDS: tuple[Backend, ...] = ("explicit", "second_call", "padded")
Result = tuple[list[Tensor], dict[str, Tensor]]


def joined(logits: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(logits) if isinstance(logits, tuple) else [logits]


def step(model: nn.Module, logits_of: Any, seed: int = 5) -> Result:
    """Logits, and gradients of the model's parameters, with the random numbers of this seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    logits = joined(logits_of())
    sum(part.float().square().sum() for part in logits).backward()
    return [part.detach() for part in logits], {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def both(model: nn.Module, case: str, backend: Backend | None = None, **options: Any) -> tuple[Result, Result]:
    """The step of the aligned model, and of the plain one."""
    images, plan = mixed(case)
    aligned = TLAlign(model, backend=backend, **options)
    return step(model, lambda: aligned(images, plan)[0]), step(model, lambda: model(images))


def assert_close(actual: Result, expected: Result, error: float = 1e-4) -> None:
    """Up to an error relative to the largest value of each tensor, or a hundredth of the largest gradient."""
    assert actual[1].keys() == expected[1].keys()
    pairs = [*zip(actual[0], expected[0], strict=True)]
    pairs += [(actual[1][name], gradient) for name, gradient in expected[1].items()]
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for left, right in pairs:
        scale = max(float(right.abs().max()), 1e-2 * largest)
        torch.testing.assert_close(left, right, rtol=0, atol=error * scale)


def assert_same(actual: Result, expected: Result) -> None:
    """To the last bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def dropping(case: str, attention: float = 0.0) -> dict[str, float]:
    """Every kind of dropout that the family has, but that of attention."""
    rates = {"drop_path_rate": 0.3}
    if not case.startswith("convnext"):
        rates |= {"proj_drop_rate": 0.1}
    if case in ATTENTION:
        rates |= {"attn_drop_rate": attention}
    if "vit" in case or case == "distilled":
        rates |= {"pos_drop_rate": 0.1}
    return rates


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ATTENTION)
def test_every_family_and_backend(case: str, backend: Backend) -> None:
    model = build(case, **dropping(case))
    aligned, plain = both(model, case, backend)
    if backend == "second_call" and "vit" in case:
        assert_same(aligned, plain)
    assert_close(aligned, plain)
    without = build(case)(mixed(case)[0])
    assert not torch.allclose(plain[0][0], joined(without)[0]), "dropout did something"


@pytest.mark.parametrize("case", ["mixer", "convnext", "convnext2"])
def test_families_without_attention(case: str) -> None:
    assert_same(*both(build(case, **dropping(case)), case))


@pytest.mark.parametrize(
    ("backend", "fused"),
    [
        *((backend, fused) for backend in ("second_call", "padded", None) for fused in (True, False)),
        ("explicit", False),
    ],
)
@pytest.mark.parametrize("case", ["vit", "lvvit", "swin-padded", "swin2", "pvt"])
def test_attention_dropout(case: str, backend: Backend | None, fused: bool) -> None:
    with fused_attention(fused):
        model = build(case, **dropping(case, attention=0.3))
    assert_close(*both(model, case, backend))


def test_explicit_attention_drops_what_attention_that_is_not_fused_drops() -> None:
    """Nothing can draw the random numbers of the fused kernel again."""
    with fused_attention(False):
        plain = build("vit", attn_drop_rate=0.3)
    images, plan = mixed("vit")
    aligned = TLAlign(build("vit", attn_drop_rate=0.3), backend="explicit")
    assert aligned.model.blocks[0].attn.fused_attn
    assert_close(step(aligned.model, lambda: aligned(images, plan)[0]), step(plain, lambda: plain(images)))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_labels_see_attention_before_dropout(backend: Backend) -> None:
    images, plan = mixed("vit")
    shares = []
    for rate in (0.0, 0.9):
        model = build("vit", attn_drop_rate=rate)
        for block in model.blocks:
            block.attn.proj.weight.zero_()  # no token of the next block is changed
        shares.append(TLAlign(model, backend=backend)(images, plan)[1])
    torch.testing.assert_close(*shares, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ATTENTION)
def test_fused_and_plain_attention(case: str) -> None:
    for fused in (True, False):
        with fused_attention(fused):
            model = build(case)
        assert_close(*both(model, case))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_autocast(case: str, backend: Backend | None) -> None:
    """Within some steps of bfloat16, 2^-8 of a value, for logits; shares are carried in float32."""
    images, plan = mixed(case)
    model = build(case)
    with torch.no_grad():
        exact, expected_share, expected_tokens = TLAlign(model)(images, plan, return_token_share=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, share, tokens = TLAlign(model, backend=backend)(images, plan, return_token_share=True)
        plain = model(images)
    assert joined(logits)[0].dtype == torch.bfloat16
    assert share.dtype == tokens.dtype == torch.float32
    for ours, theirs, right in zip(joined(logits), joined(plain), joined(exact), strict=True):
        scale = float(right.abs().max())
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=8 * 2**-8 * scale)
    torch.testing.assert_close(share, expected_share, rtol=0, atol=5e-3)
    torch.testing.assert_close(tokens, expected_tokens, rtol=0, atol=2e-2)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_checkpointing(case: str) -> None:
    """Activations that are computed again draw the same random numbers again."""
    model = build(case, **dropping(case))
    kept, _ = both(model, case)
    TLAlign(model).set_grad_checkpointing()
    num_calls = 0

    def count(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1

    images, plan = mixed(case)
    blocks = find_family(model).blocks(model)
    with ExitStack() as hooks:
        for block in blocks:
            mlp = block.mlp_channels if case == "mixer" else block.mlp
            hooks.enter_context(mlp.register_forward_pre_hook(count))
        step(model, lambda: TLAlign(model, layers=(0,))(images, plan)[0])
    assert num_calls == 2 * len(blocks), "whether labels follow or not"
    again, plain = both(model, case)
    assert_same(again, kept)
    assert_close(again, plain)


def test_distilled_training_returns_both_logits() -> None:
    model = build("distilled")
    model.set_distilled_training(True)
    aligned, plain = both(model, "distilled")
    assert len(aligned[0]) == 2
    assert_close(aligned, plain)


@pytest.mark.parametrize("case", ["distilled", "swin-padded", "pvt"])
def test_a_dense_classifier_returns_logits_of_images_and_tokens(case: str) -> None:
    model = DenseClassifier(build(case, **dropping(case)), CASES[case][1]).train()
    aligned, plain = both(model, case)
    assert [part.ndim for part in aligned[0]] == [2, 3]
    assert_close(aligned, plain)
    images, plan = mixed(case)
    _, share, tokens = TLAlign(model)(images, plan, return_token_share=True)
    assert (share.shape, tokens.shape) == ((4,), aligned[0][1].shape[:2])


@pytest.mark.parametrize("case", ["vit", "swin", "convnext"])
def test_predictions_are_those_of_the_model(case: str) -> None:
    aligned, (images, _) = TLAlign(build(case)).eval(), mixed(case)
    assert torch.equal(aligned(images), aligned.model(images))


def test_shares_need_no_gradient_whatever_checkpoints_say() -> None:
    """Reentrant ones make all that they return require gradients; so does a plan that was made to."""
    images, plan = mixed("vit")
    timm.layers.set_reentrant_ckpt(True)
    try:
        model = TLAlign(build("vit"))
        model.set_grad_checkpointing()
        shares = model(images.requires_grad_(), plan, return_token_share=True)[1:]
    finally:
        timm.layers.set_reentrant_ckpt(False)
    learned = MixPlan(plan.partner, plan.own.clone())
    learned.own.requires_grad_()
    for wrapper in (TLAlign, TransMix):
        shares = (*shares, *wrapper(build("vit"))(images.detach(), learned, return_token_share=True)[1:])
    assert not any(share.requires_grad for share in shares)
