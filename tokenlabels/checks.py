"""What the maths asks of the tensors that it is given, and how its messages name them."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeGuard, get_args

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of tokens or cells, (h, w)."""

FLOATS = (torch.float32, torch.float64)
"""Dtypes of coordinates: float16 has no room for the position of a crop."""


def describe(tensor: Tensor) -> str:
    """dtype, shape and device of a tensor."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def check_tensor(name: str, value: object) -> None:
    """Refuse arrays, lists and numbers in the place of tensors."""
    if not isinstance(value, Tensor):
        kind = type(value)
        raise ValueError(
            f"{name} must be a torch.Tensor, got {kind.__module__}.{kind.__qualname__}; torch.as_tensor makes one"
        )


def is_integer(tensor: Tensor) -> bool:
    """Whether a tensor holds integers (booleans are none)."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def has_values(tensor: Tensor) -> bool:
    """Whether values can be looked at for nothing: an accelerator would be waited for, a compiled graph would break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_grid(grid: Any, name: str = "grid") -> Grid:
    """The two positive integers of a grid, or a ValueError."""
    if not isinstance(grid, Sequence) or len(grid) != 2 or not all(map(_is_count, grid)):
        raise ValueError(f"{name} must be two positive integers (rows, columns), got {grid!r}")
    return grid[0], grid[1]


def for_autograd(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode, which autograd cannot keep for backward."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def check_count(name: str, value: object) -> None:
    """Refuse what is no integer of at least 1."""
    if not _is_count(value):
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse what is none of the values of a `Literal`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def check_share(name: str, value: object) -> None:
    """Refuse what is no number in 0..1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in 0..1, got {value!r}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a plain number: no boolean, no tensor."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_generator(generator: object) -> None:
    """Refuse what is neither a generator nor None."""
    if not isinstance(generator, torch.Generator | None):
        raise ValueError(
            f"generator must be a torch.Generator or None, got {generator!r}; torch.Generator().manual_seed(0) is one"
        )


def check_float(name: str, tensor: Tensor) -> None:
    """Refuse what is neither float32 nor float64: the half-wide ones cannot name a pixel."""
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32 or float64, got {describe(tensor)}; convert with .float()")


def check_labels(
    labels: Tensor, num_classes: int, *, num_images: int | None = None, device: torch.device | None = None
) -> None:
    """Refuse labels that are no integers [B] on the device of the rest, or outside 0..num_classes-1.

    Values are looked at on the CPU alone: elsewhere the look would wait for the device.
    """
    check_tensor("labels", labels)
    if labels.ndim != 1 or not is_integer(labels) or len(labels) == 0 or num_images not in (None, len(labels)):
        wanted = "[B] with B above 0" if num_images is None else f"[{num_images}]"
        raise ValueError(f"labels must be integer {wanted}, got {describe(labels)}")
    if device is not None and labels.device != device:
        raise ValueError(f"labels must be on {device} as the targets are, got {describe(labels)}; move them there")
    if not has_values(labels):
        return
    lowest, highest = (int(bound) for bound in labels.long().aminmax())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1}, got {lowest}..{highest}; "
            "num_classes is the label set's number of classes"
        )


def check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    """Refuse tensors that are on two devices."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device} as the rest is, got {describe(tensor)}; move it there")


def check_values(name: str, tensor: Tensor, are_good: Callable[[Tensor], Tensor], advice: str) -> None:
    """Refuse values that are not good (bool, shape of the tensor), with the first of them and its place.

    Nothing happens on an accelerator, where the look would wait for the device, and in compiled code.
    """
    if not has_values(tensor) or bool((good := are_good(tensor)).all()):
        return
    place = good.logical_not().nonzero()[0].tolist()
    whole = f" in {tensor[place[0]].tolist()}" if tensor.ndim == 2 else ""
    raise ValueError(f"{name} {advice}, got {float(tensor[tuple(place)])} at {place}{whole}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
