"""The benchmark of TL-Align compares ways to the same logits and targets. No test looks at how fast anything is."""

import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import nn
from typer.testing import CliRunner

from jobs.bench import align as bench
from jobs.bench.align import WAYS, AlignFigures, Case, Training, WayFigures, bench_align, cpu_peak, time_in_turn
from tokenlabels.align import TLAlign
from tokenlabels.align.families import Features
from tokenlabels.cli import app
from tokenlabels.sparse_targets import TokenTargets

CPU = torch.device("cpu")
DEIT = Case("deit_tiny_patch16_224", {"img_size": 64, "depth": 2, "drop_path_rate": 0.3})
SWIN = Case(
    "swin_tiny_patch4_window7_224",
    {"img_size": 56, "embed_dim": 48, "depths": (2, 2), "num_heads": (2, 4), "drop_path_rate": 0.3},
)

cases = pytest.mark.parametrize("case", [DEIT, SWIN], ids=["deit", "swin"])


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory on the CPU has a test of its own."""
    monkeypatch.setattr(bench, "cpu_peak", lambda *arguments: 1000 + WAYS.index(arguments[-1]))


def build(case: Case, batch_size: int = 3) -> Training:
    return Training.build(case, batch_size, CPU, "fp32")


@cases
def test_the_plain_model_has_fused_attention_and_the_setting_is_put_back(case: Case) -> None:
    before = use_fused_attn(), use_fused_attn(experimental=True)
    try:
        for experimental in (False, True):
            set_fused_attn(True, experimental=experimental)
            attentions = [part.fused_attn for part in build(case).model.modules() if hasattr(part, "fused_attn")]
            assert attentions == [True] * len(attentions) != []
            assert (use_fused_attn(), use_fused_attn(experimental=True)) == (True, experimental)
        set_fused_attn(False)
        with pytest.raises(RuntimeError, match="Unknown model"):
            build(Case("no_such_model"))
        assert not use_fused_attn()
    finally:
        set_fused_attn(before[0], experimental=before[1])


@cases
def test_all_ways_are_equal_in_float32(case: Case) -> None:
    differences = build(case).differences()
    assert list(differences) == list(WAYS)
    for way, (logits, gradients, target) in differences.items():
        assert logits < 1e-5, way
        assert gradients < 1e-4, way
        assert (target < 1e-6) == (way != "plain"), way
    assert differences["plain"][:2] == (0, 0)
    assert differences["plain"][2] > 1e-4  # by area: alignment has changed something


def test_bfloat16_is_compared_with_float32() -> None:
    differences = Training.build(DEIT, 3, CPU, "bf16").differences()
    assert all(1e-6 < differences[way][2] < 1e-2 for way in WAYS[1:])


@cases
def test_every_way_moves_the_same_weights(case: Case) -> None:
    training = build(case)
    for way in WAYS:
        before = [weight.clone() for weight in training.model.parameters()]
        training.run(way)
        moved = [not torch.equal(*pair) for pair in zip(before, training.model.parameters(), strict=True)]
        assert sum(moved) > 0.9 * len(moved), way
    (steps,) = {int(state["step"]) for state in training.optimizer.state.values()}
    assert steps == len(WAYS)


@cases
def test_the_published_way_carries_all_classes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str | None, torch.Size]] = []
    features = TLAlign.features

    def watched(self: TLAlign, *arguments: Any) -> Features:
        found = features(self, *arguments)
        seen.append((self.alignment.backend, found.labels.shape))
        return found

    monkeypatch.setattr(TLAlign, "features", watched)
    training = build(case)
    num_tokens = 17 if case is DEIT else 49
    for way in WAYS:
        logits, target = training.predict(way)
        assert logits.shape == (3, 1000)
        assert isinstance(target, torch.Tensor) == (way == "published")
        dense = target.dense()[:, 0] if isinstance(target, TokenTargets) else target
        assert dense.sum(dim=1).tolist() == pytest.approx([1] * 3)
    backends = ("explicit", "second_call", "padded")
    expected = [*((backend, (3, num_tokens, 1)) for backend in backends), ("explicit", (3, num_tokens, 1000))]
    assert seen == expected


def test_labels_of_a_token_are_those_of_what_it_shows() -> None:
    batch = build(DEIT).batch
    embedding = batch.label_embedding((4, 4), 1)
    own = batch.targets.dense()[:, 0]
    for number, (row, partner) in enumerate(zip(embedding, batch.plan.partner.tolist(), strict=True)):
        share = batch.plan.coverage((4, 4))[number].flatten()[:, None]
        torch.testing.assert_close(row[1:], share * own[number] + (1 - share) * own[partner])
        area = batch.plan.share()[number]
        torch.testing.assert_close(row[0], area * own[number] + (1 - area) * own[partner])


def test_sides_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    order: list[str] = []

    def take(name: str, seconds: float) -> None:
        order.append(name)
        clock.now += seconds

    seconds = time_in_turn({"a": lambda: take("a", 1), "b": lambda: take("b", 2), "c": lambda: take("c", 4)}, 3)
    assert "".join(order) == "abc" + "abc" + "acb" + "cab"
    assert seconds == {"a": [1] * 3, "b": [2] * 3, "c": [4] * 3}


@cases
def test_all_figures_come(case: Case) -> None:
    figures = bench_align("tiny", case, 2, CPU, precision="fp32", steps=1, rounds=2)
    assert list(figures.ways) == list(WAYS)
    for index, (name, way) in enumerate(figures.ways.items()):
        assert way.seconds > 0
        assert len(way.ratios) == 2
        assert way.peak_bytes == 1000 + index, name
    assert figures.ways["plain"].ratios == (1, 1)
    assert "tiny: training step of " in figures.title
    assert "resident memory" in figures.memory


def test_the_table() -> None:
    plain = WayFigures(0.5, (1.0, 1.0), 2_000_000, 0.0, 0.0, 0.01)
    padded = WayFigures(0.6, (1.1, 1.3, 1.25), 2_100_000, 2e-7, 3e-6, 1e-8)
    lines = str(AlignFigures("title", "how", {"plain": plain, "padded": padded})).splitlines()
    assert lines[0] == "title"
    assert lines[2].split() == ["plain", "500.0", "1.000", "(1.000..1.000)", "2.0", "1.000", "0e+00", "0e+00", "1e-02"]
    median = f"{statistics.median(padded.ratios):.3f}"
    assert lines[3].split() == ["padded", "600.0", median, "(1.100..1.300)", "2.1", "1.050", "2e-07", "3e-06", "1e-08"]
    assert "  peak: how" in lines


def test_peak_memory_is_that_of_weights_optimizer_and_activations() -> None:
    peak = cpu_peak(DEIT, 4, "fp32", "second_call")
    model: nn.Module = build(DEIT).model
    weights = sum(weight.nbytes for weight in model.parameters())
    assert 3 * weights < peak < 12 * weights  # with two moments, before gradients and activations


def test_the_command_prints_the_models_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.MODELS, "deit_s", DEIT)
    monkeypatch.setitem(bench.MODELS, "swin_t", SWIN)
    arguments = ["--device", "cpu", "--batch-size", "2", "--rounds", "1", "--steps", "1"]
    models = ["--models", "deit_s", "--models", "swin_t"]
    result = CliRunner().invoke(app, ["bench", "align", *models, *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    titles = [line for line in result.stdout.splitlines() if "training step of" in line]
    assert [title.split(":")[0] for title in titles] == ["deit_s", "swin_t"]
    for way in WAYS:
        assert sum(line.startswith(f"  {way} ") for line in result.stdout.splitlines()) == 2


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no model deit_x to measure; choose of deit_s, deit_s_384, swin_t"):
        bench.find_cases(["deit_s", "deit_x"])
    assert list(bench.find_cases(None)) == list(bench.MODELS)
