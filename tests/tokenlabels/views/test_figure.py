"""Figures as data, drawn by Pillow and by matplotlib."""

import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tokenlabels.views.drawing import INK, PAPER
from tokenlabels.views.figure import Cells, Figure, Frame, Photo, across, down, draw, words
from tokenlabels.views.typeface import matplotlib_font
from tokenlabels.views.vector import encode

RED, BLUE = (200, 0, 0), (0, 0, 200)
SVG = "{http://www.w3.org/2000/svg}"
DEJAVU = str(matplotlib_font())


def block(colour: tuple[int, int, int], width: int, height: int) -> Figure:
    return Figure(width, height, (Frame(0, 0, width, height, fill=colour),))


def everything(name: str = "tench & <Tinca> $x$") -> Figure:
    """One item of every kind: a photograph below 2 x 2 cells, one of them clear and half of them cut away."""
    photo = Photo(10, 10, 80, 40, np.full((4, 8, 3), 128, np.uint8))
    colours = np.array([[RED, BLUE], [BLUE, RED]], np.uint8)
    cells = Cells(10, 10, 80, 40, colours, np.array([[0.5, np.nan], [1.0, 0.25]]), (0, 0, 1, 2))
    text = words(10, 80, name, 180, size_px=14, only=DEJAVU)
    return Figure(200, 100, (photo, cells, Frame(120, 10, 40, 40, outline=INK, line_px=2), text))


class TestPutTogether:
    def test_across_and_down(self) -> None:
        row = across([block(RED, 10, 5), block(BLUE, 20, 8)], 3)
        assert (row.width, row.height) == (33, 8)
        pixels = np.asarray(draw(down([row, block(RED, 4, 4)], 2).padded(1)))
        assert pixels.shape == (16, 35, 3)
        assert (pixels[1:6, 1:11] == RED).all()
        assert (pixels[1:9, 14:34] == BLUE).all()
        assert (pixels[11:15, 1:5] == RED).all()
        assert ((pixels != PAPER).any(axis=2)).sum() == 50 + 160 + 16

    def test_nothing(self) -> None:
        assert (across([], 5).width, down([], 5).height) == (0, 0)


class TestPillow:
    def test_cells_lie_over_what_was_drawn_before(self) -> None:
        pixels = np.asarray(draw(everything())).astype(int)
        np.testing.assert_allclose(pixels[12, 12], 64 + np.array(RED) / 2, atol=1)  # half of it over 128
        np.testing.assert_array_equal(pixels[12, 88], 128)  # a clear cell
        np.testing.assert_array_equal(pixels[30, 120:160:39], [INK, INK])

    def test_a_bar_of_nothing(self) -> None:
        pixels = np.asarray(draw(Figure(9, 9, (Frame(2, 2, 0.2, 5, fill=RED),))))
        assert (pixels == 255).all()


class TestVector:
    def test_svg_has_text_rectangles_and_the_photograph(self) -> None:
        svg = encode(everything(), "svg")
        root = ElementTree.fromstring(svg)
        texts = ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
        assert texts == ["tench & <Tinca> $x$"]
        assert len(list(root.iter(f"{SVG}image"))) == 1
        assert (root.get("width"), root.get("height")) == ("200pt", "100pt")
        fills = [match.group(1) for match in re.finditer(rb"fill: #([0-9a-f]{6}); fill-opacity: 0.5", svg)]
        assert fills == [b"c80000"]

    def test_cells_are_cut_at_the_edge_of_their_panel(self) -> None:
        """The map is twice as high as the panel: its second row begins where the panel ends, and one cell is clear."""
        root = ElementTree.fromstring(encode(everything(), "svg"))
        (cells,) = (group for group in root.iter(f"{SVG}g") if group.get("id", "").startswith("PolyCollection"))
        (path,) = cells.iter(f"{SVG}path")
        corners = [tuple(map(float, corner)) for corner in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path.get("d", ""))]
        assert set(corners) == {(10, 10), (50, 10), (50, 50), (10, 50)}

    @pytest.mark.parametrize("kind", ["svg", "pdf"])
    def test_the_same_figure_is_the_same_file(self, kind: str) -> None:
        assert encode(everything(), kind) == encode(everything(), kind)

    def test_pdf(self) -> None:
        pdf = encode(everything(), "pdf")
        assert pdf.startswith(b"%PDF")
        assert b"DejaVuSans" in pdf
        assert b"/MediaBox [ 0 0 200 100 ]" in pdf

    @pytest.mark.parametrize("name", ["鯉", "🐟", "a\x00b", "\ud83d", "δελφίνι"])
    def test_characters_without_a_glyph(self, name: str) -> None:
        """matplotlib warns of missing glyphs, and warnings are errors here."""
        for kind in ("svg", "pdf"):
            assert encode(everything(name), kind)


def test_both_draw_the_same() -> None:
    """matplotlib's own rasteriser draws the figure where Pillow draws it, but for type and the edges of shapes."""
    from matplotlib import rc_context

    import tokenlabels.views.vector as vector

    figure = everything()
    with rc_context(vector._STYLE):
        rastered = np.asarray(Image.open(io.BytesIO(encode(figure, "png"))).convert("RGB")).astype(int)
    pixels = np.asarray(draw(figure)).astype(int)
    assert rastered.shape == pixels.shape
    for place in np.s_[14:46, 14:46], np.s_[14:46, 54:86], np.s_[16:44, 126:154]:
        np.testing.assert_allclose(rastered[place], pixels[place], atol=2)
