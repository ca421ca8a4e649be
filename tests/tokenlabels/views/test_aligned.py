"""Pictures of aligned labels, by their pixels."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tokenlabels.views import aligned as aligned_pictures
from tokenlabels.views.aligned import AlignedPair, colours_of, draw_pairs, paint_labels
from tokenlabels.views.drawing import GAP_PX, LINE_PX, MARGIN_PX, panel_size

RED, BLUE = colours_of(np.array([1.0, 0.0])).astype(int)
GREY = np.full((60, 80, 3), 100, np.uint8)


def pair(size: tuple[int, int] = (224, 224), **changes: Any) -> AlignedPair:
    """Own image green, partner yellow, mixed grey; the left half of the labels is the own image's."""
    halves = np.repeat([[1.0, 0.0]], 2, axis=0)
    values: dict[str, Any] = {
        "own": np.full((*size, 3), (0, 160, 0), np.uint8),
        "partner": np.full((*size, 3), (220, 220, 0), np.uint8),
        "mixed": np.full((*size, 3), 100, np.uint8),
        "initial": np.kron(halves, np.ones((7, 7))),
        "aligned": halves,
        "target": 0.625,
        "names": ("n01440764_10026", "n01443537_11513"),
    }
    return AlignedPair(**(values | changes))


def panels(picture: Image.Image, size: tuple[int, int], row: int = 0) -> list[NDArray[np.int64]]:
    """The five panels of a row, cut out of the picture where they have to be."""
    margin, gap, line = MARGIN_PX, GAP_PX, LINE_PX
    step = (picture.width - 2 * margin + gap) // 5
    top = margin + aligned_pictures._LEGEND_PX[1] + 2 * gap + 2 * line + row * (size[0] + line + 2 * gap)
    pixels = np.asarray(picture).astype(int)
    return [pixels[top : top + size[0], left : left + size[1]] for left in range(margin, margin + 5 * step, step)]


class TestColours:
    def test_red_is_own_and_blue_is_the_partner(self) -> None:
        assert RED[0] > RED[1:].max() + 100
        assert BLUE[2] > BLUE[:2].max() + 80
        middle = colours_of(np.array(0.5))
        assert middle.min() > 230

    def test_shares_differ_in_colour_and_not_in_who_is_darker(self) -> None:
        shares = np.linspace(0, 0.5, 33)
        partner, own = colours_of(shares).astype(float), colours_of(1 - shares).astype(float)
        luma = np.array([0.299, 0.587, 0.114])
        assert np.abs(partner @ luma - own @ luma).max() < 12
        assert (np.diff(partner @ luma) > 0).all(), "the middle is the lightest"
        assert ((own - partner)[:-1, 0] > 0).all()
        assert ((partner - own)[:-1, 2] > 0).all()


class TestPaintedLabels:
    @settings(max_examples=30, deadline=None)
    @given(
        grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
        size=st.tuples(st.integers(48, 90), st.integers(48, 90)),
        seed=st.integers(0, 99),
    )
    def test_every_pixel_has_the_colour_of_the_cell_that_holds_its_centre(
        self, grid: tuple[int, int], size: tuple[int, int], seed: int
    ) -> None:
        shares = np.random.default_rng(seed).random(grid)
        painted = paint_labels(np.zeros((*size, 3), np.uint8), shares).astype(int)
        rows, columns = ([int((px + 0.5) / n * cells) for px in range(n)] for n, cells in zip(size, grid, strict=True))
        colours = colours_of(shares).astype(float)
        for y, x in np.ndindex(*size):
            colour = 0.72 * colours[rows[y], columns[x]] + 0.28 * 40
            if (y and rows[y] != rows[y - 1]) or (x and columns[x] != columns[x - 1]):
                colour += 0.3 * (255 - colour)
            assert np.abs(painted[y, x] - colour).max() <= 0.51

    def test_borders_lie_at_the_pixel(self) -> None:
        painted = paint_labels(GREY, np.full((3, 4), 1.0)).astype(int)
        lighter = painted[..., 1] > painted[1, 1, 1]
        expected = np.zeros((60, 80), bool)
        expected[[20, 40]] = expected[:, [20, 40, 60]] = True
        np.testing.assert_array_equal(lighter, expected)

    def test_small_cells_have_no_lines(self) -> None:
        painted = paint_labels(GREY, np.full((15, 20), 1.0))
        assert (painted == painted[0, 0]).all()

    def test_the_photograph_shows_through_in_grey(self) -> None:
        mixed = np.zeros((16, 16, 3), np.uint8)
        mixed[:, 8:] = (255, 255, 255)
        painted = paint_labels(mixed, np.array([[0.5]])).astype(int)
        assert (painted[:, 8:] - painted[:, :8] > 30).all()
        coloured = paint_labels(np.full((16, 16, 3), (255, 0, 0), np.uint8), np.array([[0.5]])).astype(int)
        assert np.ptp(coloured[0, 0]) < 10


