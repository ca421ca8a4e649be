"""What a training run is made of, as far as the trainer is concerned. The defaults are the papers'.

Table 1 of the supplement to Token Labeling (arXiv 2104.10858) has the numbers; where it is silent, the published
training script.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from tokenlabels.checks import check_choice, check_count, check_share, is_number

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move.

    Attributes:
        name: as `timm.optim.create_optimizer_v2` knows it; parameters are grouped as timm does, so that biases, norms
            and embeddings do not decay.
        base_lr: learning rate of a global batch of `lr_batch` samples; it grows in proportion to the batch.
        lr_batch: samples per optimizer step, over all ranks, for which `base_lr` holds.
        weight_decay: 0 or more.
        momentum: of SGD and its like.
        clip_grad: largest norm of all gradients together; None does not clip.
    """

    name: str = "adamw"
    base_lr: float = 1e-3
    lr_batch: int = 640
    weight_decay: float = 0.05
    momentum: float = 0.9
    clip_grad: float | None = None

    def __post_init__(self) -> None:
        _check_positive("optimizer.base_lr", self.base_lr)
        check_count("optimizer.lr_batch", self.lr_batch)
        _check_from_0("optimizer.weight_decay", self.weight_decay)
        check_share("optimizer.momentum", self.momentum)
        if self.clip_grad is not None:
            _check_positive("optimizer.clip_grad", self.clip_grad)

    def lr(self, batch_size: int) -> float:
        """Learning rate of optimizer steps of `batch_size` samples, over all ranks (section 4.1)."""
        return self.base_lr * batch_size / self.lr_batch


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, and how the learning rate goes: linear warm-up, then a cosine to `min_lr`.

    Attributes:
        epochs: warm-up included.
        warmup_epochs: 0 or more, below `epochs`; a fraction is allowed.
        warmup_lr: where the warm-up begins.
        min_lr: where the cosine ends; never above the learning rate itself.
    """

    epochs: int = 300
    warmup_epochs: float = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5

    def __post_init__(self) -> None:
        check_count("schedule.epochs", self.epochs)
        for name in ("warmup_epochs", "warmup_lr", "min_lr"):
            _check_from_0(f"schedule.{name}", getattr(self, name))
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs is {self.warmup_epochs}, and all {self.epochs} epochs would be warm-up; "
                "make it smaller than schedule.epochs"
            )


@dataclass(frozen=True)
class LossConfig:
    """The loss, see `tokenlabels.token_label_loss`.

    Attributes:
        image_weight, dense_weight: of the image's and the tokens' cross-entropy; dense_weight is beta of equation 4.
        keep_tokens: share of the tokens that take part (Figure 4), above 0 and at most 1.
        smoothing: label smoothing of all targets, 0..1; the published script has 0.1.
    """

    image_weight: float = 1.0
    dense_weight: float = 0.5
    keep_tokens: float = 1.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        _check_from_0("loss.image_weight", self.image_weight)
        _check_from_0("loss.dense_weight", self.dense_weight)
        check_share("loss.smoothing", self.smoothing)
        if not is_number(self.keep_tokens) or not 0 < self.keep_tokens <= 1:
            raise ValueError(f"loss.keep_tokens must be a number above 0 and at most 1, got {self.keep_tokens!r}")


@dataclass(frozen=True)
class TrainerConfig:
    """All that `Trainer` needs to know beside the model and the batches.

    Attributes:
        optimizer, schedule, loss: see there.
        precision: of the forward pass; weights stay float32. "fp16" scales the loss.
        accumulate: batches per optimizer step.
        ema_decay: of the average of weights that is evaluated beside them; None keeps none.
        compile: whether `torch.compile` makes the forward pass.
        channels_last: memory format of images and convolutions.
        seed: of initial weights, stochastic depth and dropout: step s of rank r draws from (seed, r, s).
        log_every: optimizer steps per line of steps.jsonl.
        save_every: optimizer steps between checkpoints; there is one before and one after every evaluation in any case.
    """

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    precision: Precision = "bf16"
    accumulate: int = 1
    ema_decay: float | None = 0.99996
    compile: bool = False
    channels_last: bool = False
    seed: int = 0
    log_every: int = 20
    save_every: int = 1000

    def __post_init__(self) -> None:
        check_choice("trainer.precision", self.precision, Precision)
        for name in ("accumulate", "log_every", "save_every"):
            check_count(f"trainer.{name}", getattr(self, name))
        if self.ema_decay is not None and (not is_number(self.ema_decay) or not 0 < self.ema_decay < 1):
            raise ValueError(f"trainer.ema_decay must be None or between 0 and 1, got {self.ema_decay!r}")


def _check_positive(name: str, value: object) -> None:
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def _check_from_0(name: str, value: object) -> None:
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of 0 or more, got {value!r}")
