"""What would go wrong only after hours, or never be noticed, is refused on the first batch."""

import inspect

from torch import nn

from tokenlabels.align import TLAlign
from tokenlabels.models.wrapper import student
from tokenlabels.trainer.batches import TrainingBatch
from tokenlabels.trainer.config import TrainerConfig


def check_batch(model: nn.Module, batch: TrainingBatch, config: TrainerConfig) -> None:
    """Compare a batch with the model and the configuration.

    Args:
        model: not wrapped.
        batch: the first.
        config: of the run.

    Raises:
        ValueError: there are no targets; they have another grid, other classes or no tokens for the model's classifier
            of tokens; the model cannot mix tokens; targets are mixed where the model finds the shares, or unmixed where
            it does not.
    """
    targets = batch.targets
    if targets is None:
        raise ValueError("the batches have no targets: give the loader labels, or num_classes for hard labels")
    name = type(model).__name__
    _check_who_mixes_targets(model, batch)
    grid = targets.grid if targets.grid is None else getattr(model, "grid", None) or targets.grid
    targets.check_model(name, grid=grid, num_classes=getattr(model, "num_classes", targets.num_classes))
    is_to_mix = batch.plan is not None and not batch.is_mixed
    if is_to_mix and "plan" not in inspect.signature(student(model).forward).parameters:
        raise ValueError(f"{name} takes no plan and cannot mix tokens; wrap it in DenseClassifier, or use mix='cutmix'")
    is_trained = targets.grid is not None and config.loss.dense_weight > 0
    if getattr(model, "aux_head", None) is not None and not is_trained:
        why = "loss.dense_weight is 0" if targets.grid is not None else f"the targets have no tokens ({targets!r})"
        raise ValueError(
            f"{name} has a classifier for tokens that nothing would train: {why}. Build the model without it "
            "(aux_head=False of LV-ViT; the plain timm model in place of DenseClassifier), or use token labels"
        )


def _check_who_mixes_targets(model: nn.Module, batch: TrainingBatch) -> None:
    name = type(model).__name__
    if isinstance(model, TLAlign):
        if batch.plan is None or not batch.is_mixed or batch.has_mixed_targets:
            raise ValueError(
                f"{name} finds the shares that targets are mixed by: it needs images that are mixed, their plan, and "
                "targets that are not; give the loader mix='cutmix' (or another of pixels) and mix_targets=False"
            )
    elif batch.plan is not None and not batch.has_mixed_targets:
        raise ValueError(
            f"the images are mixed and their targets are not, and {name} does not find the shares; wrap it in TLAlign, "
            "or leave mix_targets of the loader on"
        )
