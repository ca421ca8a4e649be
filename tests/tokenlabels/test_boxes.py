from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms import RandomResizedCrop

from annotate.fit import ImageSpec, fit
from tokenlabels.boxes import box_in_image, box_in_map, image_in_map, mirror_boxes, valid_range
from tokenlabels.geometry import ResizeMode, valid_cells, view_center, view_letterbox, view_squash

few = settings(max_examples=40, deadline=None)
sides_px = st.integers(1, 4000)
DTYPES = [torch.float32, torch.float64]
RESIZE_MODES: list[ResizeMode] = ["squash", "center", "letterbox"]
# A crop in the upper right of a landscape image: no symmetry hides a mistake.
ASYMMETRIC = torch.tensor([[0.55, 0.1, 0.95, 0.3]])


@st.composite
def boxes_xyxy(draw: st.DrawFn, count: int = 3, reach: float = 1.0) -> Tensor:
    """float64 [count, 4], not empty, the upper left corner in -reach..reach."""
    corner, extent = st.floats(-reach, reach), st.floats(0.05, 2)
    rows = [[draw(corner), draw(corner), draw(extent), draw(extent)] for _ in range(count)]
    x, y, width, height = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    return torch.stack([x, y, x + width, y + height], dim=-1)


@st.composite
def boxes_px(draw: st.DrawFn, width: int, height: int) -> tuple[int, int, int, int]:
    """A box of whole pixels in an image."""
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))


def normalised(box_px: tuple[int, ...], width: int, height: int) -> Tensor:
    return torch.tensor(box_px, dtype=torch.float64) / torch.tensor([width, height, width, height])


def cut(image: np.ndarray, box: Tensor) -> np.ndarray:  # type: ignore[type-arg]
    """The pixels of an array [H, W] in a normalised box that lies on their borders."""
    height, width = image.shape
    x0, y0, x1, y1 = (box * torch.tensor([width, height, width, height])).round().int().tolist()
    return image[y0:y1, x0:x1]


def numbered_pixels(width: int, height: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.arange(height * width).reshape(height, width)


@given(boxes_xyxy(), boxes_xyxy())
@few
def test_box_in_map_is_the_arithmetic_of_one_number_after_the_other(boxes: Tensor, views: Tensor) -> None:
    result = box_in_map(boxes, views)
    for box, view, mapped in zip(boxes.tolist(), views.tolist(), result.tolist(), strict=True):
        for index in range(4):
            low, high = view[index % 2], view[index % 2 + 2]
            assert mapped[index] == pytest.approx((box[index] - low) / (high - low), abs=1e-9)


@given(boxes_xyxy(), boxes_xyxy())
@few
def test_image_to_map_and_back(boxes: Tensor, views: Tensor) -> None:
    torch.testing.assert_close(box_in_image(box_in_map(boxes, views), views), boxes)
    torch.testing.assert_close(box_in_map(box_in_image(boxes, views), views), boxes)


@given(st.data(), st.integers(1, 30), st.integers(1, 30))
@few
def test_crop_of_a_crop_of_pixels(data: st.DataObject, width: int, height: int) -> None:
    outer = data.draw(boxes_px(width, height))
    outer_width, outer_height = outer[2] - outer[0], outer[3] - outer[1]
    inner = normalised(data.draw(boxes_px(outer_width, outer_height)), outer_width, outer_height)
    image = numbered_pixels(width, height)
    outer_in_image = normalised(outer, width, height)
    twice = cut(cut(image, outer_in_image), inner)
    np.testing.assert_array_equal(cut(image, box_in_image(inner, outer_in_image)), twice)


@given(boxes_xyxy(), boxes_xyxy(), boxes_xyxy())
@few
def test_crops_of_crops_are_associative(inner: Tensor, middle: Tensor, outer: Tensor) -> None:
    torch.testing.assert_close(
        box_in_image(box_in_image(inner, middle), outer), box_in_image(inner, box_in_image(middle, outer))
    )


@given(st.data(), st.integers(1, 30), st.integers(1, 30))
@few
def test_mirrored_crop_is_the_crop_of_the_mirrored_image(data: st.DataObject, width: int, height: int) -> None:
    image, box = numbered_pixels(width, height), normalised(data.draw(boxes_px(width, height)), width, height)
    np.testing.assert_array_equal(cut(image[:, ::-1], mirror_boxes(box)), cut(image, box)[:, ::-1])


@given(boxes_xyxy(), boxes_xyxy())
@few
def test_mirroring_twice_and_on_both_sides_of_a_view(boxes: Tensor, views: Tensor) -> None:
    torch.testing.assert_close(mirror_boxes(mirror_boxes(boxes)), boxes)
    torch.testing.assert_close(
        box_in_map(mirror_boxes(boxes), mirror_boxes(views)), mirror_boxes(box_in_map(boxes, views))
    )


@pytest.mark.parametrize("resize", RESIZE_MODES)
@given(st.data(), st.integers(20, 60), st.integers(20, 60))
@settings(max_examples=15, deadline=None)
def test_a_marked_block_of_a_real_image_is_where_the_map_has_it(
    resize: ResizeMode, data: st.DataObject, width: int, height: int
) -> None:
    """Resized as the annotator does it: the marked pixels are those whose centres lie in the box."""
    box_px = data.draw(boxes_px(width, height))
    image = Image.new("RGB", (width, height), (0, 0, 0))
    image.paste((255, 255, 255), box_px)
    side = 97
    fitted, view = fit(image, ImageSpec((side, side), "nearest", resize, 0.9, (0, 0, 0)))
    x0, y0, x1, y1 = (box_in_map(normalised(box_px, width, height), torch.tensor(view).double()) * side).tolist()
    centres = np.arange(side) + 0.5
    inside = ((centres > y0) & (centres < y1))[:, None] & ((centres > x0) & (centres < x1))[None, :]
    # Where a centre lies on the border of the box, rounding decides.
    undecided = np.zeros((side, side), bool)
    undecided[(np.abs(centres - y0) < 1e-3) | (np.abs(centres - y1) < 1e-3), :] = True
    undecided[:, (np.abs(centres - x0) < 1e-3) | (np.abs(centres - x1) < 1e-3)] = True
    np.testing.assert_array_equal((fitted[..., 0] == 255)[~undecided], inside[~undecided])


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        pytest.param(view_squash(), (0, 0, 1, 1), id="squash"),
        pytest.param(view_center(500, 375, 0.875), (0, 0, 1, 1), id="center"),
        pytest.param(view_letterbox(200, 100, (64, 64)), (0, 0.25, 1, 0.75), id="letterbox wide"),
        pytest.param(view_letterbox(50, 200, (64, 64)), (0.375, 0, 0.625, 1), id="letterbox tall"),
    ],
)
def test_image_in_map_is_all_but_the_padding(view: tuple[float, ...], expected: tuple[float, ...]) -> None:
    torch.testing.assert_close(image_in_map(torch.tensor([view])), torch.tensor([expected], dtype=torch.float32))


