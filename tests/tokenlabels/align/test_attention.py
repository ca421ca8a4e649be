"""`attend`: three backends against explicit attention in float64, and what is true of any attention."""

import math
from itertools import product
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tokenlabels.align.cases import build, mixed
from tokenlabels.align import Backend, TLAlign
from tokenlabels.align.attention import DEFAULTS, attend

BACKENDS: tuple[Backend, ...] = ("explicit", "second_call", "padded")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def inputs(
    queries: int = 5, keys: int = 7, channels: int = 6, columns: int = 1, heads: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v with sharp attention, and labels of the keys."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, heads, count, channels, generator=generator) * factor
        for count, factor in ((queries, 3), (keys, 3), (keys, 1))
    )
    return q, k, v, torch.rand(2, keys, columns, generator=generator)


def twin(q: Tensor, k: Tensor, v: Tensor, labels: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Query by query and head by head, in float64."""
    batch, heads, queries, _ = q.shape
    attended = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    moved = torch.zeros(batch, queries, labels.shape[-1], dtype=torch.float64)
    for b, h, i in product(range(batch), range(heads), range(queries)):
        exponents = k[b, h].double() @ q[b, h, i].double() * scale
        if bias is not None:
            exponents += bias.expand(batch, heads, queries, -1)[b, h, i].double()
        weights = [math.exp(e - float(exponents.max())) for e in exponents.tolist()]
        for j, weight in enumerate(weights):
            share = weight / sum(weights)
            attended[b, h, i] += share * v[b, h, j]
            moved[b, i] += share / heads * labels[b, j]
    return attended, moved


def biases(queries: int = 5, keys: int = 7) -> dict[str, Tensor | None]:
    mask = torch.zeros(2, 1, queries, keys)
    mask[0, :, : queries // 2, : keys // 2] = -100
    return {"none": None, "bias": torch.randn(1, 3, queries, keys), "mask": mask + torch.randn(1, 3, queries, keys)}


@every_backend
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bias", ["none", "bias", "mask"])
def test_against_loops(backend: Backend, fused: bool, bias: str) -> None:
    torch.manual_seed(0)
    given_bias = biases()[bias]
    q, k, v, labels = inputs()
    expected = twin(q, k, v, labels, 0.4, given_bias)
    actual = attend(q, k, v, labels, scale=0.4, fused=fused, backend=backend, bias=given_bias)
    assert actual[1].dtype == torch.float32
    for ours, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=2e-6)


@every_backend
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"columns": 5}, id="several columns"),
        pytest.param({"columns": 9, "channels": 4}, id="more columns than channels"),
        pytest.param({"columns": 8, "channels": 8}, id="as many columns as channels"),
        pytest.param({"queries": 1, "keys": 1}, id="one token"),
        pytest.param({"queries": 49, "keys": 3, "heads": 1}, id="few keys"),
        pytest.param({"queries": 3, "keys": 50, "channels": 1}, id="one channel"),
    ],
)
def test_sizes(backend: Backend, sizes: dict[str, int]) -> None:
    q, k, v, labels = inputs(**sizes)
    expected = twin(q, k, v, labels, 0.4, None)
    for fused in (True, False):
        for ours, right in zip(attend(q, k, v, labels, scale=0.4, fused=fused, backend=backend), expected, strict=True):
            torch.testing.assert_close(ours.double(), right, rtol=0, atol=2e-6)


@every_backend
def test_gradients_are_those_of_the_main_path_alone(backend: Backend) -> None:
    gradients = []
    for with_labels in (False, True):
        leaves = [part.clone().requires_grad_() for part in inputs()[:3]]
        bias = torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if with_labels:
            attended, moved = attend(*leaves, inputs()[3], scale=0.4, fused=True, backend=backend, bias=bias)
            assert not moved.requires_grad
        else:
            q, k, v = leaves
            attended = (0.4 * q @ k.mT + bias).softmax(dim=-1) @ v
        attended.square().sum().backward()
        gradients.append([leaf.grad for leaf in (*leaves, bias)])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_the_default_is_the_fastest_of_the_device_where_attention_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, labels = inputs()
    for fastest in BACKENDS:
        monkeypatch.setitem(DEFAULTS, "cpu", fastest)
        ours = attend(q, k, v, labels, scale=0.4, fused=True)
        named = attend(q, k, v, labels, scale=0.4, fused=True, backend=fastest)
        assert all(torch.equal(*pair) for pair in zip(ours, named, strict=True))
        unfused = attend(q, k, v, labels, scale=0.4, fused=False)
        explicit = attend(q, k, v, labels, scale=0.4, fused=False, backend="explicit")
        assert all(torch.equal(*pair) for pair in zip(unfused, explicit, strict=True))


@every_backend
def test_labels_are_not_rounded_by_autocast(backend: Backend) -> None:
    q, k, v, labels = inputs(keys=1)
    with torch.autocast("cpu", torch.bfloat16):
        _, moved = attend(q, k, v, labels, scale=0.4, fused=True, backend=backend)
    assert torch.equal(moved, labels.expand_as(moved))


sizes_of_attention = st.fixed_dictionaries(
    {
        "queries": st.integers(1, 12),
        "keys": st.integers(1, 12),
        "channels": st.integers(1, 12),
        "columns": st.integers(1, 12),
        "heads": st.integers(1, 4),
        "seed": st.integers(0, 1000),
    }
)
options = st.fixed_dictionaries(
    {"backend": st.sampled_from(BACKENDS), "fused": st.booleans(), "scale": st.floats(0.01, 2)}
)


@settings(deadline=None, max_examples=60)
@given(sizes_of_attention, options)
def test_labels_are_means_of_those_of_the_keys(sizes: dict[str, int], how: dict[str, Any]) -> None:
    q, k, v, labels = inputs(**sizes)
    _, moved = attend(q, k, v, labels, **how)
    low, high = labels.aminmax(dim=1, keepdim=True)
    assert ((moved >= low - 1e-6) & (moved <= high + 1e-6)).all()
    constant = torch.full_like(labels, 0.3)
    torch.testing.assert_close(attend(q, k, v, constant, **how)[1], constant[:, :1].expand_as(moved))


@settings(deadline=None, max_examples=60)
@given(sizes_of_attention, options)
def test_labels_are_moved_linearly_and_keep_their_sum(sizes: dict[str, int], how: dict[str, Any]) -> None:
    q, k, v, labels = inputs(**sizes)
    other = labels.flip(1)
    moved, of_other = (attend(q, k, v, part, **how)[1] for part in (labels, other))
    both = attend(q, k, v, 0.25 * labels - 3 * other, **how)[1]
    torch.testing.assert_close(both, 0.25 * moved - 3 * of_other, rtol=0, atol=1e-5)
    partition = labels / labels.sum(dim=-1, keepdim=True)
    sums = attend(q, k, v, partition, **how)[1].sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("case", ["vit", "lvvit", "swin-padded", "swin2-padded", "pvt", "pvt-linear"])
@torch.no_grad()
def test_backends_agree_on_shares(case: str) -> None:
    images, plan = mixed(case)
    found = [TLAlign(build(case), backend=backend)(images, plan, return_token_share=True)[1:] for backend in BACKENDS]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=2e-6)


@pytest.mark.gpu
@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["vit", "lvvit", "swin-padded", "swin2", "pvt"])
@torch.no_grad()
def test_cuda_under_autocast(cuda: torch.device, case: str, dtype: torch.dtype, backend: Backend) -> None:
    images, plan = mixed(case)
    _, share, token_share = TLAlign(build(case))(images, plan, return_token_share=True)
    model = build(case).to(cuda)
    images, plan = images.to(cuda), plan.to(cuda)
    with torch.autocast(cuda.type, dtype):
        logits, *ours = TLAlign(model, backend=backend)(images, plan, return_token_share=True)
        plain = model(images)
    for left, right in zip(*((part,) if isinstance(part, Tensor) else part for part in (logits, plain)), strict=True):
        scale = float(right.float().abs().max())
        torch.testing.assert_close(left.float(), right.float(), rtol=0, atol=8 * 2**-8 * scale)
    assert [part.dtype for part in ours] == 2 * [torch.float32]
    torch.testing.assert_close(ours[0].cpu(), share, rtol=0, atol=5e-3)
    torch.testing.assert_close(ours[1].cpu(), token_share, rtol=0, atol=2e-2)


@pytest.mark.gpu
@every_backend
def test_cuda_in_float32(cuda: torch.device, backend: Backend) -> None:
    bias = biases()["bias"]
    assert bias is not None
    q, k, v, labels = inputs()
    expected = twin(q, k, v, labels, 0.4, bias)
    on_cuda = (part.to(cuda) for part in (q, k, v, labels))
    actual = attend(*on_cuda, scale=0.4, fused=True, backend=backend, bias=bias.to(cuda))
    for ours, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", get_args(Backend))
@torch.no_grad()
def test_ratios_of_small_columns(backend: Backend, dtype: torch.dtype) -> None:
    """A class token that looks at itself, and patches that share about a hundredth of its attention (TransMix)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 3, 25, 8, generator=generator).to(dtype) for _ in range(3))
    q[..., 0], k[..., 0] = 4, 0
    k[:, :, 0, 0] = 8**0.5 * 2  # eight nats ahead of the others
    labels = torch.cat([torch.rand(4, 25, 1, generator=generator), torch.ones(4, 25, 1)], dim=-1)
    labels[:, 0] = 0
    _, moved = attend(q, k, v, labels, scale=8**-0.5, fused=True, backend=backend, centred=False)
    weights = ((q.double() @ k.double().mT) * 8**-0.5).softmax(dim=-1).mean(dim=1)
    own, everything = (weights @ labels.double()).unbind(dim=-1)
    assert everything.median() < 0.05
    error = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(moved[..., 0] / moved[..., 1], (own / everything).float(), rtol=0, atol=error)
