import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from annotate import published_write
from annotate.published_read import PublishedLayoutError
from annotate.published_write import export_published, published_path
from tokenlabels.store import (
    ImageLevelRecord,
    LabelSet,
    SkippedRecord,
    SourceRecord,
    TeacherRecord,
    claim_shard,
    create_label_set,
)
from tokenlabels.types import ScoreMap, ScoreMaps, class_dtype

OUTS = ("out", "out.tar", "out.zip")


@dataclass(frozen=True)
class Written:
    """A label set on disk, and what is in it."""

    path: Path
    maps: ScoreMaps


WriteSet = Callable[..., Written]


@pytest.fixture(autouse=True)
def _sync_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture
def write_set(tmp_path: Path) -> WriteSet:
    """Writes a label set of one shard with 2x3 cells, one of whose images was skipped."""

    def write(
        keys: Sequence[str] = ("n01440764_1", "n01440764_2"),
        *,
        num_classes: int = 1000,
        largest_id: int = 999,
        tars: Sequence[str] = ("one.tar",),
    ) -> Written:
        shape = (len(keys), 2, 3, 2)
        scores = np.random.default_rng(0).normal(0, 3, shape)
        maps = ScoreMaps(
            keys=tuple(keys),
            scores=-np.sort(-scores, axis=-1).astype(np.float16),
            classes=np.broadcast_to([largest_id, 0], shape).astype(class_dtype(num_classes)),
            tail=np.zeros(shape[:3], np.float16),
            views=np.tile(np.array([0, 0, 1, 1], np.float32), (len(keys), 1)),
        )
        info = LabelSet(
            grid=(2, 3),
            k=2,
            num_classes=num_classes,
            class_names=None,
            teacher=TeacherRecord(models=(), flip=False, amp="none", digest="d"),
            resize="squash",
            tars=tuple(tars),
        )
        path = tmp_path / "set"
        with claim_shard(path, "one", create_label_set(path, info)) as writer:
            writer.write(
                maps,
                source=SourceRecord(name="one.tar", size_bytes=1, num_samples=len(keys) + 1),
                image_level=ImageLevelRecord(num_labelled=0, num_agreeing=0),
                skipped=[SkippedRecord(key="broken", reason="truncated")],
                versions={},
            )
        return Written(path, maps)

    return write