@given(st.lists(st.tuples(sides_px, sides_px), min_size=1, max_size=5), st.integers(1, 24), st.integers(1, 24))
@settings(max_examples=100, deadline=None)
def test_valid_range_is_the_first_and_last_of_valid_cells(
    sizes: list[tuple[int, int]], num_rows: int, num_columns: int
) -> None:
    views = np.array([view_letterbox(*size, (num_rows * 16, num_columns * 16)) for size in sizes], np.float32)
    ranges = valid_range(torch.from_numpy(views), (num_rows, num_columns))
    assert (ranges.dtype, tuple(ranges.shape)) == (torch.int64, (len(sizes), 4))
    for view, (column, row, last_column, last_row) in zip(views, ranges.tolist(), strict=True):
        valid = valid_cells(view, (num_rows, num_columns))
        if valid.any():
            expected = np.zeros_like(valid)
            expected[row : last_row + 1, column : last_column + 1] = True
            np.testing.assert_array_equal(expected, valid)
        else:
            assert 0 <= column <= last_column < num_columns
            assert 0 <= row <= last_row < num_rows


@pytest.mark.parametrize(
    ("view", "grid", "expected"),
    [
        pytest.param((0, 0, 1, 1), (14, 18), (0, 0, 17, 13), id="everything"),
        pytest.param((0, -0.5, 1, 1.5), (8, 4), (0, 2, 3, 5), id="middle rows"),
        pytest.param((0, -12, 1, 13), (3, 3), (0, 1, 2, 1), id="thinner than a cell, odd rows"),
        pytest.param((0, -12, 1, 13), (4, 3), (0, 1, 2, 2), id="thinner than a cell, between two rows"),
        pytest.param((0, -0.25, 1, 1.25), (3, 1), (0, 0, 0, 2), id="centres on the border"),
    ],
)
def test_valid_range_by_hand(view: tuple[float, ...], grid: tuple[int, int], expected: tuple[int, ...]) -> None:
    views = torch.tensor([view], dtype=torch.float32)
    assert valid_range(views, grid)[0].tolist() == list(expected)


def test_valid_range_of_no_maps_is_empty() -> None:
    assert valid_range(torch.zeros(0, 4), (3, 3)).shape == (0, 4)


def iou(a: Tensor, b: Tensor) -> Tensor:
    return box_iou(a, b).diagonal()


def test_a_box_in_the_wrong_order_is_another_region() -> None:
    """Read as (top, left, bottom, right), the upper right of an image is its lower left."""
    exchanged = ASYMMETRIC[:, [1, 0, 3, 2]]
    assert iou(exchanged, ASYMMETRIC).item() == 0
    whole = torch.tensor(view_squash())
    assert iou(box_in_image(box_in_map(ASYMMETRIC, whole), whole), ASYMMETRIC).item() == 1


