"""What TL-Align costs in a training step, and how exact it is: `tokenlabels bench align`.

Legend: B images, P prefix tokens, N patch tokens, K classes.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, Self, get_args

import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from tokenlabels.align import Backend, TLAlign
from tokenlabels.align.operations import first_labels
from tokenlabels.checks import Grid
from tokenlabels.losses import token_label_loss
from tokenlabels.measure import peak_memory, run_fresh
from tokenlabels.mixing import MixPlan
from tokenlabels.sparse_targets import TokenTargets
from tokenlabels.trainer.config import OptimizerConfig
from tokenlabels.trainer.optimizer import make_optimizer

Precision = Literal["fp32", "bf16"]
PLAIN, PUBLISHED = "plain", "published"
WAYS: tuple[str, ...] = (PLAIN, *get_args(Backend), PUBLISHED)
"""The model with fused attention and targets mixed by area; `TLAlign` by each backend; explicit attention with a label
embedding [B, P + N, K]."""

SEED, SMOOTHING, SHARPENING = 0, 0.1, 4.0
CUDA_MEMORY = "torch.cuda.max_memory_allocated of a step"
CPU_MEMORY = """resident memory at its high-water mark in a step, in a fresh process for each way; of what was there
    before, the weights, the optimizer's state and the batch alone count"""


@dataclass(frozen=True)
class Case:
    """A classifier of timm with random weights: its name, and arguments of `timm.create_model` that JSON can hold."""

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)


MODELS = {
    "deit_s": Case("deit_small_patch16_224", {"drop_path_rate": 0.1}),
    "deit_s_384": Case("deit_small_patch16_224", {"drop_path_rate": 0.1, "img_size": 384}),
    "swin_t": Case("swin_tiny_patch4_window7_224", {"drop_path_rate": 0.2}),
}


def find_cases(names: Sequence[str] | None) -> dict[str, Case]:
    """What is measured under these names, or everything."""
    if unknown := [name for name in names or () if name not in MODELS]:
        raise ValueError(f"there is no model {', '.join(unknown)} to measure; choose of {', '.join(MODELS)}")
    return {name: MODELS[name] for name in names or MODELS}


@dataclass(frozen=True)
class WayFigures:
    """One way to make a training step.

    Attributes:
        seconds: of a step, median over the rounds.
        ratios: to the seconds of the plain step, of each round.
        peak_bytes: memory at the highest point of a step.
        logits, gradients: largest difference from the plain model's, with the same seed and target; of gradients,
            relative to the largest value of the same parameter.
        target: largest difference from the published way's label embedding in float32; of "plain" it is what alignment
            changes.
    """

    seconds: float
    ratios: tuple[float, ...]
    peak_bytes: int
    logits: float
    gradients: float
    target: float

    def row(self, name: str, plain: "WayFigures") -> str:
        """A line of the table."""
        rounds = f"{statistics.median(self.ratios):.3f} ({min(self.ratios):.3f}..{max(self.ratios):.3f})"
        peak = f"{self.peak_bytes / 1e6:8.1f}  {self.peak_bytes / plain.peak_bytes:7.3f}"
        differences = f"{self.logits:6.0e}  {self.gradients:9.0e}  {self.target:6.0e}"
        return f"  {name:11}  {self.seconds * 1e3:7.1f}  {rounds:22}  {peak}  {differences}"


@dataclass(frozen=True)
class AlignFigures:
    """What `bench align` measures for one model: `title` says which, `memory` how its peak was found."""

    title: str
    memory: str
    ways: Mapping[str, WayFigures]

    def __str__(self) -> str:
        rows = "\n".join(way.row(name, self.ways[PLAIN]) for name, way in self.ways.items())
        return f"""{self.title}
               ms/step  time / plain, rounds     peak MB  / plain  logits  gradients  target
{rows}
  peak: {self.memory}
  logits, gradients: largest difference from plain, of gradients relative to the largest value of the same parameter
  target: largest difference from the published way's label embedding in float32"""


@dataclass(frozen=True, eq=False)
class _Batch:
    """Noise that `plan` has mixed, and the smoothed labels of the images before."""

    images: Tensor
    plan: MixPlan
    targets: TokenTargets

    @classmethod
    def draw(cls, batch_size: int, model: Any, device: torch.device) -> Self:
        """A batch that fits the model."""
        generator = torch.Generator().manual_seed(SEED)
        size = model.patch_embed.img_size
        plan = MixPlan.cutmix(batch_size, image_size=size, generator=generator, device=device)
        images = torch.randn(batch_size, 3, *size, generator=generator).to(device)
        labels = torch.randint(model.num_classes, (batch_size,), generator=generator).to(device)
        return cls(plan.mix(images), plan, TokenTargets.from_labels(labels, model.num_classes).smooth(SMOOTHING))

    def label_embedding(self, grid: Grid, num_prefix_tokens: int) -> Tensor:
        """Equation 5 as published: the label of every token, float32 [B, P + N, K]."""
        own = self.targets.dense()
        share = first_labels(self.plan, grid, num_prefix_tokens)
        return share * own + (1 - share) * own[self.plan.partner]


