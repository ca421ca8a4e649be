import hashlib
import os
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from tokenlabels.files import (
    file_lock,
    files_below,
    fsync_tree,
    remove_temporaries,
    replace_file,
    sha256_of,
    temporary_sibling,
)


def test_replaced_files_hold_the_new_content(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "record.json"
    for content in (b"first", b"second, and longer", b""):
        replace_file(path, content)
        assert path.read_bytes() == content
        assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_content_can_be_written_by_a_function(tmp_path: Path) -> None:
    replace_file(tmp_path / "record.bin", lambda file: file.write(b"as it comes"))
    assert (tmp_path / "record.bin").read_bytes() == b"as it comes"

    def fail(file: BinaryIO) -> None:
        file.write(b"half of")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        replace_file(tmp_path / "record.bin", fail)
    assert [file.name for file in tmp_path.iterdir()] == ["record.bin"]
    assert (tmp_path / "record.bin").read_bytes() == b"as it comes"


def test_a_replaced_file_is_flushed_and_then_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    replace_file(tmp_path / "record.json", b"content")
    temporary, folder = flushed
    assert temporary.name.startswith(".record.json.tmp-")
    assert (folder, sorted(folder.iterdir())) == (tmp_path, [tmp_path / "record.json"])


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_replacement_leaves_the_old_file_alone(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    path = tmp_path / "record.json"
    replace_file(path, b"old")
    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="the disk is gone"):
        replace_file(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]
    assert path.read_bytes() == b"old"


def test_fsync_tree_flushes_everything_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).touch()
    flushed: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    fsync_tree(tmp_path)
    assert sorted(flushed) == sorted([tmp_path, *tmp_path.rglob("*")])
    assert all(flushed.index(path) < flushed.index(path.parent) for path in tmp_path.rglob("*"))


def test_temporaries_are_swept_with_files_and_folders(tmp_path: Path) -> None:
    target = tmp_path / "a.zarr"
    first, second = temporary_sibling(target), temporary_sibling(target)
    assert first != second
    assert first.parent == target.parent
    assert first.name.startswith(".")
    first.write_bytes(b"half")
    (second / "scores").mkdir(parents=True)
    (second / "scores" / "zarr.json").write_bytes(b"{}")
    target.mkdir()
    remove_temporaries(target)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("mine", "others"),
    [("a.zarr", "ab.zarr"), ("a.zarr", "b.zarr"), ("[ab].zarr", "a.zarr"), ("*.zarr", "a.zarr"), ("?.zarr", "a.zarr")],
)
def test_temporaries_of_others_are_not_swept(mine: str, others: str, tmp_path: Path) -> None:
    foreign, own = temporary_sibling(tmp_path / others), temporary_sibling(tmp_path / mine)
    foreign.mkdir()
    own.mkdir()
    remove_temporaries(tmp_path / mine)
    assert list(tmp_path.iterdir()) == [foreign]


def test_files_below_are_relative_and_sorted(tmp_path: Path) -> None:
    for name in ("b", "a/c/0", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty folder").mkdir()
    assert files_below(tmp_path) == [".hidden", "a/c/0", "b"]


def test_checksum_of_a_file(tmp_path: Path) -> None:
    path, content = tmp_path / "large", bytes(range(256)) * 10_000
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a"
    with file_lock(path, wait=False) as mine:
        assert mine
        with file_lock(path, wait=False) as theirs:
            assert not theirs
        with file_lock(tmp_path / "locks" / "b", wait=False) as unrelated:
            assert unrelated
    with file_lock(path, wait=False) as again:
        assert again


def test_a_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the block"), file_lock(tmp_path / "a", wait=False):
        raise RuntimeError("in the block")
    with file_lock(tmp_path / "a", wait=False) as again:
        assert again


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    order: list[str] = []

    def wait_for_it() -> None:
        with file_lock(tmp_path / "a", wait=True) as taken:
            order.append(f"second {taken}")

    second = threading.Thread(target=wait_for_it)
    with file_lock(tmp_path / "a", wait=True) as taken:
        second.start()
        second.join(timeout=0.1)
        order.append(f"first {taken}")
    second.join(timeout=10)
    assert order == ["first True", "second True"]
