import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tokenlabels.files import files_below, sha256_of, temporary_sibling
from tokenlabels.store import (
    ImageLevelRecord,
    LabelSet,
    LabelStoreError,
    Manifest,
    ShardBusyError,
    SkippedRecord,
    SourceRecord,
    claim_shard,
    create_label_set,
    open_store,
    verify_store,
)
from tokenlabels.store.layout import values_of
from tokenlabels.types import ScoreMaps

MakeInfo = Callable[..., LabelSet]
MakeMaps = Callable[..., ScoreMaps]
WriteShard = Callable[..., Manifest]
Contents = Callable[[Path], dict[str, bytes]]


def test_two_writes_give_the_same_bytes(
    tmp_path: Path, make_info: MakeInfo, make_maps: MakeMaps, write_shard: WriteShard, contents: Contents
) -> None:
    # As large as real chunks are, so that blosc cuts them into blocks.
    info = make_info(grid=(18, 18), k=5, num_classes=1000)
    for folder in ("first", "second"):
        create_label_set(tmp_path / folder, info)
        write_shard(tmp_path / folder, "a", make_maps(257, info), info)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_the_labels_of_another_tar_are_refused(label_set: Path, make_maps: MakeMaps, make_info: MakeInfo) -> None:
    with (
        claim_shard(label_set, "b", make_info()) as writer,
        pytest.raises(LabelStoreError, match=r"b\.zarr: cannot hold the labels of a\.tar"),
    ):
        writer.write(
            make_maps(5),
            source=SourceRecord(name="a.tar", size_bytes=1, num_samples=5),
            image_level=ImageLevelRecord(num_labelled=0, num_agreeing=0),
            versions={},
        )


def test_the_manifest_says_what_was_written(label_set: Path, write_shard: WriteShard) -> None:
    skipped = SkippedRecord(key="broken", reason="truncated")
    maps = open_store(label_set).shards[1].read()
    manifest = write_shard(label_set, "b", maps, skipped=[skipped])
    assert open_store(label_set).shards[1].manifest == manifest
    assert (manifest.rows, manifest.teacher_digest, manifest.skipped) == (5, "t0", (skipped,))
    assert manifest.source == SourceRecord(name="b.tar", size_bytes=10_240, num_samples=5)
    assert manifest.image_level == ImageLevelRecord(num_labelled=5, num_agreeing=2)
    group = label_set / "b.zarr"
    assert list(manifest.files) == files_below(group)
    for name, record in manifest.files.items():
        assert (record.size_bytes, record.sha256) == ((group / name).stat().st_size, sha256_of(group / name))
    assert manifest.size_bytes == sum(path.stat().st_size for path in group.rglob("*") if path.is_file())


def test_a_tar_without_a_readable_image_is_an_empty_shard(
    label_set: Path, make_maps: MakeMaps, write_shard: WriteShard
) -> None:
    manifest = write_shard(label_set, "b", make_maps(0))
    assert (manifest.rows, list(verify_store(label_set))) == (0, [])


