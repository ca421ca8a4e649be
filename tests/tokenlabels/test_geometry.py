import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabels.geometry import (
    cell_centres,
    letterbox_placement,
    valid_cells,
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