@dataclass(frozen=True, eq=False)
class Training:
    """A model, its optimizer and a batch, which all ways share: another copy elsewhere in memory has its own speed."""

    model: nn.Module
    aligned: Mapping[str, TLAlign]
    optimizer: Optimizer
    batch: _Batch
    precision: Precision

    @classmethod
    def build(cls, case: Case, batch_size: int, device: torch.device, precision: Precision) -> Self:
        """With fused attention, and weights that attend to few tokens, so that labels have somewhere to go."""
        torch.manual_seed(SEED)
        with fused_attention(), torch.no_grad():
            model = timm.create_model(case.model, **case.options).to(device).train()
            for name, weight in model.named_parameters():
                if name.endswith("qkv.weight"):
                    weight[: 2 * len(weight) // 3] *= SHARPENING
        aligned = {backend: TLAlign(model, backend=backend) for backend in get_args(Backend)}
        aligned[PUBLISHED] = aligned["explicit"]
        optimizer = make_optimizer(model, OptimizerConfig(), batch_size)
        return cls(model, aligned, optimizer, _Batch.draw(batch_size, model, device), precision)

    def run(self, way: str, steps: int = 1) -> None:
        """Forward, loss, backward and the optimizer's step, and wait until the last is done."""
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                loss = _loss(*self.predict(way))
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        if self.batch.images.is_cuda:
            torch.cuda.synchronize(self.batch.images.device)

    def predict(self, way: str) -> tuple[Tensor, TokenTargets | Tensor]:
        """Logits [B, K] and the targets that this way makes; dense [B, K] as published."""
        images, plan, targets = self.batch.images, self.batch.plan, self.batch.targets
        if way == PLAIN:
            return self.model(images), plan.mix_targets(targets)
        aligned = self.aligned[way]
        if way == PUBLISHED:
            features = aligned.features(images, self.batch.label_embedding)
            return self.model.forward_head(features.tokens), aligned.classified(features)  # type: ignore[operator]
        logits, share = aligned(images, plan)
        return logits, plan.mix_targets(targets, share)

    def differences(self) -> dict[str, tuple[float, float, float]]:
        """Of logits, gradients and target, see `WayFigures`. "plain" is run again: what differs then is noise."""
        embedding = replace(self, precision="fp32")._passed(PUBLISHED)[2]
        plain_logits, plain_gradients, _ = self._passed(PLAIN)
        found = {}
        for way in WAYS:
            logits, gradients, target = self._passed(way)
            pairs = zip(gradients, plain_gradients, strict=True)
            relative = [_largest(mine - plain) / max(_largest(plain), 1e-30) for mine, plain in pairs]
            found[way] = _largest(logits - plain_logits), max(relative), _largest(target - embedding)
        return found

    def _passed(self, way: str) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """Logits, the gradients of the loss with targets mixed by area, and the way's own target [B, K]."""
        torch.manual_seed(SEED)
        with self._autocast():
            logits, target = self.predict(way)
            loss = _loss(logits, self.batch.plan.mix_targets(self.batch.targets))
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        return logits.detach().float(), gradients, target.dense()[:, 0] if isinstance(target, TokenTargets) else target

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.batch.images.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def bench_align(
    name: str, case: Case, batch_size: int, device: torch.device, *, precision: Precision, steps: int, rounds: int
) -> AlignFigures:
    """Differences, then times of all ways in turn, then the peak memory of each."""
    training = Training.build(case, batch_size, device, precision)
    differences = training.differences()
    seconds = time_in_turn({way: partial(training.run, way, steps) for way in WAYS}, rounds)
    is_cuda = device.type == "cuda"
    ways = {
        way: WayFigures(
            statistics.median(seconds[way]) / steps,
            tuple(mine / plain for mine, plain in zip(seconds[way], seconds[PLAIN], strict=True)),
            cuda_peak(training, way) if is_cuda else cpu_peak(case, batch_size, precision, way),
            *differences[way],
        )
        for way in WAYS
    }
    where = torch.cuda.get_device_name(device) if is_cuda else f"the CPU with {torch.get_num_threads()} threads"
    height, width = training.batch.images.shape[2:]
    what = f"{name}: training step of {case.model}, {height} x {width} px, batch {batch_size}, {precision}, on {where}"
    title = f"{what}; rounds: {rounds}, steps of a round: {steps}"
    return AlignFigures(title, CUDA_MEMORY if is_cuda else CPU_MEMORY, ways)


def time_in_turn(sides: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one to warm up; another goes first, and the order turns, every time."""
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for side in sides.values():
        side()
    for number in range(rounds):
        first = number % len(names)
        for name in (names[first:] + names[:first])[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def cuda_peak(training: Training, way: str) -> int:
    """Bytes allocated at the highest point of a step."""
    torch.cuda.reset_peak_memory_stats()
    training.run(way)
    return torch.cuda.max_memory_allocated()


def cpu_peak(case: Case, batch_size: int, precision: Precision, way: str) -> int:
    """Bytes at the highest point of a step in a process of its own, without those of the process itself."""
    arguments = json.dumps([asdict(case), batch_size, precision, way])
    return int(run_fresh(f"from jobs.bench.align import _print_peak; _print_peak({arguments!r})"))


def _print_peak(arguments: str) -> None:
    case, batch_size, precision, way = json.loads(arguments)
    training = Training.build(Case(**case), 2, torch.device("cpu"), precision)
    training.run(way)  # makes the optimizer's state
    training.optimizer.zero_grad(set_to_none=True)
    batch = _Batch.draw(batch_size, training.model, torch.device("cpu"))
    states = [value for state in training.optimizer.state.values() for value in state.values()]
    held = [batch.images, batch.plan.own, *training.model.parameters(), *states]
    with peak_memory() as peak:
        replace(training, batch=batch).run(way)
    print(peak.num_bytes + sum(tensor.nbytes for tensor in held))  # noqa: T201


@contextmanager
def fused_attention() -> Iterator[None]:
    """timm builds models with fused attention inside, Swin too; the setting is put back afterwards."""
    is_on, is_on_for_all = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(True, experimental=True)
    try:
        yield
    finally:
        set_fused_attn(is_on, experimental=is_on_for_all)


def _loss(logits: Tensor, target: TokenTargets | Tensor) -> Tensor:
    if isinstance(target, TokenTargets):
        return token_label_loss(logits, None, target)
    return functional.cross_entropy(logits.float(), target)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())
