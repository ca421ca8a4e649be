"""The benchmark of TokenProp makes the same steps with and without. No test looks at how fast anything is."""

import pytest
import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from jobs.bench.token_prop import PLAIN, TOKEN_PROP, TokenPropFigures, Training, bench_token_prop

CPU = torch.device("cpu")
MODEL = "token_prop_test_vit"


@register_model
def token_prop_test_vit(**_: object) -> nn.Module:
    return VisionTransformer(32, 8, embed_dim=24, depth=1, num_heads=2, num_classes=5)


def moved(training: Training, way: str) -> set[str]:
    before = {name: value.clone() for name, value in training.token_prop.named_parameters()}
    training.run(way)
    after = training.token_prop.named_parameters()
    return {name.split(".")[0] for name, value in after if not torch.equal(value, before[name])}


def test_the_plain_step_leaves_the_decoder_alone() -> None:
    training = Training.build(MODEL, 2, CPU, "fp32")
    assert moved(training, PLAIN) == {"model"}
    assert moved(training, TOKEN_PROP) == {"model", "decoder"}
    assert moved(training, PLAIN) == {"model"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_losses_differ_by_the_reconstruction(precision: str) -> None:
    training = Training.build(MODEL, 2, CPU, precision)  # type: ignore[arg-type]
    with torch.no_grad():
        difference = training.loss(TOKEN_PROP) - training.loss(PLAIN)
        reconstruction = training.token_prop(training.images)[1]
    assert 1e-4 < float(reconstruction) < 1e-3
    torch.testing.assert_close(difference, reconstruction, rtol=0.01, atol=1e-6)


def test_all_figures_come() -> None:
    figures = bench_token_prop(MODEL, 2, CPU, precision="fp32", steps=1, rounds=3)
    assert len(figures.ratios) == 3
    assert all(ratio > 0 for ratio in figures.ratios)
    assert figures.ratio == sorted(figures.ratios)[1]
    assert set(figures.seconds) == {PLAIN, TOKEN_PROP}
    assert figures.peak_bytes == {}
    assert str(figures).startswith(f"TokenProp / plain training step of {MODEL}, 32 x 32 px, batch 2, fp32, on the CPU")


def test_the_line() -> None:
    seconds, peaks = {PLAIN: 0.5, TOKEN_PROP: 0.52}, {PLAIN: 2_000_000, TOKEN_PROP: 2_100_000}
    line = "title: time 1.040 (520.0 / 500.0 ms, rounds 1.030..1.060)"
    assert str(TokenPropFigures("title", seconds, (1.06, 1.03, 1.04), {})) == line
    assert str(TokenPropFigures("title", seconds, (1.06, 1.03, 1.04), peaks)) == f"{line}; peak 1.050 (2.1 / 2.0 MB)"
