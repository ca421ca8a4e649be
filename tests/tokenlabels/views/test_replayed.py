"""Pictures of what training sees, by their pixels and words."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tokenlabels.geometry import Box
from tokenlabels.views import drawing
from tokenlabels.views.drawing import FONT_PX, GAP_PX, LINE_PX, MARGIN_PX, TITLE_PX
from tokenlabels.views.replayed import HEADINGS, Mixed, ReplayedSample, Shown, draw_replayed
from tokenlabels.views.targets import TABLE_PX, Targets

NAMES = ("tench", "goldfish", "great white shark")
GREEN, YELLOW, GREY = (0, 160, 0), (220, 220, 0), (90, 90, 90)
FACTS = ("a recipe", "a place")


def plain(colour: tuple[int, int, int], *lines: str, size: tuple[int, int] = (224, 224)) -> Shown:
    return Shown(np.full((*size, 3), colour, np.uint8), lines)


def targets(grid: tuple[int, int] | None = (14, 14)) -> Targets:
    """Everything is a goldfish; the last token has no target."""
    num_rows = 1 + (grid[0] * grid[1] if grid else 0)
    dense, valid = np.zeros((num_rows, 3), np.float32), np.ones(num_rows, np.bool_)
    dense[:, 1] = 1
    if grid:
        dense[-1], valid[-1] = 0, False
    return Targets(dense, valid, grid)


def sample(**changes: Any) -> ReplayedSample:
    """A white image, its crop is green, its partner yellow, the input grey."""
    mixed = Mixed(plain(YELLOW, "partner's key"), plain(GREY, "mixed"), np.eye(2))
    values: dict[str, Any] = {
        "source": plain((255, 255, 255), "its size"),
        "box": (0.25, 0.5, 0.75, 1.0),
        "own": plain(GREEN, "own key", "class tench"),
        "mixed": mixed,
        "targets": targets(),
    }
    return ReplayedSample(**(values | changes))


def panel(picture: Image.Image, number: int, size: tuple[int, int] = (224, 224), num_lines: int = 2) -> NDArray[Any]:
    """A panel, cut out of the picture where it has to be; `num_lines` is the most below a panel of the first row."""
    row, column = divmod(number, 3)
    top = MARGIN_PX + TITLE_PX + GAP_PX + len(FACTS) * LINE_PX + GAP_PX + LINE_PX
    top += row * (size[0] + (1 + num_lines) * LINE_PX + 2 * GAP_PX)
    left = MARGIN_PX + column * (max(size[1], 192) + GAP_PX)
    return np.asarray(picture).astype(int)[top : top + size[0], left : left + size[1]]


def draw(drawn: ReplayedSample) -> Image.Image:
    return draw_replayed(drawn, NAMES, "a key in epoch 3", FACTS)


def test_panels_are_where_they_have_to_be() -> None:
    picture = draw(sample())
    assert picture.mode == "RGB"
    source, own, partner, given, cells, whose = (panel(picture, number) for number in range(6))
    assert (own == GREEN).all()
    assert (partner == YELLOW).all()
    assert (given == GREY).all()
    assert (source[:, :50] < 120).all()
    assert (source[120:220, 60:160] == 255).all()
    assert np.ptp(cells[2:14, 2:14], axis=2).min() > 60
    assert np.ptp(cells[-15:, -15:], axis=2).max() == 0
    assert (whose[:100, :100, 0] > whose[:100, :100, 2]).all()
    assert (whose[:100, 130:, 2] > whose[:100, 130:, 0]).all()


def test_cells_lie_on_the_input() -> None:
    """The classes are those of the mixed input, not of the crop."""
    given = np.full((224, 224, 3), 40, np.uint8)
    given[:112] = 240
    one = sample()
    assert one.mixed is not None
    picture = draw(replace(one, mixed=replace(one.mixed, input=Shown(given, ()))))
    cells = panel(picture, 4)
    assert (cells[5, 5] > cells[200, 5]).all()


@pytest.mark.parametrize("size", [(224, 224), (384, 384), (64, 64), (96, 64)])
@pytest.mark.parametrize("shape", [(300, 400), (40, 900), (900, 40), (20, 20)])
def test_images_of_any_shape(size: tuple[int, int], shape: tuple[int, int]) -> None:
    """Whatever the image, its crop is where it is, and nothing is drawn over other panels."""
    own, grid = plain(GREEN, "own", size=size), (size[0] // 16, size[1] // 16)
    box: Box = (0.5, 0.0, 1.0, 0.5)
    picture = draw(sample(own=own, mixed=None, targets=targets(grid), source=plain((200, 0, 0), size=shape), box=box))
    shown = drawing.panel_size(size, [grid])
    source = panel(picture, 0, shown, num_lines=1)
    assert (panel(picture, 1, shown, num_lines=1) == GREEN).all()
    scale = min(shown[0] / shape[0], shown[1] / shape[1])
    height, width = (round(side * scale) for side in shape)
    assert (source[height:] == 255).all()
    assert (source[:, width:] == 255).all()
    bright = (source[..., 0] == 200) & (source[..., 1] == 0)
    inside = bright[3 : height // 2 - 3, width // 2 + 3 : width - 3]
    assert inside.all()
    assert bright.sum() == pytest.approx(inside.size, abs=8 * (height + width))
    assert (source[height // 2 + 3 : height, : width // 2 - 3, 0] == 80).all()


def test_nothing_is_mixed() -> None:
    picture = draw(sample(mixed=None))
    assert (panel(picture, 1) == GREEN).all()
    assert np.ptp(panel(picture, 2)[2:14, 2:14], axis=2).min() > 40
    assert picture.height < draw(sample()).height
    assert picture.width == draw(sample()).width


def test_image_level_targets_alone() -> None:
    picture = draw(sample(targets=targets(None)))
    assert (panel(picture, 3) == GREY).all()
    whose = panel(picture, 4)
    assert (whose[:100, :100, 0] > whose[:100, :100, 2]).all()
    assert (panel(picture, 5) == 255).all()


def test_no_targets() -> None:
    assert draw(sample(targets=None)).width == draw(sample()).width - MARGIN_PX - TABLE_PX


def test_texts_are_shown_and_never_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[tuple[float, float, float, float, str]] = []
    draw_text = drawing.ImageDraw.ImageDraw.text

    def record(draw: Any, xy: tuple[float, float], text: str, *args: Any, **options: Any) -> None:
        boxes.append((*draw.textbbox(xy, text, args[1], anchor=options["anchor"]), text))
        draw_text(draw, xy, text, *args, **options)

    monkeypatch.setattr(drawing.ImageDraw.ImageDraw, "text", record)
    long_key = "a/key/that/goes/on/and/on_" * 9
    one = sample(own=plain(GREEN, long_key, "class tench"))
    picture = draw_replayed(one, NAMES, f"title {long_key}", ("a fact", f"fact {long_key}"))
    words = [text for *_, text in boxes]
    for text in (
        *HEADINGS,
        "targets of its 14 x 14 tokens",
        "red: 50.0% its own",
        "blue: 50.0% its partner's",
        "a fact",
    ):
        assert text in words
    assert {"hatched: no target", "fainter: smaller targets", "partner's key", "its size", "goldfish"} <= set(words)
    own_table = 0  # the table is drawn by itself, at the beginning
    for index, (left, top, right, bottom, text) in enumerate(boxes):
        if text == "a fact":
            own_table = index - 1
        assert bottom - top <= FONT_PX + 8, text
        assert right <= picture.width - MARGIN_PX + 1, text
        assert left >= 0, text
    on_picture = boxes[own_table:]
    for index, (left, top, right, bottom, text) in enumerate(on_picture):
        for other_left, other_top, other_right, other_bottom, other in on_picture[:index]:
            apart = right <= other_left or other_right <= left or bottom <= other_top or other_bottom <= top
            assert apart, (text, other)


def test_images_that_are_refused() -> None:
    for pixels in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"pixels must be uint8 \[H, W, 3\], got"):
            Shown(pixels, ())
