"""A named case for every rule: one thing is wrong, and the findings name it and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenlabels.files import files_below, sha256_of
from tokenlabels.store import (
    FileRecord,
    LabelSet,
    Manifest,
    SkippedRecord,
    SourceRecord,
    create_label_set,
    manifest_path,
    verify_store,
)
from tokenlabels.store.schema import read_sealed, write_sealed
from tokenlabels.store.verify import wrong_values
from tokenlabels.store.writer import ShardWriter
from tokenlabels.types import ScoreMaps

MakeInfo = Callable[..., LabelSet]
MakeMaps = Callable[..., ScoreMaps]
WriteShard = Callable[..., Manifest]
KEYS = [f"b_{row:05d}" for row in range(5)]


def findings(labels: Path, **options: Any) -> list[str]:
    """The lines that a user sees, with paths relative to the label set."""
    return [str(finding).removeprefix(f"{labels}/") for finding in verify_store(labels, **options)]


def test_a_whole_set_has_no_findings(label_set: Path) -> None:
    keys = {"a": [f"a_{row:05d}" for row in range(300)], "b": KEYS}
    seen: list[str] = []
    assert findings(label_set, source_keys=keys.get, on_shard=seen.append) == []
    assert seen == ["a", "b"]


def set_item(array: str, place: tuple[Any, ...], value: Any) -> Callable[[ScoreMaps], None]:
    return lambda maps: getattr(maps, array).__setitem__(place, value)


TOO_LARGE, TWICE = "a class id is not below 10", "a class is stored twice in a cell"
OUT_OF_ORDER = "scores are not in descending order"
NOT_FINITE, NO_SHARE = "a score is not finite", "a tail is not in 0..1"
NO_VIEW = "a view is not finite, or not x0 < x1 and y0 < y1"
WRONG_VALUES: dict[str, tuple[Callable[[ScoreMaps], None], str]] = {
    "id too large by one": (set_item("classes", (2, 0, 0, 2), 10), TOO_LARGE),
    "id that means nothing stored": (set_item("classes", (2, 0, 0, 0), 65_535), TOO_LARGE),
    "a class twice": (set_item("classes", (2, 2, 1), [4, 5, 4]), TWICE),
    "scores out of order": (set_item("scores", (2, 1, 1), [3, 1, 2]), OUT_OF_ORDER),
    "NaN score": (set_item("scores", (2, 0, 0, 1), np.nan), NOT_FINITE),
    "infinite score": (set_item("scores", (2, 0, 0, 0), np.inf), NOT_FINITE),
    "two infinite scores": (set_item("scores", (2, 0, 0, [0, 1]), np.inf), NOT_FINITE),
    "no score at all": (set_item("scores", (2,), -np.inf), NOT_FINITE),
    "tail below 0": (set_item("tail", (2, 1, 1), -0.001), NO_SHARE),
    "tail above 1": (set_item("tail", (2, 1, 1), 1.001), NO_SHARE),
    "NaN tail": (set_item("tail", (2, 1, 1), np.nan), NO_SHARE),
    "view without width": (set_item("views", (2,), [0.5, 0, 0.5, 1]), NO_VIEW),
    "view upside down": (set_item("views", (2,), [0, 1, 1, 0]), NO_VIEW),
    "view without end": (set_item("views", (2,), [0, 0, np.inf, 1]), NO_VIEW),
}


@pytest.mark.parametrize(("spoil", "problem"), WRONG_VALUES.values(), ids=WRONG_VALUES.keys())
def test_values_that_no_teacher_gives(
    spoil: Callable[[ScoreMaps], None],
    problem: str,
    label_set: Path,
    make_maps: MakeMaps,
    write_shard: WriteShard,
) -> None:
    maps = make_maps(5, prefix="b")
    spoil(maps)
    write_shard(label_set, "b", maps)
    assert findings(label_set) == [f"b.zarr: rows 0..4: {problem} (1 images, first b_00002)"]


def test_values_on_the_border_are_right(make_info: MakeInfo, make_maps: MakeMaps) -> None:
    maps = make_maps(5, make_info(k=1))
    maps.tail[0, 0] = [0, 1]
    maps.scores[0] = 65_504
    maps.classes[0] = 9
    maps.views[0] = [-1, -1, 2, 2]
    equal = make_maps(5)
    equal.scores[:] = 3
    assert [*wrong_values(maps, 10), *wrong_values(equal, 10)] == []


def test_the_rows_of_a_wrong_value_are_those_of_its_chunk(
    label_set: Path, make_maps: MakeMaps, write_shard: WriteShard
) -> None:
    maps = make_maps(300, prefix="a")
    maps.tail[[7, 9, 280]] = 2
    write_shard(label_set, "a", maps)
    assert findings(label_set) == [
        "a.zarr: rows 0..255: a tail is not in 0..1 (2 images, first a_00007)",
        "a.zarr: rows 256..299: a tail is not in 0..1 (1 images, first a_00280)",
    ]


def seal_again(labels: Path) -> None:
    """Makes the manifest of shard b fit what is there now, as a program that knows the format could."""
    group, mark = labels / "b.zarr", manifest_path(labels, "b")
    files = {
        name: FileRecord(size_bytes=(group / name).stat().st_size, sha256=sha256_of(group / name))
        for name in files_below(group)
    }
    write_sealed(mark, read_sealed(mark, Manifest).model_copy(update={"files": files}))


def change_attribute(labels: Path, name: str, value: Any) -> None:
    path = labels / "b.zarr" / "zarr.json"
    metadata = json.loads(path.read_bytes())
    metadata["attributes"][name] = value
    path.write_text(json.dumps(metadata))
    seal_again(labels)


OTHER_ATTRIBUTES = {
    "n": (6, "n is 6, expected 5"),
    "grid": ([2, 3], "grid is (2, 3), expected (3, 2)"),
    "k": (4, "k is 4, expected 3"),
    "num_classes": (11, "num_classes is 11, expected 10"),
    "source": (
        {"name": "b.tar", "size_bytes": 1, "num_samples": 5},
        "source is name='b.tar' size_bytes=1 num_samples=5 num_ignored=0, expected name='b.tar' size_bytes=10240 ",
    ),
    "keys_sha256": ("0", "keys_sha256 is 0, expected "),
    "teacher_digest": ("t1", "teacher_digest is t1, expected t0"),
}


@pytest.mark.parametrize("name", OTHER_ATTRIBUTES)
def test_attributes_that_do_not_fit(name: str, label_set: Path) -> None:
    value, problem = OTHER_ATTRIBUTES[name]
    change_attribute(label_set, name, value)
    [finding] = findings(label_set)
    assert finding.startswith(f"b.zarr: attribute {problem}")


def test_unknown_attributes(label_set: Path) -> None:
    change_attribute(label_set, "colour", "red")
    [finding] = findings(label_set)
    assert finding.startswith("b.zarr: not the attributes of a shard")
    assert "colour" in finding


def test_a_missing_array(label_set: Path) -> None:
    shutil.rmtree(label_set / "b.zarr" / "tail")
    seal_again(label_set)
    [finding] = findings(label_set)
    assert finding.startswith("b.zarr/tail: no array. To make this shard again, remove ")
    assert str(manifest_path(label_set, "b")) in finding


def test_keys_of_other_images(label_set: Path, make_maps: MakeMaps, write_shard: WriteShard) -> None:
    write_shard(label_set, "b", make_maps(5, prefix="other"))
    (label_set / "b.zarr" / "keys").rename(label_set / "other keys")
    write_shard(label_set, "b", make_maps(5, prefix="b"))
    shutil.rmtree(label_set / "b.zarr" / "keys")
    (label_set / "other keys").rename(label_set / "b.zarr" / "keys")
    seal_again(label_set)
    assert findings(label_set) == ["b.zarr/keys: the keys are not those of the manifest"]


def test_an_array_of_another_shape(label_set: Path) -> None:
    shutil.rmtree(label_set / "b.zarr" / "scores")
    shutil.copytree(label_set / "a.zarr" / "scores", label_set / "b.zarr" / "scores")
    seal_again(label_set)
    [finding] = findings(label_set)
    assert finding.startswith("b.zarr/scores: float16 (300, 3, 2, 3), but labels.json asks for float16 (5, 3, 2, 3).")


def test_an_array_of_another_type(
    label_set: Path, make_info: MakeInfo, make_maps: MakeMaps, write_shard: WriteShard
) -> None:
    wide = make_info(num_classes=70_000)
    write_shard(label_set, "b", make_maps(5, wide, prefix="b"), wide)
    change_attribute(label_set, "num_classes", 10)
    [finding] = findings(label_set)
    assert finding.startswith("b.zarr/classes: uint32 (5, 3, 2, 3), but labels.json asks for uint16 (5, 3, 2, 3).")


def test_a_shard_of_another_grid(
    label_set: Path, make_info: MakeInfo, make_maps: MakeMaps, write_shard: WriteShard
) -> None:
    turned = make_info(grid=(2, 3))
    write_shard(label_set, "b", make_maps(5, turned, prefix="b"), turned)
    attribute, array = findings(label_set)
    assert attribute == "b.zarr: attribute grid is (2, 3), expected (3, 2)"
    assert array.startswith("b.zarr/scores: float16 (5, 2, 3, 3), but labels.json asks for float16 (5, 3, 2, 3).")


def test_a_shard_of_another_teacher(
    label_set: Path, make_info: MakeInfo, make_maps: MakeMaps, write_shard: WriteShard
) -> None:
    other = make_info(teacher=make_info().teacher.model_copy(update={"digest": "t1"}))
    write_shard(label_set, "b", make_maps(5, other, prefix="b"), other)
    assert findings(label_set) == [f"b.zarr: made by another teacher than {label_set / 'labels.json'} names"]


def test_a_key_in_two_shards(label_set: Path, make_maps: MakeMaps, write_shard: WriteShard) -> None:
    maps = make_maps(5, prefix="b")
    keys = (*maps.keys[:4], "a_00123")
    write_shard(label_set, "b", ScoreMaps(keys, maps.scores, maps.classes, maps.tail, maps.views))
    assert findings(label_set) == ["b.zarr: key a_00123 is in a too"]


def test_a_key_twice_in_a_shard(
    label_set: Path,
    make_maps: MakeMaps,
    write_shard: WriteShard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Our writer refuses it; another one may not."""
    monkeypatch.setattr(ShardWriter, "_check", lambda *_: None)
    maps = make_maps(5, prefix="b")
    keys = (*maps.keys[:4], "b_00000")
    write_shard(label_set, "b", ScoreMaps(keys, maps.scores, maps.classes, maps.tail, maps.views))
    assert findings(label_set) == ["b.zarr: key b_00000 is in b too"]


