import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from tests.tokenlabels.views.maps import LONG_NAME, score_map
from tokenlabels.geometry import view_center, view_letterbox
from tokenlabels.types import ScoreMap
from tokenlabels.views import block_map
from tokenlabels.views.palette import class_colours
from tokenlabels.views.terminal import image_fits


class TestBlockMap:
    @staticmethod
    def text_of(labels: ScoreMap, names: tuple[str, ...] | None, **console: object) -> list[str]:
        terminal = Console(width=80, **console)  # type: ignore[arg-type]
        with terminal.capture() as capture:
            terminal.print(block_map(labels, names))
        return capture.get().splitlines()

    def test_letters_by_class_and_capitals_by_probability(self) -> None:
        labels = score_map(np.array([[4, 4, 8], [4, 8, 4]]))
        assert [line.strip() for line in self.text_of(labels, None)[3:5]] == ["A A B", "A B A"]
        unsure = score_map(np.array([[4, 4, 8], [4, 8, 4]]), logit=-1.0)
        assert [line.strip() for line in self.text_of(unsure, None)[3:5]] == ["a a b", "a b a"]

    def test_table_names_shares_and_ids(self) -> None:
        names = tuple(f"[bold]kind {index}" for index in range(1000))
        lines = self.text_of(score_map(np.array([[4, 4, 8, 4]])), names)
        assert [line.split() for line in lines[-2:]] == [
            ["A", "[bold]kind", "4", "4", "75%", "75.0%"],
            ["B", "[bold]kind", "8", "8", "25%", "25.0%"],
        ]

    def test_padding_stays_empty(self) -> None:
        labels = score_map(np.zeros((4, 3), int), view=view_letterbox(100, 50, (64, 64)))
        assert [line.strip() for line in self.text_of(labels, None)[3:7]] == ["", "A A A", "A A A", ""]

    def test_many_classes_and_long_names_fit_the_terminal(self) -> None:
        lines = self.text_of(score_map(np.arange(30)[None], key=LONG_NAME), (LONG_NAME,) * 1000)
        assert max(map(len, lines)) <= 80
        assert lines[-1].split() == ["·", "4", "more", "13%", "13.3%"]
        assert lines[3].split() == [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"····"]

    def test_blocks_carry_the_colours_of_the_palette(self) -> None:
        lines = self.text_of(score_map(np.array([[0]])), None, force_terminal=True, color_system="truecolor")
        red, green, blue = class_colours([0])[0].tolist()
        assert f"48;2;{red};{green};{blue}" in lines[-1]


class TestImageBeside:
    @staticmethod
    def half_blocks(labels: ScoreMap, image: Image.Image) -> NDArray[np.int64]:
        """The pixels that the terminal shows in front of the map, [2 H, 2 W, 3]."""
        terminal = Console(width=80, force_terminal=True, color_system="truecolor")
        with terminal.capture() as capture:
            terminal.print(block_map(labels, None, image))
        lines = [line for line in capture.get().splitlines() if "▀" in line]
        colour = r"38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m(▀+)"
        rows = []
        for line in lines:
            pairs = [
                [int(value) for value in match[:6]] for match in re.findall(colour, line) for _ in range(len(match[6]))
            ]
            rows += [[pair[:3] for pair in pairs], [pair[3:] for pair in pairs]]
        return np.array(rows)

    def test_two_by_two_pixels_to_a_cell(self) -> None:
        small = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
        image = Image.fromarray(small.repeat(10, axis=0).repeat(10, axis=1))
        shown = self.half_blocks(score_map(np.zeros((2, 3), int)), image)
        np.testing.assert_array_equal(shown, small)

    def test_what_the_map_covers(self) -> None:
        image = Image.fromarray(np.full((50, 100, 3), (200, 100, 50), np.uint8))
        letterboxed = score_map(np.zeros((4, 4), int), view=view_letterbox(100, 50, (64, 64)))
        shown = self.half_blocks(letterboxed, image)
        np.testing.assert_array_equal(shown[2:6], np.broadcast_to((200, 100, 50), (4, 8, 3)))
        np.testing.assert_array_equal(shown[[0, 1, 6, 7]], 0)

    @pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1)])
    @pytest.mark.parametrize("fit", [view_letterbox, lambda width, height, _: view_center(width, height, 0.9)])
    def test_any_aspect_ratio(self, size: tuple[int, int], fit: Any) -> None:
        labels = score_map(np.zeros((4, 5), int), view=fit(*size, (64, 64)))
        assert self.half_blocks(labels, Image.new("RGB", size)).shape == (8, 10, 3)

    def test_room(self) -> None:
        labels = score_map(np.zeros((2, 7), int))
        assert image_fits(labels, 30)
        assert not image_fits(labels, 29)


def test_classes_of_a_cell() -> None:
    terminal = Console(width=80)
    names = tuple(f"[red]kind {index}" for index in range(1000))
    with terminal.capture() as capture:
        terminal.print(block_map(score_map(np.array([[4, 8]]), logit=0.0, tail=0.5), names, cell=(0, 1)))
    assert [line.rstrip() for line in capture.get().splitlines()[-4:]] == [
        "cell 0,1",
        " 25.0% █████                [red]kind 8",
        " 25.0% █████                [red]kind 999",
        " 50.0% ██████████           all other classes (tail)",
    ]
