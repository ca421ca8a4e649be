"""Labels joined to windows of image shards: bit for bit those of the store, and every way in which they do not fit."""

import os
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loaders.label_windows
from loaders.label_windows import LabelBlock, LabelJoin
from loaders.plan import EpochPlan, Window
from tokenlabels.store import (
    ImageLevelRecord,
    LabelSet,
    LabelStoreError,
    ShardReader,
    SkippedRecord,
    SourceRecord,
    TeacherRecord,
    claim_shard,
    create_label_set,
    open_store,
)
from tokenlabels.types import ScoreMaps, class_dtype

TEACHER = TeacherRecord(models=(), flip=False, amp="none", digest="t0")
STEMS = ("b", "a", "c")
"""In another order than that of the label set."""

LENGTHS = (5, 300, 40)
NAMES = ("scores", "classes", "tail", "views")


@pytest.fixture(autouse=True)
def _flush_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, and flushing is most of the time of a small write."""
    monkeypatch.setattr(os, "fsync", os.fstat)


def info_with(**changes: Any) -> LabelSet:
    fields = {"grid": (3, 2), "k": 3, "num_classes": 10, "class_names": None, "teacher": TEACHER, "resize": "squash"}
    return LabelSet(**{**fields, "tars": ("a.tar", "b.tar", "c.tar"), **changes})


def keys_of_shard(stem: str, num_samples: int) -> tuple[str, ...]:
    return tuple(f"{stem}_{row:05d}" for row in range(num_samples))


def make_maps(keys: Sequence[str], info: LabelSet, seed: int = 0) -> ScoreMaps:
    random = np.random.default_rng(seed)
    cells = (len(keys), *info.grid)
    steps = random.integers(1, info.num_classes // info.k, size=(*cells, info.k))  # no class twice in a cell
    classes = steps.cumsum(axis=-1) % info.num_classes
    corners = random.uniform(0, 0.3, size=(len(keys), 2))
    return ScoreMaps(
        tuple(keys),
        (-np.sort(-random.normal(size=(*cells, info.k)), axis=-1)).astype(np.float16),
        classes.astype(class_dtype(info.num_classes)),
        random.random(cells).astype(np.float16),
        np.concatenate([corners, corners + 0.7], axis=1).astype(np.float32),
    )


def write_shard(
    labels: Path, stem: str, maps: ScoreMaps, info: LabelSet, skipped: dict[str, str] | None = None
) -> None:
    skipped = skipped or {}
    with claim_shard(labels, stem, info) as writer:
        writer.write(
            maps,
            source=SourceRecord(name=f"{stem}.tar", size_bytes=10_240, num_samples=len(maps) + len(skipped)),
            image_level=ImageLevelRecord(num_labelled=len(maps), num_agreeing=len(maps) // 2),
            skipped=[SkippedRecord(key=key, reason=reason) for key, reason in skipped.items()],
            versions={},
        )


def write_set(labels: Path, info: LabelSet) -> None:
    create_label_set(labels, info)
    for seed, (stem, length) in enumerate(zip(STEMS, LENGTHS, strict=True)):
        write_shard(labels, stem, make_maps(keys_of_shard(stem, length), info, seed), info)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Folder of a label set of the image shards b, a and c: 5, 300 (two chunks) and 40 images."""
    write_set(tmp_path / "labels", info_with())
    return tmp_path / "labels"


def join_of(labels: Path, stems: Sequence[str] = STEMS) -> LabelJoin:
    return LabelJoin(open_store(labels), stems, [f"/data/{stem}.tar" for stem in stems])


def image_keys(number: int) -> tuple[str, ...]:
    """The keys of the image shards, by number."""
    return keys_of_shard(STEMS[number], LENGTHS[number])


def windows_of(shuffle_shards: int, **changes: Any) -> list[Window]:
    return list(EpochPlan(LENGTHS, seed=0, epoch=0, shuffle_shards=shuffle_shards, batch_size=1, **changes).windows())


def whole_window(number: int = 0, length: int = 5) -> Window:
    return Window(np.array([(number, row) for row in range(length)]))


