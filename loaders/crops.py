"""Which part of an image a sample shows: random resized crops for training, the centre for evaluation.

Plain Python on plain numbers, a few microseconds per image: the threads of the loader take turns in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from tokenlabels.checks import is_number
from tokenlabels.geometry import Box

MAX_CROP_ATTEMPTS = 10
_TOP, _LEFT = 2 * MAX_CROP_ATTEMPTS, 2 * MAX_CROP_ATTEMPTS + 1
NUM_CROP_UNIFORMS = _LEFT + 1

Range = tuple[float, float]
"""Lowest and highest value."""

SCALE: Range = (0.08, 1.0)
RATIO: Range = (3 / 4, 4 / 3)


@dataclass(frozen=True, slots=True)
class PixelBox:
    """A part of an image, in whole pixels of it.

    Attributes:
        left: columns in front of the box, at least 0.
        top: rows above the box, at least 0.
        width: columns of the box, at least 1.
        height: rows of the box, at least 1.
    """

    left: int
    top: int
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.left < 0 or self.top < 0 or self.width < 1 or self.height < 1:
            raise ValueError(f"a box starts inside its image and has at least one pixel, got {self}")

    def fits_in(self, width_px: int, height_px: int) -> bool:
        """Whether the box lies in an image of this size."""
        return self.left + self.width <= width_px and self.top + self.height <= height_px

    def normalised(self, width_px: int, height_px: int) -> Box:
        """The box as xyxy in 0..1 of the image, whose size is given."""
        return (
            self.left / width_px,
            self.top / height_px,
            (self.left + self.width) / width_px,
            (self.top + self.height) / height_px,
        )


def check_crop_range(scale: Sequence[float], ratio: Sequence[float]) -> None:
    """Refuse what `random_resized_crop` cannot draw from; once per loader, as the crops themselves do not check."""
    if not _is_pair(scale) or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(
            f"scale must be (lowest, highest) share of the image's area, above 0 and at most 1, got {scale}"
        )
    if not _is_pair(ratio) or not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio must be (lowest, highest) width over height, both above 0, got {ratio}")


def _is_pair(values: object) -> TypeGuard[Range]:
    return isinstance(values, Sequence) and len(values) == 2 and all(map(is_number, values))


def random_resized_crop(
    width_px: int, height_px: int, uniforms: Sequence[float], scale: Range = SCALE, ratio: Range = RATIO
) -> PixelBox:
    """Draw the box of a random resized crop by the rule of torchvision's `RandomResizedCrop`.

    The rule is Inception's (Szegedy et al., "Going deeper with convolutions", 2015): an area and an aspect ratio, up
    to ten times until they fit into the image, then a position. If none fits, the largest central box whose ratio is
    within `ratio`. That box is at least one pixel wide and high here, where torchvision's can be empty.

    Args:
        width_px: of the image.
        height_px: of the image.
        uniforms: at least `NUM_CROP_UNIFORMS` numbers in [0, 1); more are ignored. Attempt i takes its area from number
            2i and its ratio from number 2i + 1; numbers 20 and 21 are the position from top and from left. What a
            number is for does not depend on how many attempts it took.
        scale: lowest and highest area as a share of the image's.
        ratio: lowest and highest width over height; drawn evenly in the logarithm.
    """
    area, (lowest_scale, highest_scale) = width_px * height_px, scale
    lowest_log, highest_log = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, 2 * MAX_CROP_ATTEMPTS, 2):
        target_area = area * (lowest_scale + uniforms[i] * (highest_scale - lowest_scale))
        target_ratio = math.exp(lowest_log + uniforms[i + 1] * (highest_log - lowest_log))
        width = round(math.sqrt(target_area * target_ratio))
        height = round(math.sqrt(target_area / target_ratio))
        if 0 < width <= width_px and 0 < height <= height_px:
            top = int(uniforms[_TOP] * (height_px - height + 1))
            left = int(uniforms[_LEFT] * (width_px - width + 1))
            return PixelBox(left, top, width, height)
    return _largest_central_box(width_px, height_px, ratio)


def _largest_central_box(width_px: int, height_px: int, ratio: Range) -> PixelBox:
    width, height, image_ratio = width_px, height_px, width_px / height_px
    if image_ratio < ratio[0]:
        height = max(1, round(width / ratio[0]))
    elif image_ratio > ratio[1]:
        width = max(1, round(height * ratio[1]))
    return PixelBox((width_px - width) // 2, (height_px - height) // 2, width, height)


@dataclass(frozen=True, slots=True)
class CenterCrop:
    """An evaluation crop: the image is resized as a whole, then cut.

    Attributes:
        resized_width_px: width of the whole image after resizing.
        resized_height_px: height of the whole image after resizing.
        box: what is cut out of the resized image.
    """

    resized_width_px: int
    resized_height_px: int
    box: PixelBox

    def normalised(self) -> Box:
        """The crop as xyxy in 0..1 of the image, be it resized or not."""
        return self.box.normalised(self.resized_width_px, self.resized_height_px)


def check_crop_pct(crop_pct: float) -> None:
    """Refuse what `center_crop` cannot cut; once per loader, as the crops themselves do not check."""
    if not is_number(crop_pct) or not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be above 0 and at most 1, got {crop_pct}")


def center_crop(width_px: int, height_px: int, size_hw: tuple[int, int], crop_pct: float) -> CenterCrop:
    """The evaluation crop of timm's `transforms_imagenet_eval`, with the same whole pixels.

    The image is resized to cover `floor(size / crop_pct)`, its aspect kept, and the centre is cut out. As `crop_pct` is
    at most 1 the resized image is never smaller than the crop: small images are enlarged and nothing is padded.

    Args:
        width_px: of the image.
        height_px: of the image.
        size_hw: height and width of the crop in pixels.
        crop_pct: size of the crop as a share of what the resized image covers, above 0 and at most 1.
    """
    crop_height, crop_width = size_hw
    width, height = _resized_to_cover(
        width_px, height_px, math.floor(crop_width / crop_pct), math.floor(crop_height / crop_pct)
    )
    left, top = round((width - crop_width) / 2), round((height - crop_height) / 2)
    return CenterCrop(width, height, PixelBox(left, top, crop_width, crop_height))


def _resized_to_cover(width_px: int, height_px: int, target_width: int, target_height: int) -> tuple[int, int]:
    """Width and height. timm rounds the longer side down for squares, as torchvision does, else to nearest."""
    if target_width != target_height:
        ratio = min(height_px / target_height, width_px / target_width)
        return round(width_px / ratio), round(height_px / ratio)
    if width_px > height_px:
        return int(target_width * width_px / height_px), target_height
    return target_width, int(target_height * height_px / width_px)
