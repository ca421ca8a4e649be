"""Everything of a run that changes while it trains, saved and restored together."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from tokenlabels.differences import differences
from tokenlabels.trainer.batches import Stateful
from tokenlabels.trainer.checkpoint import read_checkpoint, save_checkpoint
from tokenlabels.trainer.config import TrainerConfig
from tokenlabels.trainer.ranks import rank_and_world_size

# They change neither the samples of a step nor its mathematics, but for the order of sums.
_FREE_TO_CHANGE = ("accumulate", "compile", "channels_last", "log_every", "save_every")


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: optimizer steps that are done.
        epoch: epochs that are done.
        batch: batches of the present epoch that this rank has used.
        num_batches: of the present epoch, for this rank.
        done_before: share of the present epoch that was done before its batch 0, 0..1: above 0 after going on with
            another number of ranks.
        loss_sum, num_losses: of the steps of the present epoch.
        best_top1: of all evaluations, 0..1; -1 before the first.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    num_batches: int = 1
    done_before: float = 0.0
    loss_sum: float = 0.0
    num_losses: int = 0
    best_top1: float = -1.0

    @property
    def time(self) -> float:
        """Epochs that are done, with the fraction of the present one."""
        return self.epoch + self.done_before + (1 - self.done_before) * self.batch / self.num_batches

    def advance(self, num_batches: int) -> None:
        """An optimizer step of that many batches is done."""
        self.step, self.batch, self.num_losses = self.step + 1, self.batch + num_batches, self.num_losses + 1

    def end_epoch(self) -> None:
        """The present epoch is done."""
        self.epoch, self.batch, self.done_before, self.loss_sum, self.num_losses = self.epoch + 1, 0, 0.0, 0.0, 0


@dataclass
class RunState:
    """The changing parts of a run.

    Attributes:
        model: not wrapped.
        ema: average of its weights, or None.
        optimizer, scaler: see `OptimizerStep`.
        config: what a run must share with the one that it goes on with.
        description: plain values that are kept in the checkpoint and compared as well.
        free_to_change: paths in the description, with all below them, that may differ in a run that goes on.
        progress: where the run is.
    """

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    config: TrainerConfig
    description: Mapping[str, Any]
    free_to_change: tuple[str, ...] = ()
    progress: Progress = field(default_factory=Progress)

    def save(self, path: Path, train: Iterable[object]) -> None:
        """Write the run as it is now; rank 0 alone does, for all."""
        rank, world_size = rank_and_world_size()
        if rank != 0:
            return
        content = {
            "progress": asdict(self.progress),
            "world_size": world_size,
            "state_dict": self.model.state_dict(),
            "state_dict_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": train.state_dict() if isinstance(train, Stateful) else None,
            "config": asdict(self.config),
            "description": dict(self.description),
        }
        save_checkpoint(path, content)

    def restore(self, path: Path, train: Iterable[object]) -> None:
        """Take up what `save` wrote, on every rank.

        Raises:
            ValueError: the file is no checkpoint of this run, or its place among the batches cannot be found again.
        """
        content = read_checkpoint(path)
        self._refuse_other_settings(content, path)
        try:
            self.model.load_state_dict(content["state_dict"])
            if self.ema is not None:
                self.ema.module.load_state_dict(content["state_dict_ema"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is of another model: {error}") from error
        self.scaler.load_state_dict(content["scaler"])
        self.progress = Progress(**content["progress"])
        self._find_place(content, path, train)

    def _refuse_other_settings(self, content: Mapping[str, Any], path: Path) -> None:
        of_trainer = differences(content["config"], asdict(self.config))
        of_run = differences(content["description"], self.description)
        changed = [line for line in of_trainer if not _is_below(line, _FREE_TO_CHANGE)]
        changed += [line for line in of_run if not _is_below(line, self.free_to_change)]
        if changed:
            raise ValueError(
                f"{path} is of a run with other settings (saved != now): {'; '.join(changed)}. Use the same ones to go "
                "on, or another folder for another run"
            )

    def _find_place(self, content: Mapping[str, Any], path: Path, train: Iterable[object]) -> None:
        """Bring the loader to where it was. With another number of ranks it shares out what is left of the epoch."""
        progress, has_place = self.progress, isinstance(train, Stateful)
        if has_place != (content["loader"] is not None):
            raise ValueError(f"{path}: the run had {'no' if has_place else 'a'} loader with a place; use the same kind")
        if isinstance(train, Stateful):
            try:
                train.load_state_dict(content["loader"])
            except ValueError as error:
                raise ValueError(
                    f"{path}: {error}. A rank's batch is data.batch_size / (ranks * trainer.accumulate): with other "
                    "ranks, change trainer.accumulate so that it stays the same"
                ) from error
        if content["world_size"] == rank_and_world_size()[1]:
            return
        if not has_place and progress.batch:
            raise ValueError(
                f"{path} was saved in the middle of an epoch by {content['world_size']} ranks; use as many, or a "
                "loader with state_dict()"
            )
        progress.done_before, progress.batch = progress.time - progress.epoch, 0


def _is_below(line: str, paths: Collection[str]) -> bool:
    """Whether a line "path.to.field: a != b" is of one of the paths, or of a field below it."""
    field = line.partition(":")[0]
    return any(field == path or field.startswith(f"{path}.") for path in paths)
