"""What MoTo costs against the literal loop of its equation and against attention between pixels, as in Table 3 of arXiv
2212.11115: `tokenlabels bench moto`.

Legend: B images, C channels, H x W positions, P = H * W, n entities.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs.bench.align import time_in_turn
from tokenlabels.measure import peak_memory, run_fresh
from tokenlabels.models.moto import EPSILON, MoTo, sampling_grid

SIZES, CHANNELS = (224, 384, 512, 1024), 16
MOTO, LOOP, FUSED, EXPLICIT = "moto", "literal loop", "fused attention", "explicit attention"
WAYS = (MOTO, LOOP, FUSED, EXPLICIT)
PASSES = ("forward", "forward+backward")

MEMORY_SHARE = 0.5
"""Of what is free, where no limit is given."""
ROUND_SECONDS = 0.05
"""A call that is shorter is repeated within a round."""

SEED, GB = 0, 1e9


def literal_moto(moto: MoTo, x: Tensor) -> Tensor:
    """Equations 3 to 5 as they are written, with a normalised copy of x [B, C, H, W] for every entity."""
    height, width = x.shape[2:]
    rows, columns = sampling_grid(moto.num_entities, (height, width))
    places = [
        ((2 * row + 1) * height // (2 * rows), (2 * column + 1) * width // (2 * columns))
        for row in range(rows)
        for column in range(columns)
    ]
    keys, queries, features = moto.k(x), moto.q(x), moto.f(x)
    sampled = torch.stack([keys[:, :, row, column] for row, column in places], dim=2)
    activation = moto.u[:, None, None] * torch.einsum("bdn,bdhw->bnhw", sampled, queries) + features
    if moto.partition == "hard":
        layout = functional.one_hot(activation.argmax(dim=1), moto.num_entities).movedim(3, 1).to(x.dtype)
    else:
        layout = (moto.temperature * activation).softmax(dim=1)
    return literal_modulation(moto, x, layout)


def literal_modulation(moto: MoTo, x: Tensor, layout: Tensor) -> Tensor:
    """Equation 5 with a given layout [B, n, H, W]. An entity without any position has no mean, here 0 / 0."""
    modulated = torch.zeros_like(x)
    for entity in range(moto.num_entities):
        weight = layout[:, entity, None]
        total = weight.sum(dim=(2, 3), keepdim=True)
        mean = (weight * x).sum(dim=(2, 3), keepdim=True) / total
        deviation = ((weight * (x - mean).square()).sum(dim=(2, 3), keepdim=True) / total).sqrt()
        beta, alpha = (affine[entity, :, None, None] for affine in (moto.beta, moto.alpha))
        modulated = modulated + ((x - mean) / (deviation + EPSILON) * beta + alpha) * weight
    return modulated


class LiteralMoTo(MoTo):
    """`literal_moto` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return literal_moto(self, x)


class PixelAttention(nn.Module):
    """Self-attention between all pixels, one head: by `scaled_dot_product_attention`, or by an explicit softmax."""

    def __init__(self, channels: int, *, is_fused: bool) -> None:
        super().__init__()
        self.is_fused = is_fused
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        query, key, value = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        if self.is_fused:
            heads = (part.unsqueeze(1) for part in (query, key, value))
            attended = functional.scaled_dot_product_attention(*heads).squeeze(1)
        else:
            attended = (query * query.shape[-1] ** -0.5 @ key.transpose(1, 2)).softmax(dim=-1) @ value
        projected: Tensor = self.proj(attended)
        return projected.transpose(1, 2).reshape(x.shape)


def build(way: str, device: torch.device, channels: int = CHANNELS) -> nn.Module:
    """A module from [1, C, H, W] to the same, with random weights."""
    torch.manual_seed(SEED)
    made: dict[str, Callable[[int], nn.Module]] = {
        MOTO: MoTo,
        LOOP: LiteralMoTo,
        FUSED: partial(PixelAttention, is_fused=True),
        EXPLICIT: partial(PixelAttention, is_fused=False),
    }
    return made[way](channels).to(device)


