"""Everything geometric that happens to an image, as one affine map, and the tokens that it leaves without a picture.

An affine map [..., 2, 3] leads from a point (x, y) of the output image to the point of the source that is seen there:
source = map[..., :2] @ output + map[..., 2], both normalised to 0..1, x first. Leading dimensions, dtypes and
devices are as in `tokenlabels.boxes`. Sums of products are written out, because a matrix product would run in
half precision under autocast.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenlabels.boxes import check_alike, check_boxes, check_flip
from tokenlabels.checks import check_float, check_grid, check_tensor, describe, has_values
from tokenlabels.geometry import BORDER_TOLERANCE


def affine_from_boxes(boxes: Tensor, flip: Tensor | None = None) -> Tensor:
    """The maps of crops: the output shows the box, left and right exchanged where `flip` is true.

    Args:
        boxes: [..., 4], in 0..1 of the source.
        flip: bool [...] with the leading dimensions of `boxes`; None mirrors nothing.

    Returns:
        [..., 2, 3].
    """
    check_boxes("boxes", boxes)
    x0, y0, x1, y1 = boxes.unbind(-1)
    start_x, step_x = x0, x1 - x0
    if flip is not None:
        check_flip(flip, boxes)
        start_x, step_x = torch.where(flip, x1, x0), torch.where(flip, -step_x, step_x)
    none = torch.zeros_like(x0)
    return _from_rows((step_x, none, start_x), (none, y1 - y0, y0))


def rotation(degrees: Tensor, size_px: Sequence[int]) -> Tensor:
    """The maps of rotations about the centre, in pixels, as `PIL.Image.rotate` and timm's Rotate.

    Args:
        degrees: [...], counter-clockwise as one sees the picture.
        size_px: of the image, (H, W).

    Returns:
        [..., 2, 3].
    """
    check_float("degrees", degrees)
    _check_finite("degrees", degrees)
    aspect = _width_over_height(size_px)
    radians = torch.deg2rad(degrees)
    cos, sin = radians.cos(), radians.sin()
    x_by_y, y_by_x = -sin / aspect, sin * aspect
    return _from_rows((cos, x_by_y, (1 - cos - x_by_y) / 2), (y_by_x, cos, (1 - cos - y_by_x) / 2))


def shear(x: Tensor, y: Tensor, size_px: Sequence[int]) -> Tensor:
    """The maps of shears about the upper left corner, in pixels, as timm's ShearX (`y` all 0) and ShearY (`x` all 0).

    One after the other they are `compose_affine` of two; both at once are not the same.

    Args:
        x: [...], pixels that the source lies further right per pixel further down.
        y: [...], pixels that the source lies further down per pixel further right.
        size_px: of the image, (H, W).

    Returns:
        [..., 2, 3].
    """
    _check_pair(x, y)
    aspect = _width_over_height(size_px)
    one, none = torch.ones_like(x), torch.zeros_like(x)
    return _from_rows((one, x / aspect, none), (y * aspect, one, none))


def translation(x: Tensor, y: Tensor) -> Tensor:
    """The maps of translations, as timm's TranslateXRel and TranslateYRel: positive shares move it left and up.

    Args:
        x: [...], how far right the source lies, as a share of the width.
        y: [...], how far down, as a share of the height.

    Returns:
        [..., 2, 3].
    """
    _check_pair(x, y)
    one, none = torch.ones_like(x), torch.zeros_like(x)
    return _from_rows((one, none, x), (none, one, y))


def compose_affine(*, output_to_middle: Tensor, middle_to_source: Tensor) -> Tensor:
    """One map for two, named along the way of a point, which is against the order in which the images were made.

    Args:
        output_to_middle: [..., 2, 3], what happened to the image last.
        middle_to_source: [..., 2, 3], what happened before.

    Returns:
        [..., 2, 3], from output to source.
    """
    check_affine("output_to_middle", output_to_middle)
    check_affine("middle_to_source", middle_to_source)
    check_alike("output_to_middle", output_to_middle, "middle_to_source", middle_to_source, (2, 2))
    by_x, by_y, shift = middle_to_source.unbind(-1)
    product = by_x[..., None] * output_to_middle[..., :1, :] + by_y[..., None] * output_to_middle[..., 1:, :]
    return torch.cat([product[..., :2], product[..., 2:] + shift[..., None]], dim=-1)


def invert_affine(affine: Tensor) -> Tensor:
    """The maps [..., 2, 3] from source to output; one that squeezes the image into a line has none."""
    check_affine("affine", affine)
    (a, b, shift_x), (c, d, shift_y) = (row.unbind(-1) for row in affine.unbind(-2))
    determinant = a * d - b * c
    if has_values(affine) and bool((determinant == 0).any()):
        raise ValueError(
            f"affine must be invertible, got {affine[determinant == 0][0].tolist()}, which maps the image to a line;"
            " a box without width or height makes such a map"
        )
    a, b, c, d = d / determinant, -b / determinant, -c / determinant, a / determinant
    return _from_rows((a, b, -a * shift_x - b * shift_y), (c, d, -c * shift_x - d * shift_y))


def apply_affine(affine: Tensor, points_xy: Tensor) -> Tensor:
    """Where the source has the points of the output.

    Args:
        affine: [..., 2, 3].
        points_xy: [..., P, 2], x first, or [P, 2], the same points for all maps.

    Returns:
        [..., P, 2].
    """
    check_affine("affine", affine)
    check_tensor("points_xy", points_xy)
    if points_xy.ndim < 2 or points_xy.shape[-1] != 2:
        raise ValueError(f"points_xy must be [..., P, 2], got {describe(points_xy)}")
    check_alike("affine", affine, "points_xy", points_xy, (2, 2))
    by_x, by_y, shift = affine[..., None, :, :].unbind(-1)
    return points_xy[..., :1] * by_x + points_xy[..., 1:] * by_y + shift


def affine_in_map(output_to_image: Tensor, views: Tensor) -> Tensor:
    """The maps from output image to label map, where the label maps cover `views` of the images.

    Args:
        output_to_image: [..., 2, 3].
        views: [..., 4], in 0..1 of the image, neither empty nor inverted.

    Returns:
        [..., 2, 3].
    """
    check_affine("output_to_image", output_to_image)
    check_boxes("views", views, may_be_empty=False)
    check_alike("output_to_image", output_to_image, "views", views, (2, 1))
    origin = views[..., :2, None]
    extent = views[..., 2:, None] - origin
    return torch.cat([output_to_image[..., :2] / extent, (output_to_image[..., 2:] - origin) / extent], dim=-1)


def token_centres(
    grid: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The centres of the tokens of an image, row by row: [h * w, 2], x first, in 0..1 of the image."""
    num_rows, num_columns = check_grid(grid)
    x = (torch.arange(num_columns, device=device, dtype=dtype) + 0.5) / num_columns
    y = (torch.arange(num_rows, device=device, dtype=dtype) + 0.5) / num_rows
    return torch.stack([x.repeat(num_rows), y.repeat_interleave(num_columns)], dim=-1)


