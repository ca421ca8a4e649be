import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

from tokenlabels.affine import (
    affine_from_boxes,
    affine_in_map,
    apply_affine,
    compose_affine,
    invert_affine,
    rotation,
    shear,
    token_centres,
    translation,
    valid_tokens,
)
from tokenlabels.boxes import box_in_image, box_in_map, image_in_map, mirror_boxes
from tokenlabels.geometry import cell_centres, valid_cells, view_center, view_letterbox, view_squash

few = settings(max_examples=40, deadline=None)
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
MIRROR = torch.tensor([[-1.0, 0, 1], [0, 1, 0]], dtype=torch.float64)
IDENTITY = torch.tensor([[1.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
FILL = -1000.0


@st.composite
def boxes_xyxy(draw: st.DrawFn, count: int = 3) -> Tensor:
    """float64 [count, 4], not empty, the upper left corner in -1..1."""
    corner, extent = st.floats(-1, 1), st.floats(0.05, 2)
    rows = [[draw(corner), draw(corner), draw(extent), draw(extent)] for _ in range(count)]
    x, y, width, height = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    return torch.stack([x, y, x + width, y + height], dim=-1)


@st.composite
def affine_maps(draw: st.DrawFn, count: int = 3) -> Tensor:
    """float64 [count, 2, 3]: what RandAugment and a crop with a flip make in any order, so never close to singular."""
    degrees, x, y = (
        torch.tensor([draw(st.floats(-limit, limit)) for _ in range(count)], dtype=torch.float64)
        for limit in (180, 0.45, 0.45)
    )
    flip = torch.tensor([draw(st.booleans()) for _ in range(count)])
    sheared = compose_affine(output_to_middle=shear(x, y, (30, 40)), middle_to_source=translation(y, x))
    turned = compose_affine(output_to_middle=rotation(degrees, (30, 40)), middle_to_source=sheared)
    return compose_affine(output_to_middle=turned, middle_to_source=affine_from_boxes(draw(boxes_xyxy(count)), flip))


def then(first: Tensor, second: Tensor) -> Tensor:
    return compose_affine(output_to_middle=first, middle_to_source=second)


def corners(boxes: Tensor) -> Tensor:
    return boxes.reshape(*boxes.shape[:-1], 2, 2)


@given(affine_maps(), st.tuples(st.floats(-1, 2), st.floats(-1, 2)))
@few
def test_apply_is_the_arithmetic_of_one_point_after_the_other(affine: Tensor, point: tuple[float, float]) -> None:
    result = apply_affine(affine, torch.tensor([point], dtype=torch.float64))
    for ((a, b, c), (d, e, f)), ((x, y),) in zip(affine.tolist(), result.tolist(), strict=True):
        assert x == pytest.approx(a * point[0] + b * point[1] + c, abs=1e-12)
        assert y == pytest.approx(d * point[0] + e * point[1] + f, abs=1e-12)


@given(affine_maps(), affine_maps())
@few
def test_composing_is_applying_one_after_the_other(first: Tensor, second: Tensor) -> None:
    points = token_centres((2, 3), dtype=torch.float64)
    torch.testing.assert_close(
        apply_affine(then(first, second), points), apply_affine(second, apply_affine(first, points))
    )


@given(affine_maps(), affine_maps(), affine_maps())
@few
def test_composition_is_associative(first: Tensor, second: Tensor, third: Tensor) -> None:
    torch.testing.assert_close(then(then(first, second), third), then(first, then(second, third)))


@given(affine_maps())
@few
def test_a_map_and_its_inverse_cancel(affine: Tensor) -> None:
    identity = IDENTITY.expand_as(affine)
    torch.testing.assert_close(then(affine, invert_affine(affine)), identity, atol=1e-9, rtol=0)
    torch.testing.assert_close(then(invert_affine(affine), affine), identity, atol=1e-9, rtol=0)


@given(boxes_xyxy())
@few
def test_the_map_of_a_crop_leads_from_corners_to_corners(boxes: Tensor) -> None:
    whole = corners(torch.tensor([0.0, 0, 1, 1], dtype=torch.float64))
    torch.testing.assert_close(apply_affine(affine_from_boxes(boxes), whole), corners(boxes))
    flipped = affine_from_boxes(boxes, torch.tensor([True, False, True]))
    x0, y0, x1, y1 = boxes.unbind(-1)
    exchanged = torch.stack([x1, y0, x0, y1], dim=-1)
    exchanged[1] = boxes[1]
    torch.testing.assert_close(apply_affine(flipped, whole), corners(exchanged))


@given(boxes_xyxy(), boxes_xyxy())
@few
def test_maps_of_crops_compose_as_boxes_do(inner: Tensor, outer: Tensor) -> None:
    composed = then(affine_from_boxes(inner), affine_from_boxes(outer))
    torch.testing.assert_close(composed, affine_from_boxes(box_in_image(inner, outer)))
    torch.testing.assert_close(
        affine_in_map(affine_from_boxes(inner), outer), affine_from_boxes(box_in_map(inner, outer))
    )


@given(boxes_xyxy())
@few
def test_flips(boxes: Tensor) -> None:
    """Twice is once not at all, and the mirrored crop is the crop of the mirrored image."""
    all_flipped = affine_from_boxes(boxes, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(then(MIRROR, all_flipped), affine_from_boxes(boxes))
    torch.testing.assert_close(then(affine_from_boxes(mirror_boxes(boxes)), MIRROR), all_flipped)
    torch.testing.assert_close(affine_from_boxes(boxes, torch.zeros(3, dtype=torch.bool)), affine_from_boxes(boxes))


@given(affine_maps(), boxes_xyxy())
@few
def test_the_way_into_a_map_is_the_inverse_of_its_view(affine: Tensor, views: Tensor) -> None:
    torch.testing.assert_close(affine_in_map(affine, views), then(affine, invert_affine(affine_from_boxes(views))))


SIZES_PX = [(30, 40), (40, 30), (32, 32), (7, 51)]
OPERATIONS: dict[str, tuple[Callable[..., Image.Image], float, Callable[[Tensor, tuple[int, int]], Tensor]]] = {
    "rotate": (auto_augment.rotate, 30.0, rotation),
    "rotate-far": (auto_augment.rotate, -117.0, rotation),
    "rotate-90": (auto_augment.rotate, 90.0, rotation),
    "rotate-180": (auto_augment.rotate, 180.0, rotation),
    "shear_x": (auto_augment.shear_x, 0.3, lambda x, size_px: shear(x, torch.zeros_like(x), size_px)),
    "shear_x-negative": (auto_augment.shear_x, -0.21, lambda x, size_px: shear(x, torch.zeros_like(x), size_px)),
    "shear_y": (auto_augment.shear_y, 0.17, lambda y, size_px: shear(torch.zeros_like(y), y, size_px)),
    "translate_x_rel": (auto_augment.translate_x_rel, 0.45, lambda x, _: translation(x, torch.zeros_like(x))),
    "translate_y_rel": (auto_augment.translate_y_rel, -0.13, lambda y, _: translation(torch.zeros_like(y), y)),
}


def coordinate_images(size_px: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Pictures of which every pixel holds the x, and the y, of its centre, in 0..1."""
    height, width = size_px
    x, y = cell_centres(view_squash(), size_px)
    x, y = (np.broadcast_to(axis, (height, width)).astype(np.float32) for axis in (x[None, :], y[:, None]))
    return Image.fromarray(x), Image.fromarray(y)


def assert_source_of_pixels(pictures: list[NDArray[np.float32]], affine: Tensor, size_px: tuple[int, int]) -> None:
    """The pixels of transformed `coordinate_images` name their source, or are filled, as the affine map says."""
    height, width = size_px
    points = apply_affine(affine, token_centres(size_px, dtype=affine.dtype)).reshape(height, width, 2).numpy()
    seen = np.stack(pictures, axis=-1)
    # Away from the border of the source by more than half a pixel Pillow has neighbours to interpolate.
    inner = (np.abs(points - 0.5) < 0.5 - 0.51 / np.array([width, height])).all(axis=-1)
    assert inner.sum() >= 8
    np.testing.assert_allclose(seen[inner], points[inner], atol=2e-6)
    on_border = (np.abs(np.abs(points - 0.5) - 0.5) < 1e-5).any(axis=-1)
    np.testing.assert_array_equal(
        (seen[..., 0] > FILL / 2)[~on_border], valid_tokens(affine, size_px).numpy()[~on_border]
    )


@pytest.mark.parametrize("size_px", SIZES_PX, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(("operation", "value", "ours"), OPERATIONS.values(), ids=OPERATIONS.keys())
def test_operations_are_those_of_timm(
    operation: Callable[..., Image.Image],
    value: float,
    ours: Callable[[Tensor, tuple[int, int]], Tensor],
    size_px: tuple[int, int],
) -> None:
    pictures = [
        np.asarray(operation(picture, value, resample=Image.Resampling.BILINEAR, fillcolor=FILL))
        for picture in coordinate_images(size_px)
    ]
    assert_source_of_pixels(pictures, ours(torch.tensor(value, dtype=torch.float64), size_px), size_px)


def test_two_operations_in_a_row_are_composed_the_last_one_first() -> None:
    size_px = (40, 48)
    options: dict[str, Any] = {"resample": Image.Resampling.BILINEAR, "fillcolor": FILL}
    sheared = [auto_augment.shear_x(picture, 0.2, **options) for picture in coordinate_images(size_px)]
    turned = [np.asarray(auto_augment.rotate(picture, 25, **options)) for picture in sheared]
    twenty_five, fifth = (torch.tensor(value, dtype=torch.float64) for value in (25, 0.2))
    turn, slant = rotation(twenty_five, size_px), shear(fifth, torch.zeros_like(fifth), size_px)
    centres, seen = token_centres(size_px, dtype=torch.float64), np.stack(turned, axis=-1)
    points = apply_affine(then(turn, slant), centres).reshape(*size_px, 2).numpy()
    # At the borders of the source and of the picture in the middle, Pillow mixes the filling in.
    at_border = np.zeros(size_px, bool)
    for affine in (turn, then(turn, slant)):
        distance = (apply_affine(affine, centres) - 0.5).abs().reshape(*size_px, 2) - 0.5
        at_border |= (distance.abs() < 1.5 / min(size_px)).any(dim=-1).numpy()
    # What the first operation has pushed out is lost to the second: a token is valid after both if it is after each.
    valid = (valid_tokens(turn, size_px) & valid_tokens(then(turn, slant), size_px)).numpy()
    assert (valid & ~at_border).mean() > 0.4
    assert (~valid & ~at_border).mean() > 0.05
    assert (valid_tokens(then(turn, slant), size_px).numpy() & ~valid & ~at_border).any()
    np.testing.assert_array_equal((seen[..., 0] > FILL / 2)[~at_border], valid[~at_border])
    np.testing.assert_allclose(seen[valid & ~at_border], points[valid & ~at_border], atol=1e-5)


def test_nothing_happens_for_zeros() -> None:
    zeros = torch.zeros(2, 3)
    for affine in (rotation(zeros, (3, 5)), shear(zeros, zeros, (3, 5)), translation(zeros, zeros)):
        torch.testing.assert_close(affine, IDENTITY.float().expand(2, 3, 2, 3), rtol=0, atol=0)


@given(grids)
@few
def test_token_centres_are_those_of_cells(grid: tuple[int, int]) -> None:
    x, y = cell_centres(view_squash(), grid)
    expected = [(column, row) for row in y for column in x]
    np.testing.assert_allclose(token_centres(grid, dtype=torch.float64).numpy(), np.array(expected), atol=1e-12)


@given(affine_maps(count=2), boxes_xyxy(count=2), grids)
@few
def test_valid_tokens_are_those_of_one_token_after_the_other(
    affine: Tensor, region: Tensor, grid: tuple[int, int]
) -> None:
    inside = valid_tokens(affine, grid)
    inside_region = valid_tokens(affine, grid, region)
    assert inside.shape == inside_region.shape == (2, *grid)
    for image, row, column in itertools.product(range(2), range(grid[0]), range(grid[1])):
        x_out, y_out = (column + 0.5) / grid[1], (row + 0.5) / grid[0]
        x, y = (a * x_out + b * y_out + c for a, b, c in affine[image].tolist())
        left, top, right, bottom = region[image].tolist()
        to_borders = [x, x - 1, x - left, x - right, y, y - 1, y - top, y - bottom]
        if min(abs(distance) for distance in to_borders) < 2e-6:
            continue
        within = 0 < x < 1 and 0 < y < 1
        assert inside[image, row, column] == within
        assert inside_region[image, row, column] == (within and left < x < right and top < y < bottom)


@pytest.mark.parametrize(
    "view",
    [view_squash(), view_center(50, 30, 0.9), view_letterbox(50, 30, (64, 64)), view_letterbox(9, 60, (64, 64))],
    ids=["squash", "center", "wide", "tall"],
)
def test_a_map_as_its_own_output_has_the_valid_cells_of_its_view(view: tuple[float, ...]) -> None:
    views = torch.tensor([view])
    expected = torch.from_numpy(valid_cells(np.array(view, np.float32), (7, 5)))
    torch.testing.assert_close(valid_tokens(affine_from_boxes(views), (7, 5))[0], expected)
    output_to_map = affine_in_map(affine_from_boxes(views), views)
    torch.testing.assert_close(valid_tokens(output_to_map, (7, 5), image_in_map(views))[0], expected)


@given(affine_maps(), st.integers(1, 300), st.integers(1, 300), grids)
@few
def test_valid_in_the_image_and_valid_in_a_letterboxed_map_are_one(
    affine: Tensor, width: int, height: int, grid: tuple[int, int]
) -> None:
    view = torch.tensor(view_letterbox(width, height, (448, 448)), dtype=torch.float64)
    points = apply_affine(affine, token_centres(grid, dtype=torch.float64))
    decided = ((points.abs() > 1e-3) & ((points - 1).abs() > 1e-3)).all(-1).reshape(-1, *grid)
    in_map = valid_tokens(affine_in_map(affine, view), grid, image_in_map(view))
    assert torch.equal(in_map[decided], valid_tokens(affine, grid)[decided])


@pytest.mark.parametrize("flip", [False, True], ids=["upright", "flipped"])
def test_centres_on_the_border_are_inside_in_float32(flip: bool) -> None:
    """A crop that reaches over the image by half a token on all sides, at places where float32 rounds."""
    for tokens in range(2, 60):
        overhang = 0.5 / (tokens - 1)
        boxes = torch.tensor([[-overhang, -overhang, 1 + overhang, 1 + overhang]])
        assert valid_tokens(affine_from_boxes(boxes, torch.tensor([flip])), (tokens, tokens)).all()


def test_a_token_of_the_filling_is_invalid_though_the_image_goes_on_there() -> None:
    """A crop of the left half, moved by half its width: the right half of the output is filled, not the image."""
    crop = torch.tensor([0.0, 0.0, 0.5, 1.0])
    moved = then(translation(torch.tensor(0.5), torch.tensor(0.0)), affine_from_boxes(crop))
    assert valid_tokens(moved, (1, 4)).all()
    assert valid_tokens(moved, (1, 4), crop).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_any_leading_dimensions_and_the_same_dtype(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    boxes = torch.tensor([0.2, 0.1, 0.4, 0.9], dtype=dtype).expand(*leading, 4)
    value = torch.full(leading, 0.25, dtype=dtype)
    flip = torch.ones(leading, dtype=torch.bool)
    affine = affine_from_boxes(boxes, flip)
    one = affine_from_boxes(torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=dtype))
    for result in (
        affine,
        rotation(value, (3, 4)),
        shear(value, -value, (3, 4)),
        translation(value, value),
        then(affine, one),
        then(one, affine),
        invert_affine(affine),
        affine_in_map(affine, boxes),
        affine_in_map(one, boxes),
    ):
        assert (result.dtype, result.shape) == (dtype, (*leading, 2, 3))
    points = apply_affine(affine, token_centres((2, 2), dtype=dtype))
    assert (points.dtype, points.shape) == (dtype, (*leading, 4, 2))
    assert valid_tokens(affine, (4, 5)).shape == valid_tokens(one, (4, 5), boxes).shape == (*leading, 4, 5)


GOOD = IDENTITY.float().expand(2, 2, 3)
BOXES = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.0, 0.5, 1.0]])
FLAT = affine_from_boxes(torch.tensor([0.2, 0.1, 0.2, 0.9]))
TWO = torch.zeros(2)

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "shape": (
        lambda: invert_affine(GOOD[..., :2]),
        r"affine must be affine maps \[..., 2, 3\], got float32 \[2, 2, 2\]",
    ),
    "dtype": (lambda: invert_affine(GOOD.half()), "affine must be float32 or float64, got float16"),
    "nan": (lambda: invert_affine(GOOD * math.nan), "affine must be finite, got 12 values that are not"),
    "singular": (lambda: invert_affine(FLAT), "affine must be invertible, got .* a box without width or height"),
    "batch": (lambda: then(GOOD, GOOD[:1]), r"equal leading dimensions.*\[2, 2, 3\] and \[1, 2, 3\]"),
    "dtypes": (lambda: then(GOOD, GOOD.double()), "output_to_middle and middle_to_source must share dtype"),
    "points": (lambda: apply_affine(GOOD, torch.zeros(2, 5, 3)), r"points_xy must be \[..., P, 2\]"),
    "points-dtype": (lambda: apply_affine(GOOD, token_centres((2, 2), dtype=torch.float64)), "share dtype"),
    "points-batch": (lambda: apply_affine(GOOD, torch.zeros(3, 5, 2)), "affine and points_xy must have equal leading"),
    "views-batch": (lambda: affine_in_map(GOOD, BOXES[:1]), "output_to_image and views must have equal leading"),
    "empty-view": (lambda: affine_in_map(GOOD, 0 * BOXES), "views must be finite with x0 < x1"),
    "region": (lambda: valid_tokens(GOOD, (2, 2), BOXES[:, [2, 1, 0, 3]]), "region must be finite with x0 <= x1"),
    "region-batch": (lambda: valid_tokens(GOOD, (2, 2), BOXES[:1]), "output_to_source and region must have equal"),
    "grid": (lambda: token_centres((2, 0)), "grid must be two positive integers"),
    "flip-dtype": (lambda: affine_from_boxes(BOXES, TWO), r"flip must be bool \[2\] on cpu .* got float32 \[2\]"),
    "flip-batch": (lambda: affine_from_boxes(BOXES, TWO[:1].bool()), r"flip must be bool \[2\].* got bool \[1\]"),
    "degrees": (lambda: rotation(TWO.long(), (3, 4)), "degrees must be float32 or float64"),
    "degrees-nan": (lambda: rotation(TWO * math.nan, (3, 4)), "degrees must be finite, got 2 values"),
    "size": (lambda: rotation(TWO, (3, 0)), r"size_px must be two positive integers \(rows, columns\), got \(3, 0\)"),
    "pair": (lambda: shear(TWO, TWO[:1], (3, 4)), "x and y must share shape.*give zeros"),
    "pair-dtype": (lambda: translation(TWO, TWO.double()), "x and y must share shape, dtype and device"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_makes_no_sense_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_composition_asks_for_names() -> None:
    with pytest.raises(TypeError):
        compose_affine(GOOD, GOOD)  # type: ignore[misc]


def every_function(boxes: Tensor, flip: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    cropped = affine_from_boxes(boxes, flip)
    turned = then(rotation(100 * value, (30, 40)), cropped)
    slanted = then(shear(value, -value, (30, 40)), then(translation(value, value), turned))
    in_map = affine_in_map(slanted, boxes)
    return in_map, invert_affine(in_map), valid_tokens(in_map, (14, 13), image_in_map(boxes))


EVERY_ARGUMENT = (BOXES, torch.tensor([True, False]), torch.tensor([0.3, -0.2]))


def test_compiled_and_under_autocast_nothing_changes() -> None:
    expected = every_function(*EVERY_ARGUMENT)
    compiled = torch.compile(every_function, backend="eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_autocast = every_function(*EVERY_ARGUMENT)
    torch.testing.assert_close(compiled(*EVERY_ARGUMENT), expected, rtol=0, atol=0)
    torch.testing.assert_close(in_autocast, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_cuda_device_gives_the_same_and_is_not_waited_for(cuda: torch.device) -> None:
    arguments = [argument.to(cuda) for argument in EVERY_ARGUMENT]
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = every_function(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(tuple(tensor.cpu() for tensor in there), every_function(*EVERY_ARGUMENT))