def needed_bytes(way: str, size: int, what: str, channels: int = CHANNELS) -> float:
    """A bound from below of the memory that a pass over one float32 map takes: of its largest tensors alone."""
    num_pixels, is_forward = size * size, what == "forward"
    if way == EXPLICIT:  # scores and probabilities; in backward probabilities and the gradients of both
        return 4.0 * num_pixels**2 * (2 if is_forward else 3)
    num_maps = {MOTO: 4, LOOP: 4 if is_forward else 30, FUSED: 5}[way]
    return 4.0 * num_pixels * channels * num_maps


@dataclass(frozen=True)
class WayFigures:
    """One way over one size.

    Attributes:
        seconds: of a call in each round.
        ratios: to MoTo's of the same round.
        peak_bytes: memory at the highest point of a call, above its input and weights.
        reason: why it was not run; then the others are empty.
    """

    seconds: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    peak_bytes: int = 0
    reason: str = ""

    def row(self, name: str) -> str:
        """A line of the table."""
        if self.reason:
            return f"    {name:18}  not run: {self.reason}"
        spent = _spread([1e3 * seconds for seconds in self.seconds], 2)
        return f"    {name:18}  {spent:28}  {_spread(self.ratios, 3):28}  {self.peak_bytes / 1e6:9.1f}"


@dataclass(frozen=True)
class MotoFigures:
    """What `bench moto` measures: `ways[what, size][way]`, in the order measured.

    Attributes:
        title: what and where.
        ways: the figures.
        difference: largest difference of MoTo from the literal loop, on the first map.
    """

    title: str
    ways: Mapping[tuple[str, int], Mapping[str, WayFigures]] = field(repr=False)
    difference: float

    def exponents(self, what: str) -> dict[str, float]:
        """Slope of log time against log pixels, by least squares, of every way that ran over two sizes or more.

        Of the fastest round: another process on the machine makes one size slow and not the next.
        """
        found = {}
        for way in WAYS:
            points = [
                (math.log(size * size), math.log(min(ways[way].seconds)))
                for (each, size), ways in self.ways.items()
                if each == what and ways[way].seconds
            ]
            if len(points) > 1:
                pixels, seconds = zip(*points, strict=True)
                found[way] = statistics.linear_regression(pixels, seconds).slope
        return found

    def __str__(self) -> str:
        lines = [self.title]
        for (what, size), ways in self.ways.items():
            lines.append(f"  {what}, {size} x {size} px")
            lines.append(f"    {'':18}  {'ms (rounds)':28}  {'time / moto (rounds)':28}    peak MB")
            lines += [figures.row(way) for way, figures in ways.items()]
        for what in PASSES:
            slopes = ", ".join(f"{way} {slope:.2f}" for way, slope in self.exponents(what).items())
            lines.append(f"  exponent of time against pixels, {what}: {slopes or 'one size alone'}")
        lines.append(f"  moto differs from the literal loop by {self.difference:.0e} at most")
        return "\n".join(lines)


