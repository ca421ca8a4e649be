"""What TokenProp costs in a training step (Table 9 of arXiv 2212.11115 has 4.1 % for DeiT-S)."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

import tokenlabels.models  # noqa: F401 - registers LV-ViT
from jobs.bench.align import SEED, time_in_turn
from tokenlabels.models.tokenprop import TokenProp
from tokenlabels.trainer.config import OptimizerConfig, Precision
from tokenlabels.trainer.optimizer import make_optimizer

PLAIN, TOKEN_PROP = "plain", "with TokenProp"


@dataclass(frozen=True)
class TokenPropFigures:
    """A training step with TokenProp against one without.

    Attributes:
        title: what was measured, and where.
        seconds: of a step, median over the rounds, by way.
        ratios: with over without, of each round.
        peak_bytes: `torch.cuda.max_memory_allocated` of a step, by way; empty on the CPU.
    """

    title: str
    seconds: Mapping[str, float]
    ratios: Sequence[float]
    peak_bytes: Mapping[str, int]

    @property
    def ratio(self) -> float:
        """Time with over time without, median over the rounds."""
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        rounds = f"rounds {min(self.ratios):.3f}..{max(self.ratios):.3f}"
        plain, ours = (self.seconds[way] * 1e3 for way in (PLAIN, TOKEN_PROP))
        memory = ""
        if self.peak_bytes:
            before, after = (self.peak_bytes[way] / 1e6 for way in (PLAIN, TOKEN_PROP))
            memory = f"; peak {after / before:.3f} ({after:.1f} / {before:.1f} MB)"
        return f"{self.title}: time {self.ratio:.3f} ({ours:.1f} / {plain:.1f} ms, {rounds}){memory}"


@dataclass(frozen=True, eq=False)
class Training:
    """A model, its optimizer and a batch of noise, which both ways share: another copy in memory has its own speed."""

    token_prop: TokenProp
    optimizer: Optimizer
    images: Tensor
    labels: Tensor
    precision: Precision

    @classmethod
    def build(cls, model: str, batch_size: int, device: torch.device, precision: Precision) -> "Training":
        """A classifier of timm with random weights; of LV-ViT, without its classifier of tokens."""
        torch.manual_seed(SEED)
        arguments: dict[str, Any] = {"aux_head": False} if model.startswith("lvvit") else {}
        token_prop = TokenProp(timm.create_model(model, **arguments).to(device)).train()
        optimizer = make_optimizer(token_prop, OptimizerConfig(), batch_size)
        images = torch.randn(batch_size, 3, *token_prop.image_size).to(device)
        labels = torch.randint(token_prop.num_classes, (batch_size,)).to(device)
        return cls(token_prop, optimizer, images, labels, precision)

    def run(self, way: str, steps: int = 1) -> None:
        """Forward, loss, backward and the optimizer's step, and wait until the last is done."""
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)  # the decoder, unused, is then left alone by the plain step
            self.loss(way).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        if self.images.is_cuda:
            torch.cuda.synchronize(self.images.device)

    def loss(self, way: str) -> Tensor:
        """Of this way: cross-entropy, and with TokenProp the weighted reconstruction."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            if way == PLAIN:
                return functional.cross_entropy(self.token_prop.model(self.images).float(), self.labels)
            outputs, reconstruction = self.token_prop(self.images)
            loss: Tensor = functional.cross_entropy(outputs.float(), self.labels) + reconstruction
            return loss


def bench_token_prop(
    model: str, batch_size: int, device: torch.device, *, precision: Precision, steps: int, rounds: int
) -> TokenPropFigures:
    """Times of both ways in turn, then on CUDA the peak memory of each.

    Args:
        model: of timm, such as "deit_small_patch16_224".
        batch_size, steps, rounds: images in a step, steps in a round, rounds after one to warm up.
        precision: "fp32", or "bf16" for autocast.
    """
    training = Training.build(model, batch_size, device, precision)
    ways = (PLAIN, TOKEN_PROP)
    seconds = time_in_turn({way: partial(training.run, way, steps) for way in ways}, rounds)
    pairs = zip(seconds[TOKEN_PROP], seconds[PLAIN], strict=True)
    is_cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if is_cuda else f"the CPU with {torch.get_num_threads()} threads"
    height, width = training.token_prop.image_size
    what = f"{model}, {height} x {width} px, batch {batch_size}, {precision}"
    return TokenPropFigures(
        f"TokenProp / plain training step of {what}, on {where}",
        {way: statistics.median(seconds[way]) / steps for way in ways},
        tuple(ours / plain for ours, plain in pairs),
        {way: _peak(training, way) for way in ways} if is_cuda else {},
    )


def _peak(training: Training, way: str) -> int:
    torch.cuda.reset_peak_memory_stats(training.images.device)
    training.run(way)
    return torch.cuda.max_memory_allocated(training.images.device)
