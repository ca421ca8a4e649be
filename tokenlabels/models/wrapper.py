"""What training puts around a model, and takes off again."""

from torch import nn

from tokenlabels.checks import Grid


class TrainingWrapper(nn.Module):
    """A model that does more in training, and of which `model` is kept.

    The trainer asks it what it asks any model; the answers are the model's.

    Attributes:
        model: the model.
    """

    model: nn.Module

    @property
    def num_classes(self) -> int:
        """Classes that the model tells apart, K."""
        return int(self.model.num_classes)  # type: ignore[arg-type]

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of the tokens that the model classifies; None where it classifies images alone."""
        return self.model.grid if self.aux_head is not None else None  # type: ignore[return-value]

    @property
    def aux_head(self) -> nn.Module | None:
        """The model's classifier of tokens, if it has one."""
        return getattr(self.model, "aux_head", None)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the model wants to be left out of weight decay, by their names here."""
        names: set[str] = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in names}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the model computes activations again in backward, to save memory."""
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]


def student(model: nn.Module) -> nn.Module:
    """What is kept of a model: without what training alone puts around it."""
    return student(model.model) if isinstance(model, TrainingWrapper) else model
