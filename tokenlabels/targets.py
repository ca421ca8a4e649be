"""From stored score maps to the targets of the crops that a student sees.

RoIAlign is linear and the classes that a map does not mention share one value, so only the U classes that it does
mention are interpolated: the targets of all K classes are never made.

Legend: B images, H x W cells, k stored classes per cell, K classes, U listed classes per image; R = 1 + N rows, the
image-level row first, then N = h * w tokens, row-major.
"""

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenlabels.affine import valid_tokens
from tokenlabels.boxes import check_boxes, image_in_map, valid_range
from tokenlabels.checks import FLOATS, Grid, check_device, check_grid, check_values, describe, is_integer
from tokenlabels.geometry import BORDER_TOLERANCE
from tokenlabels.precision import without_autocast, work_dtype
from tokenlabels.resample import affine_operator, box_operator
from tokenlabels.rules import calibrate, softmax_with_absent, spread
from tokenlabels.sparse_targets import TokenTargets
from tokenlabels.vocabulary import Vocabulary, find_vocabulary

__all__ = ["InterpolationRule", "TokenTargets", "affine_token_targets", "token_targets"]

InterpolationRule = Literal["logits", "probs"]

# What a chunk of maps may take on the CPU, so that it stays in the cache from one step to the next.
CHUNK_BYTES = 2**20

Resample = Callable[[slice, Tensor], Tensor]
"""Brings cells [b, H, W, C] of some images of the batch to rows [b, R, C]."""


def token_targets(
    scores: Tensor,
    classes: Tensor,
    boxes: Tensor,
    *,
    flip: Tensor | None = None,
    grid: Grid | None = (14, 14),
    num_classes: int,
    interpolate: InterpolationRule = "logits",
    tail: Tensor | None = None,
    views: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
) -> TokenTargets:
    """The soft targets of crops, by RoIAlign of their score maps (Token Labeling, section 3.2 and 4.1).

    RoIAlign is that of `torchvision.ops.roi_align(aligned=True, sampling_ratio=-1)`; the image-level row is RoIAlign
    of the same crop to 1 x 1.

    Two rules. "logits" is the papers': classes that a cell does not store have logit 0, logits are interpolated, then
    softmax. "probs" does not depend on the offset of the teacher's logits: the stored classes of a cell share 1 - tail
    by the softmax of their scores, the others share the tail evenly, and probabilities are interpolated.

    Args:
        scores: float16 or float32 [B, H, W, k], teacher logits.
        classes: integer [B, H, W, k], ids in 0..num_classes-1, distinct within a cell.
        boxes: float32 or float64 [B, 4], the crop in the map, xyxy in 0..1.
        flip: bool [B], mirrors left-right after cropping.
        grid: rows and columns of tokens (h, w); None makes the image-level row alone (the supervision of ReLabel).
        num_classes: K.
        interpolate: "logits" or "probs".
        tail: floating [B, H, W], softmax mass of the classes that are not stored, 0..1; read by "probs" alone, where
            None means that nothing is left for them.
        views: float32 or float64 [B, 4], the part of the image that each map covers; cells outside the image, the
            padding of letterboxed maps, are then not read. None reads all cells.
        vocabulary: the distinct classes of these maps, from `find_vocabulary`. None finds them here, for which the
            host waits where the maps are on an accelerator.

    Returns:
        Targets within 2e-6 of a float64 computation.

    Raises:
        ValueError: wrong shape, dtype or device; and, seen on the CPU alone, scores that are not finite, ids outside
            0..num_classes-1, boxes outside 0..1 or without area, tail outside 0..1. On an accelerator such a box gives
            targets of NaN, because looking at it would make the host wait.
    """
    _check_maps(scores, classes, tail, views, interpolate)
    boxes = _check_boxes(boxes, scores)
    if flip is not None and (flip.shape != boxes.shape[:1] or flip.dtype != torch.bool or flip.device != scores.device):
        raise ValueError(f"flip must be bool [{len(boxes)}] on {scores.device}, got {describe(flip)}")
    grid = None if grid is None else check_grid(grid)
    cells = _cells(scores)
    column, row, last_column, last_row = _readable_cells(views, scores).unbind(dim=1)
    low_x, low_y, high_x, high_y = boxes.unbind(dim=1)
    dtype = work_dtype()

    def along_x(num_tokens: int) -> Tensor:
        return box_operator(low_x, high_x, num_tokens, cells[1], column, last_column).to(dtype)

    def along_y(num_tokens: int) -> Tensor:
        return box_operator(low_y, high_y, num_tokens, cells[0], row, last_row).to(dtype)

    image_x, image_y = along_x(1), along_y(1)
    token_x, token_y = (None, None) if grid is None else (along_x(grid[1]), along_y(grid[0]))
    if token_x is not None and flip is not None:
        token_x = torch.where(flip[:, None, None], token_x.flip(1), token_x)

    def resample(part: slice, field_BHWC: Tensor) -> Tensor:
        field = field_BHWC.flatten(2)
        num_images, num_values = len(field_BHWC), field_BHWC.shape[3]
        image = image_x[part] @ (image_y[part] @ field).view(num_images, cells[1], num_values)
        if grid is None or token_x is None or token_y is None:
            return image
        bands = (token_y[part] @ field).view(num_images, grid[0], cells[1], num_values)
        return torch.cat([image, (token_x[part, None] @ bands).flatten(1, 2)], dim=1)

    every_row = torch.ones(len(scores), 1, dtype=torch.bool, device=scores.device)
    return _targets(scores, classes, tail, vocabulary, resample, every_row, grid, num_classes, interpolate)


