"""From stored score maps to the targets of the crops that a student sees.

RoIAlign is linear and the classes that a map does not mention share one value, so only the U classes that it does
mention are interpolated: the targets of all K classes are never made.

Legend: B images, H x W cells, k stored classes per cell, K classes, U listed classes per image; R = 1 + N rows, the
image-level row first, then N = h * w tokens, row-major.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tokenlabels.affine import valid_tokens
from tokenlabels.boxes import check_flip, valid_range
from tokenlabels.checks import Grid, check_count, check_grid
from tokenlabels.precision import without_autocast, work_dtype
from tokenlabels.resample import affine_operator, box_operator
from tokenlabels.rules import calibrate, softmax_with_absent, spread
from tokenlabels.sparse_targets import TokenTargets
from tokenlabels.target_inputs import (
    InterpolationRule,
    check_affines,
    check_crops,
    check_maps,
    visible_part,
)
from tokenlabels.vocabulary import Vocabulary, find_vocabulary

__all__ = ["InterpolationRule", "TokenTargets", "affine_token_targets", "token_targets"]

# What a chunk of maps may take on the CPU, so that it stays in the cache from one step to the next.
CHUNK_BYTES = 2**20

# What the operators of affine maps may take at a time, [N, H * W] for every image.
CPU_OPERATOR_BYTES, ACCELERATOR_OPERATOR_BYTES = 2**24, 2**28

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
        boxes: float32 or float64 [B, 4], the crop in the map, xyxy in 0..1; with `views`, within the image.
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
        Targets within 2e-6 of a float64 computation, for scores up to about 50; float32 has no finer steps beyond.

    Raises:
        ValueError: wrong shape, dtype or device; and, seen on the CPU outside compiled code alone, scores that are not
            finite, ids outside 0..num_classes-1, boxes outside 0..1 (or the image) or without area, tail outside 0..1,
            a vocabulary of other maps. Elsewhere looking at values would make the host wait, or break the graph; such
            a box gives targets of NaN there.
    """
    check_maps(scores, classes, tail, views, interpolate)
    boxes = check_crops(boxes, visible_part(views, scores), scores)
    if flip is not None:
        check_flip(flip, boxes)
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

    Every token is the mean of sample points spread over it in the output image, each brought to the map by the affine
    map and interpolated there. They are as many as RoIAlign takes, but no more than for an output that shows the whole
    map: crops and flips alone give the targets of `token_targets`, unless the extent of a token is a whole number of
    cells and the rounding of the map decides how many samples it takes.

    A token whose centre falls outside the map (or outside the image with `views`, or outside `region`) is marked
    invalid and takes no part in the loss; the image-level row is the mean over the points that fall inside.

    Args:
        output_to_map: float32 or float64 [B, 2, 3], from the output image to the map, both 0..1, x first; see
            `tokenlabels.geometry.affine_in_map`.
        region: float32 or float64 [B, 4], xyxy in the map: what the output could show. Rotations of a crop that is
            already cut out show a fill colour outside it, though the image goes on there: give the crop. None is the
            whole map.

    The other arguments, the result and the errors are those of `token_targets`.
    """
    check_maps(scores, classes, tail, views, interpolate)
    output_to_map, region, good = check_affines(output_to_map, region, views, scores)
    grid, cells = check_grid(grid), _cells(scores)
    readable, visible = _readable_cells(views, scores), visible_part(views, scores)
    if region is not None:
        low, high = torch.maximum(visible, region)[:, :2], torch.minimum(visible, region)[:, 2:]
        visible = torch.cat([low, torch.maximum(low, high)], dim=1)
    image, image_inside = affine_operator(output_to_map, (1, 1), cells, visible, readable)

    def resample(part: slice, field_BHWC: Tensor) -> Tensor:
        tokens, _ = affine_operator(output_to_map[part], grid, cells, visible[part], readable[part])
        operator = torch.cat([image[part], tokens], dim=1).to(field_BHWC.dtype)
        return operator @ field_BHWC.flatten(1, 2)

    # What is no number shows in the targets; leaving it out of the loss would hide it.
    token_inside = valid_tokens(output_to_map, grid, visible).flatten(1)
    valid = torch.cat([image_inside, token_inside], dim=1) | ~good
    operator_bytes = 8 * grid[0] * grid[1] * cells[0] * cells[1]
    return _targets(scores, classes, tail, vocabulary, resample, valid, grid, num_classes, interpolate, operator_bytes)


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
    operator_bytes: int = 0,
) -> TokenTargets:
    """Resample the listed classes of a few images at a time and turn them into weights above a background."""
    check_count("num_classes", num_classes)
    if not isinstance(vocabulary, Vocabulary | None):
        raise ValueError(f"vocabulary must come from find_vocabulary, got {type(vocabulary).__name__}")
    if vocabulary is None:
        vocabulary = find_vocabulary(classes, num_classes)
    else:
        vocabulary.check(classes, num_classes)
    num_rows = 1 + (0 if grid is None else grid[0] * grid[1])
    weights = scores.new_empty(len(scores), num_rows, vocabulary.num_listed, dtype=torch.float32)
    background = scores.new_empty(len(scores), num_rows, dtype=torch.float32)
    valid = valid.expand(len(scores), num_rows).contiguous()
    is_listed = vocabulary.is_listed()
    with without_autocast(scores.device):
        for part in _chunks(scores, vocabulary.num_listed, operator_bytes):
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


def _chunks(scores: Tensor, num_listed: int, operator_bytes: int) -> list[slice]:
    """Few images at a time; all of them in compiled code, and on an accelerator unless their operators are large."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    num_images, height, width, _ = scores.shape
    on_cpu = scores.device.type == "cpu"
    step = CHUNK_BYTES // (height * width * num_listed * 4) if on_cpu else num_images
    if operator_bytes:
        step = min(step, (CPU_OPERATOR_BYTES if on_cpu else ACCELERATOR_OPERATOR_BYTES) // operator_bytes)
    step = max(1, step)
    return [slice(start, start + step) for start in range(0, num_images, step)]


def _cells(scores: Tensor) -> Grid:
    return scores.shape[1], scores.shape[2]


def _readable_cells(views: Tensor | None, scores: Tensor) -> Tensor:
    """First column, first row, last column and last row of cells that show the image, int64 [B, 4]."""
    if views is not None:
        return valid_range(views, _cells(scores))
    height, width = _cells(scores)
    cells = (0, 0, width - 1, height - 1)
    return torch.stack([scores.new_full((len(scores),), cell, dtype=torch.int64) for cell in cells], dim=1)