class TestPanelSize:
    @pytest.mark.parametrize(
        ("size", "grids", "expected"),
        [
            pytest.param((224, 224), [(14, 14), (14, 14)], (224, 224), id="DeiT"),
            pytest.param((384, 384), [(96, 96), (12, 12)], (384, 384), id="Swin at 384"),
            pytest.param((32, 32), [(2, 2)], (256, 256), id="tiny"),
            pytest.param((64, 64), [(16, 16), (2, 2)], (256, 256), id="small"),
            pytest.param((1024, 1024), [(64, 64)], (256, 256), id="large"),
            pytest.param((64, 96), [(4, 6)], (172, 258), id="wide"),
            pytest.param((672, 448), [(42, 28)], (252, 168), id="tall"),
            pytest.param((64, 67), [(16, 67)], (256, 268), id="odd"),
            pytest.param((700, 700), [(13, 13), (11, 11), (7, 7)], (700, 700), id="no size in the range"),
        ],
    )
    def test_cells_are_whole_pixels(
        self, size: tuple[int, int], grids: list[tuple[int, int]], expected: tuple[int, int]
    ) -> None:
        assert panel_size(size, grids) == expected


class TestDrawnPairs:
    @pytest.mark.parametrize("size", [(224, 224), (224, 336), (320, 224)], ids=["square", "wide", "tall"])
    def test_panels_are_where_they_have_to_be(self, size: tuple[int, int]) -> None:
        picture = draw_pairs([pair(size), pair(size, target=0.1)], "a model")
        assert picture.mode == "RGB"
        for row in (0, 1):
            own, partner, mixed, initial, aligned = panels(picture, size, row)
            assert (own == (0, 160, 0)).all()
            assert (partner == (220, 220, 0)).all()
            assert (mixed == 100).all()
            half = size[1] // 2
            for painted in (initial, aligned):
                assert (np.abs(painted[:, : half - 1] - RED).sum(axis=2) < 120).mean() > 0.7
                assert (painted[:, : half - 1, 0] > painted[:, : half - 1, 2]).all()
                assert (painted[:, half + 1 :, 2] > painted[:, half + 1 :, 0]).all()
            assert (aligned[:, half - 1] != aligned[:, half]).any(axis=1).all()
            lines = np.flatnonzero((initial[1] != initial[1, 1]).any(axis=1) & (np.arange(size[1]) < half))
            np.testing.assert_array_equal(lines, size[1] // 14 * np.arange(1, 7))

    def test_cells_lie_on_what_they_belong_to(self) -> None:
        """An image that is enlarged: the patch that differs in the mixed image is the cell that differs."""
        mixed, initial = np.zeros((32, 32, 3), np.uint8), np.ones((2, 2))
        mixed[:16, 16:], initial[0, 1] = 200, 0.0
        picture = draw_pairs([pair((32, 32), mixed=mixed, initial=initial, aligned=initial)], "enlarged")
        _, _, shown, labels, _ = panels(picture, (256, 256))
        is_light = shown.mean(axis=2) > 100
        is_blue = labels[..., 2] > labels[..., 0]
        for across_the_border in (np.s_[:64], np.s_[:, 192:]):  # the filter rounds the corner
            np.testing.assert_array_equal(is_light[across_the_border], is_blue[across_the_border])
        assert is_blue[:128, 128:].all()
        assert is_blue.sum() == 128 * 128

    def test_rows_of_different_sizes_share_columns(self) -> None:
        sizes = (224, 224), (320, 320)
        picture = draw_pairs([pair(size) for size in sizes], "sizes")
        assert (panels(picture, sizes[0])[1] == (220, 220, 0)).all()
        assert picture.width == 2 * 24 + 5 * 332 - 12

    def test_texts_are_shown_and_never_overlap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        texts: list[tuple[float, float, str]] = []
        draw_text = aligned_pictures.ImageDraw.ImageDraw.text

        def record(draw: Any, xy: tuple[float, float], text: str, *args: Any, **options: Any) -> None:
            texts.append((xy[0], draw.textlength(text, font=args[1]), text))
            draw_text(draw, xy, text, *args, **options)

        monkeypatch.setattr(aligned_pictures.ImageDraw.ImageDraw, "text", record)
        long_name = "a/key/that/goes/on/and/on_" * 9
        picture = draw_pairs([pair(names=(long_name, "b"))], f"a title {long_name}")
        shown = [text for _, _, text in texts]
        for text in (*aligned_pictures.COLUMNS, "own 50.0% of the image", "own 62.5% of what is classified", "half"):
            assert text in shown
        name = next((x, width) for x, width, text in texts if text.startswith("a/key"))
        assert name[0] + name[1] <= 224
        title = next((x, width) for x, width, text in texts if text.startswith("a title"))
        assert title[0] + title[1] < picture.width - 24 - aligned_pictures._LEGEND_PX[0]

    def test_the_legend_goes_from_partner_to_own(self) -> None:
        pixels = np.asarray(draw_pairs([pair()], "legend")).astype(int)
        strip = pixels[30, -24 - aligned_pictures._LEGEND_PX[0] : -24]
        assert strip[0, 2] > strip[0, 0] + 80
        assert strip[-1, 0] > strip[-1, 2] + 80
        assert (np.diff(strip[:, 0] - strip[:, 2]) >= -3).all()

    def test_nothing_to_draw(self) -> None:
        with pytest.raises(ValueError, match="nothing to draw"):
            draw_pairs([], "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixed": np.zeros((224, 223, 3), np.uint8)}, r"mixed must be uint8 \[H, W, 3\] of one size, .*223"),
        ({"own": np.zeros((224, 224, 3))}, "own must be uint8 .* got float64"),
        ({"initial": np.full((2, 2), 1.5)}, r"initial must be shares \[h, w\] in 0..1"),
        ({"aligned": np.full((2, 2), np.nan)}, "aligned must be shares"),
        ({"aligned": np.ones(4)}, r"aligned must be shares .*\(4,\)"),
    ],
)
def test_pairs_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair(**change)
