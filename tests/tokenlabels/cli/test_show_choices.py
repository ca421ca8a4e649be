"""What the options of tokenlabels show LABELS mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenlabels.cli.show_choices import find_class, parse_cell, parse_crop

NAMES = ("tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark", "tiger shark", "7", "Tiger")


class TestCell:
    def test_row_then_column(self) -> None:
        assert parse_cell("7,9", (8, 10)) == (7, 9)
        assert parse_cell(" 0 , 0 ", (1, 1)) == (0, 0)

    @pytest.mark.parametrize("text", ["", "7", "7,9,1", "-1,0", "a,b", "1.5,2", "7;9", "²,1"])
    def test_no_cell(self, text: str) -> None:
        with pytest.raises(ValueError, match="--cell is ROW,COLUMN"):
            parse_cell(text, (20, 20))

    @pytest.mark.parametrize("text", ["8,0", "0,10", "99999999999999999999,0"])
    def test_outside_the_grid(self, text: str) -> None:
        with pytest.raises(ValueError, match="outside the map of 8 rows and 10 columns: give 0,0 to 7,9"):
            parse_cell(text, (8, 10))


class TestCrop:
    def test_four_numbers(self) -> None:
        assert parse_crop("0,0.25, .5,1") == (0.0, 0.25, 0.5, 1.0)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "X0,Y0,X1,Y1 in 0..1"),
            ("0,0,1", "X0,Y0,X1,Y1 in 0..1"),
            ("0,0,1,x", "X0,Y0,X1,Y1 in 0..1"),
            ("0.5,0,0.5,1", "is empty"),
            ("0,1,1,0", "is empty"),
            ("nan,0,1,1", "is empty"),
            ("0,0,1,inf", "is empty"),
            ("-0.1,0,1,1", "outside the image"),
            ("10,20,100,200", "outside the image"),
        ],
    )
    def test_refused(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_crop(text)


class TestClass:
    @pytest.mark.parametrize(
        ("text", "class_id"),
        [
            ("tench", 0),
            ("Tinca TINCA", 0),
            ("tench, Tinca tinca", 0),
            ("gold", 1),
            ("white", 2),
            ("tiger", 5),  # a whole name goes before a part of one
            ("7", 4),  # and before an id
            ("3", 3),
        ],
    )
    def test_found(self, text: str, class_id: int) -> None:
        assert find_class(text, NAMES) == class_id

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("shark", "several classes, say which by its id: 2: great white shark; 3: tiger shark"),
            ("gold fish", "no such class among 6; near it are 1: goldfish, Carassius auratus"),
            ("6", "'6': ids are 0 to 5"),
            ("-1", "'-1': ids are 0 to 5"),
            ("", "no such class among 6; near it are"),
            ("zzzzzz", "near it are 0: tench"),
        ],
    )
    def test_refused(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find_class(text, NAMES)

    def test_two_classes_of_one_name(self) -> None:
        with pytest.raises(ValueError, match="0: crane; 1: crane"):
            find_class("crane", ("crane", "crane"))

    @given(st.lists(st.text(min_size=1), min_size=1, max_size=8), st.text())
    def test_any_text_is_a_class_or_refused(self, names: list[str], text: str) -> None:
        try:
            class_id = find_class(text, names)
        except ValueError:
            return
        assert 0 <= class_id < len(names)
