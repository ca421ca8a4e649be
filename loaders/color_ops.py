"""The colour operations of RandAugment on a batch, each sample with its own, as timm does them with Pillow.

Values stay whole numbers, rounded or cut off where Pillow does so on bytes. Every operation works on the samples
that share it, gathered into a tensor [n, 3, H, W] of their own that it may overwrite; `x` stands for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import equalize_image

from loaders.augment_ops import Op
from loaders.rand_augment import AugmentDraw
from tokenlabels.checks import check_tensor, describe


def apply_color(images: Tensor, draw: AugmentDraw, *, inplace: bool = False) -> Tensor:
    """The images after their colour operations, layer by layer. No device is waited for.

    AutoContrast may be one grey level above Pillow, which cuts off what rounding left a hair below a whole number;
    all else is equal to timm on bytes.

    Args:
        images: float32 [B, 3, H, W], RGB, whole numbers in 0..255.
        draw: of these B samples, on the device of the images.
        inplace: overwrites `images`, which saves a copy.

    Returns:
        float32 [B, 3, H, W], whole numbers in 0..255.
    """
    check_images(images)
    if len(draw) != len(images) or draw.color_rows.device != images.device:
        raise ValueError(
            f"draw must be of {len(images)} samples on {images.device}, got {len(draw)} on {draw.color_rows.device}"
        )
    if not inplace:
        images = images.clone()
    for layer, op, start, stop in draw.color_runs:
        rows = draw.color_rows[start:stop]
        argument = draw.arguments[:, layer].index_select(0, rows)[:, None, None, None]
        images.index_copy_(0, rows, _APPLY[op](images.index_select(0, rows), argument))
    return images


def check_images(images: Tensor) -> None:
    """Refuse what is not float32 [B, 3, H, W]."""
    check_tensor("images", images)
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be float32 [B, 3, H, W], got {describe(images)}")


def _auto_contrast(x: Tensor, _: Tensor) -> Tensor:
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    flat = high == low
    span = (high - low).masked_fill_(flat, 255)
    return x.sub_(low.masked_fill_(flat, 0)).mul_(255).div_(span).floor_()


def _equalize(x: Tensor, _: Tensor) -> Tensor:
    return x.copy_(equalize_image(x.to(torch.uint8)))


def _invert(x: Tensor, _: Tensor) -> Tensor:
    return x.neg_().add_(255)


def _posterize(x: Tensor, bits: Tensor) -> Tensor:
    step = torch.exp2(8 - bits.clamp(max=8)).round_()
    return x.div_(step).floor_().mul_(step)


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x < threshold, x, 255 - x)


def _solarize_add(x: Tensor, add: Tensor) -> Tensor:
    return torch.where(x < 128, (x + add).clamp_(max=255), x)


def _color(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(_grey(x), x, factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    # Whole numbers: the sum of a row is exact in float32, that of a large image is not, and a mean may end in .5.
    total = _grey(x).sum(dim=3, keepdim=True).long().sum(dim=2, keepdim=True)
    num_pixels = x.shape[2] * x.shape[3]
    mean = (2 * total + num_pixels).div_(2 * num_pixels, rounding_mode="floor")
    return _blend(mean.float(), x, factor)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 255).floor_()


def _sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Away from Pillow's SMOOTH filter, a mean in which the pixel itself counts 5 and its 8 neighbours 1; as there,
    the outermost pixels stay."""
    inner = x[:, :, 1:-1, 1:-1]
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    smooth = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth.add_(inner, alpha=4).div_(13).add_(0.5).floor_()
    inner.copy_(_blend(smooth, inner, factor))
    return x


def _grey(x: Tensor) -> Tensor:
    """Luma [n, 1, H, W] in Pillow's fixed-point weights; below 2 ** 24, so that float32 is exact."""
    red, green, blue = x[:, :, None].unbind(1)
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000).div_(0x10000).floor_()


def _blend(start: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """From `start` towards (and beyond) `x`, cut off as `PIL.Image.blend` does: product and sum rounded apart."""
    return (x - start).mul_(factor).add_(start).clamp_(0, 255).floor_()


_APPLY: dict[Op, Callable[[Tensor, Tensor], Tensor]] = {
    Op.AUTO_CONTRAST: _auto_contrast,
    Op.EQUALIZE: _equalize,
    Op.INVERT: _invert,
    Op.POSTERIZE: _posterize,
    Op.SOLARIZE: _solarize,
    Op.SOLARIZE_ADD: _solarize_add,
    Op.COLOR: _color,
    Op.CONTRAST: _contrast,
    Op.BRIGHTNESS: _brightness,
    Op.SHARPNESS: _sharpness,
}
