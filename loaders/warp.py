"""Images seen through affine maps: one resampling for all geometric operations of a sample."""

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from loaders.color_ops import check_images
from tokenlabels.affine import check_affine
from tokenlabels.checks import check_tensor, describe


def warp(images: Tensor, affine: Tensor, fill: Tensor, rows: Tensor | None = None, *, inplace: bool = False) -> Tensor:
    """The images as their maps show them, bilinear as `PIL.Image.transform` with a fill colour.

    A pixel whose centre comes from outside the image is filled, without fading into it; inside, the outermost pixels
    go on to the border. Values are not rounded, where Pillow cuts off the fraction. No device is waited for.

    Args:
        images: float32 [B, 3, H, W].
        affine: float32 [B, 2, 3], from output to source, both in 0..1 (`tokenlabels.affine`).
        fill: float32 [3], colour of what lies outside, in the unit of the images.
        rows: int64 [n], the samples to resample, none twice; the others stay as they are. None takes all.
        inplace: overwrites `images`, which saves a copy.

    Returns:
        float32 [B, 3, H, W].
    """
    check_images(images)
    _check_map(images, affine, fill, rows)
    if rows is None:
        warped = _resample(images, affine, fill)
        return images.copy_(warped) if inplace else warped
    if not inplace:
        images = images.clone()
    return images.index_copy_(0, rows, _resample(images.index_select(0, rows), affine.index_select(0, rows), fill))


def _resample(images: Tensor, affine: Tensor, fill: Tensor) -> Tensor:
    num, _, height, width = images.shape
    # grid_sample counts -1..1 from border to border.
    grid = images.new_empty(num, height, width, 2)
    along_x, along_y = (
        torch.arange(1, 2 * size, 2, device=images.device, dtype=images.dtype) / size for size in (width, height)
    )
    inside = torch.ones_like(grid[..., 0], dtype=torch.bool)
    for axis in (0, 1):
        # Written out, because a matrix product could run in a narrower type, which cannot name a pixel.
        by_x, by_y, shift = affine[:, axis].unbind(1)
        from_x = by_x[:, None] * along_x + (2 * shift[:, None] - 1)
        source = from_x[:, None, :] + (by_y[:, None] * along_y)[:, :, None]
        grid[..., axis] = source
        inside.logical_and_(source >= -1).logical_and_(source < 1)
    sampled = grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(inside[:, None], sampled, fill[:, None, None], out=sampled)


def _check_map(images: Tensor, affine: Tensor, fill: Tensor, rows: Tensor | None) -> None:
    check_affine("affine", affine)
    check_tensor("fill", fill)
    for name, tensor, shape in (("affine", affine, (len(images), 2, 3)), ("fill", fill, (3,))):
        if tensor.dtype != torch.float32 or tensor.shape != shape or tensor.device != images.device:
            raise ValueError(f"{name} must be float32 {list(shape)} on {images.device}, got {describe(tensor)}")
    if rows is not None:
        check_tensor("rows", rows)
        if rows.dtype != torch.int64 or rows.ndim != 1 or rows.device != images.device:
            raise ValueError(f"rows must be int64 [n] on {images.device}, got {describe(rows)}")
