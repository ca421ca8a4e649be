"""What the trainer asks of batches, and of whatever makes them.

`loaders.TokenLabelLoader` and `loaders.EvaluationLoader` fit, and so does any iterable of such batches with a length.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tokenlabels.mixing import MixPlan
from tokenlabels.sparse_targets import TokenTargets


class TrainingBatch(Protocol):
    """Images [B, 3, H_px, W_px] on the model's device, with their targets, mixed where a plan says so."""

    @property
    def images(self) -> Tensor:
        """float32 [B, 3, H_px, W_px], normalised."""

    @property
    def targets(self) -> TokenTargets | None:
        """Of B images."""

    @property
    def plan(self) -> MixPlan | None:
        """Who is mixed with whom; None if nobody is."""

    @property
    def is_mixed(self) -> bool:
        """Whether the images are mixed already (CutMix). The model mixes its patch embedding otherwise (MixToken)."""

    @property
    def has_mixed_targets(self) -> bool:
        """Whether the targets are those of the mixed images. `TLAlign` needs those of the images themselves."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of the samples, for messages."""


class EvaluationBatch(Protocol):
    """Images with the classes of the data set."""

    @property
    def images(self) -> Tensor:
        """float32 [B, 3, H_px, W_px], normalised."""

    @property
    def labels(self) -> Tensor:
        """int64 [B]; -1 where an image has none."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of the samples."""


@runtime_checkable
class Stateful(Protocol):
    """A loader that knows its place, as `torchdata` and this project have it."""

    def state_dict(self) -> dict[str, Any]:
        """Where it is: the batch after the one that was handed out last."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that batch."""


def num_batches(batches: Iterable[object]) -> int:
    """Batches of one pass.

    Raises:
        ValueError: the iterable has no length, or none in it.
    """
    if not isinstance(batches, Sized):
        raise ValueError(
            f"{type(batches).__name__} has no len(); the schedule of the learning rate needs the number of batches per "
            "epoch: wrap it in a class with __iter__ and __len__"
        )
    count = len(batches)
    if count == 0:
        raise ValueError(
            f"{type(batches).__name__} has no batches: fewer samples than one batch of all ranks; make it smaller"
        )
    return count


def pass_over(batches: Iterable[Any], epoch: int, first: int, total: int) -> Iterator[Any]:
    """The batches of an epoch from number `first` of `total` on.

    A `Stateful` loader that was given its place begins there by itself; others are run through up to it.
    """
    if hasattr(batches, "set_epoch"):
        batches.set_epoch(epoch)
    if isinstance(batches, Stateful):
        return iter(batches)
    return islice(iter(batches), first, None) if first < total else iter(())


def placed(batch: Any, device: torch.device) -> Any:
    """The batch on a device; as it is if it is there."""
    return batch if batch.images.device == device else batch.to(device)
