"""The training loop: epochs of optimizer steps, evaluation, logs and checkpoints, on one device or many.

    trainer = Trainer(model, TrainerConfig(), "runs/mine", batch_size=128)
    trainer.fit(loader, validation_loader)

A run is a function of its configuration, its batches and the number of ranks: on the CPU one that was killed and goes
on computes bit for bit what it would have computed.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokenlabels.files import replace_file
from tokenlabels.models.wrapper import student
from tokenlabels.trainer.batches import EvaluationBatch, TrainingBatch, num_batches, pass_over, placed
from tokenlabels.trainer.checkpoint import BEST_FILE, CONFIG_FILE, LAST_FILE, save_checkpoint
from tokenlabels.trainer.checks import check_batch
from tokenlabels.trainer.config import TrainerConfig
from tokenlabels.trainer.display import Display, Throughput
from tokenlabels.trainer.evaluation import Accuracy, RealLabels, evaluate
from tokenlabels.trainer.logs import RunLog
from tokenlabels.trainer.optimizer import make_optimizer, make_schedule
from tokenlabels.trainer.ranks import (
    StopRequest,
    broadcast_buffers,
    is_same_on_all_ranks,
    rank_and_world_size,
    stop_on_sigterm,
    sum_over_ranks,
)
from tokenlabels.trainer.state import Progress, RunState
from tokenlabels.trainer.step import LossGuard, OptimizerStep, autocast


class TrainingStoppedError(Exception):
    """SIGTERM was received, and the run is saved; the message says where."""


class Trainer:
    """Trains one model.

    Args:
        model: on its device. With token labels it returns (image logits, token logits) in training, otherwise image
            logits; in evaluation image logits, or a pair that begins with them.
        config: see there.
        folder: of the run: checkpoints (last.pt, best.pt), config.json, logs (steps.jsonl, epochs.csv).
        batch_size: samples per batch of this rank; the learning rate follows from it.
        description: what JSON can hold, kept in config.json and the checkpoints: the configuration of the whole run.
            None is `config` alone. A run that goes on must have the same.
        free_to_change: paths in the description ("data.threads", "data") that may differ all the same.

    Attributes:
        state: model, average of weights, optimizer and progress.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainerConfig,
        folder: str | Path,
        *,
        batch_size: int,
        description: Mapping[str, Any] | None = None,
        free_to_change: Sequence[str] = (),
    ) -> None:
        self.config, self.folder = config, Path(folder)
        self.device = next(model.parameters()).device
        self._rank, self._world_size = rank_and_world_size()
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(model, config.optimizer, batch_size * self._world_size * config.accumulate)
        self._schedule = make_schedule(optimizer, config.schedule)
        ema = None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay)
        if config.compile:
            model.compile()
        wrapped = DistributedDataParallel(model) if self._world_size > 1 else model
        self._step = OptimizerStep(wrapped, optimizer, config, ema)
        # Without a description of its own a run is described by its configuration, which is compared anyway.
        described, free = ({}, ()) if description is None else (dict(description), tuple(free_to_change))
        self.state = RunState(model, ema, optimizer, self._step.scaler, config, described, free)
        self._guard = LossGuard(self.folder)

    @property
    def progress(self) -> Progress:
        """Where the run is."""
        return self.state.progress

    def fit(
        self,
        train: Iterable[TrainingBatch],
        val: Iterable[EvaluationBatch] | None = None,
        *,
        resume: str | Path = "never",
        real: RealLabels | None = None,
    ) -> Accuracy | None:
        """Train up to the last epoch of the schedule.

        Args:
            train: an iterable with a length that gives an epoch of batches per pass. If it has ``set_epoch``, it is
                told the epoch; if it has ``state_dict`` and ``load_state_dict``, its place is saved and taken up again,
                otherwise it is run through to that place.
            val: to evaluate on after every epoch, the average of weights too.
            resume: "never" begins, and refuses a folder with a run in it; "auto" goes on with that run if there is one;
                a path goes on from that checkpoint.
            real: ImageNet-ReaL labels of `val`.

        Returns:
            Accuracy after the last epoch, the better of the model and its average; None without `val` and where
            nothing was left to do.

        Raises:
            ValueError: the folder, the checkpoint, the batches or the model do not fit; before the first step.
            NonFiniteLossError: loss or weights are not finite any more.
            TrainingStoppedError: SIGTERM was received.
        """
        num_batches(train)
        self._go_on(train, resume)
        accuracy = None
        with ExitStack() as stack:
            stop = stack.enter_context(stop_on_sigterm())
            display = stack.enter_context(Display(self._rank == 0))
            log = None
            if self._rank == 0:
                self._describe()
                log = stack.enter_context(RunLog(self.folder, step=self.progress.step, epoch=self.progress.epoch))
            while self.progress.epoch < self.config.schedule.epochs:
                self._train_epoch(train, stop, log, display)
                accuracy = self._end_epoch(train, val, real, log, display)
                if self.progress.epoch < self.config.schedule.epochs:
                    self._leave_if_asked(stop)
        return accuracy

    def _describe(self) -> None:
        path = self.folder / CONFIG_FILE
        if self.progress.step == 0 or not path.exists():
            described = self.state.description or asdict(self.config)
            replace_file(path, (json.dumps(described, indent=1) + "\n").encode())

    def _go_on(self, train: Iterable[object], resume: str | Path) -> None:
        last = self.folder / LAST_FILE
        path = last if resume in ("never", "auto") else Path(resume)
        is_elsewhere = path.resolve() != last.resolve()
        if last.exists() and (resume == "never" or is_elsewhere):
            raise ValueError(
                f"{self.folder} holds a run already; go on with it (--resume auto), or begin in another folder"
            )
        is_there = path.exists() if resume == "auto" else resume != "never"
        if is_there:
            self.state.restore(path, train)
        if not is_same_on_all_ranks(self.progress.step if is_there else -1, self.device):
            raise ValueError(f"not all ranks find the same {path}; put the run into a folder that all machines share")
        if is_elsewhere:
            self.progress.best_top1 = -1.0  # best.pt stayed behind

    def _train_epoch(
        self, train: Iterable[TrainingBatch], stop: StopRequest, log: RunLog | None, display: Display
    ) -> None:
        progress, config = self.progress, self.config
        progress.num_batches = len(train) if progress.done_before else num_batches(train)  # type: ignore[arg-type]
        if progress.num_batches == 0:  # other ranks had finished the steps of the epoch
            progress.batch = progress.num_batches = 1
        display.begin(f"epoch {progress.epoch + 1}/{config.schedule.epochs}", progress.num_batches, progress.batch)
        speed, first_step = Throughput(), progress.step
        self._loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=self.device)
        self._step.model.train()
        batches = pass_over(train, progress.epoch, progress.batch, progress.num_batches)
        while progress.batch < progress.num_batches:
            self._schedule.step(progress.time)  # type: ignore[arg-type]
            # Never more than are left: a loader that was asked for one more would be in the next epoch already.
            size = min(config.accumulate, progress.num_batches - progress.batch)
            keys: list[str] = []
            group = self._taken(batches, size, keys, is_first=progress.step == first_step)
            loss = self._step(group, size, progress.step)
            progress.advance(size)
            self._loss_sum += loss
            self._guard.watch(loss, keys, progress.step)
            speed.count(len(keys) * self._world_size)
            if progress.step % config.log_every == 0:
                self._log_step(loss, speed, log, display)
            display.advance(size)
            if progress.step % config.save_every == 0:
                self._save(train)
            self._leave_if_asked(stop, train)
        if progress.step > first_step:
            self._save(train)  # evaluation takes its time, and may fail
        if next(batches, None) is not None:
            raise ValueError("the loader has more batches than its len() says; the schedule counts on that number")

    def _taken(self, batches: Iterator[Any], size: int, keys: list[str], *, is_first: bool) -> Iterator[TrainingBatch]:
        """The next batches on the device, and their keys."""
        for batch in islice(batches, size):
            if is_first and not keys:
                check_batch(self.state.model, batch, self.config)
            keys.extend(batch.keys)
            yield placed(batch, self.device)

    def _save(self, train: Iterable[object]) -> None:
        """Write last.pt, if weights and loss are numbers."""
        self._guard.check(self.state.model, self.progress.step)
        self.progress.loss_sum = self._mean_over_ranks(self._loss_sum)
        self.state.save(self.folder / LAST_FILE, train)

    def _leave_if_asked(self, stop: StopRequest, train: Iterable[object] | None = None) -> None:
        if not stop.is_agreed():
            return
        if train is not None:
            self._save(train)
        raise TrainingStoppedError(
            f"stopped by SIGTERM after step {self.progress.step}, at epoch {self.progress.time:.2f}; all of it is in "
            f"{self.folder / LAST_FILE}, and --resume auto goes on from there"
        )

    def _mean_over_ranks(self, value: Tensor) -> float:
        return float(sum_over_ranks(value.clone())) / self._world_size

    def _log_step(self, loss: Tensor, speed: Throughput, log: RunLog | None, display: Display) -> None:
        row = {
            "step": self.progress.step,
            "epoch": self.progress.time,
            "loss": self._mean_over_ranks(loss),
            "lr": self.state.optimizer.param_groups[0]["lr"],
            "images_per_second": speed.lap(),
        }
        display.show(f"loss {row['loss']:.3f}, lr {row['lr']:.2e}, {row['images_per_second']:.0f} images/s")
        if log is not None:
            log.step(row)

    def _end_epoch(
        self,
        train: Iterable[object],
        val: Iterable[EvaluationBatch] | None,
        real: RealLabels | None,
        log: RunLog | None,
        display: Display,
    ) -> Accuracy | None:
        state, progress = self.state, self.progress
        models = {"": state.model} | ({} if state.ema is None else {"ema_": state.ema.module})
        found: dict[str, Accuracy] = {}
        if val is not None:
            display.begin("evaluating", 1, 0)
            found = {name: self._evaluate(model, val, real) for name, model in models.items()}
        row = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": progress.loss_sum / max(progress.num_losses, 1),
        }
        for name in ("", "ema_"):
            for figure in ("top1", "top5", "real_top1"):
                row[name + figure] = getattr(found.get(name), figure, None)
        shown = "".join(f"; {'average of weights ' if name else ''}{accuracy}" for name, accuracy in found.items())
        display.line(f"epoch {row['epoch']}: loss {row['train_loss']:.4f}{shown}")
        if log is not None:
            log.epoch(row, step=progress.step)
        best = max(found, key=lambda name: found[name].top1, default=None)
        if best is not None and found[best].top1 > progress.best_top1:
            progress.best_top1 = found[best].top1
            self._save_best(models[best])
        progress.end_epoch()
        state.save(self.folder / LAST_FILE, train)
        return None if best is None else found[best]

    def _save_best(self, model: nn.Module) -> None:
        """Before last.pt says so: a kill in between repeats the evaluation."""
        if self._rank == 0:
            content = {"state_dict": student(model).state_dict(), "epoch": self.progress.epoch + 1}
            content |= {"top1": self.progress.best_top1, "description": dict(self.state.description)}
            save_checkpoint(self.folder / BEST_FILE, content)

    def _evaluate(self, model: nn.Module, val: Iterable[EvaluationBatch], real: RealLabels | None) -> Accuracy:
        broadcast_buffers(model)
        return evaluate(model, val, autocast=autocast(self.device, self.config), real=real)