def test_a_map_of_the_centre_read_as_the_whole_image_shows_another_region() -> None:
    """What a crop's labels show when the view is forgotten, and what they show here: random crops of a photograph."""
    view = torch.tensor(view_center(500, 375, 0.875), dtype=torch.float64)
    torch.manual_seed(0)
    image = torch.zeros(1, 375, 500)
    tlhw = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(50)]
    boxes = torch.stack([normalised((left, top, left + w, top + h), 500, 375) for top, left, h, w in tlhw])
    forgotten = iou(box_in_image(boxes, view), boxes)
    assert forgotten.max() < 0.9
    assert forgotten.mean() < 0.6
    torch.testing.assert_close(iou(box_in_image(box_in_map(boxes, view), view), boxes), torch.ones(50).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("leading", "leading_views"), [((), ()), ((3,), ()), ((2, 3), (2, 3)), ((), (4,))], ids=str)
def test_any_leading_dimensions_and_the_same_dtype(
    leading: tuple[int, ...], leading_views: tuple[int, ...], dtype: torch.dtype
) -> None:
    boxes = torch.tensor([0.2, 0.1, 0.4, 0.9], dtype=dtype).expand(*leading, 4)
    views = torch.tensor([-0.5, 0, 1.5, 1], dtype=dtype).expand(*leading_views, 4)
    mapped = box_in_map(boxes, views)
    assert (mapped.dtype, mapped.shape) == (dtype, (*(leading or leading_views), 4))
    expected = torch.tensor([0.35, 0.1, 0.45, 0.9], dtype=dtype).expand_as(mapped)
    torch.testing.assert_close(mapped, expected)
    torch.testing.assert_close(box_in_image(mapped, views), boxes.expand_as(mapped))
    assert mirror_boxes(boxes).dtype == image_in_map(views).dtype == dtype


GOOD = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.0, 0.5, 1.0]])
NAN, INVERTED = GOOD.clone(), GOOD.clone()
NAN[1, 2] = float("nan")
INVERTED[1, 2] = 0.1

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no-boxes": (lambda: mirror_boxes(GOOD[:, :3]), r"boxes must be xyxy boxes \[..., 4\], got float32 \[2, 3\]"),
    "scalar": (lambda: mirror_boxes(torch.tensor(1.0)), "boxes must be xyxy boxes"),
    "half": (lambda: box_in_map(GOOD.half(), GOOD.half()), "must be float32 or float64, got float16"),
    "integers": (lambda: image_in_map(GOOD.long()), "views must be float32 or float64, got int64"),
    "nan": (lambda: box_in_map(NAN, GOOD), "boxes_in_image must be finite .* and 1 such of 2"),
    "inverted": (lambda: box_in_image(INVERTED, GOOD), "x0 <= x1 and y0 <= y1.*left, top, right, bottom"),
    "inverted-view": (lambda: box_in_map(GOOD, INVERTED), "views must be finite with x0 < x1 and y0 < y1"),
    "empty-view": (lambda: valid_range(torch.zeros(1, 4), (3, 3)), "views must be finite with x0 < x1"),
    "dtypes": (lambda: box_in_map(GOOD, GOOD.double()), "share dtype and device, got float32 .* and float64"),
    "device": (lambda: box_in_map(GOOD, GOOD.to("meta")), "share dtype and device, .* on meta"),
    "batch": (lambda: box_in_map(GOOD, GOOD[:1]), r"equal leading dimensions.*got \[2, 4\] and \[1, 4\]"),
    "one-view": (lambda: valid_range(GOOD[0], (3, 3)), r"views must be \[B, 4\], got float32 \[4\]"),
    "grid": (lambda: valid_range(GOOD, (0, 3)), "grid must be two positive integers"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_boxes_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def every_function(boxes: Tensor, views: Tensor) -> tuple[Tensor, ...]:
    mapped = box_in_map(boxes, views)
    return mapped, box_in_image(mapped, views), mirror_boxes(boxes), image_in_map(views), valid_range(views, (14, 18))


def test_compiled_and_under_autocast_nothing_changes() -> None:
    boxes, views = GOOD, torch.tensor([view_letterbox(200, 100, (64, 64)), view_squash()])
    expected = every_function(boxes, views)
    compiled = torch.compile(every_function, backend="eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_autocast = every_function(boxes, views)
    torch.testing.assert_close(compiled(boxes, views), expected, rtol=0, atol=0)
    torch.testing.assert_close(in_autocast, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_cuda_device_gives_the_same_and_is_not_waited_for(cuda: torch.device) -> None:
    boxes, views = GOOD, torch.tensor([view_letterbox(200, 100, (64, 64)), view_squash()])
    boxes_there, views_there = boxes.to(cuda), views.to(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = every_function(boxes_there, views_there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(tuple(tensor.cpu() for tensor in there), every_function(boxes, views))
