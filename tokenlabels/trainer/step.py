"""One optimizer step: forward, loss, backward, weights, and their average."""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tokenlabels.align import TLAlign
from tokenlabels.losses import token_label_loss
from tokenlabels.models.tokenprop import TokenProp
from tokenlabels.trainer.batches import TrainingBatch
from tokenlabels.trainer.config import TrainerConfig
from tokenlabels.trainer.ranks import rank_and_world_size, seed_step

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(ArithmeticError):
    """Loss or weights became infinite or NaN; the message names the file with the keys of the batch."""


def batch_loss(model: nn.Module, batch: TrainingBatch, config: TrainerConfig) -> Tensor:
    """The token-labelling loss of one batch, a scalar; with that of `TokenProp`, if the model is one.

    Args:
        model: gives (image logits, token logits) for targets with tokens, image logits for others; called with the
            plan too where it mixes its patch embedding, or finds the shares that targets are mixed by (`TLAlign`).
        batch: its targets are mixed already, but for `TLAlign`.
        config: of the loss.

    Raises:
        ValueError: the batch has no targets, or they do not fit what the model returns.
    """
    if batch.targets is None:
        raise ValueError("the batches have no targets: give the loader labels, or num_classes for hard labels")
    images = batch.images.contiguous(memory_format=torch.channels_last) if config.channels_last else batch.images
    plans = () if batch.plan is None or batch.is_mixed else (batch.plan,)
    targets, wrapper = batch.targets, unwrapped(model)
    reconstruction: Tensor | float = 0.0
    if isinstance(wrapper, TLAlign):
        assert batch.plan is not None, "check_batch refuses such batches"
        outputs, share, token_share = model(images, batch.plan, return_token_share=True)
        targets = batch.plan.mix_targets(targets, share, None if targets.grid is None else token_share)
    elif isinstance(wrapper, TokenProp):
        outputs, reconstruction = model(images, *plans)
    else:
        outputs = model(images, *plans)
    image_logits, token_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
    loss = token_label_loss(
        image_logits,
        token_logits,
        targets.smooth(config.loss.smoothing),
        image_weight=config.loss.image_weight,
        dense_weight=config.loss.dense_weight,
        keep_tokens=config.loss.keep_tokens,
    )
    return loss + reconstruction


class OptimizerStep:
    """Runs optimizer steps on batches.

    Args:
        model: on its device, wrapped for distributed training if there are several ranks.
        optimizer: of its parameters.
        config: see there.
        ema: the average of weights, or None.

    Attributes:
        scaler: of the loss; does nothing but for "fp16".
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: TrainerConfig, ema: ModelEmaV3 | None) -> None:
        self.model, self.optimizer, self.config, self.ema = model, optimizer, config, ema
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")

    def __call__(self, batches: Iterable[TrainingBatch], num_batches: int, step: int) -> Tensor:
        """One step; returns the mean loss of the batches, detached, on the device.

        Args:
            batches: that make up the step, on the model's device. Taken one after the other.
            num_batches: how many they are.
            step: its number, from which stochastic depth and dropout draw.

        Raises:
            ValueError: there are fewer batches.
        """
        seed_step(self.config.seed, step)
        self.optimizer.zero_grad(set_to_none=True)
        total, num_taken = torch.zeros((), device=self.device), 0
        for batch in batches:
            num_taken += 1
            with self._unsynchronised(num_taken < num_batches):
                with autocast(self.device, self.config):
                    loss = batch_loss(self.model, batch, self.config) / num_batches
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if num_taken < num_batches:
            raise ValueError("the loader has fewer batches than its len() says; the schedule counts on that number")
        if self.config.optimizer.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(unwrapped(self.model), step=step + 1)
        return total

    def _unsynchronised(self, more_follow: bool) -> Any:
        """Ranks exchange gradients in the last backward pass of a step alone."""
        if more_follow and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()


class LossGuard:
    """Stops a run whose loss is no number any more, before that is saved.

    On a GPU a loss is looked at when the step after it has been queued, so that the device never waits for the host.

    Args:
        folder: where the keys of the batch are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: _Loss | None = None
        self._keys: Sequence[str] = ()

    def watch(self, loss: Tensor, keys: Sequence[str], step: int) -> None:
        """Look at the loss before, and keep this one for later; on the CPU look at once.

        Raises:
            NonFiniteLossError: it is not finite.
        """
        self._check_loss()
        self._last, self._keys = _Loss(loss, step), keys
        if loss.device.type == "cpu":
            self._check_loss()

    def check(self, model: nn.Module, step: int) -> None:
        """Look at the loss that was kept, and at all weights: to be called before they are saved. Raises as `watch`.

        A finite loss can have gradients that are not.
        """
        self._check_loss()
        norm = float(nn.utils.get_total_norm(model.parameters()))
        if not math.isfinite(norm):
            self._stop(step, f"the weights after step {step} are not finite (their norm is {norm})")

    def _check_loss(self) -> None:
        last, self._last = self._last, None
        if last is not None and not math.isfinite(value := last.value()):
            self._stop(last.step, f"the loss of step {last.step} is {value}")

    def _stop(self, step: int, finding: str) -> NoReturn:
        rank, _ = rank_and_world_size()
        path = self._folder / f"nonfinite_step{step:07d}_rank{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"step": step, "rank": rank, "finding": finding, "keys": self._keys}, indent=1) + "\n"
        )
        raise NonFiniteLossError(
            f"{finding}; the keys of its batch are in {path}. The last checkpoint is from before: go on from it with a "
            "lower learning rate, gradient clipping or bf16 in place of fp16"
        )


class _Loss:
    """A loss on its way to the host, which waits for the device to have come that far and no further."""

    def __init__(self, loss: Tensor, step: int) -> None:
        self.step, self._arrived = step, None
        self._value = loss
        if loss.is_cuda:
            self._value = torch.empty((), dtype=loss.dtype, pin_memory=True)
            self._value.copy_(loss, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def value(self) -> float:
        """The loss."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)


def autocast(device: torch.device, config: TrainerConfig) -> torch.autocast:
    """The context of a forward pass."""
    return torch.autocast(device.type, _DTYPES.get(config.precision), enabled=config.precision != "fp32")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what distributed training puts around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model
