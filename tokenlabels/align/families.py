"""What a family of models has to say so that labels can follow its tokens from patch embedding to classifier."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from tokenlabels.align.rules import Alignment, AlignmentError, check_block, full_name
from tokenlabels.checks import Grid

FirstLabels = Callable[[Grid, int], Tensor]
"""``first_labels(grid, num_prefix_tokens)``: the labels of the embedded patches, float32 [B, P + h * w, C]."""


class Features(NamedTuple):
    """What a model's `forward_features` returns, with labels.

    Attributes:
        tokens: as the model returns them.
        labels: float32 [B, P + h * w, C], prefix tokens first, then patch tokens in row-major order.
        grid: rows and columns of the patch tokens, (h, w).
    """

    tokens: Tensor
    labels: Tensor
    grid: Grid


class Family(ABC):
    """Models of one type."""

    @abstractmethod
    def blocks(self, model: Any) -> list[nn.Module]:
        """All blocks, in order."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Refuse a variant of the model that the others of these functions do not know.

        Raises:
            AlignmentError: the reason, and what to do.
        """

    @abstractmethod
    def stride(self, model: Any) -> Grid:
        """Pixels from one embedded patch to the next, down and across."""

    @abstractmethod
    def features(self, model: Any, images: Tensor, first_labels: FirstLabels, alignment: Alignment) -> Features:
        """``model.forward_features(images)``, with labels."""

    def classified(self, model: Any, labels: Tensor) -> Tensor:  # noqa: ARG002 - for others
        """Labels [B, C] of what is classified; here the mean of all tokens."""
        return labels.mean(dim=1)


_FAMILIES: dict[type[nn.Module], Family] = {}


def family(*kinds: type[nn.Module]) -> Callable[[type[Family]], type[Family]]:
    """Register a family for models of exactly these types: a subclass may do something else."""

    def register(made: type[Family]) -> type[Family]:
        _FAMILIES.update(dict.fromkeys(kinds, made()))
        return made

    return register


def find_family(model: nn.Module) -> Family:
    """The family of a model all of whose blocks have rules.

    Raises:
        AlignmentError: there is none, or the model or a block is not one that it knows.
    """
    found = _FAMILIES.get(type(model))
    if found is None:
        known = ", ".join(sorted(kind.__name__ for kind in _FAMILIES))
        raise AlignmentError(
            f"labels cannot follow the tokens through {full_name(type(model))}; choose a model of timm of type "
            f"{known}, or DenseClassifier around one"
        )
    found.check(model)
    for block in found.blocks(model):
        check_block(block)
    return found


def on_grid(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """[B, h * w, D] -> [B, h, w, D]."""
    return tokens.reshape(len(tokens), *grid, tokens.shape[-1])


def check_pool_type(model: nn.Module, pool_type: str) -> None:
    """Refuse a classifier of anything but the mean of all tokens."""
    if pool_type not in ("avg", "fast", "fastavg"):
        raise AlignmentError(
            f"labels cannot follow the tokens through {type(model).__name__}'s pooling {pool_type!r}; build it with "
            "global_pool='avg'"
        )
