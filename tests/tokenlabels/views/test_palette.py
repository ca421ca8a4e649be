import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tokenlabels.geometry import view_letterbox
from tokenlabels.types import ScoreMap
from tokenlabels.views.palette import GREY, PALETTE, ColouredMap, class_colours, heat_colours, ink_on

# Machado, Oliveira, Fernandes (2009), severity 1, on linear RGB
COLOUR_VISION = {
    "all cones": np.eye(3),
    "no red cones": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green cones": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no blue cones": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def linear_light(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    shares = rgb / 255
    return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


def oklab(linear_rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ottosson (2020)."""
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.asarray(np.cbrt(linear_rgb @ to_cones.T) @ to_lab.T)


def smallest_distance(colours: NDArray[np.uint8], seen_as: NDArray[np.float64]) -> float:
    lab = oklab(np.clip(linear_light(colours) @ seen_as.T, 0, 1))
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1)
    return float(distances[~np.eye(len(lab), dtype=bool)].min())


class TestClassColours:
    @pytest.mark.parametrize("vision", COLOUR_VISION)
    def test_palette_is_told_apart_with_every_kind_of_vision(self, vision: str) -> None:
        colours = class_colours(range(len(PALETTE)))
        assert smallest_distance(colours, COLOUR_VISION[vision]) > 0.10

    def test_class_keeps_its_colour_in_other_company(self) -> None:
        everyone = class_colours(range(10))
        np.testing.assert_array_equal(class_colours([7, 2, 9]), everyone[[7, 2, 9]])

    def test_earlier_class_keeps_a_contested_colour(self) -> None:
        first, second = 5, 5 + len(PALETTE)
        colours = class_colours([second, first])
        np.testing.assert_array_equal(colours[0], class_colours([first])[0])
        np.testing.assert_array_equal(colours[1], class_colours([6])[0])

    @given(st.lists(st.integers(0, 100_000), unique=True, max_size=40))
    def test_colours_repeat_only_after_the_whole_palette(self, class_ids: list[int]) -> None:
        colours = [tuple(colour) for colour in class_colours(class_ids).tolist()]
        assert len(colours) == len(class_ids)
        for start in range(0, len(colours), len(PALETTE)):
            block = colours[start : start + len(PALETTE)]
            assert len(set(block)) == len(block)

    def test_hexadecimal_and_rgb_agree(self) -> None:
        assert ["#" + bytes(colour).hex() for colour in class_colours(range(len(PALETTE)))] == list(PALETTE)

    @given(st.tuples(*[st.integers(0, 255)] * 3))
    def test_ink_has_the_contrast_that_text_needs(self, colour: tuple[int, int, int]) -> None:
        def luminance(rgb: tuple[int, ...]) -> float:
            return float(linear_light(np.array(rgb, np.uint8)) @ [0.2126, 0.7152, 0.0722])

        values = sorted((luminance(colour), luminance(ink_on(np.array(colour, np.uint8)))))
        assert (values[1] + 0.05) / (values[0] + 0.05) > 4.3  # WCAG asks 4.5, and gamma 2.2 is not quite sRGB


def score_map(classes_top1: NDArray[np.integer], logits: NDArray[np.floating], view: tuple[float, ...]) -> ScoreMap:
    """A map with k=2: a leading class with its logit above that of class 99."""
    classes = np.stack([classes_top1, np.full_like(classes_top1, 99)], axis=-1).astype(np.uint16)
    scores = np.stack([logits, np.zeros_like(logits)], axis=-1).astype(np.float16)
    return ScoreMap("key", scores, classes, np.zeros(logits.shape, np.float16), np.array(view, np.float32))


class TestColouredMap:
    def test_ranks_point_to_the_leading_class_of_every_cell(self) -> None:
        rng = np.random.default_rng(0)
        classes_top1 = rng.choice([3, 40, 7, 41], size=(5, 6))
        labels = score_map(classes_top1, rng.uniform(0, 4, size=(5, 6)), (0, 0, 1, 1))
        coloured = ColouredMap.of(labels, None)
        for cell in np.ndindex(5, 6):
            share = coloured.leading[coloured.rank[cell]]
            assert share.class_id == classes_top1[cell]
            assert share.name == f"class {classes_top1[cell]}"
        np.testing.assert_array_equal(coloured.confidence, labels.probabilities()[..., 0])
        assert coloured.valid.all()

    def test_surest_class_comes_first_not_the_most_frequent(self) -> None:
        classes_top1 = np.array([[1, 1, 1, 2, 2, 5]])
        coloured = ColouredMap.of(score_map(classes_top1, np.array([[0.1, 0.1, 0.1, 9, 9, 1]]), (0, 0, 1, 1)), None)
        assert [share.class_id for share in coloured.leading] == [2, 1, 5]
        number, share_of_cells, probability = coloured.beyond(1)
        assert number == 2
        assert share_of_cells == pytest.approx(4 / 6)
        assert probability == pytest.approx(coloured.confidence[0, [0, 1, 2, 5]].sum() / 6, abs=1e-6)

    def test_padding_of_a_letterboxed_map_is_not_valid(self) -> None:
        view = view_letterbox(100, 50, (64, 64))
        coloured = ColouredMap.of(score_map(np.zeros((4, 4), int), np.ones((4, 4)), view), None)
        np.testing.assert_array_equal(coloured.valid, np.repeat([[False], [True], [True], [False]], 4, axis=1))


class TestHeatColours:
    @pytest.mark.parametrize("vision", COLOUR_VISION)
    def test_ever_lighter_with_every_kind_of_vision(self, vision: str) -> None:
        colours = heat_colours(np.linspace(0, 1, 11))
        lightness = oklab(np.clip(linear_light(colours) @ COLOUR_VISION[vision].T, 0, 1))[:, 0]
        assert (np.diff(lightness) > 0.03).all()

    def test_steps_between_the_ends(self) -> None:
        low, high = heat_colours(np.array([0.0, 1.0]))
        assert low.max() < 100
        assert high.min() > 100
        assert heat_colours(np.zeros((3, 4))).shape == (3, 4, 3)


def test_few_colours_and_grey_for_the_rest() -> None:
    classes = np.arange(6).reshape(1, 6, 1).astype(np.uint16)
    zeros = np.zeros((1, 6), np.float16)
    labels = ScoreMap("key", zeros[..., None], classes, zeros, np.array([0, 0, 1, 1], np.float32))
    coloured = ColouredMap.of(labels, None).with_distinct_colours(4)
    np.testing.assert_array_equal(coloured.colours, [*class_colours(range(4)), GREY, GREY])
    np.testing.assert_array_equal(coloured.cell_colours()[0], coloured.colours)