def affine_token_targets(
    scores: Tensor,
    classes: Tensor,
    output_to_map: Tensor,
    *,
    grid: Grid = (14, 14),
    num_classes: int,
    interpolate: InterpolationRule = "logits",
    tail: Tensor | None = None,
    views: Tensor | None = None,
    region: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
) -> TokenTargets:
    """The soft targets of images that were also rotated, sheared or translated, or cropped beyond their map.

    Every token is the mean of sample points spread over it in the output image, as many as RoIAlign takes, each
    brought to the map by the affine map and interpolated there: without rotation and shear the targets are those of
    `token_targets`. A token whose centre falls outside the map (or outside the image with `views`, or outside
    `region`) is marked invalid and takes no part in the loss; the image-level row is the mean over the points that
    fall inside.

    Args:
        output_to_map: float32 or float64 [B, 2, 3], from the output image to the map, both 0..1, x first; see
            `tokenlabels.geometry.affine_in_map`.
        region: float32 or float64 [B, 4], xyxy in the map: what the output could show. Rotations of a crop that is
            already cut out show a fill colour outside it, though the image goes on there: give the crop. None is the
            whole map.

    The other arguments, the result and the errors are those of `token_targets`.
    """
    _check_maps(scores, classes, tail, views, interpolate)
    _check_coordinates("output_to_map", output_to_map, scores, 2, 3)
    check_values("output_to_map", output_to_map, output_to_map.isfinite(), "must be finite")
    grid = check_grid(grid)
    output_to_map = output_to_map.double()
    readable = _readable_cells(views, scores)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64, device=scores.device).expand(len(scores), 4)
    visible = whole if views is None else image_in_map(views.double())
    if region is not None:
        _check_coordinates("region", region, scores, 4)
        check_boxes("region", region, may_be_empty=False)
        inner = region.double()
        low, high = torch.maximum(visible, inner)[:, :2], torch.minimum(visible, inner)[:, 2:]
        visible = torch.cat([low, torch.maximum(low, high)], dim=1)
    image, image_inside = affine_operator(output_to_map, (1, 1), _cells(scores), visible, readable)
    tokens, _ = affine_operator(output_to_map, grid, _cells(scores), visible, readable)
    operator = torch.cat([image, tokens], dim=1).to(work_dtype())
    token_inside = valid_tokens(output_to_map, grid, visible).flatten(1)

    def resample(part: slice, field_BHWC: Tensor) -> Tensor:
        return operator[part] @ field_BHWC.flatten(1, 2)

    valid = torch.cat([image_inside, token_inside], dim=1)
    return _targets(scores, classes, tail, vocabulary, resample, valid, grid, num_classes, interpolate)


