"""Boxes of a batch: crops of crops, crops seen from a map, mirror images, and the part of a map that shows its image.

Boxes are xyxy, normalised to 0..1 of the thing that their name says, x first: [..., 4] with any leading dimensions,
float32 or float64. What comes out has the dtype and the device of what goes in. Arguments have equal leading
dimensions, or one of them has none and counts for all. A view is a box too: the part of the image that a map covers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenlabels.checks import check_float, check_grid, check_tensor, describe, has_values
from tokenlabels.geometry import BORDER_TOLERANCE


def box_in_map(boxes_in_image: Tensor, views: Tensor) -> Tensor:
    """Boxes of an image, in 0..1 of the map that covers `views` of it. `box_in_image` is the way back.

    Args:
        boxes_in_image: [..., 4], in 0..1 of the image.
        views: [..., 4], in 0..1 of the image, neither empty nor inverted.

    Returns:
        [..., 4], outside 0..1 where a box reaches over the edge of the map.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU also inverted boxes and what is not finite.
    """
    check_boxes("boxes_in_image", boxes_in_image)
    check_boxes("views", views, may_be_empty=False)
    check_alike("boxes_in_image", boxes_in_image, "views", views, (1, 1))
    origin, extent = _origin_and_extent(views)
    return ((_corners(boxes_in_image) - origin) / extent).flatten(-2)


def box_in_image(boxes_in_map: Tensor, views: Tensor) -> Tensor:
    """Boxes of a map, in 0..1 of the image of which it covers `views`.

    Of crops it is the crop of a crop: `boxes_in_map` in 0..1 of an outer crop, `views` the outer crop in its image.

    Args:
        boxes_in_map: [..., 4], in 0..1 of the map.
        views: [..., 4], in 0..1 of the image, neither empty nor inverted.

    Returns:
        [..., 4].

    Raises:
        ValueError: as `box_in_map`.
    """
    check_boxes("boxes_in_map", boxes_in_map)
    check_boxes("views", views, may_be_empty=False)
    check_alike("boxes_in_map", boxes_in_map, "views", views, (1, 1))
    origin, extent = _origin_and_extent(views)
    return (origin + _corners(boxes_in_map) * extent).flatten(-2)


def mirror_boxes(boxes: Tensor) -> Tensor:
    """The same boxes [..., 4] in the image mirrored left-right."""
    check_boxes("boxes", boxes)
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([1 - x1, y0, 1 - x0, y1], dim=-1)


def image_in_map(views: Tensor) -> Tensor:
    """The box of a map that shows the image, in 0..1 of the map: all of it but for the padding of a letterbox.

    Args:
        views: [..., 4], in 0..1 of the image, neither empty nor inverted.

    Returns:
        [..., 4], clipped to 0..1.
    """
    check_boxes("views", views, may_be_empty=False)
    return _whole_image_in_map(views).clamp(0, 1)


def valid_range(views: Tensor, grid: Sequence[int]) -> Tensor:
    """The cells of maps that show the image, as first and last column and row; the device is not waited for.

    They are those of `tokenlabels.geometry.valid_cells`: the centre of the cell lies inside the image. An image
    so thin that it passes between the centres has none; here it keeps the cells nearest to its middle,
    so that no range is empty.

    Args:
        views: [B, 4], in 0..1 of the image, neither empty nor inverted.
        grid: rows and columns of cells, (H, W).

    Returns:
        int64 [B, 4]: first column, first row, last column, last row. The last ones are inside.
    """
    num_rows, num_columns = check_grid(grid)
    check_boxes("views", views, may_be_empty=False)
    if views.ndim != 2:
        raise ValueError(f"views must be [B, 4], got {describe(views)}")
    x0, y0, x1, y1 = _whole_image_in_map(views).unbind(-1)
    first_column, last_column = _cells_within(x0, x1, num_columns)
    first_row, last_row = _cells_within(y0, y1, num_rows)
    return torch.stack([first_column, first_row, last_column, last_row], dim=-1)


def _cells_within(low: Tensor, high: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """First and last of the cells along one side of maps whose centres lie in `low`..`high`, each [B]."""
    centres = (torch.arange(num_cells, device=low.device, dtype=low.dtype) + 0.5) / num_cells
    distance = (centres - (low + high)[:, None] / 2).abs()
    reach = torch.maximum((high - low)[:, None] / 2, distance.amin(dim=1, keepdim=True))
    inside = (distance <= reach + BORDER_TOLERANCE).to(torch.uint8)
    return inside.argmax(dim=1), num_cells - 1 - inside.flip(1).argmax(dim=1)


def _whole_image_in_map(views: Tensor) -> Tensor:
    """`box_in_map` of the box 0, 0, 1, 1, which would have to be copied to the device of the views."""
    origin, extent = _origin_and_extent(views)
    return (torch.cat([-origin, 1 - origin], dim=-2) / extent).flatten(-2)


def _origin_and_extent(views: Tensor) -> tuple[Tensor, Tensor]:
    """Upper left corner (x, y) and (width, height) of views, each [..., 1, 2]."""
    corners = _corners(views)
    origin = corners[..., :1, :]
    return origin, corners[..., 1:, :] - origin


def _corners(boxes: Tensor) -> Tensor:
    """Upper left and lower right corner, [..., 2, 2], x first."""
    return boxes.reshape(*boxes.shape[:-1], 2, 2)


def check_boxes(name: str, boxes: Tensor, *, may_be_empty: bool = True) -> None:
    """Refuse boxes of another shape or dtype; on the CPU, also inverted ones and what is not finite."""
    check_tensor(name, boxes)
    if boxes.ndim == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"{name} must be xyxy boxes [..., 4], got {describe(boxes)}")
    check_float(name, boxes)
    if not has_values(boxes):
        return
    extent = boxes[..., 2:] - boxes[..., :2]
    wrong = ~boxes.isfinite().all(-1) | ((extent < 0) if may_be_empty else (extent <= 0)).any(-1)
    if bool(wrong.any()):
        allowed = "x0 <= x1 and y0 <= y1" if may_be_empty else "x0 < x1 and y0 < y1"
        raise ValueError(
            f"{name} must be finite with {allowed}, got {boxes[wrong][0].tolist()}"
            f" and {int(wrong.sum())} such of {wrong.numel()}; the order is left, top, right, bottom"
        )


def check_flip(flip: Tensor, boxes: Tensor) -> None:
    """Refuse what is not one bool per box, on the device of the boxes."""
    check_tensor("flip", flip)
    if flip.dtype != torch.bool or flip.shape != boxes.shape[:-1] or flip.device != boxes.device:
        raise ValueError(
            f"flip must be bool {list(boxes.shape[:-1])} on {boxes.device} as the boxes are, got {describe(flip)}"
        )


def check_alike(name: str, tensor: Tensor, other_name: str, other: Tensor, ndims: tuple[int, int]) -> None:
    """Refuse two arguments of different dtypes, devices or leading dimensions, unless one of them has none of those.

    Args:
        name, other_name: what messages call them.
        tensor, other: the arguments.
        ndims: how many dimensions of each do not lead.
    """
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must share dtype and device,"
            f" got {describe(tensor)} and {describe(other)}; convert one with .to()"
        )
    leading, other_leading = tensor.shape[: tensor.ndim - ndims[0]], other.shape[: other.ndim - ndims[1]]
    if leading != other_leading and len(leading) and len(other_leading):
        raise ValueError(
            f"{name} and {other_name} must have equal leading dimensions, or one of them none,"
            f" got {list(tensor.shape)} and {list(other.shape)}"
        )
