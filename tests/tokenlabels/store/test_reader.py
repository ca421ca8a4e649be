from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokenlabels
from tokenlabels.store import (
    LabelSet,
    LabelStoreError,
    Manifest,
    claim_shard,
    create_label_set,
    manifest_path,
    open_store,
    verify_store,
)
from tokenlabels.types import ScoreMap, ScoreMaps

MakeInfo = Callable[..., LabelSet]
MakeMaps = Callable[..., ScoreMaps]
WriteShard = Callable[..., Manifest]


def assert_same(got: ScoreMaps | ScoreMap, expected: ScoreMaps | ScoreMap) -> None:
    """Bit for bit: types, NaN and the sign of zero included."""
    names = ("scores", "classes", "tail", "views" if isinstance(expected, ScoreMaps) else "view")
    for mine, others in ((getattr(got, name), getattr(expected, name)) for name in names):
        assert (mine.dtype, mine.shape, mine.tobytes()) == (others.dtype, others.shape, others.tobytes())
    if isinstance(expected, ScoreMaps):
        assert isinstance(got, ScoreMaps)
        assert got.keys == expected.keys
    else:
        assert isinstance(got, ScoreMap)
        assert got.key == expected.key


LAYOUTS: dict[str, dict[str, Any]] = {
    "3x2 cells": {},
    "1x5 cells": {"grid": (1, 5), "k": 4},
    "one class per cell": {"k": 1},
    "all classes": {"k": 10},
    "uint32 ids": {"num_classes": 65_536},
    "largest uint16 ids": {"num_classes": 65_535},
}


@pytest.mark.parametrize("num_maps", [0, 1, 255, 256, 257, 700])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_maps_come_back_as_they_were_written(
    layout: dict[str, Any],
    num_maps: int,
    tmp_path: Path,
    make_info: MakeInfo,
    make_maps: MakeMaps,
    write_shard: WriteShard,
) -> None:
    info = make_info(**layout)
    maps = make_maps(num_maps, info)
    create_label_set(tmp_path, info)
    write_shard(tmp_path, "a", maps, info)
    [shard] = open_store(tmp_path).shards
    assert len(shard) == num_maps
    assert shard.keys == maps.keys
    assert_same(shard.read(), maps)
    for row in {0, num_maps // 2, num_maps - 1} & {*range(num_maps)}:
        assert_same(shard.row(row), maps[row])
    parts = list(shard.stream())
    assert [len(part) for part in parts] == [min(256, num_maps - start) for start in range(0, num_maps, 256)]
    for part, start in zip(parts, range(0, num_maps, 256), strict=True):
        for row in range(len(part)):
            assert_same(part[row], maps[start + row])
    assert {finding.path.name for finding in verify_store(tmp_path)} == {"b.zarr"}


def test_values_that_no_teacher_gives_come_back_too(
    label_set: Path, make_maps: MakeMaps, write_shard: WriteShard
) -> None:
    maps = make_maps(300)
    patterns = np.random.default_rng(3).integers(0, 2**16, size=maps.scores.shape, dtype=np.uint16)
    maps.scores[:] = patterns.view(np.float16)
    maps.classes[:] = patterns
    maps.tail[:] = patterns[..., 0].view(np.float16)
    maps.views[:] = [np.nan, -0.0, np.inf, 1e-45]
    write_shard(label_set, "a", maps)
    assert_same(open_store(label_set).shards[0].read(), maps)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(st.text(max_size=10), max_size=5, unique=True).map(tuple))
def test_any_text_is_a_key(
    keys: tuple[str, ...], label_set: Path, make_maps: MakeMaps, write_shard: WriteShard
) -> None:
    maps = make_maps(len(keys))
    write_shard(label_set, "b", ScoreMaps(keys, maps.scores, maps.classes, maps.tail, maps.views))
    assert open_store(label_set).shards[1].keys == keys


@pytest.mark.parametrize("rows", [7, 256, 299, 300, 1000])
def test_streams_of_any_length_are_the_whole_shard(rows: int, label_set: Path) -> None:
    shard = open_store(label_set).shards[0]
    maps, parts = shard.read(), list(shard.stream(rows))
    assert [len(part) for part in parts] == [min(rows, 300 - start) for start in range(0, 300, rows)]
    assert tuple(key for part in parts for key in part.keys) == maps.keys
    for name in ("scores", "classes", "tail", "views"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(maps, name))


