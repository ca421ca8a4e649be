"""What two records differ in, field by field."""

from tokenlabels.differences import MAX_SHOWN_LETTERS, differences


def test_nested_fields_are_named_by_their_path() -> None:
    mine = {"a": 1, "b": {"c": 2, "d": {"e": "x"}}, "same": [1, 2]}
    others = {"a": 1, "b": {"c": 3, "d": {"e": "y"}}, "same": [1, 2]}
    assert differences(mine, others) == ["b.c: 2 != 3", "b.d.e: x != y"]


def test_fields_of_one_side() -> None:
    assert differences({"a": 1}, {"b": 2}) == ["a: 1 != absent", "b: absent != 2"]


def test_tuples_are_lists_as_in_json() -> None:
    assert differences({"a": (1, 2)}, {"a": [1, 2]}) == []
    assert differences({"a": (1, 2)}, {"a": [1, 3]}) == ["a: [1, 2] != [1, 3]"]


def test_lists_of_records_are_numbered() -> None:
    assert differences({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}) == ["a.1.b: 2 != 3"]


def test_empty_records_count() -> None:
    assert differences({"a": {}}, {"a": {}}) == []
    assert differences({}, {}) == []


def test_long_values_are_cut() -> None:
    (line,) = differences({"a": "x" * 1000}, {"a": "y"})
    assert line == f"a: {'x' * MAX_SHOWN_LETTERS}... != y"
