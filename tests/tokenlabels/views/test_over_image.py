from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import tokenlabels.views.over_image as module
from tokenlabels.types import ScoreMap
from tokenlabels.views import overlay
from tokenlabels.views.palette import ColouredMap, class_colours

WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)
LONG_NAME = "a name that goes on and on, as the synonyms of a taxonomy do, until nobody reads it " * 3


def score_map(
    classes_top1: NDArray[np.integer], *, view: tuple[float, ...] = WHOLE_IMAGE, logit: float = 12.0, key: str = "key"
) -> ScoreMap:
    """A map with k=2: a leading class `logit` above class 999."""
    shape = classes_top1.shape
    classes = np.stack([classes_top1, np.full_like(classes_top1, 999)], axis=-1).astype(np.uint16)
    scores = np.stack([np.full(shape, logit), np.zeros(shape)], axis=-1).astype(np.float16)
    return ScoreMap(key, scores, classes, np.zeros(shape, np.float16), np.array(view, np.float32))


def painted(labels: ScoreMap, photograph: Image.Image) -> NDArray[np.int64]:
    picture = module._paint_map(photograph, ColouredMap.of(labels, None), labels.view)
    return np.asarray(picture).astype(int)


def black(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height))


class TestPaintedMap:
    @settings(max_examples=30, deadline=None)
    @given(
        grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
        corners=st.tuples(*[st.integers(-4, 10)] * 2),
        sizes=st.tuples(*[st.integers(4, 12)] * 2),
        seed=st.integers(0, 1000),
    )
    def test_cell_centres_have_their_colour_and_the_rest_is_dark(
        self, grid: tuple[int, int], corners: tuple[int, int], sizes: tuple[int, int], seed: int
    ) -> None:
        """View in tenths of an image of 300 x 200 px, so that cells are several pixels wide."""
        (rows, columns), (left, top), (width, height) = grid, corners, sizes
        view = (left / 10, top / 10, (left + width) / 10, (top + height) / 10)
        labels = score_map(np.random.default_rng(seed).integers(0, 9, size=grid), view=view)
        image = painted(labels, black(300, 200))
        for row, column in np.ndindex(*grid):
            x = Fraction(left, 10) * 300 + Fraction(width * 30 * (2 * column + 1), 2 * columns)
            y = Fraction(top, 10) * 200 + Fraction(height * 20 * (2 * row + 1), 2 * rows)
            if 0 <= x < 300 and 0 <= y < 200:
                colour = class_colours([int(labels.classes[row, column, 0])])[0]
                np.testing.assert_allclose(image[int(y), int(x)], 0.8 * colour, atol=2)
        columns_px, rows_px = np.arange(300) + 0.5, np.arange(200) + 0.5
        outside_x = (columns_px < left * 30) | (columns_px > (left + width) * 30)
        outside_y = (rows_px < top * 20) | (rows_px > (top + height) * 20)
        assert (image[outside_y] == 0).all()
        assert (image[:, outside_x] == 0).all()

    def test_lines_lie_between_cells(self) -> None:
        # nearly black cells, so that only the lines are bright
        image = painted(score_map(np.full((2, 4), 3), logit=-6.0), black(80, 60))
        bright = image.min(axis=2) > 50
        expected = np.zeros((60, 80), bool)
        expected[30] = expected[:, [20, 40, 60]] = True
        np.testing.assert_array_equal(bright, expected)

    def test_opacity_grows_with_the_probability(self) -> None:
        strengths = [
            painted(score_map(np.array([[0]]), logit=logit), black(9, 9))[4, 4, 0] for logit in (0.0, 1.0, 2.0, 9.0)
        ]
        probabilities = 1 / (1 + np.exp(-np.array([0.0, 1.0, 2.0, 9.0])))
        np.testing.assert_allclose(strengths, 0.8 * probabilities * class_colours([0])[0, 0], atol=1.5)

    def test_uncovered_part_is_a_dim_grey_copy(self) -> None:
        image = painted(score_map(np.array([[0]]), view=(0.5, 0, 1, 1)), Image.new("RGB", (10, 4), (200, 200, 200)))
        np.testing.assert_array_equal(image[:, :5], 70)
        assert (image[:, 5:] != 70).any(axis=2).all()


class TestOverlay:
    @pytest.mark.parametrize(
        "size", [(64, 64), (1000, 30), (30, 1000), (500, 375), (1, 1)], ids=lambda size: "x".join(map(str, size))
    )
    def test_any_aspect_ratio(self, size: tuple[int, int]) -> None:
        labels = score_map(np.arange(12).reshape(3, 4), key=LONG_NAME)
        picture = overlay(Image.new("L", size, 128), labels, (LONG_NAME,) * 1000)
        assert picture.mode == "RGB"
        assert 400 < picture.width < 1600
        assert 300 < picture.height < 1300
        margin = np.concatenate([np.asarray(picture)[:, -20:].reshape(-1, 3), np.asarray(picture)[-20:].reshape(-1, 3)])
        assert (margin == 255).all()

    def test_image_and_map_lie_side_by_side(self) -> None:
        photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3)).astype(np.uint8))
        labels = score_map(np.array([[0, 1], [2, 3]]))
        picture = np.asarray(overlay(photograph, labels, None))
        margin, caption = module._MARGIN_PX, module._ROW_PX
        top, right_panel = margin + caption, margin + 512 + margin
        np.testing.assert_array_equal(picture[top : top + 512, margin : margin + 512], np.asarray(photograph))
        np.testing.assert_array_equal(
            picture[top : top + 512, right_panel : right_panel + 512], painted(labels, photograph)
        )


class TestLegend:
    def test_long_name_leaves_the_numbers_alone(self) -> None:
        labels = score_map(np.array([[0, 0, 1]]))
        short, long = (np.asarray(module._legend(ColouredMap.of(labels, (name,) * 1000))) for name in ("i", LONG_NAME))
        numbers_left = module._LEGEND_PX - 96 - 50
        assert (short != long).any()
        np.testing.assert_array_equal(short[:, numbers_left:], long[:, numbers_left:])

    def test_swatches_follow_the_classes_and_the_rest_shares_a_row(self) -> None:
        labels = score_map(np.arange(13)[None])
        legend = module._legend(ColouredMap.of(labels, None))
        row = module._ROW_PX
        swatches = [legend.getpixel((8, row * index + 8)) for index in range(1, 12)]
        assert swatches[:10] == [tuple(colour) for colour in class_colours(range(10)).tolist()]
        assert swatches[10] == (255, 255, 255)
        assert legend.height == row * 14

    @given(st.text(max_size=200), st.integers(20, 300))
    def test_shortened_text_fits(self, text: str, width_px: int) -> None:
        font = module._font()
        shortened = module._shorten(text, width_px, font)
        assert font.getlength(shortened) <= width_px
        assert "\n" not in shortened

    def test_text_that_fits_is_left_as_it_is(self) -> None:
        assert module._shorten("tench, Tinca tinca", 300, module._font()) == "tench, Tinca tinca"
