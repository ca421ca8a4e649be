import numpy as np
from rich.console import Console

from tests.tokenlabels.views.test_over_image import LONG_NAME, score_map
from tokenlabels.geometry import view_letterbox
from tokenlabels.types import ScoreMap
from tokenlabels.views import block_map
from tokenlabels.views.palette import class_colours


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
