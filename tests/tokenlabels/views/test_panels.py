"""Panels of an image and its maps, by their pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenlabels.geometry import view_center, view_letterbox
from tokenlabels.views.drawing import INK, PAPER
from tokenlabels.views.figure import Figure, Photo, Words, draw
from tokenlabels.views.palette import heat_colours
from tokenlabels.views.panels import CAPTION_PX, PANEL_PX, Stage, nice_ceiling

WHOLE = (0.0, 0.0, 1.0, 1.0)
SIZES = [(64, 64), (500, 375), (375, 500), (1200, 300), (4000, 1), (1, 4000), (1, 1), (3000, 2000)]


def stage(
    size: tuple[int, int], view: tuple[float, ...] = WHOLE, grid: tuple[int, int] = (3, 4), **more: object
) -> Stage:
    image = Image.new("RGB", size, (0, 0, 0))
    return Stage.of(image, np.array(view, np.float32), grid, **more)  # type: ignore[arg-type]


def pixels_of(panel: Figure, shown: Stage) -> np.ndarray:
    """The panel below its caption."""
    pixels = np.asarray(draw(panel)).astype(int)
    return pixels[CAPTION_PX : CAPTION_PX + shown.height, : shown.width]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_any_aspect_ratio_fits_its_column(size: tuple[int, int]) -> None:
    shown = stage(size)
    assert max(shown.width, shown.height) == PANEL_PX
    assert min(shown.width, shown.height) >= 48
    if max(size) < 8 * min(size):
        assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.02)


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from(SIZES) | st.tuples(st.integers(1, 900), st.integers(1, 900)),
    mode=st.sampled_from(["squash", "center", "letterbox"]),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 99),
)
def test_cells_are_painted_where_the_geometry_puts_them(
    size: tuple[int, int], mode: str, grid: tuple[int, int], seed: int
) -> None:
    """The twin asks for some pixels in which cell of the map, which covers `view`, their centre lies."""
    view = {"squash": WHOLE, "center": view_center(*size, 0.9), "letterbox": view_letterbox(*size, (96, 96))}[mode]
    view = tuple(np.array(view, np.float32).tolist())
    rng = np.random.default_rng(seed)
    colours = rng.integers(60, 256, (*grid, 3)).astype(np.uint8)
    shown = stage(size, view, grid)
    painted = pixels_of(shown.cells("labels", colours, np.ones(grid)), shown)
    for y, x in zip(rng.integers(shown.height, size=60), rng.integers(shown.width, size=60), strict=True):
        across, along = (x + 0.5) / shown.width, (y + 0.5) / shown.height
        row = (along - view[1]) / (view[3] - view[1]) * grid[0]
        column = (across - view[0]) / (view[2] - view[0]) * grid[1]
        if min(abs(row - round(row)), abs(column - round(column))) < 1e-6:
            continue  # on a border, where rounding decides
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            np.testing.assert_array_equal(painted[y, x], 18)  # the dark grey of black pixels
            continue
        colour = colours[int(row), int(column)].astype(int)
        is_line = (np.abs(painted[y, x] - (colour + 0.3 * (255 - colour))) <= 1).all()
        assert (painted[y, x] == colour).all() or is_line


def test_cells_of_nan_are_dark() -> None:
    shown = stage((100, 100), grid=(2, 2))
    painted = pixels_of(shown.cells("", np.full((2, 2, 3), 200, np.uint8), np.array([[1, np.nan], [1, 1]])), shown)
    np.testing.assert_array_equal(painted[100, 300], 18)
    np.testing.assert_array_equal(painted[300, 300], 200)


def test_the_cell_is_outlined_around_it_in_every_panel() -> None:
    shown = stage((100, 100), grid=(7, 7), cell=(2, 3))
    colours = np.full((7, 7, 3), 100, np.uint8)
    for panel in (
        shown.photo(""),
        shown.cells("", colours, np.ones((7, 7))),
        shown.heat("", np.ones((7, 7)), np.ones((7, 7), bool), ""),
    ):
        painted = pixels_of(panel, shown)
        top, left = 2 * 56, 3 * 56
        inside = painted[top + 1 : top + 55, left + 1 : left + 55]
        assert (inside == inside[0, 0]).all()
        np.testing.assert_array_equal(painted[top - 1, left : left + 56], np.broadcast_to(PAPER, (56, 3)))
        np.testing.assert_array_equal(painted[top : top + 56, left + 58], np.broadcast_to(INK, (56, 3)))


def test_a_cell_of_padding_has_no_outline() -> None:
    view = view_letterbox(100, 25, (100, 100))
    with_cell = stage((100, 25), view, (8, 8), cell=(0, 3)).photo("")
    assert [type(item) for item in with_cell.items] == [Words, Photo]


class TestHeat:
    def test_colours_and_the_ends_of_the_scale(self) -> None:
        values = np.array([[0.0, 0.013, 0.5]])
        shown = stage((300, 100), grid=(1, 3))
        panel = shown.heat("", values, np.array([[True, True, False]]), "unit")
        painted = pixels_of(panel, shown)
        texts = [item.text for item in panel.items if isinstance(item, Words)]
        assert texts[1:] == ["0%", "unit", "2%"]  # 0.5 is padding
        for column, value in ((0, 0.0), (1, 0.013 / 0.02)):
            colour = 0.85 * heat_colours(np.array(value)) + 0.15 * 40
            np.testing.assert_allclose(painted[10, shown.width * (2 * column + 1) // 6], colour, atol=1)

    @pytest.mark.parametrize(
        ("value", "ceiling"),
        [(0, 1), (1e-9, 0.001), (0.001, 0.001), (0.0011, 0.002), (0.2, 0.2), (0.21, 0.5), (0.51, 1), (1, 1)],
    )
    def test_nice_ceiling(self, value: float, ceiling: float) -> None:
        assert nice_ceiling(value) == pytest.approx(ceiling)
