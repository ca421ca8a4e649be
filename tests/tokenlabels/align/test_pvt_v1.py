"""PVT v1 against its brute-force twin, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenlabels.align.pvt_v1  # noqa: F401 - registers the family
from tests.tokenlabels.align.cases import NUM_CLASSES, NUM_IMAGES, sharpen
from tests.tokenlabels.align.twins import (
    Twin,
    inputs_of,
    move,
    norm,
    prefix_labels,
    pvt_keys,
    softmax_matrix,
    window_matrix,
)
from tokenlabels.align import AlignmentError, Backend, TLAlign, TransMix, transmix
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier, PyramidVisionTransformer

SIZE = (64, 32)
SMALL: dict[str, Any] = {
    "img_size": SIZE,
    "num_classes": NUM_CLASSES,
    "embed_dims": (8, 12, 16, 24),
    "depths": (1, 1, 2, 2),
    "num_heads": (1, 2, 2, 3),
    "sr_ratios": (4, 2, 2, 1),
}


def build(**changes: Any) -> PyramidVisionTransformer:
    """The sharpened model in training mode."""
    torch.manual_seed(0)
    model = PyramidVisionTransformer(**(SMALL | changes))
    sharpen(model)
    return model.train()


def mixed() -> tuple[Tensor, MixPlan]:
    """Images that a plan of boxes has mixed; sample 3 by a fraction everywhere."""
    generator = torch.Generator().manual_seed(1)
    plan = MixPlan.cutmix(NUM_IMAGES, image_size=SIZE, generator=generator)
    own = plan.own.clone()
    own[3] = torch.rand(own.shape[1:], generator=generator)
    plan = MixPlan(plan.partner, own)
    return plan.mix(torch.randn(NUM_IMAGES, 3, *SIZE, generator=generator)), plan


@torch.no_grad()
def twin_labels(model: nn.Module, images: Tensor, plan: MixPlan, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The whole label embedding by explicit matrices: of what is classified [B, K], and of tokens [B, N, K]."""
    twin = Twin(model, images, plan.own, plan.partner, labels)
    model = twin.model
    attentions = [block.attn for stage in model.stages for block in stage.blocks]
    queries = iter(inputs_of(model, twin.images, [attn.q for attn in attentions]))
    keys = iter(inputs_of(model, twin.images, [attn.kv for attn in attentions]))
    grid = (SIZE[0] // 4, SIZE[1] // 4)
    y = twin.patches(grid)
    for number, stage in enumerate(model.stages):
        if number:
            reads, grid = window_matrix(grid, (2, 2), (2, 2), (0, 0))
            y = move(y, reads)
        if number == 3:
            y = torch.cat([prefix_labels(twin.own, twin.partner, twin.labels, 1), y], dim=1)
        for block in stage.blocks:
            attn = block.attn
            q, k = attn.q(next(queries)[0]), attn.kv(next(keys)[0])[..., : attn.dim]
            weights = softmax_matrix(q, k, attn.num_heads, 1 / math.sqrt(attn.head_dim))
            y = norm(y + move(y if number == 3 else move(y, pvt_keys(attn, grid)), weights))
    return (y[:, 0] if model.global_pool == "token" else y[:, 1:].mean(dim=1)), y[:, 1:]


def check(model: Any, backend: Backend | None = None) -> None:
    images, plan = mixed()
    y = nn.functional.one_hot(torch.tensor([2, 5, 0, 3]), NUM_CLASSES).double()
    backbone = model.model if isinstance(model, DenseClassifier) else model
    expected, expected_tokens = twin_labels(backbone, images, plan, y)
    aligned = TLAlign(model, backend=backend)
    logits, share, token_share = aligned(images, plan, return_token_share=True)
    torch.testing.assert_close(logits, model(images))
    share, token_share, partner = share.double()[:, None], token_share.double()[..., None], y[plan.partner]
    torch.testing.assert_close(share * y + (1 - share) * partner, expected, rtol=0, atol=1e-5)
    tokens = token_share * y[:, None] + (1 - token_share) * partner[:, None]
    torch.testing.assert_close(tokens, expected_tokens, rtol=0, atol=1e-5)
    assert (share[:, 0] - plan.share()).abs().max() > 0.01, "attention is far from uniform"


@pytest.mark.parametrize("backend", ["explicit", "second_call", "padded"])
def test_every_backend(backend: Backend) -> None:
    check(build(), backend)


def test_the_mean_of_patches_and_a_dense_classifier() -> None:
    check(build(global_pool="avg"))
    check(DenseClassifier(build(), SIZE).train())


def test_checkpoints_change_no_label() -> None:
    images, plan = mixed()
    model = TLAlign(build())
    expected = model(images, plan)[1]
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images, plan)[1], expected)


@torch.no_grad()
def test_transmix_looks_at_the_last_block() -> None:
    images, plan = mixed()
    model = build()
    _, share = TransMix(model, area_weight=0.0)(images, plan)
    attn = model.stages[3].blocks[1].attn
    ((q,), (k,)) = inputs_of(model, images, [attn.q, attn.kv])
    weights = softmax_matrix(attn.q(q), attn.kv(k)[..., : attn.dim], attn.num_heads, 1 / math.sqrt(attn.head_dim))
    torch.testing.assert_close(share, transmix(weights[:, 0, 1:], plan, grid=(2, 1)))


def test_one_graph() -> None:
    torch.compiler.reset()
    images, plan = mixed()
    model = TLAlign(build())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, plan), model(images, plan), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_refused() -> None:
    images, plan = mixed()
    with pytest.raises(AlignmentError, match="without pooling"):
        TLAlign(build(global_pool=""))
    model = build()
    model.patch_embeds[1] = nn.Sequential(model.patch_embeds[1], nn.Identity())
    with pytest.raises(AlignmentError, match=r"Sequential in tokenlabels\.models\.pvt_v1"):
        TLAlign(model)
    with pytest.raises(ValueError, match="the model takes 64 x 64"):
        TLAlign(build(img_size=64))(images, plan)
