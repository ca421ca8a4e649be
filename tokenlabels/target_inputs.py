"""What targets are made of: the checks of maps, crops and affine maps before anything is computed."""

from typing import Literal, get_args

import torch
from torch import Tensor

from tokenlabels.boxes import check_boxes, image_in_map
from tokenlabels.checks import FLOATS, check_device, check_tensor, check_values, describe, is_integer

InterpolationRule = Literal["logits", "probs"]
"""logits: the rule of the papers. probs: the calibrated one. See `tokenlabels.targets.token_targets`."""

# Crops come from float32 boxes and views: this much of the map is a fraction of a cell that nobody will see.
BOX_TOLERANCE = 1e-5

# No crop reaches that many times beyond its image; pixels do.
FARTHEST = 64


def visible_part(views: Tensor | None, scores: Tensor) -> Tensor:
    """The part of every map that shows its image, xyxy, float64 [B, 4]."""
    if views is not None:
        return image_in_map(views.double())
    return torch.stack([scores.new_full((len(scores),), side, dtype=torch.float64) for side in (0, 0, 1, 1)], dim=1)


def check_maps(
    scores: Tensor, classes: Tensor, tail: Tensor | None, views: Tensor | None, interpolate: InterpolationRule
) -> None:
    """Refuse maps whose parts do not fit each other, or hold what no teacher says."""
    check_tensor("scores", scores)
    check_tensor("classes", classes)
    if scores.ndim != 4 or scores.dtype not in (torch.float16, *FLOATS) or 0 in scores.shape:
        raise ValueError(f"scores must be float16 or float32 [B, H, W, k] without empty sides, got {describe(scores)}")
    check_values("scores", scores, torch.isfinite, "must be finite; verify the label set")
    if classes.shape != scores.shape or not is_integer(classes):
        raise ValueError(f"classes must be integer {list(scores.shape)} as the scores are, got {describe(classes)}")
    check_device("classes", classes, scores)
    if tail is not None:
        check_tensor("tail", tail)
        if tail.shape != scores.shape[:-1] or not tail.is_floating_point():
            raise ValueError(f"tail must be floating {list(scores.shape[:-1])}, got {describe(tail)}")
        check_device("tail", tail, scores)
        check_values("tail", tail, lambda mass: (mass >= 0) & (mass <= 1), "must be in 0..1; verify the label set")
    if views is not None:
        check_coordinates("views", views, scores, 4)
    if interpolate not in get_args(InterpolationRule):
        raise ValueError(f"interpolate must be one of {get_args(InterpolationRule)}, got {interpolate!r}")


def check_crops(boxes: Tensor, visible: Tensor, scores: Tensor) -> Tensor:
    """Boxes in float64; on an accelerator, NaN where the CPU would refuse them."""
    check_coordinates("boxes", boxes, scores, 4)
    low, high = boxes[:, :2], boxes[:, 2:]
    inside = (low >= visible[:, :2] - BOX_TOLERANCE) & (high <= visible[:, 2:] + BOX_TOLERANCE)
    good = (inside & (low < high)).all(dim=1, keepdim=True)
    advice = (
        "must be x0, y0, x1, y1 in 0..1 of the map (divide pixels by its sides) with x0 < x1 and y0 < y1, and within "
        "the image where views are given; affine_token_targets takes crops that reach beyond"
    )
    check_values("boxes", boxes, good.expand_as, advice)
    return boxes.double().masked_fill(~good, torch.nan)


def check_affines(
    output_to_map: Tensor, region: Tensor | None, views: Tensor | None, scores: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Affine maps and regions in float64, and which images have good ones, bool [B, 1].

    On an accelerator maps are NaN where the CPU would refuse them.
    """
    check_coordinates("output_to_map", output_to_map, scores, 2, 3)
    # In units of the image, of which a map can cover a small part.
    extent_xy = 1.0 if views is None else (views[:, 2:] - views[:, :2]).abs().clamp(max=1)[..., None]
    advice = "must be finite and normalised to 0..1 of the map (divide pixels by its sides; maps of a part: give views)"
    near = (output_to_map * extent_xy).abs() <= FARTHEST
    check_values("output_to_map", output_to_map, lambda _: near, advice)
    good = near.flatten(1).all(dim=1, keepdim=True)
    if region is not None:
        check_coordinates("region", region, scores, 4)
        check_boxes("region", region, may_be_empty=False)
        corners = region.reshape(-1, 2, 2).mT
        near_region = ((corners * extent_xy).abs() <= FARTHEST).mT.flatten(1)
        check_values("region", region, lambda _: near_region, advice)
        good = good & near_region.all(dim=1, keepdim=True) & (region[:, :2] < region[:, 2:]).all(dim=1, keepdim=True)
        region = region.double()
    return output_to_map.double().masked_fill(~good[..., None], torch.nan), region, good


def check_coordinates(name: str, tensor: Tensor, scores: Tensor, *sides: int) -> None:
    """Refuse what is not float32 or float64 [B, *sides] on the device of the scores."""
    check_tensor(name, tensor)
    if tensor.shape != (len(scores), *sides) or tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32 {[len(scores), *sides]}, got {describe(tensor)}")
    check_device(name, tensor, scores)
