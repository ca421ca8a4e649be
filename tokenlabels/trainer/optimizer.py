"""The optimizer and the course of its learning rate, both timm's."""

from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from tokenlabels.models.moto import MoTo
from tokenlabels.trainer.config import OptimizerConfig, ScheduleConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig, batch_size: int) -> Optimizer:
    """timm's optimizer and parameter groups: no decay for vectors, for what ``model.no_weight_decay()`` names, and for
    the scales and shifts of `MoTo`, which are matrices.

    Args:
        model: on its device, before it is wrapped for distributed training.
        config: see there.
        batch_size: samples per optimizer step, over all ranks.

    Raises:
        ValueError: timm has no such optimizer.
    """
    kept: set[str] = set(getattr(model, "no_weight_decay", set)())
    for name, module in model.named_modules():
        if isinstance(module, MoTo):
            kept |= {f"{name}.{parameter}" if name else parameter for parameter in ("alpha", "beta")}
    try:
        return create_optimizer_v2(
            param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=kept),
            opt=config.name,
            lr=config.lr(batch_size),
            weight_decay=0.0,  # that of the groups counts
            momentum=config.momentum,
        )
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"optimizer.name {config.name!r}: {error}; timm.optim.list_optimizers() has the names"
        ) from error


def make_schedule(optimizer: Optimizer, config: ScheduleConfig) -> CosineLRScheduler:
    """Linear warm-up, then a cosine; ``schedule.step(t)`` sets the rate for time t in epochs, a float.

    The cosine counts from epoch 0, as in timm and the published script, and not from the end of the warm-up.
    """
    lr = min(group["lr"] for group in optimizer.param_groups)
    return CosineLRScheduler(
        optimizer,
        t_initial=config.epochs,
        lr_min=min(config.min_lr, lr),
        warmup_t=config.warmup_epochs,  # type: ignore[arg-type]
        warmup_lr_init=min(config.warmup_lr, lr),
        cycle_decay=0.5,  # there is one cycle: all this does is to keep timm from warning of runs of a single epoch
    )
