"""Batches made of nothing but random numbers, for the tests of the trainer."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

import tokenlabels as tl

NUM_CLASSES, GRID, SIDE = 10, (2, 2), 32


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch for training and evaluation; fields as in `loaders.TokenLabelBatch`."""

    images: Tensor
    targets: tl.TokenTargets | None
    plan: tl.MixPlan | None
    is_mixed: bool
    has_mixed_targets: bool
    labels: Tensor
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> Self:
        return replace(self, images=self.images.to(device))


def make_batch(seed: int, num_samples: int = 4, *, mix: bool = True, **changes: Any) -> Batch:
    """Images whose colour tells their class, with targets for 2 x 2 tokens."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    images = torch.randn(num_samples, 3, SIDE, SIDE, generator=generator) * 0.1
    images[:, 0] += labels[:, None, None] / NUM_CLASSES * 4 - 2
    dense = torch.full((num_samples, 5, NUM_CLASSES), 0.02)
    dense.scatter_(2, labels[:, None, None].expand(-1, 5, 1), 0.82)
    targets = tl.TokenTargets.from_dense(dense)
    plan = tl.MixPlan.mixtoken(num_samples, grid=GRID, generator=generator) if mix else None
    if plan is not None:
        targets = plan.mix_targets(targets)
    keys = tuple(f"batch{seed}/sample{number}" for number in range(num_samples))
    return replace(Batch(images, targets, plan, False, True, labels, keys), **changes)


@dataclass
class Batches:
    """An iterable with a length, whose batches are a function of (epoch, number). It knows no place."""

    length: int = 6
    epoch: int = 0
    num_handed_out: int = 0
    changes: dict[str, Any] = field(default_factory=dict)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.length):
            self.num_handed_out += 1
            yield make_batch(1000 * self.epoch + number, **self.changes)


@dataclass
class StatefulBatches(Batches):
    """The same, with a place: what a `TokenLabelLoader` promises."""

    first: int = 0
    next: int = 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.first = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.first = state["epoch"], state["batch"]

    def __iter__(self) -> Iterator[Batch]:
        first, self.first = self.first, 0
        for number in range(first, self.length):
            self.next = number + 1
            self.num_handed_out += 1
            yield make_batch(1000 * self.epoch + number, **self.changes)
