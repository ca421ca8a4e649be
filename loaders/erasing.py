"""Random Erasing (Zhong et al., arXiv 1708.04896), which others call CutOut, as timm does it: one box a sample.

Legend: B samples; [h, w] a grid of tokens.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from loaders.rand_augment import check_uniforms
from tokenlabels.checks import (
    check_generator,
    check_grid,
    check_share,
    check_tensor,
    describe,
    has_values,
    is_integer,
)

EraseMode = Literal["const", "pixel"]
"""What is put in the place of pixels: the mean colour (0 after normalisation), or noise from N(0, 1)."""

NUM_TRIES = 10
"""Boxes that do not fit into the image are drawn anew; after this many, nothing is erased."""

NUM_UNIFORMS = 1 + NUM_TRIES * 4
"""How many random numbers a sample takes: whether, then area, aspect, top and left of each try."""

MIN_AREA, MAX_AREA = 0.02, 1 / 3
"""Shares of the image."""

MIN_ASPECT = 0.3
"""Height over width; the largest is 1 over this."""


def draw_boxes(uniforms: Tensor, prob: float, size_px: Sequence[int]) -> Tensor:
    """The box that is erased of each sample.

    Args:
        uniforms: float64 [B, NUM_UNIFORMS] in 0..1 without 1, on the CPU.
        prob: probability that a sample is erased, 0..1.
        size_px: of the images, (H, W), pixels.

    Returns:
        int64 [B, 4], xyxy in pixels, x1 and y1 not inside; 0, 0, 0, 0 where nothing is erased.
    """
    check_uniforms(uniforms, NUM_UNIFORMS)
    check_share("prob", prob)
    height, width = check_grid(size_px, "size_px")
    area, aspect, top, left = uniforms[:, 1:].reshape(-1, NUM_TRIES, 4).unbind(2)
    area = (MIN_AREA + (MAX_AREA - MIN_AREA) * area) * (height * width)
    aspect = torch.exp(math.log(MIN_ASPECT) - 2 * math.log(MIN_ASPECT) * aspect)
    box_height, box_width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    y0 = (top * (height - box_height + 1)).floor()
    x0 = (left * (width - box_width + 1)).floor()
    fits = (box_width < width) & (box_height < height)
    first = fits.int().argmax(dim=1)
    boxes = torch.stack([x0, y0, x0 + box_width, y0 + box_height], dim=2)[torch.arange(len(first)), first]
    erased = fits.any(dim=1) & (uniforms[:, 0] < prob)
    return torch.where(erased[:, None], boxes, 0).long()


def erase(
    images: Tensor,
    boxes: Tensor,
    mode: EraseMode = "const",
    generator: torch.Generator | None = None,
    *,
    inplace: bool = False,
) -> Tensor:
    """The images without what their boxes cover. No device is waited for.

    With boxes on the CPU, noise is drawn for the samples that are erased, elsewhere for all.

    Args:
        images: floating point [B, C, H, W], normalised: mean 0, standard deviation 1.
        boxes: int64 [B, 4] of `draw_boxes`, on the device of the images.
        mode: see `EraseMode`.
        generator: of the noise, on the device of the images; None takes torch's own.
        inplace: overwrites `images`, which saves a copy.

    Returns:
        [B, C, H, W] of the same dtype.
    """
    _check_erase(images, boxes, mode, generator)
    if not inplace:
        images = images.clone()
    if not has_values(boxes):
        return images.copy_(_erased(images, boxes, mode, generator))
    rows = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero().flatten()
    part = _erased(images.index_select(0, rows), boxes.index_select(0, rows), mode, generator)
    return images.index_copy_(0, rows, part)


def erased_tokens(boxes: Tensor, size_px: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The tokens that lost more than half of their area.

    Args:
        boxes: int64 [B, 4] of `draw_boxes`.
        size_px: of the images, (H, W), pixels.
        grid: rows and columns of tokens, (h, w).

    Returns:
        bool [B, h, w], on the device of the boxes.
    """
    _check_boxes(boxes)
    height, width = check_grid(size_px, "size_px")
    num_rows, num_columns = check_grid(grid)
    x0, y0, x1, y1 = boxes.unbind(1)
    # Lengths in pixels / (rows or columns of the grid), so that whole numbers are exact.
    covered_y = _overlaps(y0 * num_rows, y1 * num_rows, height, num_rows)
    covered_x = _overlaps(x0 * num_columns, x1 * num_columns, width, num_columns)
    return 2 * covered_y[:, :, None] * covered_x[:, None, :] > height * width


def _overlaps(start: Tensor, stop: Tensor, cell: int, num_cells: int) -> Tensor:
    """Length of start..stop within each of a row of cells, int64 [B, num_cells]."""
    low = torch.arange(num_cells, device=start.device) * cell
    return (stop[:, None].minimum(low + cell) - start[:, None].maximum(low)).clamp_(min=0)


def _erased(images: Tensor, boxes: Tensor, mode: EraseMode, generator: torch.Generator | None) -> Tensor:
    height, width = images.shape[2:]
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    inside = (((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :])[:, None]
    if mode == "const":
        return images.masked_fill(inside, 0)
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return torch.where(inside, noise, images)


def _check_boxes(boxes: Tensor) -> None:
    check_tensor("boxes", boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not is_integer(boxes):
        raise ValueError(f"boxes must be int64 [B, 4] in pixels, got {describe(boxes)}")


def _check_erase(images: Tensor, boxes: Tensor, mode: EraseMode, generator: torch.Generator | None) -> None:
    check_tensor("images", images)
    _check_boxes(boxes)
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating point [B, C, H, W], got {describe(images)}")
    if len(boxes) != len(images) or boxes.device != images.device:
        raise ValueError(f"boxes must be [{len(images)}, 4] on {images.device}, got {describe(boxes)}")
    if mode not in get_args(EraseMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(EraseMode))}, got {mode!r}")
    check_generator(generator)
