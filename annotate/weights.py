"""From a teacher spec to a timm model with its weights, at the size of the images to come."""

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.models import get_deprecated_models, is_model_pretrained
from torch import Tensor, nn

from annotate.cells import TeacherError
from annotate.specs import TeacherSpec
from tokenlabels.models.checkpoints import CheckpointError, load_strictly, read_state_dict

_NUM_NAMES_SHOWN = 5


def build_model(spec: TeacherSpec) -> nn.Module:
    """Build the model of `spec` on the CPU, in evaluation mode.

    The random numbers that timm draws while it builds come from `spec.seed` where there is one, and never from the
    generators of the process.

    Raises:
        TeacherError: timm has no such model, no such weights, or cannot build it for images of this size; or the
            checkpoint cannot be read or does not fit. The message names the model and the file.
    """
    _check_name(spec)
    with torch.random.fork_rng(devices=[]):
        state = None if spec.checkpoint is None else _read_checkpoint(spec.checkpoint, spec.name)
        model = _build(spec, state)
        wanted = image_size(model, spec)
        if model.pretrained_cfg.get("fixed_input_size") and wanted != tuple(model.pretrained_cfg["input_size"][-2:]):
            model = _resized(model, spec, state, wanted)
    built: nn.Module = model.eval()
    return built


def data_config(model: nn.Module) -> dict[str, Any]:
    """How timm prepares images to evaluate the model: input_size (C, H, W), interpolation, crop_pct, mean, std."""
    config: dict[str, Any] = resolve_model_data_config(model, use_test_size=True)  # type: ignore[no-untyped-call]
    return config


def image_size(model: nn.Module, spec: TeacherSpec) -> tuple[int, int]:
    """Pixels of the model's images, (H, W): as the spec says, or as timm evaluates the model."""
    if spec.image_size is not None:
        return spec.image_size, spec.image_size
    height, width = data_config(model)["input_size"][-2:]
    return height, width


def full_name(model: Any, spec: TeacherSpec) -> str:
    """The spec's name, with the tag that timm chose if pretrained weights were asked for without one."""
    tag = model.pretrained_cfg.get("tag")
    if spec.weights == "pretrained" and tag and ":" not in spec.name and "." not in spec.name:
        return f"{spec.name}.{tag}"
    return spec.name


def state_digest(model: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of the model's parameters and buffers, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def class_names(model: Any) -> tuple[str, ...] | None:
    """One name per class: those in the model's own configuration, or the WordNet lemmas of the ImageNet set that timm
    recognises by the number of classes; None where nobody knows."""
    config = model.pretrained_cfg
    labels, descriptions = config.get("label_names"), config.get("label_descriptions") or {}
    if isinstance(labels, Mapping):
        labels = [labels[index] for index in sorted(labels, key=int)]
    if not labels and config.get("num_classes") == model.num_classes:
        subset = infer_imagenet_subset(model)
        if subset is not None:
            labels = ImageNetInfo(subset).label_descriptions()
    if not labels or len(labels) != model.num_classes:
        return None
    return tuple(str(descriptions.get(label, label)) for label in labels)


def _check_name(spec: TeacherSpec) -> None:
    """Refuse names that timm does not know, with the nearest ones that it does."""
    if spec.name.startswith(("hf-hub:", "local-dir:")):
        return
    architecture, _, tag = spec.name.partition(".")
    renamed = get_deprecated_models()
    if architecture in renamed:
        raise TeacherError(f"{spec.name}: timm has given up this name; use {renamed[architecture] or 'another model'}")
    if not timm.is_model(architecture):
        raise TeacherError(
            f"timm {timm.__version__} has no model {spec.name!r}{_near(architecture)}. Models from elsewhere are "
            "written hf-hub:OWNER/MODEL or local-dir:FOLDER"
        )
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise TeacherError(f"{spec.name}: {architecture} has no tag {tag!r}; it has {', '.join(tags) or 'none'}")
    if spec.weights == "pretrained" and not is_model_pretrained(spec.name):
        raise TeacherError(f"{spec.name}: timm has no pretrained weights for it; give a checkpoint file")


def _near(architecture: str) -> str:
    known = timm.list_models()
    close = difflib.get_close_matches(architecture, known, n=_NUM_NAMES_SHOWN)
    names = close or [name for name in known if architecture.lower() in name]
    return f"; near it are {_few(names)}" if names else ""


def _build(spec: TeacherSpec, state: dict[str, Tensor] | None, **arguments: Any) -> Any:
    model = _create(spec, **arguments)
    if state is None:
        return model
    num_classes = _num_classes_in(state, model, spec)
    if num_classes != model.num_classes:
        model = _create(spec, num_classes=num_classes, **arguments)
    _load_strictly(model, state, spec)
    return model


def _create(spec: TeacherSpec, **arguments: Any) -> Any:
    if spec.seed is not None:
        # torch.manual_seed would also change the generators of the GPUs
        torch.default_generator.manual_seed(spec.seed)
    try:
        return timm.create_model(spec.name, pretrained=spec.weights == "pretrained", **arguments)
    except Exception as error:  # timm, the hub's client and torch's loaders share no base class
        raise TeacherError(f"{spec.name}: timm could not build the model ({spec.weights_shown}): {error}") from error


def _resized(model: Any, spec: TeacherSpec, state: dict[str, Tensor] | None, size: tuple[int, int]) -> Any:
    """The same model for images of another size, for architectures whose weights depend on it."""
    if not hasattr(model, "set_input_size"):
        return _build(spec, state, img_size=size)
    try:
        model.set_input_size(img_size=size)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise TeacherError(
            f"{spec.name}: it cannot be resized to {size[0]} x {size[1]} images ({error}); leave image_size out for "
            "the model's own size, or give a multiple of its stride"
        ) from error
    return model


def _read_checkpoint(path: Path, name: str) -> dict[str, Tensor]:
    try:
        return read_state_dict(path)
    except CheckpointError as error:
        raise TeacherError(f"{name}: {error}") from error


def _num_classes_in(state: dict[str, Tensor], model: Any, spec: TeacherSpec) -> int:
    classifier = model.pretrained_cfg.get("classifier")
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    weights = [state[f"{name}.weight"] for name in names if f"{name}.weight" in state]
    if not weights:
        raise TeacherError(
            f"{spec.checkpoint} does not fit {spec.name}: no classifier in it (looked for "
            f"{_few([f'{name}.weight' for name in names])})"
        )
    return weights[0].shape[0]


def _load_strictly(model: nn.Module, state: dict[str, Tensor], spec: TeacherSpec) -> None:
    try:
        load_strictly(model, state, source=str(spec.checkpoint), name=spec.name)
    except CheckpointError as error:
        raise TeacherError(str(error)) from error


def _few(names: list[str]) -> str:
    return ", ".join(names[:_NUM_NAMES_SHOWN]) + (", ..." if len(names) > _NUM_NAMES_SHOWN else "")
