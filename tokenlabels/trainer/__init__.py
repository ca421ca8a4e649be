"""Training: takes a model and any iterable of batches, and leaves checkpoints and logs.

config.py      what a run is made of; the defaults are the papers'
trainer.py     Trainer: epochs, evaluation, saving
step.py        one optimizer step, and the guard against losses that are no numbers
optimizer.py   optimizer and learning rate, by timm
evaluation.py  top-1, top-5, ImageNet-ReaL
checks.py      what is refused on the first batch
state.py       all that changes, saved and restored together; checkpoint.py writes and reads the file
batches.py     what is asked of batches and loaders
ranks.py       several processes: who is who, seeds, stopping together
logs.py        steps.jsonl, epochs.csv, TensorBoard
display.py     the progress bar

`jobs.train` makes models and loaders from a recipe and calls this.
"""

from tokenlabels.trainer.config import LossConfig, OptimizerConfig, ScheduleConfig, TrainerConfig
from tokenlabels.trainer.evaluation import Accuracy, RealLabels, evaluate
from tokenlabels.trainer.step import NonFiniteLossError, batch_loss
from tokenlabels.trainer.trainer import Trainer, TrainingStoppedError

__all__ = [
    "Accuracy",
    "LossConfig",
    "NonFiniteLossError",
    "OptimizerConfig",
    "RealLabels",
    "ScheduleConfig",
    "Trainer",
    "TrainerConfig",
    "TrainingStoppedError",
    "batch_loss",
    "evaluate",
]
