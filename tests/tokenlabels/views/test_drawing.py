"""Cells over pictures: which pixel belongs to which cell."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabels.views.drawing import blend_cells, cells_of_pixels, dimmed

CLEAR = np.nan


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from([(1, 4000), (4000, 1)]),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    corner=st.tuples(st.integers(-8, 6), st.integers(-8, 6)),
    extent=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    seed=st.integers(0, 99),
)
def test_every_pixel_has_the_cell_at_its_centre(
    size: tuple[int, int], grid: tuple[int, int], corner: tuple[int, int], extent: tuple[int, int], seed: int
) -> None:
    """The twin looks at one pixel after the other, in whole numbers; views in eighths, which are exact."""
    view = (corner[0] / 8, corner[1] / 8, (corner[0] + extent[0]) / 8, (corner[1] + extent[1]) / 8)
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (*grid, 3)).astype(np.uint8)
    opacity = np.where(rng.random(grid) < 0.2, CLEAR, rng.random(grid))
    below = rng.integers(0, 256, (*size, 3)).astype(np.float64)

    def cell_along(pixel: int, axis: int) -> int:
        start, length = Fraction(corner[1 - axis], 8), Fraction(extent[1 - axis], 8)
        place = (Fraction(2 * pixel + 1, 2 * size[axis]) - start) / length * grid[axis]
        return int(place // 1) if 0 <= place < grid[axis] else -1

    rows = [cell_along(pixel, 0) for pixel in range(size[0])]
    columns = [cell_along(pixel, 1) for pixel in range(size[1])]
    cell_px = min(size[axis] * Fraction(extent[1 - axis], 8) / grid[axis] for axis in (0, 1))
    expected = below.copy()
    for y, x in np.ndindex(*size):
        if min(rows[y], columns[x]) < 0 or np.isnan(opacity[rows[y], columns[x]]):
            continue
        cell = rows[y], columns[x]
        pixel = below[y, x] + opacity[cell] * (colours[cell] - below[y, x])
        begins_row = y > 0 and rows[y] > 0 and rows[y] != rows[y - 1]
        begins_column = x > 0 and columns[x] > 0 and columns[x] != columns[x - 1]
        if cell_px >= 8 and (begins_row or begins_column):
            pixel = pixel + 0.3 * (255 - pixel)
        expected[y, x] = pixel
    np.testing.assert_allclose(blend_cells(below, colours, opacity, view), expected, atol=1e-9)


@pytest.mark.parametrize("view", [(-3.0, 0.0, -1.0, 1.0), (0.0, 2.0, 1.0, 3.0)], ids=["left of it", "below it"])
def test_a_map_beside_the_picture_draws_nothing(view: tuple[float, float, float, float]) -> None:
    below = np.full((10, 10, 1), 7.0)
    painted = blend_cells(below, np.zeros((2, 2, 3), np.uint8), np.ones((2, 2)), view)
    np.testing.assert_array_equal(painted, np.full((10, 10, 3), 7.0))


def test_pixels_on_a_border_belong_to_the_cell_behind_it() -> None:
    row, column = cells_of_pixels((3, 5), (2, 2), (0, 0, 1, 1))
    assert row.tolist() == [0, 1, 1]  # the centre of the middle one lies on the border
    assert column.tolist() == [0, 0, 1, 1, 1]


def test_dimmed_pictures_are_grey_and_of_low_contrast() -> None:
    image = np.array([[(0, 0, 0), (255, 255, 255), (255, 0, 0)]], np.uint8)
    np.testing.assert_allclose(dimmed(image)[0, :, 0], [40, 40 + 0.6 * 255, 40 + 0.6 * 76])