def assert_as_stored(block: LabelBlock, labels: Path, window: Window, but: Sequence[int] = ()) -> None:
    """The slow way: every sample by its key among all maps of the set, zeros for those that have a problem."""
    store = {score_map.key: score_map for shard in open_store(labels).shards for score_map in shard.read()}
    assert len(block) == len(window)
    assert sorted(block.problems) == sorted(but)
    for position, (number, row) in enumerate(window.samples.tolist()):
        values = [getattr(block, name)[position] for name in NAMES]
        if position in but:
            assert not any(value.any() for value in values)
            continue
        stored = store[image_keys(number)[row]]
        for value, expected in zip(values, (stored.scores, stored.classes, stored.tail, stored.view), strict=True):
            assert (value.dtype, value.shape, value.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


@pytest.mark.parametrize("bulk_bytes", [1, 2**30], ids=["a chunk at a time", "in bulk"])
@pytest.mark.parametrize("num_classes", [10, 70_000], ids=["uint16 ids", "uint32 ids"])
@pytest.mark.parametrize("shuffle_shards", [1, 2, 3])
def test_windows_have_the_labels_of_their_samples(
    shuffle_shards: int, num_classes: int, bulk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders.label_windows, "BULK_BYTES", bulk_bytes)
    write_set(tmp_path, info_with(num_classes=num_classes))
    join = join_of(tmp_path)
    for window in windows_of(shuffle_shards):
        block = join.read(window, image_keys)
        assert block.classes.dtype == class_dtype(num_classes)
        assert_as_stored(block, tmp_path, window)


def test_a_rank_reads_its_rows_alone(labels: Path) -> None:
    for window in windows_of(3, rank=1, world_size=5):
        assert_as_stored(join_of(labels).read(window, image_keys), labels, window)


def test_a_sample_may_come_twice(labels: Path) -> None:
    """As where the end of an epoch is filled up with its beginning."""
    window = Window(np.array([(1, 7), (0, 2), (1, 7), (1, 299)]))
    assert_as_stored(join_of(labels).read(window, image_keys), labels, window)


def test_every_shard_is_read_once_and_let_go(labels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = ShardReader.stream

    def stream(self: ShardReader, rows: int = 256) -> Any:
        read.append(self.stem)
        return original(self, rows)

    monkeypatch.setattr(ShardReader, "stream", stream)
    store = open_store(labels)
    before = [set(vars(shard)) for shard in store.shards]
    join = LabelJoin(store, STEMS, STEMS)
    for window in windows_of(3):
        join.read(window, image_keys)
    assert sorted(read) == ["a", "b", "c"]
    assert [set(vars(shard)) for shard in store.shards] == before


def test_bulk_reads_hold_up_to_32_mb() -> None:
    imagenet = info_with(grid=(18, 18), k=5, num_classes=1000)
    rows = loaders.label_windows._rows_in_bulk(imagenet)
    assert rows % 256 == 0
    assert rows * 18 * 18 * (5 * 4 + 2) < 32 * 2**20 < (rows + 256) * (18 * 18 * (5 * 4 + 2) + 16)
    assert loaders.label_windows._rows_in_bulk(info_with(grid=(200, 200))) == 256


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(lambda keys: keys[::-1], id="another order"),
        pytest.param(lambda keys: (*keys[3:], *keys[:3]), id="rotated"),
    ],
)
def test_rows_are_found_by_key(order: Callable[[tuple[str, ...]], tuple[str, ...]], labels: Path) -> None:
    """As when the image tar was made again, from the same images in another order."""
    write_shard(labels, "b", make_maps(order(image_keys(0)), info_with()), info_with())
    window = Window(np.array([(0, 4), (0, 0), (1, 3), (0, 2)]))
    assert_as_stored(join_of(labels).read(window, image_keys), labels, window)


def test_skipped_images_are_problems_with_their_reason(labels: Path) -> None:
    keys, info = image_keys(0), info_with()
    skipped = {keys[1]: "not an image", keys[4]: "truncated"}
    write_shard(labels, "b", make_maps([keys[0], keys[2], keys[3]], info), info, skipped)
    window = Window(np.array([(0, 4), (1, 1), (0, 3), (0, 1), (0, 0)]))
    join = join_of(labels)
    join.check_counts(LENGTHS)
    block = join.read(window, image_keys)
    assert_as_stored(block, labels, window, but=[0, 3])
    assert block.problems == {
        0: "/data/b.tar: no labels of 'b_00004': truncated",
        3: "/data/b.tar: no labels of 'b_00001': not an image",
    }


