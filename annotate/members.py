"""One model of a teacher: its classifier per cell, its normalisation, and what is recorded of it.

Legend: B images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from annotate.cells import CellClassifier
from annotate.specs import TeacherSpec
from annotate.weights import build_model, class_names, data_config, full_name, image_size, state_digest


@dataclass(frozen=True)
class ModelInfo:
    """What has to be known of one model to make its labels again.

    Attributes:
        name: timm's name, with the tag of the weights where they are timm's own.
        weights: where they come from, in words.
        digest: sha256 of the weights.
        image_size: pixels of its input, (H, W).
        interpolation: how images are resized to it, by PIL's name in lower case.
        crop_pct: share of the image that timm's centre crop keeps, 0..1.
        mean, std: normalisation per RGB channel, for pixels of 0..1.
    """

    name: str
    weights: str
    digest: str
    image_size: tuple[int, int]
    interpolation: str
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class TeacherModel:
    """One classifier of a teacher, with its normalisation, on its device.

    Args:
        classifier: applied at every cell.
        info: says how images are normalised.
        names: of the classes, if they are known.
    """

    def __init__(self, classifier: CellClassifier, info: ModelInfo, names: tuple[str, ...] | None = None) -> None:
        device = next(classifier.parameters()).device
        self.classifier = classifier
        self.info = info
        self.class_names = names
        self._mean = 255 * torch.tensor(info.mean, device=device).view(3, 1, 1)
        self._std = 255 * torch.tensor(info.std, device=device).view(3, 1, 1)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, H_px, W_px, 3] on any device -> float32 [B, 3, H_px, W_px], on the model's device.

        The result is channels last in memory, as the images come.
        """
        on_device = images.to(self._mean.device, non_blocking=True)
        return on_device.permute(0, 3, 1, 2).float().sub_(self._mean).div_(self._std)


def load_model(spec: TeacherSpec, device: torch.device) -> TeacherModel:
    """Build the model of `spec`, put it on the device and test that its head can be applied to single cells.

    Raises:
        TeacherError: the model or its weights cannot be had, or its head cannot be applied per cell.
    """
    model = build_model(spec)
    size = image_size(model, spec)
    config = data_config(model)
    info = ModelInfo(
        name=full_name(model, spec),
        weights=spec.weights_shown,
        digest=state_digest(model),
        image_size=size,
        interpolation=config["interpolation"],
        crop_pct=float(config["crop_pct"]),
        mean=tuple(float(value) for value in config["mean"]),
        std=tuple(float(value) for value in config["std"]),
    )
    names = class_names(model)
    return TeacherModel(CellClassifier(_channels_last(model.to(device)), info.name, size), info, names)


def _channels_last(model: nn.Module) -> nn.Module:
    """Lay out two-dimensional convolutions for channels-last images.

    `Module.to(memory_format=torch.channels_last)` stops at weights of other layers with five axes.
    """
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model