def test_a_stream_needs_rows(label_set: Path) -> None:
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        next(open_store(label_set).shards[0].stream(0))


@pytest.mark.parametrize("row", [-1, 5])
def test_rows_outside_of_the_shard_are_refused(row: int, label_set: Path) -> None:
    with pytest.raises(IndexError, match=rf"b\.zarr has rows 0\.\.4, got {row}"):
        open_store(label_set).shards[1].row(row)


def test_maps_by_key(label_set: Path) -> None:
    store = tokenlabels.open_store(str(label_set))
    first, second = (shard.read() for shard in store.shards)
    assert [shard.stem for shard in store.shards] == ["a", "b"]
    assert len(store) == 305
    assert list(store.keys()) == list(store) == [*first.keys, *second.keys]
    assert_same(store["a_00299"], first[299])
    assert_same(store["b_00004"], second[4])
    assert "b_00004" in store
    assert "b_00005" not in store
    with pytest.raises(KeyError, match="has no labels for 'b_00005'"):
        store["b_00005"]


def test_rows_do_not_pin_the_shard(label_set: Path) -> None:
    store = open_store(label_set)
    for found in (store["a_00007"], store.shards[0].row(7), store.shards[0].read()[7]):
        assert all(part.base is None for part in (found.scores, found.classes, found.tail, found.view))


def test_what_a_store_and_its_shards_print(label_set: Path) -> None:
    store = open_store(label_set)
    assert repr(store) == f"LabelStore('{label_set}', 305 maps in 2 of 2 shards, 3x2 cells, k=3, 10 classes)"
    assert repr(store.shards[1]) == f"ShardReader('{label_set / 'b.zarr'}', 5 maps)"


def test_shards_that_are_not_annotated_yet_are_listed(label_set: Path, make_info: MakeInfo) -> None:
    create_label_set(label_set, make_info(tars=("0.tar", "c.tar")))
    store = open_store(label_set)
    assert [shard.stem for shard in store.shards] == ["a", "b"]
    assert (store.missing, len(store)) == (("0.tar", "c.tar"), 305)


def test_a_set_that_is_being_written_can_be_read(label_set: Path, make_info: MakeInfo) -> None:
    with claim_shard(label_set, "b", make_info()):
        (label_set / ".b.zarr.tmp-0").mkdir()
        assert len(open_store(label_set)) == 305


def test_attributes_of_a_shard(label_set: Path) -> None:
    attributes = open_store(label_set).shards[1].attributes
    assert (attributes.n, attributes.grid, attributes.k, attributes.num_classes) == (5, (3, 2), 3, 10)
    assert (attributes.source.name, attributes.versions) == ("b.tar", {"torch": "2.0"})


def test_a_folder_without_labels_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelStoreError, match=r"labels\.json: no such file"):
        open_store(tmp_path / "nowhere")


def test_labels_of_another_teacher_are_refused(
    label_set: Path, make_info: MakeInfo, make_maps: MakeMaps, write_shard: WriteShard
) -> None:
    """As when a shard was copied from another label set."""
    other = make_info(teacher=make_info().teacher.model_copy(update={"digest": "t1"}))
    write_shard(label_set, "b", make_maps(5, other), other)
    with pytest.raises(LabelStoreError, match=r"b\.zarr: made by another teacher than .*labels\.json names"):
        open_store(label_set)


def test_a_key_in_two_shards_is_refused_by_key_and_served_by_shard(
    label_set: Path, make_maps: MakeMaps, write_shard: WriteShard
) -> None:
    write_shard(label_set, "b", make_maps(5, prefix="a"))
    store = open_store(label_set)
    with pytest.raises(LabelStoreError, match="key 'a_00000' is in a and in b; read such a set shard by shard"):
        store["a_00007"]
    assert [len(shard.read()) for shard in store.shards] == [300, 5]


def test_a_shard_between_the_two_renames_of_a_running_writer_is_missing(label_set: Path, make_info: MakeInfo) -> None:
    mark = manifest_path(label_set, "b")
    with claim_shard(label_set, "b", make_info()):
        hidden = mark.rename(mark.with_suffix(".away"))
        store = open_store(label_set)
        assert [shard.stem for shard in store.shards] == ["a"]
        assert store.missing == ("b.tar",)
    with pytest.raises(LabelStoreError, match=r"b\.zarr: has no manifest"):
        open_store(label_set)
    hidden.rename(mark)
    assert open_store(label_set).missing == ()
