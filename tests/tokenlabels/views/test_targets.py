"""Targets as cells and as a table, by their pixels and words."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tokenlabels.views import drawing
from tokenlabels.views.palette import class_colours
from tokenlabels.views.targets import TABLE_PX, Targets, paint_targets, target_table

NAMES = tuple(f"class number {id_}" for id_ in range(30))
GREY = np.full((64, 64, 3), 100, np.uint8)
Texts = list[tuple[float, float, str]]


def targets_of(
    leading: NDArray[np.int64], probability: float = 0.6, *, invalid: tuple[int, ...] = (), image: int = 0
) -> Targets:
    """Tokens [h, w] whose leading class has this target; the rest is spread evenly."""
    ids = np.array([image, *leading.ravel().tolist()])
    dense = np.full((len(ids), len(NAMES)), (1 - probability) / (len(NAMES) - 1), np.float32)
    dense[np.arange(len(ids)), ids] = probability
    valid = np.ones(len(ids), np.bool_)
    for token in invalid:
        dense[1 + token], valid[1 + token] = 0, False
    return Targets(dense, valid, (leading.shape[0], leading.shape[1]))


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Texts:
    """(left, right, text) of all that is written."""
    written: Texts = []
    text_of = drawing.ImageDraw.ImageDraw.text

    def record(draw: Any, xy: tuple[float, float], text: str, *args: Any, **options: Any) -> None:
        left, _, right, _ = draw.textbbox(xy, text, args[1], anchor=options["anchor"])
        written.append((left, right, text))
        text_of(draw, xy, text, *args, **options)

    monkeypatch.setattr(drawing.ImageDraw.ImageDraw, "text", record)
    return written


class TestCells:
    def test_colours_are_those_of_the_leading_classes(self) -> None:
        painted = paint_targets(GREY, targets_of(np.array([[3, 3], [3, 7]]), 0.9)).astype(int)
        first, second = class_colours([3, 7]).astype(int)
        for cell, colour in ((np.s_[4:28, 4:28], first), (np.s_[36:60, 36:60], second)):
            assert np.ptp(painted[cell], axis=(0, 1)).max() == 0
            towards = painted[cell][0, 0] - 100
            assert np.corrcoef(towards, colour - 100)[0, 1] > 0.99
        assert (painted[4, 4] == painted[4, 40]).all()

    def test_the_larger_the_target_the_stronger_the_colour(self) -> None:
        colour = class_colours([3])[0].astype(int)
        distances = [
            np.abs(paint_targets(GREY, targets_of(np.array([[3]]), p))[9, 9] - colour).sum() for p in (0.1, 0.5, 1.0)
        ]
        assert distances[0] > distances[1] > distances[2]

    def test_tokens_without_target_are_hatched_and_no_others(self) -> None:
        painted = paint_targets(GREY, targets_of(np.array([[3, 3], [3, 3]]), invalid=(1,))).astype(int)
        is_grey = np.ptp(painted, axis=2) == 0
        assert is_grey[:32, 32:].all()
        assert not is_grey[1:32, 1:32].any()
        lines = painted[:32, 32:, 0] > painted[:32, 32:, 0].min()
        assert lines.mean() == pytest.approx(2 / 8)

    @settings(max_examples=20, deadline=None)
    @given(num_classes=st.integers(1, 29), seed=st.integers(0, 99))
    def test_ten_classes_have_colours_of_their_own(self, num_classes: int, seed: int) -> None:
        ids = np.random.default_rng(seed).permutation(len(NAMES))[:num_classes]
        tokens = np.repeat(ids, np.arange(num_classes, 0, -1))  # the first leads most often
        painted = paint_targets(np.full((16, 16 * len(tokens), 3), 100, np.uint8), targets_of(tokens[None]))
        of_class = {id_: tuple(painted[8, 16 * np.flatnonzero(tokens == id_)[0] + 8]) for id_ in ids.tolist()}
        assert len(set(of_class.values())) == min(num_classes, 11)
        rest = [of_class[id_] for id_ in ids[10:].tolist()]
        assert len(set(rest)) <= 1


class TestTable:
    def test_shares_and_means(self, texts: Texts) -> None:
        """A quarter of the tokens has no target, two thirds of the others are of class 7."""
        table = target_table(targets_of(np.array([[7, 3], [5, 7]]), 0.71, invalid=(2,), image=9), NAMES)
        words = [text for _, _, text in texts]
        rest = 0.29 / 29
        rows = {name: words[words.index(name) + 1 :][:3] for name in NAMES if name in words}
        assert [name for name in words if name in NAMES][:3] == [NAMES[7], NAMES[3], NAMES[9]]
        assert rows[NAMES[7]] == ["67%", f"{(2 * 0.71 + rest) / 3:.0%}", "1%"]
        assert rows[NAMES[3]] == ["33%", f"{(0.71 + 2 * rest) / 3:.0%}", "1%"]
        assert rows[NAMES[9]] == ["0%", "1%", "71%"]
        assert NAMES[5] not in rows
        assert "leads in, mean: of the 3 tokens with a target" in words
        assert table.width == TABLE_PX

    def test_many_classes_share_a_row(self, texts: Texts) -> None:
        target_table(targets_of(np.arange(20)[None], image=0), NAMES)
        words = [text for _, _, text in texts]
        assert words[words.index("10 more") + 1] == "50%"
        assert sum(name in words for name in NAMES) == 10 + 3

    def test_the_image_alone(self, texts: Texts) -> None:
        """Hard labels that are mixed; small targets are left out."""
        dense = np.zeros((1, len(NAMES)), np.float32)
        dense[0, [4, 2, 6]] = 0.7, 0.298, 0.002
        target_table(Targets(dense, np.array([True]), None), NAMES)
        words = [text for _, _, text in texts]
        assert words == ["targets", "image", NAMES[4], "70%", NAMES[2], "30%", "image: the image as a whole"]

    def test_no_token_has_a_target(self, texts: Texts) -> None:
        none = targets_of(np.array([[3, 3]]), invalid=(0, 1), image=8)
        target_table(none, NAMES)
        assert "leads in" not in [text for _, _, text in texts]
        assert (np.ptp(paint_targets(GREY, none).astype(int), axis=2) == 0).all()

    def test_long_names_stay_in_their_column(self, texts: Texts) -> None:
        names = tuple(f"{name}, a class of which there is much to say, and that has many names" for name in NAMES)
        target_table(targets_of(np.array([[7, 3]])), names)
        rows = {left: right for left, right, text in texts if text.startswith("class number")}
        assert max(rows.values()) < min(left for left, _, text in texts if text in ("leads in", "50%"))
        assert max(right for _, right, _ in texts) <= TABLE_PX + 1


@pytest.mark.parametrize(
    ("probabilities", "valid", "grid"),
    [
        (np.zeros((4, 9)), np.ones(4, bool), (2, 2)),
        (np.zeros((5, 9)), np.ones(4, bool), (2, 2)),
        (np.zeros(5), np.ones(5, bool), (2, 2)),
        (np.zeros((2, 9)), np.ones(2, bool), None),
    ],
)
def test_targets_that_are_refused(probabilities: Any, valid: Any, grid: Any) -> None:
    with pytest.raises(ValueError, match=r"targets of grid .* must be \[[15], K\], and valid \[[15]\]; got"):
        Targets(probabilities, valid, grid)
