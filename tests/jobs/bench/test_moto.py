"""The benchmark of MoTo compares ways to the same layer, and says what it did not run. No test looks at speed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from jobs.bench import moto as bench
from jobs.bench.moto import (
    EXPLICIT,
    FUSED,
    LOOP,
    MOTO,
    PASSES,
    WAYS,
    MotoFigures,
    WayFigures,
    bench_moto,
    build,
    cpu_peak,
    free_bytes,
    needed_bytes,
    run,
)
from tokenlabels.cli import app

CPU = torch.device("cpu")


@pytest.fixture
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory on the CPU has a test of its own."""
    monkeypatch.setattr(bench, "cpu_peak", lambda way, size, _what: 1000 * WAYS.index(way) + size)
    monkeypatch.setattr(bench, "ROUND_SECONDS", 1e-9)


def noise(size: int = 12) -> Tensor:
    return torch.randn(1, bench.CHANNELS, size, size, generator=torch.Generator().manual_seed(1))


def test_the_loop_is_the_module() -> None:
    torch.testing.assert_close(build(MOTO, CPU)(noise()), build(LOOP, CPU)(noise()), rtol=0, atol=1e-5)


def test_both_attentions_are_the_same_layer() -> None:
    fused, explicit = build(FUSED, CPU), build(EXPLICIT, CPU)
    assert isinstance(fused, bench.PixelAttention)
    torch.testing.assert_close(fused(noise()), explicit(noise()), rtol=0, atol=1e-5)
    pixels = noise().flatten(2).transpose(1, 2)
    reference = nn.MultiheadAttention(bench.CHANNELS, 1, batch_first=True)
    reference.in_proj_weight, reference.in_proj_bias = fused.qkv.weight, fused.qkv.bias
    reference.out_proj.weight, reference.out_proj.bias = fused.proj.weight, fused.proj.bias
    expected = reference(pixels, pixels, pixels)[0].transpose(1, 2).reshape(1, -1, 12, 12)
    torch.testing.assert_close(fused(noise()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_pass_leaves_no_gradients(way: str) -> None:
    module, x = build(way, CPU), noise()
    for what in PASSES:
        run(module, x, what)
        assert all(weight.grad is None for weight in module.parameters())
    assert x.requires_grad  # backward reached the map


@pytest.mark.usefixtures("_no_processes")
def test_all_figures_come() -> None:
    figures = bench_moto([12, 8], CPU, rounds=3, memory_gb=1)
    assert list(figures.ways) == [(what, size) for what in PASSES for size in (8, 12)]
    for (_, size), ways in figures.ways.items():
        assert list(ways) == list(WAYS)
        for index, way in enumerate(ways.values()):
            assert min(way.seconds) > 0
            assert (len(way.seconds), len(way.ratios), way.reason) == (3, 3, "")
            assert way.peak_bytes == 1000 * index + size
        assert ways[MOTO].ratios == (1, 1, 1)
    assert figures.difference < 1e-5
    assert all(list(figures.exponents(what)) == list(WAYS) for what in PASSES)
    assert "on CPU" in figures.title


@pytest.mark.usefixtures("_no_processes")
def test_what_needs_too_much_memory_is_not_run() -> None:
    limit_gb = 3 * needed_bytes(FUSED, 12, "forward") / 1e9
    ways = bench_moto([12], CPU, rounds=1, memory_gb=limit_gb).ways["forward", 12]
    assert [name for name, way in ways.items() if way.reason] == [EXPLICIT]
    assert "GB or more, the limit is 0.0 GB" in ways[EXPLICIT].reason
    assert ways[EXPLICIT].seconds == ()


@pytest.mark.usefixtures("_no_processes")
def test_what_would_take_too_long_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {MOTO: 0.5, LOOP: 0.1, FUSED: 0.1, EXPLICIT: 0.01}
    monkeypatch.setattr(bench, "_time", lambda calls, rounds: {way: [seconds[way]] * rounds for way in calls})
    ways = bench_moto([8, 16, 32], CPU, rounds=1, memory_gb=1, max_seconds=0.5).ways
    skipped = {size: [name for name, way in ways["forward", size].items() if way.reason] for size in (8, 16, 32)}
    # four times as many pixels: 0.4 s by the loop, 1.6 s and 0.16 s by attention; then from the size last measured
    assert skipped == {8: [], 16: [FUSED], 32: [FUSED]}
    assert ways["forward", 32][FUSED].reason == "a call would take about 26 s, the limit is 0.5 s"


def test_the_bound_of_memory_is_below_what_is_taken() -> None:
    bound = needed_bytes(EXPLICIT, 48, "forward+backward")
    assert 0.95 * bound < cpu_peak(EXPLICIT, 48, "forward+backward") < 4 * bound
    assert all(needed_bytes(way, 224, what) < 1e9 for way in (MOTO, LOOP, FUSED) for what in PASSES)
    assert 1e8 < free_bytes(CPU) < 1e14


def test_the_table_and_the_exponents() -> None:
    def ways(size: int) -> dict[str, WayFigures]:
        pixels = size * size
        spent = {MOTO: 1e-6 * pixels, LOOP: 3e-6 * pixels, FUSED: 1e-9 * pixels**2}
        figures = {way: WayFigures((t, 2 * t, t), (1.0, 1.5, 1.25), 2_000_000) for way, t in spent.items()}
        return {**figures, EXPLICIT: WayFigures(reason="too large")}

    figures = MotoFigures("title", {("forward", size): ways(size) for size in (10, 20, 40)}, 2e-7)
    assert figures.exponents("forward") == pytest.approx({MOTO: 1, LOOP: 1, FUSED: 2})
    lines = str(figures).splitlines()
    assert lines[0] == "title"
    assert lines[1] == "  forward, 10 x 10 px"
    assert lines[3].split() == ["moto", "0.10", "(0.10..0.20)", "1.250", "(1.000..1.500)", "2.0"]
    assert lines[6] == f"    {EXPLICIT:18}  not run: too large"
    assert "  exponent of time against pixels, forward: moto 1.00, literal loop 1.00, fused attention 2.00" in lines
    assert "  exponent of time against pixels, forward+backward: one size alone" in lines
    assert lines[-1] == "  moto differs from the literal loop by 2e-07 at most"


@pytest.mark.usefixtures("_no_processes")
def test_the_command_prints_both(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def token_prop(*args: Any, **kwargs: Any) -> str:
        seen.append((args, kwargs))
        return "TokenProp / plain training step"

    monkeypatch.setattr("jobs.bench.token_prop.bench_token_prop", token_prop)
    arguments = ["--size", "8", "--size", "12", "--device", "cpu", "--rounds", "1", "--memory-gb", "1"]
    options = ["--model", "test_vit", "--batch-size", "2", "--steps", "1"]
    result = CliRunner().invoke(app, ["bench", "moto", *arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert "  forward+backward, 12 x 12 px" in result.stdout.splitlines()
    assert result.stdout.splitlines()[-1] == "TokenProp / plain training step"
    assert seen == [(("test_vit", 2, CPU), {"precision": "fp32", "steps": 1, "rounds": 1})]
