import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as transforms

from annotate.fit import ImageSpec, fit
from tokenlabels import affine, boxes, geometry
from tokenlabels.geometry import (
    ResizeMode,
    affine_from_boxes,
    affine_in_map,
    apply_affine,
    box_in_map,
    cell_centres,
    image_in_map,
    letterbox_placement,
    token_centres,
    valid_cells,
    valid_tokens,
    view_center,
    view_letterbox,
    view_squash,
)

sides_px = st.integers(1, 4000)
canvases_hw = st.tuples(st.integers(1, 600), st.integers(1, 600))


def test_squash_shows_the_whole_image() -> None:
    assert view_squash() == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("width", "height", "crop_pct", "box_px"),
    [
        pytest.param(500, 375, 1.0, (62.5, 0, 437.5, 375), id="landscape"),
        pytest.param(375, 500, 1.0, (0, 62.5, 375, 437.5), id="portrait"),
        pytest.param(100, 100, 0.8, (10, 10, 90, 90), id="square"),
        pytest.param(200, 100, 0.875, (56.25, 6.25, 143.75, 93.75), id="landscape-timm-default"),
    ],
)
def test_center_is_the_square_in_the_middle(
    width: int, height: int, crop_pct: float, box_px: tuple[float, ...]
) -> None:
    view = np.array(view_center(width, height, crop_pct))
    np.testing.assert_allclose(view * [width, height, width, height], box_px, atol=1e-9)


@given(sides_px, sides_px, st.floats(0.05, 1.0))
@settings(max_examples=50, deadline=None)
def test_center_lies_inside_and_is_square_and_central(width: int, height: int, crop_pct: float) -> None:
    x0, y0, x1, y1 = view_center(width, height, crop_pct)
    assert min(x0, y0) >= 0
    assert max(x1, y1) <= 1
    assert (x1 - x0) * width == pytest.approx((y1 - y0) * height, rel=1e-9)
    assert (x1 - x0) * width == pytest.approx(min(width, height) * crop_pct, rel=1e-9)
    assert (x0 + x1, y0 + y1) == pytest.approx((1, 1))


@pytest.mark.parametrize("crop_pct", [0.0, -0.5, 1.01, float("nan")])
def test_center_refuses_shares_outside_0_to_1(crop_pct: float) -> None:
    with pytest.raises(ValueError, match="crop_pct must be above 0 and at most 1"):
        view_center(10, 10, crop_pct)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (-1, 5)])
def test_an_image_has_pixels(width: int, height: int) -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        view_center(width, height, 1.0)
    with pytest.raises(ValueError, match="at least one pixel"):
        view_letterbox(width, height, (10, 10))
    with pytest.raises(ValueError, match="canvas have at least one pixel"):
        letterbox_placement(10, 10, (height, width))


@given(sides_px, sides_px, canvases_hw)
@settings(max_examples=100, deadline=None)
def test_letterbox_keeps_aspect_touches_two_sides_and_is_central(
    width: int, height: int, canvas_hw: tuple[int, int]
) -> None:
    placed = letterbox_placement(width, height, canvas_hw)
    canvas_height, canvas_width = canvas_hw
    right = canvas_width - placed.left - placed.width
    below = canvas_height - placed.top - placed.height
    assert min(placed.left, placed.top, right, below) >= 0
    assert min(right + placed.left, below + placed.top) == 0
    assert 0 <= right - placed.left <= 1
    assert 0 <= below - placed.top <= 1
    scale = min(canvas_width / width, canvas_height / height)
    assert abs(placed.width - max(1, width * scale)) <= 0.5 + 1e-6
    assert abs(placed.height - max(1, height * scale)) <= 0.5 + 1e-6


@given(sides_px, sides_px, canvases_hw)
@settings(max_examples=100, deadline=None)
def test_letterbox_view_and_placement_agree_on_every_canvas_pixel(
    width: int, height: int, canvas_hw: tuple[int, int]
) -> None:
    """Canvas pixel -> image by the view, and back to the canvas by the placement, is where it began."""
    placed = letterbox_placement(width, height, canvas_hw)
    x, y = cell_centres(view_letterbox(width, height, canvas_hw), canvas_hw)
    np.testing.assert_allclose(placed.left + x * placed.width, np.arange(canvas_hw[1]) + 0.5, atol=1e-6)
    np.testing.assert_allclose(placed.top + y * placed.height, np.arange(canvas_hw[0]) + 0.5, atol=1e-6)