WRONG_MAPS = {
    "turned grid": ({"grid": (2, 3)}, r"2x3 cells.*holds \(3, 2\) cells, k=3, uint16 ids"),
    "another k": ({"k": 4}, r"k=4.*holds \(3, 2\) cells, k=3"),
    "wider ids": ({"num_classes": 70_000}, r"uint32 ids.*k=3, uint16 ids"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_MAPS.values(), ids=WRONG_MAPS.keys())
def test_maps_of_another_shape_are_refused(
    changes: dict[str, int],
    message: str,
    label_set: Path,
    make_info: MakeInfo,
    make_maps: MakeMaps,
    write_shard: WriteShard,
    contents: Contents,
) -> None:
    before = contents(label_set)
    with pytest.raises(LabelStoreError, match=rf"b\.zarr: got ScoreMaps\(4 maps.*{message}"):
        write_shard(label_set, "b", make_maps(4, make_info(**changes)))
    assert contents(label_set) == before


def with_keys(maps: ScoreMaps, keys: tuple[str, ...]) -> ScoreMaps:
    return ScoreMaps(keys, maps.scores, maps.classes, maps.tail, maps.views)


def test_duplicate_keys_are_refused(
    label_set: Path, make_maps: MakeMaps, write_shard: WriteShard, contents: Contents
) -> None:
    before = contents(label_set)
    with pytest.raises(LabelStoreError, match=r"b\.zarr: two maps have the same key"):
        write_shard(label_set, "b", with_keys(make_maps(3), ("x", "y", "x")))
    assert contents(label_set) == before


@pytest.mark.parametrize("where", ["keys", "skipped"])
def test_keys_that_are_not_unicode_are_refused(
    where: str,
    label_set: Path,
    make_maps: MakeMaps,
    write_shard: WriteShard,
    contents: Contents,
) -> None:
    """Python gives such names for files whose names are not UTF-8."""
    before, undecodable = contents(label_set), os.fsdecode(b"caf\xe9")
    maps = with_keys(make_maps(1), (undecodable if where == "keys" else "x",))
    skipped = [SkippedRecord(key=undecodable, reason="truncated")] if where == "skipped" else []
    with pytest.raises(LabelStoreError, match=r"b\.zarr: .*caf"):
        write_shard(label_set, "b", maps, skipped=skipped)
    assert contents(label_set) == before


def test_what_is_read_back_is_compared(
    label_set: Path,
    make_maps: MakeMaps,
    write_shard: WriteShard,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that writes a valid array of other values."""
    before, calls = contents(label_set), list[str]()

    def wrong_once(maps: ScoreMaps, name: str) -> object:
        calls.append(name)
        right = values_of(maps, name)
        return right + np.float16(1) if calls == ["scores", "classes", "tail"] else right

    monkeypatch.setattr("tokenlabels.store.writer.values_of", wrong_once)
    with pytest.raises(LabelStoreError, match="tail: reading back gave other values than were written"):
        write_shard(label_set, "b", make_maps(4))
    assert contents(label_set) == before


def test_joining_a_label_set_adds_tars(tmp_path: Path, make_info: MakeInfo) -> None:
    create_label_set(tmp_path, make_info(tars=("a.tar", "c.tar")))
    joined = create_label_set(tmp_path, make_info(tars=("b.tar", "c.tar")))
    assert joined == make_info(tars=("a.tar", "b.tar", "c.tar"))
    assert create_label_set(tmp_path, make_info(tars=())) == joined == open_store(tmp_path).info


def test_jobs_that_join_at_once_lose_no_tars(tmp_path: Path, make_info: MakeInfo) -> None:
    tars = tuple(f"{number:02d}.tar" for number in range(16))
    with ThreadPoolExecutor(8) as jobs:
        list(jobs.map(lambda tar: create_label_set(tmp_path, make_info(tars=(tar,))), tars))
    assert open_store(tmp_path).missing == tars


def test_joining_with_other_settings_is_refused(label_set: Path, make_info: MakeInfo, contents: Contents) -> None:
    before = contents(label_set)
    with pytest.raises(LabelStoreError, match=r"made in another way(?s:.)*  k: 3 != 2\n  resize: squash != center\n"):
        create_label_set(label_set, make_info(k=2, resize="center"))
    assert contents(label_set) == before


def test_a_set_that_lost_its_record_is_not_made_anew(label_set: Path, make_info: MakeInfo) -> None:
    (label_set / "labels.json").unlink()
    with pytest.raises(LabelStoreError, match=r"labels\.json is missing, but .*manifest is not; restore it"):
        create_label_set(label_set, make_info())


def remove_manifest(labels: Path) -> None:
    (labels / "manifest" / "b.json").unlink()


def damage_manifest(labels: Path) -> None:
    (labels / "manifest" / "b.json").write_bytes(b"{")


def truncate_chunk(labels: Path) -> None:
    [chunk] = [path for path in (labels / "b.zarr" / "scores" / "c").rglob("*") if path.is_file()]
    chunk.write_bytes(chunk.read_bytes()[:10])


def empty_group(labels: Path) -> None:
    for path in (labels / "b.zarr").rglob("zarr.json"):
        path.write_bytes(b"")


def add_stray_file(labels: Path) -> None:
    (labels / "b.zarr" / "scores" / "c" / "9").write_bytes(b"stray")


DAMAGES = [remove_manifest, damage_manifest, truncate_chunk, empty_group, add_stray_file]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_shard_is_written_over(
    damage: Callable[[Path], None],
    label_set: Path,
    make_maps: MakeMaps,
    write_shard: WriteShard,
    contents: Contents,
) -> None:
    before = contents(label_set)
    damage(label_set)
    assert list(verify_store(label_set))
    write_shard(label_set, "b", make_maps(5, prefix="b"))
    assert contents(label_set) == before


def test_claims_sweep_what_a_dead_writer_left_and_nothing_else(label_set: Path, make_info: MakeInfo) -> None:
    mine = [temporary_sibling(label_set / "b.zarr"), temporary_sibling(label_set / "manifest" / "b.json")]
    others = [temporary_sibling(label_set / "a.zarr"), temporary_sibling(label_set / "bb.zarr")]
    for folder in (*mine, *others):
        (folder / "scores").mkdir(parents=True)
    with claim_shard(label_set, "b", make_info()):
        assert [path.exists() for path in (*mine, *others)] == [False, False, True, True]


HOLD_A_CLAIM = """
import sys, time
from pathlib import Path
from tokenlabels.store import LabelSet, claim_shard
with claim_shard(Path(sys.argv[1]), "b", LabelSet.model_validate_json(sys.argv[2])):
    print("claimed", flush=True)
    time.sleep(600)
"""


@contextmanager
def other_process_with_claim(labels: Path, info: LabelSet) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", HOLD_A_CLAIM, str(labels), info.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"claimed\n"
            yield process
        finally:
            process.kill()


def test_one_process_claims_a_shard_until_it_dies(label_set: Path, make_info: MakeInfo) -> None:
    info = make_info()
    with other_process_with_claim(label_set, info) as owner:
        unfinished = temporary_sibling(label_set / "b.zarr")
        unfinished.mkdir()
        with (
            pytest.raises(ShardBusyError, match=r"b\.zarr: another process is writing it"),
            claim_shard(label_set, "b", info),
        ):
            pass
        assert unfinished.exists(), "the temporary of a writer at work was swept"
        with claim_shard(label_set, "a", info):
            pass
        owner.kill()
        owner.wait()
        with claim_shard(label_set, "b", info):
            assert not unfinished.exists()


def test_waiting_for_a_claim(label_set: Path, make_info: MakeInfo) -> None:
    info, claimed = make_info(), threading.Event()

    def wait_for_it() -> None:
        with claim_shard(label_set, "b", info, wait=True):
            claimed.set()

    waiting = threading.Thread(target=wait_for_it)
    with claim_shard(label_set, "b", info):
        waiting.start()
        assert not claimed.wait(timeout=0.1)
    waiting.join(timeout=10)
    assert claimed.is_set()


def test_a_claim_is_given_back_after_an_error(label_set: Path, make_info: MakeInfo) -> None:
    with pytest.raises(RuntimeError, match="in the block"), claim_shard(label_set, "b", make_info()):
        raise RuntimeError("in the block")
    with claim_shard(label_set, "b", make_info()):
        pass


def test_a_power_cut_finds_everything_flushed_in_order(
    tmp_path: Path,
    make_info: MakeInfo,
    make_maps: MakeMaps,
    write_shard: WriteShard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files before the group is renamed, that and the manifest before the manifest is, and that in the end."""
    flushed: list[Path] = []
    moves: list[tuple[Path, Path, list[Path]]] = []

    def fsync(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    def note_moves(name: str) -> None:
        move: Callable[[Path, Path], Path] = getattr(Path, name)

        def noted(path: Path, target: Path) -> Path:
            moves.append((path, target, flushed.copy()))
            return move(path, target)

        monkeypatch.setattr(Path, name, noted)

    labels, info = tmp_path / "labels", make_info()
    create_label_set(labels, info)
    monkeypatch.setattr(os, "fsync", fsync)
    note_moves("rename")
    note_moves("replace")
    manifest = write_shard(labels, "a", make_maps(5))

    (temporary, group, before_group), (staged, mark, before_mark) = moves[-2:]
    assert (group, mark) == (labels / "a.zarr", labels / "manifest" / "a.json")
    files = {Path(name) for name in manifest.files}
    folders = {folder for name in files for folder in name.parents}
    assert {*before_group} == {temporary / name for name in files | folders} | {staged}
    assert before_mark == [*before_group, labels]
    assert flushed == [*before_mark, mark.parent]