def bench_moto(
    sizes: Sequence[int],
    device: torch.device,
    *,
    rounds: int,
    memory_gb: float | None = None,
    max_seconds: float = 5.0,
) -> MotoFigures:
    """Times of all ways in turn, then the peak memory of each.

    Args:
        sizes: sides of the maps in pixels, from the smallest.
        device: of maps and weights.
        rounds: how often every way is timed.
        memory_gb: ways that need more are not run; None is a share of what is free.
        max_seconds: ways of which one call is expected to take longer, judging by the size before, are not run.
    """
    limit = memory_gb * GB if memory_gb is not None else MEMORY_SHARE * free_bytes(device)
    modules = {way: build(way, device) for way in WAYS}
    ways: dict[tuple[str, int], dict[str, WayFigures]] = {}
    for what in PASSES:
        before: dict[str, tuple[int, float]] = {}
        for size in sorted(sizes):
            reasons = {way: _reason(way, size, what, limit, before.get(way), max_seconds) for way in WAYS}
            x = _map(size, device)
            calls = {way: partial(run, modules[way], x, what) for way in WAYS if not reasons[way]}
            seconds = _time(calls, rounds)
            before |= {way: (size, min(spent)) for way, spent in seconds.items()}
            ways[what, size] = {way: WayFigures(reason=reason) for way, reason in reasons.items()}
            for way, spent in seconds.items():
                ratios = tuple(mine / moto for mine, moto in zip(spent, seconds[MOTO], strict=True))
                peak = cuda_peak(calls[way]) if device.type == "cuda" else cpu_peak(way, size, what)
                ways[what, size][way] = WayFigures(tuple(spent), ratios, peak)
    with torch.no_grad():
        x = _map(min(sizes), device)
        modules[LOOP].load_state_dict(modules[MOTO].state_dict())
        difference = float((modules[MOTO](x) - modules[LOOP](x)).abs().max())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    limits = f"at most {limit / GB:.1f} GB and {max_seconds:g} s a call"
    title = f"MoTo of 8 entities, batch 1, {CHANNELS} channels, float32, on {where}; rounds: {rounds}; {limits}"
    return MotoFigures(title, ways, difference)


def run(module: nn.Module, x: Tensor, what: str) -> None:
    """One pass over [1, C, H, W], and wait until it is done. Backward reaches the map and the weights."""
    if what == "forward":
        with torch.no_grad():
            module(x)
    else:
        wanted = [x.requires_grad_(), *(weight for weight in module.parameters() if weight.requires_grad)]
        torch.autograd.grad(module(x).square().mean(), wanted)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def free_bytes(device: torch.device) -> int:
    """Memory that is not in use, of the device or of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def cuda_peak(call: Callable[[], None]) -> int:
    """Bytes allocated at the highest point of a call, above what was there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(way: str, size: int, what: str) -> int:
    """Bytes at the highest point of a call in a process of its own, above what was there before."""
    arguments = json.dumps([way, size, what])
    return int(run_fresh(f"from jobs.bench.moto import _print_peak; _print_peak({arguments!r})"))


def _print_peak(arguments: str) -> None:
    way, size, what = json.loads(arguments)
    device = torch.device("cpu")
    module, x = build(way, device), _map(size, device)
    run(module, _map(16, device), what)  # loads what the libraries load once
    with peak_memory() as peak:
        run(module, x, what)
    print(peak.num_bytes)  # noqa: T201


def _reason(
    way: str, size: int, what: str, limit_bytes: float, before: tuple[int, float] | None, max_seconds: float
) -> str:
    """Why a way should not be run, or nothing. MoTo always is: it is what all others are compared with."""
    needed = needed_bytes(way, size, what)
    if way == MOTO:
        return ""
    if needed > limit_bytes:
        return f"it needs {needed / GB:.1f} GB or more, the limit is {limit_bytes / GB:.1f} GB"
    if before is not None:
        growth = (size / before[0]) ** (2 if way == LOOP else 4)
        if (expected := before[1] * growth) > max_seconds:
            return f"a call would take about {expected:.0f} s, the limit is {max_seconds:g} s"
    return ""


def _time(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call in each round."""
    steps = {}
    for way, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        steps[way] = max(1, math.ceil(ROUND_SECONDS / (time.perf_counter() - start)))
    sides = {way: partial(_repeat, call, steps[way]) for way, call in calls.items()}
    return {way: [seconds / steps[way] for seconds in spent] for way, spent in time_in_turn(sides, rounds).items()}


def _repeat(call: Callable[[], None], steps: int) -> None:
    for _ in range(steps):
        call()


def _map(size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(1, CHANNELS, size, size, generator=generator).to(device)


def _spread(values: Sequence[float], digits: int) -> str:
    """Median (lowest..highest)."""
    median, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low}..{high})"