SOURCE_KEYS = {
    "lost": (["new", *KEYS], "1 without labels, 0 unknown, such as new"),
    "unknown": (KEYS[:4], "0 without labels, 1 unknown, such as b_00004"),
    "both": ([*KEYS[:4], "x"], "1 without labels, 1 unknown, such as b_00004"),
    "turned": (KEYS[::-1], "0 without labels, 0 unknown, another order"),
}


@pytest.mark.parametrize(("keys", "problem"), SOURCE_KEYS.values(), ids=SOURCE_KEYS.keys())
def test_keys_that_are_not_those_of_the_tar(keys: list[str], problem: str, label_set: Path) -> None:
    found = findings(label_set, source_keys={"b": keys}.get)
    assert found == [f"b.zarr: keys are not those of b.tar: {problem}"]


def write_with_skipped(labels: Path, maps: ScoreMaps, write_shard: WriteShard, num_samples: int) -> None:
    source = SourceRecord(name="b.tar", size_bytes=10_240, num_samples=num_samples)
    write_shard(labels, "b", maps, skipped=[SkippedRecord(key="broken", reason="truncated")], source=source)


def test_skipped_images_are_no_findings(label_set: Path, make_maps: MakeMaps, write_shard: WriteShard) -> None:
    write_with_skipped(label_set, make_maps(5, prefix="b"), write_shard, 6)
    assert findings(label_set, source_keys={"b": [*KEYS[:2], "broken", *KEYS[2:]]}.get) == []


