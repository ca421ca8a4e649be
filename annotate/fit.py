"""From an image to the pixels that a teacher sees, with the part of the image that they show."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenlabels.geometry import ResizeMode, letterbox_placement, view_center, view_letterbox, view_squash

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "hamming": Image.Resampling.HAMMING,
    "box": Image.Resampling.BOX,
}
"""timm's names of the interpolations."""


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the input of a teacher.

    Attributes:
        size: of the input, (H, W) in pixels.
        interpolation: a key of `RESAMPLING`.
        resize: squash, center or letterbox; `center` makes squares only.
        crop_pct: `center` only: side of the square as a share of the shorter side, above 0 and at most 1.
        fill_rgb: `letterbox` only: colour of the padding, three values in 0..255.
    """

    size: tuple[int, int]
    interpolation: str
    resize: ResizeMode
    crop_pct: float
    fill_rgb: tuple[int, int, int]

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size must be (H, W) with at least one pixel each, got {self.size}")
        if self.interpolation not in RESAMPLING:
            raise ValueError(f"interpolation must be one of {', '.join(RESAMPLING)}, got {self.interpolation!r}")
        if self.resize not in ("squash", "center", "letterbox"):
            raise ValueError(f"resize must be squash, center or letterbox, got {self.resize!r}")
        if self.resize == "center" and self.size[0] != self.size[1]:
            raise ValueError(
                f"resize 'center' cuts squares, and the input of this teacher is {self.size}; use squash or letterbox"
            )
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if not all(0 <= value <= 255 for value in self.fill_rgb):
            raise ValueError(f"fill_rgb must be three values in 0..255, got {self.fill_rgb}")


def fit(image: Image.Image, spec: ImageSpec) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Bring an image to the input size of a teacher, in one resampling straight from the source pixels.

    Args:
        image: mode RGB.
        spec: the size and the way to reach it.

    Returns:
        The pixels, uint8 [H, W, 3], and the part of the image that they show, float32 [4], normalised xyxy.
    """
    if image.mode != "RGB":
        raise ValueError(f"fit takes images of mode RGB as decode_rgb makes them, got {image.mode}")
    height, width = spec.size
    resampling = RESAMPLING[spec.interpolation]
    if spec.resize == "letterbox":
        view = view_letterbox(image.width, image.height, spec.size)
        placed = letterbox_placement(image.width, image.height, spec.size)
        fitted = Image.new("RGB", (width, height), spec.fill_rgb)
        fitted.paste(image.resize((placed.width, placed.height), resampling), (placed.left, placed.top))
    else:
        view = view_squash()
        if spec.resize == "center":
            view = view_center(image.width, image.height, spec.crop_pct)
        x0, y0, x1, y1 = view
        box_px = (x0 * image.width, y0 * image.height, x1 * image.width, y1 * image.height)
        fitted = image.resize((width, height), resampling, box=box_px)
    return np.array(fitted), np.array(view, np.float32)