def test_skipped_images_in_another_order(labels: Path) -> None:
    keys, info = image_keys(0), info_with()
    write_shard(labels, "b", make_maps([keys[3], keys[0], keys[2]], info), info, dict.fromkeys(keys[1::3], "no image"))
    block = join_of(labels).read(whole_window(), image_keys)
    assert_as_stored(block, labels, whole_window(), but=[1, 4])
    assert block.problems[4] == "/data/b.tar: no labels of 'b_00004': no image"


def test_a_shard_of_nothing_but_skipped_images(labels: Path) -> None:
    keys, info = image_keys(0), info_with()
    write_shard(labels, "b", make_maps([], info), info, dict.fromkeys(keys, "no image"))
    join = join_of(labels)
    join.check_counts(LENGTHS)
    assert_as_stored(join.read(whole_window(), image_keys), labels, whole_window(), but=range(5))


def test_an_unknown_key_is_a_problem_of_its_sample(labels: Path) -> None:
    keys, info = image_keys(0), info_with()
    write_shard(labels, "b", make_maps([*keys[:3], "other", keys[4]], info), info)
    block = join_of(labels).read(whole_window(), image_keys)
    assert_as_stored(block, labels, whole_window(), but=[3])
    assert block.problems[3] == (
        f"/data/b.tar: no labels of 'b_00003': {labels}/b.zarr does not know it; is it another version of the images?"
    )


def test_labels_of_other_images_under_the_same_name(labels: Path) -> None:
    write_shard(labels, "b", make_maps(keys_of_shard("other", 5), info_with()), info_with())
    join = join_of(labels)
    join.check_counts(LENGTHS)
    message = (
        rf"^/data/b\.tar: labels of other images: {labels}/b\.zarr has rows for none of its keys, such as 'b_00000'"
    )
    with pytest.raises(LabelStoreError, match=message):
        join.read(whole_window(), image_keys)
    assert not join.read(whole_window(1), image_keys).problems


WRONG: dict[str, tuple[str, Any, str]] = {
    "fill values": ("scores", np.nan, "scores are not finite"),
    "an infinite score": ("scores", -np.inf, "scores are not finite"),
    "no such class": ("classes", 10, "class ids are not below 10"),
    "a class twice": ("classes", slice(0, 2), "a class is listed twice in a cell"),
    "no tail": ("tail", np.nan, "tails are not in 0..1"),
    "a tail above 1": ("tail", 1.001, "tails are not in 0..1"),
    "a tail below 0": ("tail", -1e-3, "tails are not in 0..1"),
    "no view": ("views", np.nan, "the view is not finite, or not x0 < x1 and y0 < y1"),
    "an empty view": ("views", 0.5, "the view is not finite, or not x0 < x1 and y0 < y1"),
}


