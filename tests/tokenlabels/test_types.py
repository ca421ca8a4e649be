from typing import Any

import numpy as np
import pytest

from tokenlabels.types import ScoreMap, ScoreMaps, class_dtype


def fields_of(num_maps: int) -> dict[str, Any]:
    """Arguments of a ScoreMaps of 3 x 2 cells, k=4."""
    counts = np.arange(num_maps * 24).reshape(num_maps, 3, 2, 4)
    return {
        "keys": tuple(f"key{row}" for row in range(num_maps)),
        "scores": -counts.astype(np.float16),
        "classes": counts.astype(np.uint16),
        "tail": np.full((num_maps, 3, 2), 0.25, np.float16),
        "views": np.tile(np.array([0, 0, 1, 1], np.float32), (num_maps, 1)),
    }


@pytest.mark.parametrize(
    ("num_classes", "dtype"), [(1, np.uint16), (1000, np.uint16), (65_535, np.uint16), (65_536, np.uint32)]
)
def test_class_ids_leave_the_all_ones_value_free(num_classes: int, dtype: type[np.unsignedinteger[Any]]) -> None:
    assert class_dtype(num_classes) == dtype
    assert num_classes - 1 < np.iinfo(dtype).max


def test_shape_of_a_stack() -> None:
    maps = ScoreMaps(**fields_of(5))
    assert (len(maps), maps.grid, maps.k) == (5, (3, 2), 4)
    assert maps.num_bytes == 5 * (24 * 2 + 24 * 2 + 6 * 2 + 4 * 4)
    assert repr(maps) == "ScoreMaps(5 maps, 3x2 cells, k=4, uint16 ids)"


def test_rows_are_the_rows_of_the_arrays() -> None:
    fields = fields_of(5)
    rows = list(ScoreMaps(**fields))
    assert [row.key for row in rows] == list(fields["keys"])
    for name, stack in (("scores", "scores"), ("classes", "classes"), ("tail", "tail"), ("view", "views")):
        np.testing.assert_array_equal(np.stack([getattr(row, name) for row in rows]), fields[stack])
    assert (rows[2].grid, rows[2].k) == ((3, 2), 4)
    assert repr(rows[2]) == "ScoreMap('key2', 3x2 cells, k=4, view=[0.0, 0.0, 1.0, 1.0])"


def test_rows_do_not_share_memory_with_the_stack() -> None:
    maps = ScoreMaps(**fields_of(5))
    row = maps[3]
    for mine, stack in ((row.scores, maps.scores), (row.classes, maps.classes), (row.tail, maps.tail)):
        assert not np.shares_memory(mine, stack)
        assert mine.base is None
    assert not np.shares_memory(row.view, maps.views)


def test_rows_beyond_the_end_are_refused() -> None:
    with pytest.raises(IndexError):
        ScoreMaps(**fields_of(5))[5]


def test_an_empty_stack_is_a_stack() -> None:
    maps = ScoreMaps(**fields_of(0))
    assert (len(maps), maps.grid, list(maps)) == (0, (3, 2), [])


WRONG_FIELDS = {
    "scores of float32": ({"scores": np.zeros((5, 3, 2, 4), np.float32)}, "scores must be float16"),
    "scores without k": ({"scores": np.zeros((5, 3, 2), np.float16)}, "scores must be float16"),
    "signed ids": ({"classes": np.zeros((5, 3, 2, 4), np.int64)}, "classes must be uint16 or uint32"),
    "ids of another k": ({"classes": np.zeros((5, 3, 2, 1), np.uint16)}, r"\(5, 3, 2, 4\).*got uint16 \(5, 3, 2, 1\)"),
    "tail with k": ({"tail": np.zeros((5, 3, 2, 4), np.float16)}, "tail must be float16"),
    "tail of float64": ({"tail": np.zeros((5, 3, 2))}, "tail must be float16"),
    "tail of a turned grid": ({"tail": np.zeros((5, 2, 3), np.float16)}, r"tail must be float16 \(5, 3, 2\)"),
    "one view for all": ({"views": np.zeros(4, np.float32)}, r"views must be float32 \(5, 4\)"),
    "views of float64": ({"views": np.zeros((5, 4))}, "views must be float32"),
    "a key too few": ({"keys": ("a", "b", "c", "d")}, "got 4 keys for 5 maps"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_FIELDS.values(), ids=WRONG_FIELDS.keys())
def test_stacks_check_their_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreMaps(**{**fields_of(5), **changes})


def test_uint32_ids_are_accepted() -> None:
    fields = fields_of(5)
    assert ScoreMaps(**{**fields, "classes": fields["classes"].astype(np.uint32)}).classes.dtype == np.uint32


def test_a_single_map_takes_no_leading_axis() -> None:
    fields = fields_of(1)
    with pytest.raises(ValueError, match="scores must be float16"):
        ScoreMap("key", fields["scores"], fields["classes"], fields["tail"], fields["views"])
    with pytest.raises(ValueError, match="views must be float32"):
        ScoreMap("key", fields["scores"][0], fields["classes"][0], fields["tail"][0], fields["views"])