@torch.no_grad()
def _targets(
    scores: Tensor,
    classes: Tensor,
    tail: Tensor | None,
    vocabulary: Vocabulary | None,
    resample: Resample,
    valid: Tensor,
    grid: Grid | None,
    num_classes: int,
    interpolate: InterpolationRule,
) -> TokenTargets:
    """Resample the listed classes of a few images at a time and turn them into weights above a background."""
    if vocabulary is None:
        vocabulary = find_vocabulary(classes, num_classes)
    vocabulary.check(classes, num_classes)
    num_rows = 1 + (0 if grid is None else grid[0] * grid[1])
    weights = scores.new_empty(len(scores), num_rows, vocabulary.num_listed, dtype=torch.float32)
    background = scores.new_empty(len(scores), num_rows, dtype=torch.float32)
    valid = valid.expand(len(scores), num_rows).contiguous()
    is_listed = vocabulary.is_listed()
    with without_autocast(scores.device):
        for part in _chunks(scores, vocabulary.num_listed):
            slots = vocabulary.slots[part].long()
            if interpolate == "logits":
                logits = resample(part, spread(scores[part], slots, vocabulary.num_listed))
                rows = softmax_with_absent(logits, is_listed[part], num_classes - vocabulary.num_distinct[part])
            else:
                shares, rest = calibrate(scores[part], None if tail is None else tail[part], num_classes)
                above = resample(part, spread(shares - rest[..., None], slots, vocabulary.num_listed))
                rows = above, resample(part, rest[..., None])[..., 0]
            weights[part], background[part] = rows
    weights.masked_fill_(~valid[..., None], 0)
    background.masked_fill_(~valid, 0)
    return TokenTargets(vocabulary.classes, weights, background, valid, grid, num_classes)


def _chunks(scores: Tensor, num_listed: int) -> Iterator[slice]:
    """Few images at a time on the CPU, all of them elsewhere and in compiled code."""
    num_images, height, width, _ = scores.shape
    whole = scores.device.type != "cpu" or torch.compiler.is_compiling()
    step = num_images if whole else max(1, CHUNK_BYTES // (height * width * num_listed * 4))
    return (slice(start, min(start + step, num_images)) for start in range(0, num_images, step))


def _cells(scores: Tensor) -> Grid:
    return scores.shape[1], scores.shape[2]


def _readable_cells(views: Tensor | None, scores: Tensor) -> Tensor:
    """First column, first row, last column and last row of cells that show the image, int64 [B, 4]."""
    if views is not None:
        return valid_range(views, _cells(scores))
    height, width = _cells(scores)
    return torch.tensor([0, 0, width - 1, height - 1], device=scores.device).expand(len(scores), 4)


def _check_maps(
    scores: Tensor, classes: Tensor, tail: Tensor | None, views: Tensor | None, interpolate: InterpolationRule
) -> None:
    if scores.ndim != 4 or scores.dtype not in (torch.float16, *FLOATS) or 0 in scores.shape:
        raise ValueError(f"scores must be float16 [B, H, W, k] without empty sides, got {describe(scores)}")
    check_values("scores", scores, scores.isfinite(), "must be finite; verify the label set")
    if classes.shape != scores.shape or not is_integer(classes):
        raise ValueError(f"classes must be integer {list(scores.shape)} as the scores are, got {describe(classes)}")
    check_device("classes", classes, scores)
    if tail is not None:
        if tail.shape != scores.shape[:-1] or not tail.is_floating_point():
            raise ValueError(f"tail must be floating {list(scores.shape[:-1])}, got {describe(tail)}")
        check_device("tail", tail, scores)
        check_values("tail", tail, (tail >= 0) & (tail <= 1), "must be in 0..1; verify the label set")
    if views is not None:
        _check_coordinates("views", views, scores, 4)
    if interpolate not in get_args(InterpolationRule):
        raise ValueError(f"interpolate must be one of {get_args(InterpolationRule)}, got {interpolate!r}")


def _check_boxes(boxes: Tensor, scores: Tensor) -> Tensor:
    """Boxes in float64; on an accelerator, NaN where the CPU would refuse them."""
    _check_coordinates("boxes", boxes, scores, 4)
    low, high = boxes[:, :2], boxes[:, 2:]
    good = ((low >= -BORDER_TOLERANCE) & (high <= 1 + BORDER_TOLERANCE) & (low < high)).all(dim=1, keepdim=True)
    advice = "must be x0, y0, x1, y1 in 0..1 of the map with x0 < x1 and y0 < y1; affine_token_targets takes others"
    check_values("boxes", boxes, good.expand_as(boxes), advice)
    return boxes.double().masked_fill(~good, torch.nan)


def _check_coordinates(name: str, tensor: Tensor, scores: Tensor, *sides: int) -> None:
    """Refuse what is not float32 or float64 [B, *sides] on the device of the scores."""
    if tensor.shape != (len(scores), *sides) or tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32 {[len(scores), *sides]}, got {describe(tensor)}")
    check_device(name, tensor, scores)