@pytest.mark.parametrize(("name", "value", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_values_that_no_target_can_be_made_of(name: str, value: Any, wrong: str, labels: Path) -> None:
    maps = make_maps(image_keys(0), info_with())
    if isinstance(value, slice):
        maps.classes[2, -1, -1, value] = 3
    else:
        getattr(maps, name)[2].flat[-1] = value
    if name == "views":
        maps.views[2] = value
    write_shard(labels, "b", maps, info_with())
    window = Window(np.array([(1, 2), (0, 3), (0, 2), (0, 1)]))
    block = join_of(labels).read(window, image_keys)
    assert_as_stored(block, labels, window, but=[2])
    assert block.problems == {
        2: f"/data/b.tar: labels of 'b_00002': {wrong}; tokenlabels verify {labels} lists all such"
    }


def test_all_that_is_wrong_with_a_sample_is_said(labels: Path) -> None:
    maps = make_maps(image_keys(0), info_with())
    maps.scores[0], maps.classes[0], maps.tail[0], maps.views[0] = np.nan, 65_535, np.nan, np.nan
    write_shard(labels, "b", maps, info_with())
    [problem] = join_of(labels).read(whole_window(), image_keys).problems.values()
    assert "scores are not finite, class ids are not below 10, a class is listed twice in a cell, tails are" in problem
    assert "not in 0..1, the view is not finite" in problem


def test_the_edges_of_what_is_right(labels: Path) -> None:
    maps = make_maps(image_keys(0), info_with())
    maps.scores[0, 0, 0], maps.classes[0] = [65_504, -0.0, -65_504], [7, 9, 8]
    maps.tail[0], maps.tail[1], maps.tail[2], maps.views[0] = 0, 1, -0.0, [-3, 0, 7, 1]
    write_shard(labels, "b", maps, info_with())
    assert_as_stored(join_of(labels).read(whole_window(), image_keys), labels, whole_window())


def test_damaged_shards_are_not_read(labels: Path) -> None:
    join = join_of(labels)
    data = max((labels / "a.zarr" / "scores").rglob("*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(LabelStoreError, match=r"a\.zarr/scores.* bytes, the manifest says"):
        join.read(whole_window(1), image_keys)


def test_shards_that_are_not_annotated_yet(tmp_path: Path) -> None:
    info = create_label_set(tmp_path, info_with())
    write_shard(tmp_path, "b", make_maps(image_keys(0), info), info)
    message = (
        r"2 of 3 image shards have no labels\. The first is /data/a\.tar: not annotated yet; run tokenlabels annot"
    )
    with pytest.raises(LabelStoreError, match=message):
        join_of(tmp_path)
    assert_as_stored(join_of(tmp_path, ["b"]).read(whole_window(), image_keys), tmp_path, whole_window())


def test_shards_that_the_label_set_does_not_know(labels: Path) -> None:
    message = r"1 of 2 image shards have no labels\. The first is /data/val\.tar: its label set knows no shard 'val'"
    with pytest.raises(LabelStoreError, match=message):
        join_of(labels, ["a", "val"])


@pytest.mark.parametrize("skipped", [{}, {"b_00005": "no image"}], ids=["none skipped", "one skipped"])
def test_counts_that_differ(skipped: dict[str, str], labels: Path) -> None:
    join_of(labels).check_counts(LENGTHS)
    write_shard(labels, "b", make_maps(image_keys(0), info_with()), info_with(), skipped)
    total = 5 + len(skipped)
    message = (
        f"/data/b.tar has 7 samples, but {labels}/b.zarr was made from {total} "
        f"(5 with labels, {len(skipped)} skipped): labels of other images."
    )
    with pytest.raises(LabelStoreError, match=re.escape(message)):
        join_of(labels).check_counts((7, 300, 40))


def test_agreement_is_that_of_the_shards_that_are_used(labels: Path) -> None:
    assert join_of(labels).agreement() == (2 + 150 + 20) / 345
    assert join_of(labels, ["b"]).agreement() == 2 / 5
    write_shard(labels, "b", make_maps([], info_with()), info_with())
    assert join_of(labels, ["b"]).agreement() is None


def test_a_join_goes_to_another_process(labels: Path) -> None:
    join = pickle.loads(pickle.dumps(join_of(labels)))
    assert_as_stored(join.read(whole_window(), image_keys), labels, whole_window())


def some_block(size: int, problems: dict[int, str], seed: int = 0) -> LabelBlock:
    maps = make_maps(keys_of_shard("x", size), info_with(), seed)
    return LabelBlock(maps.scores, maps.classes, maps.tail, maps.views, problems)


def test_slices_and_their_problems() -> None:
    block = some_block(8, {0: "a", 3: "b", 5: "c", 7: "d"})
    part = block.slice(3, 6)
    assert (len(part), part.problems) == (3, {0: "b", 2: "c"})
    for name in NAMES:
        assert np.shares_memory(getattr(part, name), getattr(block, name))
        np.testing.assert_array_equal(getattr(part, name), getattr(block, name)[3:6])
    assert repr(block) == "LabelBlock(8 maps, 3x2 cells, k=3, 4 problems)"


def test_concatenated_blocks_are_copies() -> None:
    blocks = [some_block(4, {3: "a"}), some_block(1, {}), some_block(5, {0: "b", 1: "c"}, seed=1)]
    for parts, problems in ((blocks, {3: "a", 5: "b", 6: "c"}), (blocks[:1], {3: "a"})):
        whole = LabelBlock.concatenate(parts)
        assert whole.problems == problems
        for name in NAMES:
            np.testing.assert_array_equal(getattr(whole, name), np.concatenate([getattr(p, name) for p in parts]))
            assert not np.shares_memory(getattr(whole, name), getattr(parts[0], name))


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": np.zeros((4, 3, 2, 2), np.uint16)},
        {"tail": np.zeros((4, 3, 3), np.float16)},
        {"views": np.zeros((3, 4), np.float32)},
        {"problems": {4: "a"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_blocks_whose_parts_do_not_fit(changes: dict[str, Any]) -> None:
    block = some_block(4, {})
    with pytest.raises(AssertionError):
        LabelBlock(**{name: getattr(block, name) for name in (*NAMES, "problems")} | changes)