@given(
    st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
    st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
@settings(max_examples=50, deadline=None)
def test_cell_centres_go_to_the_image_and_back(
    corner: tuple[float, float], extent: tuple[float, float], grid: tuple[int, int]
) -> None:
    view = (*corner, corner[0] + extent[0], corner[1] + extent[1])
    x, y = cell_centres(view, grid)
    for column in range(grid[1]):
        assert (x[column] - view[0]) / (view[2] - view[0]) * grid[1] == pytest.approx(column + 0.5)
    for row in range(grid[0]):
        assert (y[row] - view[1]) / (view[3] - view[1]) * grid[0] == pytest.approx(row + 0.5)


@given(sides_px, sides_px, st.integers(1, 24), st.integers(1, 16))
@settings(max_examples=100, deadline=None)
def test_valid_cells_are_those_whose_centre_is_on_the_image(width: int, height: int, cells: int, cell_px: int) -> None:
    """Against whole-pixel arithmetic on the canvas, in half pixels so that centres are whole numbers."""
    side = cells * cell_px
    placed = letterbox_placement(width, height, (side, side))
    view = np.array(view_letterbox(width, height, (side, side)), np.float32)
    valid = valid_cells(view, (cells, cells))
    for row in range(cells):
        for column in range(cells):
            x2, y2 = (2 * column + 1) * cell_px, (2 * row + 1) * cell_px
            on_image = 2 * placed.left <= x2 <= 2 * (placed.left + placed.width) and 2 * placed.top <= y2 <= 2 * (
                placed.top + placed.height
            )
            assert valid[row, column] == on_image


@pytest.mark.parametrize("view", [view_squash(), view_center(500, 375, 0.9)], ids=["squash", "center"])
def test_without_padding_every_cell_is_valid(view: tuple[float, ...]) -> None:
    assert valid_cells(view, (18, 18)).all()


def test_a_wide_letterboxed_map_is_valid_in_the_middle_rows() -> None:
    valid = valid_cells(view_letterbox(200, 100, (64, 64)), (8, 4))
    assert valid.shape == (8, 4)
    assert valid.tolist() == [[False] * 4] * 2 + [[True] * 4] * 4 + [[False] * 4] * 2


def test_the_functions_on_batches_have_their_names_here_too() -> None:
    for name in set(geometry.__all__) - set(vars(geometry)):
        module = boxes if hasattr(boxes, name) else affine
        assert getattr(geometry, name) is getattr(module, name)
        assert getattr(geometry, name).__module__ == module.__name__
    with pytest.raises(AttributeError, match="has no attribute 'boxs'"):
        geometry.boxs  # noqa: B018


def test_views_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from tokenlabels.geometry import valid_cells, view_center"
    subprocess.run([sys.executable, "-c", code], check=True)


# A picture that says where everything is: red is 255 x and green 255 y. The map is made as the annotator makes it, from
# its own resized copy; the student sees a random crop. 12 tokens of 8 pixels, 16 cells of 8 pixels.
WIDTH_PX, HEIGHT_PX = 240, 160
TOKENS, CELLS, PATCH_PX = 12, 16, 8
RESIZE_MODES: list[ResizeMode] = ["squash", "center", "letterbox"]


def position_picture() -> Image.Image:
    x, y = cell_centres(view_squash(), (HEIGHT_PX, WIDTH_PX))
    rgb = np.stack([*np.meshgrid(255 * x, 255 * y), np.zeros((HEIGHT_PX, WIDTH_PX))], axis=-1)
    return Image.fromarray(np.rint(rgb).astype(np.uint8))


def known_map(resize: ResizeMode) -> tuple[Tensor, Tensor]:
    """Mean position of every cell, float32 [2, 16, 16] (x, y), and the view [4]."""
    side = CELLS * PATCH_PX
    pixels, view = fit(position_picture(), ImageSpec((side, side), "bilinear", resize, 0.8, (0, 0, 0)))
    cells = pixels[..., :2].reshape(CELLS, PATCH_PX, CELLS, PATCH_PX, 2).mean(axis=(1, 3)) / 255
    return torch.from_numpy(cells).float().permute(2, 0, 1), torch.from_numpy(view)


def student_tokens(tlhw_px: tuple[int, int, int, int], flip: bool) -> Tensor:
    """Mean position of every token of the crop, float32 [12, 12, 2]."""
    crop = transforms.resized_crop(position_picture(), *tlhw_px, [TOKENS * PATCH_PX] * 2)
    pixels = np.asarray(transforms.hflip(crop) if flip else crop)
    tokens = pixels[..., :2].reshape(TOKENS, PATCH_PX, TOKENS, PATCH_PX, 2).mean(axis=(1, 3)) / 255
    return torch.from_numpy(tokens).float()


def read_map(cells_CHW: Tensor, points_xy: Tensor) -> Tensor:
    """The map between the centres of its cells, [P, 2]."""
    read = torch.nn.functional.grid_sample(cells_CHW[None], 2 * points_xy[None, None] - 1, align_corners=False)
    return read[0, :, 0].T


@pytest.mark.parametrize("flip", [False, True], ids=["upright", "flipped"])
@pytest.mark.parametrize("resize", RESIZE_MODES)
@given(st.data())
@settings(max_examples=20, deadline=None)
def test_tokens_read_the_place_of_the_map_that_the_student_sees(
    resize: ResizeMode, flip: bool, data: st.DataObject
) -> None:
    height, width = data.draw(st.integers(40, HEIGHT_PX)), data.draw(st.integers(40, WIDTH_PX))
    top, left = data.draw(st.integers(0, HEIGHT_PX - height)), data.draw(st.integers(0, WIDTH_PX - width))
    seen = student_tokens((top, left, height, width), flip).flatten(0, 1)
    size_px = torch.tensor([WIDTH_PX, HEIGHT_PX, WIDTH_PX, HEIGHT_PX])
    box_in_image = torch.tensor([left, top, left + width, top + height]) / size_px
    output_to_image = affine_from_boxes(box_in_image, torch.tensor(flip))
    cells, view = known_map(resize)

    in_image = apply_affine(output_to_image, token_centres((TOKENS, TOKENS)))
    torch.testing.assert_close(in_image, seen, atol=1.5 / 255, rtol=0)

    output_to_map = affine_in_map(output_to_image, view)
    torch.testing.assert_close(output_to_map, affine_from_boxes(box_in_map(box_in_image, view), torch.tensor(flip)))
    in_map = apply_affine(output_to_map, token_centres((TOKENS, TOKENS)))
    valid = valid_tokens(output_to_map, (TOKENS, TOKENS), image_in_map(view)).flatten()
    assert valid.all() or resize == "center"
    # Between the outermost centres the map is a ramp; the cells of a letterbox that padding reaches into are none.
    low, high = image_in_map(view).reshape(2, 2)
    inner = ((in_map > low + 1.5 / CELLS) & (in_map < high - 1.5 / CELLS)).all(dim=1)
    torch.testing.assert_close(read_map(cells, in_map)[inner], seen[inner], atol=2.5 / 255, rtol=0)


@pytest.mark.parametrize("resize", ["center", "letterbox"])
def test_a_map_read_without_its_view_shows_another_place(resize: ResizeMode) -> None:
    """The measure above can tell: where the view is forgotten, tokens are off by a tenth of the image and more."""
    box_in_image = torch.tensor([20 / WIDTH_PX, 20 / HEIGHT_PX, 80 / WIDTH_PX, 80 / HEIGHT_PX])
    seen = student_tokens((20, 20, 60, 60), False).flatten(0, 1)
    cells, _ = known_map(resize)
    forgotten = apply_affine(affine_from_boxes(box_in_image), token_centres((TOKENS, TOKENS)))
    error = (read_map(cells, forgotten) - seen).abs().amax(dim=1)
    assert error.mean() > 0.05
    assert error.max() > 0.1
