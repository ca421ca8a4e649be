"""What token labels and the trainer cost in a training step: `tokenlabels bench train`."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import timm
import torch
from torch import Tensor, nn

import tokenlabels.models  # noqa: F401 - registers LV-ViT
from jobs.bench.targets import GRID, NUM_CLASSES, Inputs, draw_inputs
from tokenlabels.measure import Comparison, interleave
from tokenlabels.mixing import MixPlan
from tokenlabels.sparse_targets import TokenTargets
from tokenlabels.targets import token_targets
from tokenlabels.trainer import Trainer, TrainerConfig, batch_loss
from tokenlabels.trainer.config import Precision, ScheduleConfig
from tokenlabels.trainer.optimizer import make_optimizer
from tokenlabels.trainer.step import OptimizerStep, autocast
from tokenlabels.vocabulary import Vocabulary, find_vocabulary

IMAGE_SIZE, NUM_DISTINCT = 224, 60


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch of the trainer, mixed by the model."""

    images: Tensor
    targets: TokenTargets
    plan: MixPlan
    labels: Tensor
    keys: tuple[str, ...]
    is_mixed: bool = False
    has_mixed_targets: bool = True


@dataclass(frozen=True, eq=False)
class _Material:
    """Images and maps of one batch on the device, from which a step makes its targets as the loader does."""

    images: Tensor
    maps: Inputs
    vocabulary: Vocabulary
    labels: Tensor

    @classmethod
    def draw(cls, batch_size: int, device: torch.device) -> "_Material":
        """Noise, and maps that mention 60 classes each."""
        maps = draw_inputs(batch_size, NUM_DISTINCT)
        vocabulary = find_vocabulary(maps.classes, NUM_CLASSES)
        on_device = replace(maps, **{name: getattr(maps, name).to(device) for name in ("scores", "boxes", "flip")})
        on_device = replace(on_device, classes=maps.classes.to(device))
        images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
        labels = maps.classes[:, 0, 0, 0].to(device)
        return cls(images.to(device), on_device, vocabulary.to(device), labels)

    def with_token_labels(self) -> _Batch:
        """Targets for every token, by the paper's rule."""
        maps = self.maps
        targets = token_targets(
            maps.scores,
            maps.classes,
            maps.boxes,
            flip=maps.flip,
            grid=GRID,
            num_classes=NUM_CLASSES,
            vocabulary=self.vocabulary,
        )
        return self._mixed(targets)

    def with_hard_labels(self) -> _Batch:
        """The class of the data set."""
        return self._mixed(TokenTargets.from_labels(self.labels, NUM_CLASSES))

    def _mixed(self, targets: TokenTargets) -> _Batch:
        plan = MixPlan.mixtoken(len(self.images), grid=GRID, device=self.images.device)
        keys = tuple(map(str, range(len(self.images))))
        return _Batch(self.images, plan.mix_targets(targets), plan, self.labels, keys)


def bench_labels(
    name: str, batch_size: int, device: torch.device, *, precision: Precision, steps: int, rounds: int
) -> Comparison:
    """Optimizer steps of a model with token labels and MixToken, against hard labels and MixToken."""
    material = _Material.draw(batch_size, device)
    config = TrainerConfig(precision=precision, ema_decay=None)

    def side(model: nn.Module, make_batch: Callable[[], _Batch]) -> Callable[[], None]:
        model = model.to(device).train()
        step = OptimizerStep(model, make_optimizer(model, config.optimizer, batch_size), config, None)
        return partial(_run, lambda number: step([make_batch()], 1, number), steps, device)

    return interleave(
        f"{name}: step with token labels / with hard labels",
        batch_size * steps,
        rounds,
        side(timm.create_model(name), material.with_token_labels),
        side(timm.create_model(name, aux_head=False), material.with_hard_labels),
    )


def bench_trainer(
    name: str, batch_size: int, device: torch.device, *, precision: Precision, steps: int, rounds: int
) -> Comparison:
    """The trainer with its logs and checks, against the same steps in a bare loop; both without average of weights.

    The checkpoint at the end of an epoch is left out: it is written once in thousands of steps.
    """
    batch = _Material.draw(batch_size, device).with_token_labels()
    config = TrainerConfig(
        precision=precision,
        ema_decay=None,
        schedule=ScheduleConfig(10**6, warmup_epochs=0),
        log_every=steps,
        save_every=10**9,
    )
    rates: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        batches = _Timed([batch] * steps, device)
        trainer = Trainer(timm.create_model(name).to(device), config, folder, batch_size=batch_size)
        bare = _bare_loop(trainer, config, batch, device)
        for number in range(rounds + 1):
            sides = [lambda: _one_epoch(trainer, batches), lambda: bare(steps)]
            order = (0, 1) if number % 2 else (1, 0)
            seconds = {index: sides[index]() for index in order}
            if number:  # the first warms up
                rates.append((batch_size * steps / seconds[0], batch_size * steps / seconds[1]))
    ratios = tuple(mine / theirs for mine, theirs in rates)
    medians = [statistics.median(side) for side in zip(*rates, strict=True)]
    title = f"{name}: step of the trainer / of a bare loop"
    return Comparison(title, medians[0], medians[1], statistics.median(ratios), ratios)


class _StopTimedEpoch(Exception):  # noqa: N818 - no error: what was to be timed is over
    pass


class _Timed:
    """Batches that tell how long it took to use them, and end the trainer's work before its checkpoint."""

    def __init__(self, batches: Sequence[_Batch], device: torch.device) -> None:
        self.batches, self.device, self.seconds = batches, device, 0.0

    def __len__(self) -> int:
        return len(self.batches) + 1

    def __iter__(self) -> Iterator[_Batch]:
        _synchronise(self.device)
        start = time.perf_counter()
        yield from self.batches
        _synchronise(self.device)
        self.seconds = time.perf_counter() - start
        raise _StopTimedEpoch


def _one_epoch(trainer: Trainer, batches: _Timed) -> float:
    try:
        trainer.progress.batch = 0
        trainer.fit(batches)
    except _StopTimedEpoch:
        return batches.seconds
    raise AssertionError("the batches end every epoch")


def _bare_loop(trainer: Trainer, config: TrainerConfig, batch: _Batch, device: torch.device) -> Callable[[int], float]:
    """On the trainer's own model and optimizer: where in memory another copy lies costs more than what is measured."""
    model, optimizer = trainer.state.model, trainer.state.optimizer

    def step(_: int) -> None:
        optimizer.zero_grad()
        with autocast(device, config):
            loss = batch_loss(model, batch, config)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def run(steps: int) -> float:
        _synchronise(device)
        start = time.perf_counter()
        _run(step, steps, device)
        return time.perf_counter() - start

    return run


def _run(step: Callable[[int], object], steps: int, device: torch.device) -> None:
    for number in range(steps):
        step(number)
    _synchronise(device)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