def test_images_that_are_neither_labelled_nor_skipped(
    label_set: Path, make_maps: MakeMaps, write_shard: WriteShard
) -> None:
    write_with_skipped(label_set, make_maps(5, prefix="b"), write_shard, 8)
    assert findings(label_set) == ["b.zarr: 5 rows and 1 skipped do not make 8 samples"]


def test_a_shard_that_is_not_annotated_yet(label_set: Path, make_info: MakeInfo) -> None:
    create_label_set(label_set, make_info(tars=("c.tar",)))
    assert findings(label_set) == ["c.zarr: not annotated yet"]


def test_strays_belong_to_no_tar(label_set: Path) -> None:
    (label_set / "spare.zarr").mkdir()
    (label_set / "manifest" / "other.json").write_bytes(b"{}")
    (label_set / ".a.zarr.tmp-0").mkdir()
    assert findings(label_set) == [
        "manifest/other.json: belongs to no tar of labels.json",
        "spare.zarr: belongs to no tar of labels.json",
    ]


def test_every_shard_is_checked_after_a_finding(label_set: Path) -> None:
    manifest_path(label_set, "a").write_bytes(b"")
    (label_set / "b.zarr" / "keys" / "zarr.json").unlink()
    first, second = findings(label_set)
    assert first.startswith("manifest/a.json: damaged")
    assert second == "b.zarr/keys/zarr.json: missing"
