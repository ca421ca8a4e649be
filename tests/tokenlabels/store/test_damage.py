"""Files that were damaged behind the writer's back: `verify_store` finds them, and the reader refuses them by name."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenlabels.files import files_below
from tokenlabels.store import LabelStoreError, manifest_path, open_store, shard_path, verify_store
from tokenlabels.store.writer import LOCK_FOLDER

FILES_OF_SHARD_B = [
    "b.zarr/zarr.json",
    *(f"b.zarr/{name}/zarr.json" for name in ("classes", "keys", "scores", "tail", "views")),
    *(f"b.zarr/{name}/c/0/0/0/0" for name in ("classes", "scores")),
    "b.zarr/tail/c/0/0/0",
    "b.zarr/views/c/0/0",
    "b.zarr/keys/c/0",
]
FILES = [*FILES_OF_SHARD_B, "manifest/b.json", "labels.json"]


def read_all(labels: Path) -> int:
    """Number of maps that a reader gets out of a label set, in both ways of reading."""
    shards = open_store(labels).shards
    assert all(len(shard.read()) == sum(len(maps) for maps in shard.stream()) for shard in shards)
    return sum(len(shard) for shard in shards)


def assert_found_and_refused(labels: Path, name: str) -> None:
    """The finding names the file, or the shard it belongs to; so does the message of the reader."""
    shard = labels / name.partition("/")[0] if ".zarr" in name else labels / name
    [finding] = verify_store(labels)
    assert finding.path in (labels / name, shard)
    with pytest.raises(LabelStoreError) as error:
        read_all(labels)
    assert str(shard) in str(error.value)


@pytest.mark.parametrize("num_flips", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_noticed(num_flips: int, label_set: Path) -> None:
    """In every file in turn, at a random place."""
    names = [name for name in files_below(label_set) if not name.startswith(LOCK_FOLDER)]
    assert len(names) == 2 * len(FILES_OF_SHARD_B) + 3
    assert read_all(label_set) == 305
    draw = random.Random(num_flips)
    for flip in range(num_flips):
        path = label_set / names[flip % len(names)]
        whole = path.read_bytes()
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            assert_found_and_refused(label_set, names[flip % len(names)])
        except AssertionError as error:
            error.add_note(f"after flipping bit {bit} of byte {place} of {path}")
            raise
        path.write_bytes(whole)
    assert list(verify_store(label_set)) == []


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "a byte more": lambda whole: whole + b"\0",
    "zeros": lambda whole: bytes(len(whole)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_noticed(name: str, damage: Callable[[bytes], bytes], label_set: Path) -> None:
    path = label_set / name
    path.write_bytes(damage(path.read_bytes()))
    assert_found_and_refused(label_set, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(name: str, label_set: Path) -> None:
    (label_set / name).unlink()
    assert_found_and_refused(label_set, name.replace("manifest/b.json", "b.zarr"))


@pytest.mark.parametrize("name", FILES_OF_SHARD_B)
def test_a_file_of_another_shard_is_noticed(name: str, label_set: Path) -> None:
    """Whole by its own checksums, but in the wrong place."""
    shutil.copy(label_set / f"a{name[1:]}", label_set / name)
    assert_found_and_refused(label_set, name)


def test_a_folder_in_place_of_a_file_is_noticed(label_set: Path) -> None:
    (label_set / "b.zarr" / "keys" / "c" / "0").unlink()
    (label_set / "b.zarr" / "keys" / "c" / "0").mkdir()
    assert_found_and_refused(label_set, "b.zarr/keys/c/0")


def test_a_file_more_is_found(label_set: Path) -> None:
    """The reader has no use for it; a chunk that an earlier writer left would be read by other tools."""
    stray = label_set / "b.zarr" / "tail" / "c" / "1"
    stray.write_bytes(b"stray")
    assert [str(finding) for finding in verify_store(label_set)] == [f"{stray}: is not in the manifest"]
    assert read_all(label_set) == 305


def test_a_manifest_without_shard_is_noticed(label_set: Path) -> None:
    shutil.rmtree(shard_path(label_set, "b"))
    [finding] = verify_store(label_set)
    assert str(finding) == (
        f"{shard_path(label_set, 'b')}: missing, though {manifest_path(label_set, 'b')} says it is whole"
    )
    with pytest.raises(LabelStoreError, match=r"b\.zarr: missing, though .*b\.json says it is whole"):
        open_store(label_set)


def test_a_shard_without_manifest_is_noticed(label_set: Path) -> None:
    """As after a power cut between the rename of the group and that of the manifest."""
    manifest_path(label_set, "b").unlink()
    [finding] = verify_store(label_set)
    assert str(finding) == f"{shard_path(label_set, 'b')}: has no manifest"
    with pytest.raises(LabelStoreError, match=r"b\.zarr: has no manifest, .*run the same annotate command again"):
        open_store(label_set)


def test_shards_that_changed_places_are_noticed(label_set: Path) -> None:
    for folder, suffix in (("", ".zarr"), ("manifest", ".json")):
        first, second, spare = (label_set / folder / f"{stem}{suffix}" for stem in ("a", "b", "spare"))
        first.rename(spare)
        second.rename(first)
        spare.rename(second)
    assert [finding.path for finding in verify_store(label_set)] == [shard_path(label_set, stem) for stem in "ab"]


def test_a_file_that_goes_missing_after_opening_is_noticed(label_set: Path) -> None:
    """zarr itself gives fill values for it."""
    shard = open_store(label_set).shards[1]
    assert len(shard.read()) == 5
    (label_set / "b.zarr" / "scores" / "c" / "0" / "0" / "0" / "0").unlink()
    with pytest.raises(LabelStoreError, match=r"b\.zarr/scores/c/0/0/0/0: missing"):
        shard.read()
