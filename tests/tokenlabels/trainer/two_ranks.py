"""What `test_ranks.py` runs in two processes under torchrun: ``two_ranks.py SCENARIO FOLDER``."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.tokenlabels.trainer.batches import NUM_CLASSES, SIDE, Batch, StatefulBatches, make_batch
from tokenlabels import TokenTargets
from tokenlabels.models import LVViT
from tokenlabels.trainer import OptimizerConfig, ScheduleConfig, Trainer, TrainerConfig, TrainingStoppedError
from tokenlabels.trainer.ranks import join_ranks, leave_ranks, rank_and_world_size

NUM_PER_STEP = 4  # samples of a step, over all ranks
LENGTH = 6


class Shared(StatefulBatches):
    """Every rank's part of batches of 4 samples, which are the same whatever the number of ranks."""

    signal_at: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        rank, world_size = rank_and_world_size()
        part = slice(rank * NUM_PER_STEP // world_size, (rank + 1) * NUM_PER_STEP // world_size)
        for batch in super().__iter__():
            assert batch.targets is not None
            if self.signal_at == self.num_handed_out and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)  # to one of the two
            targets = TokenTargets.from_dense(batch.targets.dense()[part])
            yield make_batch(0, images=batch.images[part], targets=targets, plan=None, keys=batch.keys[part])


def make_trainer(folder: Path, **changes: Any) -> Trainer:
    """Without batch statistics, which see the samples of one rank."""
    torch.manual_seed(0)
    model = LVViT(SIDE, 16, 3, NUM_CLASSES, 24, 2, 2, stem_kernels=(), stem_strides=())
    settings: dict[str, Any] = {
        "optimizer": OptimizerConfig(name="sgd", base_lr=1e-2, lr_batch=NUM_PER_STEP),
        "schedule": ScheduleConfig(epochs=2, warmup_epochs=0.5),
        "precision": "fp32",
        "ema_decay": 0.9,
        "log_every": 2,
        "save_every": 4,
    }
    config = TrainerConfig(**(settings | changes))
    return Trainer(model, config, folder, batch_size=NUM_PER_STEP // rank_and_world_size()[1])


def validation() -> list[Batch]:
    rank, world_size = rank_and_world_size()
    return [make_batch(100 + number, 3) for number in range(4)][rank::world_size]


def run(scenario: str, folder: Path) -> None:
    """Train; what comes out is compared in `test_ranks.py`."""
    batches = Shared(length=LENGTH, changes={"mix": False})
    if scenario == "accumulate":
        make_trainer(folder, accumulate=2).fit(batches, validation())
        return
    if scenario == "local folders":
        folder = folder / str(rank_and_world_size()[0])
    trainer = make_trainer(folder)
    batches.signal_at = 3 if scenario == "terminated" else None
    try:
        trainer.fit(batches, validation(), resume="auto")
    except TrainingStoppedError as stopped:
        print(f"rank {rank_and_world_size()[0]}: {stopped}", flush=True)  # noqa: T201
    states = [parameter.double().sum() for parameter in trainer.state.model.parameters()]
    print(f"rank {rank_and_world_size()[0]}: parameters {torch.stack(states).sum().item()!r}", flush=True)  # noqa: T201


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_ranks("cpu")
    run(sys.argv[1], Path(sys.argv[2]))
    leave_ranks()
