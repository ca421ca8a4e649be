"""Pictures of layouts, by their pixels."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tokenlabels.views.drawing import GAP_PX, LINE_PX, MARGIN_PX, TITLE_PX
from tokenlabels.views.layout import MAX_ENTITIES, ImageLayouts, draw_layouts, entity_colours, paint_layout
from tokenlabels.views.palette import class_colours

TOP = MARGIN_PX + TITLE_PX + GAP_PX + LINE_PX
QUARTERS = np.array([[0, 1], [2, 3]])


def one(size: tuple[int, int] = (224, 224), **changes: Any) -> ImageLayouts:
    """A grey image with a layout of four quarters, fine and coarse."""
    values: dict[str, Any] = {
        "image": np.full((*size, 3), 128, np.uint8),
        "entities": (np.kron(QUARTERS, np.ones((28, 28), np.int64)), QUARTERS),
        "name": "n01440764_10026",
    }
    return ImageLayouts(**(values | changes))


def panels(picture: Image.Image, size: tuple[int, int], num: int = 3) -> list[NDArray[np.int64]]:
    """The panels of the first row, cut out of the picture where they have to be."""
    step = (picture.width - 2 * MARGIN_PX + GAP_PX) // num
    pixels = np.asarray(picture).astype(int)
    lefts = range(MARGIN_PX, MARGIN_PX + num * step, step)
    return [pixels[TOP : TOP + size[0], left : left + size[1]] for left in lefts]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, str]]:
    """Of all texts that are drawn: where they begin and end on their part of the picture, and what they say."""
    drawn: list[tuple[float, float, str]] = []
    draw_text = ImageDraw.ImageDraw.text

    def record(draw: Any, xy: tuple[float, float], text: str, *args: Any, **options: Any) -> None:
        drawn.append((xy[0], xy[0] + draw.textlength(text, font=args[1]), text))
        draw_text(draw, xy, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return drawn


class TestColours:
    @pytest.mark.parametrize("num_entities", [1, 2, 8, 12, 16, 32, MAX_ENTITIES])
    def test_all_differ_and_the_first_are_the_palette(self, num_entities: int) -> None:
        colours = entity_colours(num_entities)
        assert (colours.dtype, colours.shape) == (np.uint8, (num_entities, 3))
        distance = np.abs(colours[:, None].astype(int) - colours[None]).sum(axis=2)
        assert (distance + 999 * np.eye(num_entities, dtype=int)).min() > 20
        first = min(num_entities, 12)
        np.testing.assert_array_equal(colours[:first], class_colours(range(first)))

    def test_more_than_there_are(self) -> None:
        with pytest.raises(ValueError, match="colours for 36 entities, got 37"):
            entity_colours(37)


@settings(max_examples=20, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(10, 40), st.integers(10, 40)),
    seed=st.integers(0, 99),
)
def test_every_pixel_has_the_colour_of_the_entity_at_its_centre(
    grid: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    entities = np.random.default_rng(seed).integers(0, 8, grid)
    colours = entity_colours(8)
    painted = paint_layout(np.zeros((*size, 3), np.uint8), entities, colours).astype(int)
    rows, columns = ([int((px + 0.5) / n * cells) for px in range(n)] for n, cells in zip(size, grid, strict=True))
    has_lines = min(size[0] / grid[0], size[1] / grid[1]) >= 8
    for y, x in np.ndindex(*size):
        colour = 0.8 * colours[entities[rows[y], columns[x]]] + 0.2 * 40
        if has_lines and ((y and rows[y] != rows[y - 1]) or (x and columns[x] != columns[x - 1])):
            colour += 0.3 * (255 - colour)
        assert np.abs(painted[y, x] - colour).max() <= 0.51


class TestDrawnLayouts:
    @pytest.mark.parametrize("size", [(224, 224), (224, 336), (320, 224)], ids=["square", "wide", "tall"])
    def test_panels_are_where_they_have_to_be(self, size: tuple[int, int]) -> None:
        picture = draw_layouts([one(size), one(size)], ["fine", "coarse"], 4, "a model")
        assert picture.mode == "RGB"
        image, fine, coarse = panels(picture, size)
        assert (image == 128).all()
        colours = (0.8 * entity_colours(4) + 0.2 * (40 + 0.6 * 128)).round()
        for layout in (fine, coarse):
            for entity, (row, column) in enumerate(np.ndindex(2, 2)):
                half_y, half_x = size[0] // 2, size[1] // 2
                quarter = layout[row * half_y : (row + 1) * half_y, column * half_x : (column + 1) * half_x]
                inside = quarter[1:, 1:].reshape(-1, 3)  # but for the lines
                is_colour = (np.abs(inside - colours[entity]) <= 1).all(axis=1)
                assert is_colour.mean() > (0.7 if layout is fine else 0.99)

    def test_cells_lie_on_what_they_belong_to(self) -> None:
        """An image that is enlarged, with one patch that differs."""
        image = np.zeros((32, 32, 3), np.uint8)
        image[:16, 16:] = 200
        picture = draw_layouts([one(image=image, entities=(np.array([[0, 1], [0, 0]]),))], ["layout"], 2, "enlarged")
        shown, layout = panels(picture, (256, 256), num=2)
        is_light, is_blue = shown.mean(axis=2) > 100, layout[..., 2] > layout[..., 0]
        for across_the_border in (np.s_[:64], np.s_[:, 192:]):  # the filter rounds the corner
            np.testing.assert_array_equal(is_light[across_the_border], is_blue[across_the_border])
        assert is_blue.sum() == 128 * 128

    def test_the_legend_has_the_colours_and_shares(self, texts: list[tuple[float, float, str]]) -> None:
        layout = np.zeros((20, 20), np.int64)
        layout[0, 0], layout[:10, 10:] = 3, 1
        picture = draw_layouts([one(entities=(layout,))], ["layout"], 5, "legend")
        assert {"1: 75%", "2: 25%", "3: 0%", "4: <1%", "5: 0%"} < {text for *_, text in texts}
        below = np.asarray(picture)[TOP + 224 :, MARGIN_PX + 224 + GAP_PX :].reshape(-1, 3).tolist()
        for colour in (0.8 * entity_colours(5) + 0.2 * (40 + 0.6 * 128)).round():
            assert min(np.abs(np.array(below) - colour).sum(axis=1)) <= 3

    @pytest.mark.parametrize("num_entities", [1, 8, 36])
    def test_texts_stay_on_their_panel(self, texts: list[tuple[float, float, str]], num_entities: int) -> None:
        layout = np.arange(1600).reshape(40, 40) % num_entities
        long = "a/key/that/goes/on/and/on_" * 9
        picture = draw_layouts([one(entities=(layout,), name=long)], [long], num_entities, long)
        key, title = ([end for _, end, text in texts if text.startswith("a/key")][place] for place in (0, -1))
        assert max(end for _, end, text in texts if "%" in text) <= 224
        assert key <= picture.width - MARGIN_PX
        assert title <= picture.width - MARGIN_PX
        entries = [(start, end) for start, end, text in texts if "%" in text]
        assert len(entries) == num_entities
        assert all(end + 4 <= start or start == 16 for (_, end), (start, _) in pairwise(entries))

    def test_images_of_different_sizes_share_columns(self) -> None:
        sizes = (224, 224), (320, 320)
        picture = draw_layouts([one(size) for size in sizes], ["fine", "coarse"], 4, "sizes")
        assert picture.width == 2 * MARGIN_PX + 3 * 332 - GAP_PX
        assert (panels(picture, sizes[0])[0] == 128).all()

    @pytest.mark.parametrize(
        ("images", "titles", "num_entities", "message"),
        [
            pytest.param([], ["a"], 4, "nothing to draw", id="no images"),
            pytest.param([one(entities=())], [], 4, "nothing to draw", id="no layouts"),
            pytest.param([one()], ["a"], 4, "n01440764_10026 must have 1 layouts of entities below 4", id="titles"),
            pytest.param([one()], ["a", "b"], 3, "2 layouts of entities below 3", id="entities"),
        ],
    )
    def test_refused(self, images: Any, titles: list[str], num_entities: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            draw_layouts(images, titles, num_entities, "refused")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((8, 8, 3))}, r"image must be uint8 \[H, W, 3\], got float64"),
        ({"image": np.zeros((8, 8), np.uint8)}, "image must be uint8"),
        ({"entities": (np.zeros((2, 2)),)}, r"entities must be integer \[h, w\] from 0, got float64"),
        ({"entities": (np.zeros(4, np.int64),)}, r"entities must be integer .*\(4,\)"),
        ({"entities": (np.full((2, 2), -1),)}, "entities must be integer"),
    ],
)
def test_images_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one(**change)
