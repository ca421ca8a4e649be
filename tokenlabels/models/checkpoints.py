"""Weights from files: released checkpoints and those of our own runs, at any image size."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed
from timm.models import load_state_dict
from torch import Tensor, nn

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar")
_NUM_NAMES_SHOWN = 5


class CheckpointError(ValueError):
    """A file cannot be read as a checkpoint, or is one of another model; the message names the file."""


def load_checkpoint(model: nn.Module, path: str | Path, *, use_ema: bool = True, take_classes: bool = False) -> None:
    """Load weights strictly: every tensor of the model from the file, and none left over.

    Takes a state dict or a training checkpoint (.pth, .pt, .pth.tar, .safetensors) with or without the ``module.`` of
    distributed training, and of a model inside `TLAlign` or `DenseClassifier`, see `unwrapped`. Position embeddings of
    another image size are resampled, see `fit_positions`.

    Args:
        model: on any device.
        path: the file.
        use_ema: take the averaged weights where the file holds both.
        take_classes: give the model, of timm, a classifier for as many classes as the file has.

    Raises:
        CheckpointError: there is no such file, it holds no state dict, or one of another model or number of classes.
    """
    path = Path(path)
    state = unwrapped(model, read_state_dict(path, use_ema=use_ema))
    if take_classes:
        _take_classes(model, state)
    state = fit_positions(model, state, str(path))
    load_strictly(model, state, source=str(path), name=type(model).__name__)


def read_state_dict(path: Path, *, use_ema: bool = True) -> dict[str, Tensor]:
    """The state dict of a file, by timm's loader: an averaged (EMA) one where the file holds both.

    Nothing but tensors and plain values is unpickled.

    Raises:
        CheckpointError: there is no such file, or it holds no state dict.
    """
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise CheckpointError(f"{path}: checkpoints end in {', '.join(CHECKPOINT_SUFFIXES)}")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        state: object = load_state_dict(str(path), use_ema=use_ema, device="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip and pickle share no base class
        if isinstance(error, pickle.UnpicklingError) or isinstance(error.__cause__, pickle.UnpicklingError):
            raise CheckpointError(
                f"{path}: the file is no plain state dict. It is damaged, or it holds Python objects that "
                "could run code when they are opened, and it was not opened; save the tensors alone, as "
                f"model.state_dict() or safetensors ({error})"
            ) from error
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({error})") from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no state dict, which maps names to tensors")
    return state


def unwrapped(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's part of a state dict that was saved with one or two wrappers around it.

    `TLAlign` and `DenseClassifier` keep their model below ``model.``. What is below the prefix that most names of this
    model are found with is taken, and what a wrapper has beside its model, a classifier of tokens, is left out.
    """
    own = model.state_dict().keys()
    prefix = max(("", "model.", "model.model."), key=lambda prefix: sum(prefix + name in state for name in own))
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def fit_positions(model: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The state dict with position embeddings of the model's size: bicubic, without antialiasing, as published.

    A state dict does not say its grid. Another number of tokens than the model's is taken to be a square grid, the same
    number to be the same grid.

    Raises:
        CheckpointError: another number of tokens that is no square.
    """
    own, fitted = model.state_dict(), dict(state)
    for name in own.keys() & state.keys():
        parent, _, last = name.rpartition(".")
        if last == "pos_embed" and own[name].shape != state[name].shape:
            fitted[name] = _resampled(model.get_submodule(parent), state[name], source)
    return fitted


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], *, source: str, name: str) -> None:
    """``model.load_state_dict(state, strict=True)``, or a message that says what does not fit and an untouched model.

    Args:
        model: on any device.
        state: names to tensors.
        source, name: what the message calls the state and the model.

    Raises:
        CheckpointError: the state is of another model, or of another number of classes.
    """
    own = model.state_dict()
    findings = {
        "missing": [name for name in own if name not in state],
        "not of this model": [name for name in state if name not in own],
        "of another shape": [_shapes(name, state, own) for name in own if _differ(name, state, own)],
    }
    shown = "; ".join(f"{len(names)} tensors {what} ({_few(names)})" for what, names in findings.items() if names)
    if shown:  # asked before: torch would copy what fits, and then raise
        raise CheckpointError(f"{source} does not fit {name}: {_classes(model, state)}{shown}")
    model.load_state_dict(state, strict=True)


def _take_classes(model: Any, state: Mapping[str, Tensor]) -> None:
    """A classifier for as many classes as the state dict has, if it tells."""
    classifier = model.default_cfg["classifier"]
    name = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    if name in state and len(state[name]) != model.num_classes:
        model.reset_classifier(len(state[name]))


def _resampled(embedded: nn.Module, positions: Tensor, source: str) -> Tensor:
    prefix = 0 if getattr(embedded, "no_embed_class", False) else getattr(embedded, "num_prefix_tokens", 0)
    grid = getattr(getattr(embedded, "patch_embed", None), "grid_size", None)
    num_tokens = positions.shape[1] - prefix if positions.ndim == 3 else -1
    if grid is None or num_tokens < 1 or round(num_tokens**0.5) ** 2 != num_tokens:
        raise CheckpointError(
            f"{source}: its position embedding {list(positions.shape)} is of another size and of no square grid, and "
            "cannot be resampled; build the model for images of the checkpoint's size"
        )
    resampled: Tensor = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix, antialias=False)
    return resampled


def _differ(name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return name in state and state[name].shape != own[name].shape


def _shapes(name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    return f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"


def _classes(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Where the classifier is all that differs, or part of it: say so first."""
    own = model.state_dict()
    for name in ("head.weight", "fc.weight", "classifier.weight", "head.fc.weight"):
        for prefix in ("", "model."):
            key = prefix + name
            if key in own and _differ(key, state, own) and state[key].shape[1:] == own[key].shape[1:]:
                return f"it has {len(state[key])} classes, the model {len(own[key])}; "
    return ""


def _few(names: list[str]) -> str:
    return ", ".join(names[:_NUM_NAMES_SHOWN]) + (", ..." if len(names) > _NUM_NAMES_SHOWN else "")
