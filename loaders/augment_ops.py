"""The operations of RandAugment, and from timm's magnitudes to their arguments."""

from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor


class Op(IntEnum):
    """What can happen to an image, and what its argument is; from `ROTATE` on, the operations are geometric."""

    AUTO_CONTRAST = 0  # none
    EQUALIZE = 1  # none
    INVERT = 2  # none
    POSTERIZE = 3  # bits that stay, 1..8
    SOLARIZE = 4  # grey level from which on values are inverted
    SOLARIZE_ADD = 5  # what is added to grey levels below 128
    COLOR = 6  # as the next three: factor, 1 changes nothing
    CONTRAST = 7
    BRIGHTNESS = 8
    SHARPNESS = 9
    ROTATE = 10  # degrees, counter-clockwise
    SHEAR_X = 11  # pixels that the source lies further right per pixel further down
    SHEAR_Y = 12  # pixels that the source lies further down per pixel further right
    TRANSLATE_X = 13  # how far right the source lies, as a share of the width
    TRANSLATE_Y = 14  # how far down, as a share of the height


COLOR_OPS = tuple(op for op in Op if op < Op.ROTATE)

LEVEL_SCALE = 10.0
"""Magnitudes are tenths of the widest argument."""

Level = Callable[[Tensor, Tensor], Tensor]
"""Magnitudes and signs (-1 or 1) to arguments, float64 of one shape."""


def _symmetric(widest: float) -> Level:
    return lambda magnitude, sign: sign * (magnitude / LEVEL_SCALE * widest)


def _no_argument(magnitude: Tensor, sign: Tensor) -> Tensor:  # noqa: ARG001
    return torch.zeros_like(magnitude)


def _posterize(magnitude: Tensor, sign: Tensor) -> Tensor:  # noqa: ARG001
    """At least one bit: timm's levels ask for none at times, which Pillow refuses."""
    return (magnitude / LEVEL_SCALE * 4).floor().clamp(min=1)


def _posterize_increasing(magnitude: Tensor, sign: Tensor) -> Tensor:  # noqa: ARG001
    return (4 - (magnitude / LEVEL_SCALE * 4).floor()).clamp(min=1)


def _solarize(magnitude: Tensor, sign: Tensor) -> Tensor:  # noqa: ARG001
    return (magnitude / LEVEL_SCALE * 256).floor().clamp(max=256)


def _solarize_increasing(magnitude: Tensor, sign: Tensor) -> Tensor:
    return 256 - _solarize(magnitude, sign)


def _solarize_add(magnitude: Tensor, sign: Tensor) -> Tensor:  # noqa: ARG001
    return (magnitude / LEVEL_SCALE * 110).floor().clamp(max=128)


def _enhance(magnitude: Tensor, sign: Tensor) -> Tensor:  # noqa: ARG001
    return magnitude / LEVEL_SCALE * 1.8 + 0.1


def _enhance_increasing(magnitude: Tensor, sign: Tensor) -> Tensor:
    return (1 + sign * (magnitude / LEVEL_SCALE * 0.9)).clamp(min=0.1)


OPS: dict[str, tuple[Op, Level]] = {
    "AutoContrast": (Op.AUTO_CONTRAST, _no_argument),
    "Equalize": (Op.EQUALIZE, _no_argument),
    "Invert": (Op.INVERT, _no_argument),
    "Posterize": (Op.POSTERIZE, _posterize),
    "PosterizeIncreasing": (Op.POSTERIZE, _posterize_increasing),
    "Solarize": (Op.SOLARIZE, _solarize),
    "SolarizeIncreasing": (Op.SOLARIZE, _solarize_increasing),
    "SolarizeAdd": (Op.SOLARIZE_ADD, _solarize_add),
    "Color": (Op.COLOR, _enhance),
    "ColorIncreasing": (Op.COLOR, _enhance_increasing),
    "Contrast": (Op.CONTRAST, _enhance),
    "ContrastIncreasing": (Op.CONTRAST, _enhance_increasing),
    "Brightness": (Op.BRIGHTNESS, _enhance),
    "BrightnessIncreasing": (Op.BRIGHTNESS, _enhance_increasing),
    "Sharpness": (Op.SHARPNESS, _enhance),
    "SharpnessIncreasing": (Op.SHARPNESS, _enhance_increasing),
    "Rotate": (Op.ROTATE, _symmetric(30)),
    "ShearX": (Op.SHEAR_X, _symmetric(0.3)),
    "ShearY": (Op.SHEAR_Y, _symmetric(0.3)),
    "TranslateXRel": (Op.TRANSLATE_X, _symmetric(0.45)),
    "TranslateYRel": (Op.TRANSLATE_Y, _symmetric(0.45)),
}
"""By timm's names: what happens, and how strongly at which magnitude."""