def valid_tokens(output_to_source: Tensor, grid: Sequence[int], region: Tensor | None = None) -> Tensor:
    """Which tokens of the output image show the source: true where the centre of the token lies inside.

    The source is the image or the map. An operation fills what lies outside its own input, though the image may go
    on there: after a crop, `region` is the crop, and a token is valid after several operations if it is after each.

    Args:
        output_to_source: [..., 2, 3].
        grid: rows and columns of tokens, (h, w).
        region: [..., 4] in 0..1 of the source: inside means inside this part of it. The padding of letterboxed maps
            is left out by `image_in_map(views)`.

    Returns:
        bool [..., h, w]. A centre on the very border counts as inside.
    """
    num_rows, num_columns = check_grid(grid)
    check_affine("output_to_source", output_to_source)
    centres = token_centres((num_rows, num_columns), device=output_to_source.device, dtype=output_to_source.dtype)
    points = apply_affine(output_to_source, centres)
    inside = _within(points, 0, 1)
    if region is not None:
        check_boxes("region", region)
        check_alike("output_to_source", output_to_source, "region", region, (2, 1))
        inside = inside & _within(points, region[..., None, :2], region[..., None, 2:])
    return inside.reshape(*inside.shape[:-1], num_rows, num_columns)


def check_affine(name: str, affine: Tensor) -> None:
    """Refuse maps of another shape or dtype; on the CPU, also what is not finite."""
    check_tensor(name, affine)
    if affine.ndim < 2 or affine.shape[-2:] != (2, 3):
        raise ValueError(f"{name} must be affine maps [..., 2, 3], got {describe(affine)}")
    check_float(name, affine)
    _check_finite(name, affine)


def _within(points_xy: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    inside: Tensor = (points_xy >= low - BORDER_TOLERANCE) & (points_xy <= high + BORDER_TOLERANCE)
    return inside.all(dim=-1)


def _from_rows(x: tuple[Tensor, Tensor, Tensor], y: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.stack([torch.stack(x, dim=-1), torch.stack(y, dim=-1)], dim=-2)


def _width_over_height(size_px: Sequence[int]) -> float:
    height, width = check_grid(size_px, "size_px")
    return width / height


def _check_pair(x: Tensor, y: Tensor) -> None:
    for name, tensor in (("x", x), ("y", y)):
        check_float(name, tensor)
        _check_finite(name, tensor)
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"x and y must share shape, dtype and device, got {describe(x)} and {describe(y)};"
            " give zeros for the one that is not wanted"
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    if has_values(tensor) and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {int((~tensor.isfinite()).sum())} values that are not")
