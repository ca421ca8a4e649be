"""Maps to targets to loss on the CPU, sparse against dense: `tokenlabels bench targets`."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.bench.dense import dense_loss, dense_targets
from tokenlabels.losses import token_label_loss
from tokenlabels.measure import Comparison, interleave, peak_memory
from tokenlabels.targets import token_targets

CELLS, GRID, TOPK, NUM_CLASSES, DENSE_WEIGHT = (18, 18), (14, 14), 5, 1000, 0.5
NUM_DISTINCT = (12, 60, 255)
"""Distinct classes per map that are measured: one or two objects, a crowded photograph, a teacher without a clue."""


@dataclass(frozen=True)
class TargetFigures:
    """What `bench targets` measures for maps that mention a given number of classes.

    Attributes:
        num_images: images of the batch; 18x18 cells, top 5 of 1000 classes, 14x14 tokens.
        num_distinct: classes that each map mentions.
        targets: maps to targets, sparse against dense.
        loss: forward and backward from targets that are there, sparse against dense.
        target_bytes: of sparse and of dense targets.
        peak_bytes: memory at the highest point of targets, loss and gradients together, sparse and dense.
    """

    num_images: int
    num_distinct: int
    targets: Comparison
    loss: Comparison
    target_bytes: tuple[int, int]
    peak_bytes: tuple[int, int]

    def __str__(self) -> str:
        def megabytes(name: str, both: tuple[int, int]) -> str:
            return f"{name}, sparse / dense: {both[0] / both[1]:.3f} ({both[0] / 1e6:.1f} / {both[1] / 1e6:.1f} MB)"

        return (
            f"{self.num_images} maps of {self.num_distinct} distinct classes\n"
            f"  {self.targets}\n  {self.loss}\n"
            f"  {megabytes('bytes of the targets', self.target_bytes)}\n"
            f"  {megabytes('peak memory', self.peak_bytes)}"
        )


@dataclass(frozen=True)
class Inputs:
    """Random maps, crops and logits of one batch; fields as in `token_targets` and `token_label_loss`."""

    scores: Tensor
    classes: Tensor
    boxes: Tensor
    flip: Tensor
    image_logits: Tensor
    token_logits: Tensor

    def sparse(self) -> object:
        """Targets and loss, forward and backward, as the package does it."""
        targets = token_targets(
            self.scores, self.classes, self.boxes, flip=self.flip, grid=GRID, num_classes=NUM_CLASSES
        )
        loss = token_label_loss(self.image_logits, self.token_logits, targets, dense_weight=DENSE_WEIGHT)
        return torch.autograd.grad(loss, [self.image_logits, self.token_logits])

    def dense(self) -> object:
        """The same with all classes everywhere."""
        targets = dense_targets(self.scores, self.classes, self.boxes, self.flip, GRID, NUM_CLASSES)
        loss = dense_loss(self.image_logits, self.token_logits, targets, DENSE_WEIGHT)
        return torch.autograd.grad(loss, [self.image_logits, self.token_logits])


def draw_inputs(num_images: int, num_distinct: int) -> Inputs:
    """A batch whose maps mention `num_distinct` classes each, drawn evenly, with crops of 0.2 to 1 of a side."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mentioned = uniform(num_images, NUM_CLASSES).argsort(dim=1)[:, :num_distinct]
    ranks = uniform(num_images, *CELLS, num_distinct).topk(TOPK).indices
    sides = 0.2 + 0.8 * uniform(num_images, 2)
    corners = uniform(num_images, 2) * (1 - sides)
    return Inputs(
        scores=(normal(num_images, *CELLS, TOPK) * 2 + 4).sort(dim=-1, descending=True).values.half(),
        classes=mentioned.gather(1, ranks.flatten(1)).view_as(ranks),
        boxes=torch.cat([corners, (corners + sides).clamp(max=1)], dim=1),
        flip=uniform(num_images) < 0.5,
        image_logits=normal(num_images, NUM_CLASSES).requires_grad_(),
        token_logits=normal(num_images, GRID[0] * GRID[1], NUM_CLASSES).requires_grad_(),
    )


def bench_targets(num_images: int, num_distinct: int, *, rounds: int) -> TargetFigures:
    """Time targets and loss in turn with the dense form, and take the memory of each in a process of its own."""
    inputs = draw_inputs(num_images, num_distinct)
    maps = inputs.scores, inputs.classes, inputs.boxes
    logits = inputs.image_logits, inputs.token_logits
    sparse = token_targets(*maps, flip=inputs.flip, grid=GRID, num_classes=NUM_CLASSES)
    dense = dense_targets(*maps, inputs.flip, GRID, NUM_CLASSES)
    difference = float((sparse.dense() - dense).abs().max())
    if difference > 1e-4:  # the rounding of float32 crops
        raise AssertionError(f"sparse and dense targets differ by {difference}")
    return TargetFigures(
        num_images,
        num_distinct,
        targets=interleave(
            "maps to targets, sparse / dense",
            num_images,
            rounds,
            lambda: token_targets(*maps, flip=inputs.flip, grid=GRID, num_classes=NUM_CLASSES),
            lambda: dense_targets(*maps, inputs.flip, GRID, NUM_CLASSES),
        ),
        loss=interleave(
            "loss forward and backward, sparse / dense",
            num_images,
            rounds,
            lambda: torch.autograd.grad(token_label_loss(*logits, sparse, dense_weight=DENSE_WEIGHT), logits),
            lambda: torch.autograd.grad(dense_loss(*logits, dense, DENSE_WEIGHT), logits),
        ),
        target_bytes=(sparse.num_bytes, dense.nbytes),
        peak_bytes=(_peak_bytes("sparse", num_images, num_distinct), _peak_bytes("dense", num_images, num_distinct)),
    )


def distinct_classes(label_sets: Sequence[Path]) -> str:
    """How many classes the maps of real label sets mention: a line per set."""
    from tokenlabels.store import open_store
    from tokenlabels.summary import num_distinct_classes

    lines = []
    for path in label_sets:
        counts = np.concatenate([num_distinct_classes(shard.read()) for shard in open_store(path).shards])
        quantiles = "/".join(f"{value:.0f}" for value in np.quantile(counts, [0.05, 0.5, 0.95, 1]))
        lines.append(f"{path}: {quantiles} distinct classes per map (5 %, median, 95 %, most), {len(counts)} maps")
    return "\n".join(lines)


def _peak_bytes(form: str, num_images: int, num_distinct: int) -> int:
    code = f"from jobs.bench.targets import _print_peak; _print_peak({form!r}, {num_images}, {num_distinct})"
    # Freed tensors go back to the system at once, so that those of the inputs do not hide a part of the peak.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return int(json.loads(output))


def _print_peak(form: str, num_images: int, num_distinct: int) -> None:
    warm, inputs = draw_inputs(2, num_distinct), draw_inputs(num_images, num_distinct)
    getattr(warm, form)()
    with peak_memory() as peak:
        getattr(inputs, form)()
    print(json.dumps(peak.num_bytes))  # noqa: T201