def unpack(path: Path) -> dict[str, bytes]:
    """The obvious way to read all three: everything."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as zipped:
            return {name: zipped.read(name) for name in zipped.namelist()}
    if path.suffix == ".tar":
        folder = path.with_suffix(".unpacked")
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
        path = folder
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", OUTS)
def test_files_hold_scores_and_ids_as_stored(name: str, write_set: WriteSet, tmp_path: Path) -> None:
    written = write_set()
    seen: list[str] = []
    report = export_published(written.path, tmp_path / "new" / name, on_shard=seen.append)
    assert seen == ["one"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
    files = unpack(tmp_path / "new" / name)
    assert set(files) == {"n01440764/n01440764_1.pt", "n01440764/n01440764_2.pt"}
    assert (report.num_files, report.num_bytes) == (2, sum(map(len, files.values())))
    assert (report.num_without, report.resize) == (1, "squash")
    for score_map in written.maps:
        file = tmp_path / "one.pt"
        file.write_bytes(files[f"n01440764/{score_map.key}.pt"])
        tensor = torch.load(file, weights_only=True)
        assert (tensor.dtype, tensor.shape) == (torch.float16, (2, 2, 2, 3))
        for row, column, rank in np.ndindex(2, 3, 2):
            assert tensor[0, rank, row, column] == score_map.scores[row, column, rank]
            assert tensor[1, rank, row, column] == score_map.classes[row, column, rank]


def test_a_file_has_the_bytes_and_strides_of_its_own_map_only(write_set: WriteSet, tmp_path: Path) -> None:
    score_map = write_set().maps[1]
    (tmp_path / "x.pt").write_bytes(published_write.published_bytes(score_map))
    tensor = torch.load(tmp_path / "x.pt", weights_only=True)
    stacked = torch.from_numpy(np.stack([score_map.scores, score_map.classes.astype(np.float16)]))
    assert tensor.untyped_storage().nbytes() == stacked.untyped_storage().nbytes()
    assert tensor.stride() == stacked.permute(0, 3, 1, 2).stride()


@pytest.mark.parametrize("name", ["out.tar", "out.zip"])
def test_exports_of_one_set_are_the_same_bytes(name: str, write_set: WriteSet, tmp_path: Path) -> None:
    written = write_set()
    for folder in ("first", "second"):
        export_published(written.path, tmp_path / folder / name)
    assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_archived_files_may_be_read_by_all(write_set: WriteSet, tmp_path: Path) -> None:
    written = write_set()
    for name in ("out.zip", "out.tar"):
        export_published(written.path, tmp_path / name)
    with zipfile.ZipFile(tmp_path / "out.zip") as zipped, tarfile.open(tmp_path / "out.tar") as tar:
        modes = [member.external_attr >> 16 for member in zipped.infolist()] + [member.mode for member in tar]
    assert {stat.S_IMODE(mode) for mode in modes} == {0o644}


def test_ids_up_to_2048_of_more_classes_are_exported(write_set: WriteSet, tmp_path: Path) -> None:
    export_published(write_set(num_classes=21_841, largest_id=2048).path, tmp_path / "out")
    tensor = torch.load(tmp_path / "out" / "n01440764" / "n01440764_1.pt", weights_only=True)
    assert tensor[1].max() == 2048


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "large id": ({"num_classes": 21_841, "largest_id": 2049}, r"one\.zarr: has class id 2049"),
    "uint32 id": ({"num_classes": 70_000, "largest_id": 69_999}, r"one\.zarr: has class id 69999"),
    "unfinished": ({"tars": ("one.tar", "two.tar")}, r"1 of 2 shards have no labels yet .*two\.tar"),
    "one path for two": ({"keys": ("train/c/x", "val/c/x")}, r"'train/c/x' and 'val/c/x' would both be c/x\.pt"),
    "outside": ({"keys": ("../x",)}, "has no place"),
}


@pytest.mark.parametrize("name", OUTS)
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_nothing_is_written_of_what_the_layout_cannot_hold(
    options: dict[str, Any], message: str, name: str, write_set: WriteSet, tmp_path: Path
) -> None:
    written = write_set(**options)
    with pytest.raises(PublishedLayoutError, match=message):
        export_published(written.path, tmp_path / name)
    assert list(tmp_path.iterdir()) == [written.path]


@pytest.mark.parametrize("name", OUTS)
def test_what_is_there_is_not_overwritten(name: str, write_set: WriteSet, tmp_path: Path) -> None:
    written = write_set()
    export_published(written.path, tmp_path / name)
    with pytest.raises(PublishedLayoutError, match=f"{name} exists already"):
        export_published(written.path, tmp_path / name)


@pytest.mark.parametrize("name", ["out.tar.gz", "out.tgz", "out.tar.zst"])
def test_compressed_archives_are_not_made(name: str, write_set: WriteSet, tmp_path: Path) -> None:
    with pytest.raises(PublishedLayoutError, match=r"a folder, a \.tar or a \.zip"):
        export_published(write_set().path, tmp_path / name)


@pytest.mark.parametrize("name", OUTS)
def test_an_interrupted_export_leaves_nothing(
    name: str, write_set: WriteSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_set()
    left_by_a_killed_export = tmp_path / f".{name}.tmp-0"
    left_by_a_killed_export.mkdir()
    (left_by_a_killed_export / "x.pt").write_bytes(b"x")
    make, made = published_write.published_bytes, [0]

    def stop_at_the_second(score_map: ScoreMap) -> bytes:
        made[0] += 1
        if made[0] == 2:
            raise KeyboardInterrupt
        return make(score_map)

    with monkeypatch.context() as patch:
        patch.setattr(published_write, "published_bytes", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            export_published(written.path, tmp_path / name)
    assert made == [2]
    assert list(tmp_path.iterdir()) == [written.path]
    assert export_published(written.path, tmp_path / name).num_files == 2


KEYS = {
    "n01440764_10026": "n01440764/n01440764_10026.pt",
    "train/n01440764/n01440764_10026": "n01440764/n01440764_10026.pt",
    "cats/0001": "cats/0001.pt",
    "cats/0001.copy": "cats/0001.pt",
    "0001": "0001.pt",
    "n1_2": "n1_2.pt",
    "./0001": "0001.pt",
}


@pytest.mark.parametrize(("key", "path"), KEYS.items(), ids=KEYS.keys())
def test_where_the_layout_keeps_a_key(key: str, path: str) -> None:
    assert published_path(key) == path


@pytest.mark.parametrize("key", ["../0001", "a/../0001", "cats/", "cats/.hidden"])
def test_keys_without_a_place(key: str) -> None:
    with pytest.raises(PublishedLayoutError, match="has no place"):
        published_path(key)
