import errno
import gc
import io
import multiprocessing
import os
import pickle
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from loaders.index import build_index
from loaders.shard_files import FolderFile, LocalTarFile, RemoteTarFile, TarFile
from tokenlabels.images.folders import folder_shards
from tokenlabels.tars import TarError

IMAGES = {"a": b"A" * 600, "b": b"", "c": b"C" * 9000}
Opener = Callable[[Path], TarFile]


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def open_local(path: Path) -> LocalTarFile:
    return LocalTarFile(str(path), build_index(str(path)), path.stat().st_size)


def open_remote(path: Path) -> RemoteTarFile:
    return RemoteTarFile(put_remote(path), build_index(str(path)))


def open_remote_cached(path: Path) -> RemoteTarFile:
    return RemoteTarFile(f"simplecache::{put_remote(path)}", build_index(str(path)))


def put_remote(path: Path) -> str:
    fsspec.filesystem("memory").pipe_file(str(path), path.read_bytes())
    return f"memory:/{path}"


OPENERS = pytest.mark.parametrize("opener", [open_local, open_remote, open_remote_cached])


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "t.tar", {f"{key}.jpg": data for key, data in IMAGES.items()} | {"d.cls": b"1"})


def num_descriptors() -> int:
    gc.collect()  # of earlier tests
    return len(list(Path("/proc/self/fd").iterdir()))


@OPENERS
def test_rows_of_a_real_tar_in_any_order_from_several_threads(opener: Opener, imagenet_sample: Path) -> None:
    path = imagenet_sample / "imagenet1k-train-0003.tar"
    with tarfile.open(path) as archive:
        files = [archive.extractfile(name) for name in archive.getnames() if name.endswith(".jpg")]
        expected = [file.read() for file in files if file is not None]
    rows = np.random.default_rng(0).permutation(len(expected))
    with opener(path) as file, ThreadPoolExecutor(4) as pool:
        images = list(pool.map(file.read, rows))
    assert images == [expected[row] for row in rows]
    assert len(images) == 44


@OPENERS
def test_a_sample_without_image_says_which_files_are_images(opener: Opener, tar: Path) -> None:
    with opener(tar) as file:
        assert [file.read(row) for row in range(3)] == list(IMAGES.values())
        with pytest.raises(ValueError, match=r"t\.tar: sample 'd' has no image member \(images are jpg, jpeg, png"):
            file.read(3)


def test_a_tar_that_is_truncated_while_it_is_open(tar: Path) -> None:
    with open_local(tar) as file:
        os.truncate(tar, 5000)
        assert file.read(0) == IMAGES["a"]
        with pytest.raises(TarError, match=r"t\.tar: sample 'c': the tar was truncated .* where 9000 were indexed"):
            file.read(2)


def test_a_url_that_is_truncated(tar: Path) -> None:
    with open_remote(tar) as file:
        fsspec.filesystem("memory").pipe_file(str(tar), tar.read_bytes()[:5000])
        assert file.read(0) == IMAGES["a"]
        with pytest.raises(TarError, match=r"t\.tar: sample 'c': the tar was truncated"):
            file.read(2)


@pytest.mark.parametrize("size_bytes", [5000, 50_000], ids=["shorter", "longer"])
def test_a_tar_of_another_size_is_not_opened(size_bytes: int, tar: Path) -> None:
    index, was, before = build_index(str(tar)), tar.stat().st_size, num_descriptors()
    os.truncate(tar, size_bytes)
    with pytest.raises(TarError, match=rf"t\.tar: the tar changed .* it has {size_bytes} bytes, had {was}"):
        LocalTarFile(str(tar), index, was)
    assert num_descriptors() == before


def test_a_tar_that_is_gone(tar: Path) -> None:
    index = build_index(str(tar))
    tar.unlink()
    with pytest.raises(FileNotFoundError, match=r"t\.tar"):
        LocalTarFile(str(tar), index, 1)


def test_a_disk_that_fails_names_tar_and_sample(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with open_local(tar) as file:
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(OSError, match=r"t\.tar: sample 'c' cannot be read: Input/output error") as caught:
            file.read(2)
        monkeypatch.undo()
    assert caught.value.errno == errno.EIO


def test_a_server_that_fails_names_tar_and_sample(tar: Path) -> None:
    with open_remote(tar) as file:
        fsspec.filesystem("memory").rm(str(tar))
        with pytest.raises(OSError, match=r"memory://\S*t\.tar: sample 'a' cannot be read: FileNotFoundError"):
            file.read(0)


def test_a_closed_shard_is_not_read(tar: Path) -> None:
    file = open_local(tar)
    file.close()
    file.close()
    with pytest.raises(ValueError, match=r"t\.tar: sample 'a': read after the shard was closed"):
        file.read(0)


def test_closing_waits_for_reads_that_have_begun(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the descriptor could become another file's between its look-up and the read."""
    begun, closed = threading.Event(), threading.Event()
    pread = os.pread

    def slow(*arguments: int) -> bytes:
        begun.set()
        assert closed.wait(10)
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", slow)
    before, file = num_descriptors(), open_local(tar)
    with ThreadPoolExecutor(1) as pool:
        image = pool.submit(file.read, 2)
        assert begun.wait(10)
        file.close()
        others = [open(os.devnull, "rb") for _ in range(10)]  # noqa: PTH123, SIM115 - to take the number, if it is free
        closed.set()
        assert image.result() == IMAGES["c"]
    for other in others:
        other.close()
    assert num_descriptors() == before


def test_no_descriptor_is_left(tar: Path) -> None:
    index, before = build_index(str(tar)), num_descriptors()
    for number in range(200):
        file = LocalTarFile(str(tar), index, tar.stat().st_size)
        file.read(0)
        if number % 2:
            file.close()
    del file
    assert num_descriptors() == before


@OPENERS
def test_open_tars_travel(opener: Opener, tar: Path) -> None:
    with opener(tar) as file:
        packed = pickle.dumps(file)
        with pickle.loads(packed) as travelled:
            assert [travelled.read(row) for row in range(3)] == [file.read(row) for row in range(3)]
        assert file.read(0) == IMAGES["a"]


@OPENERS
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_open_tars_are_read_on_both_sides_of_a_fork(opener: Opener, tar: Path) -> None:
    with opener(tar) as file:
        process = multiprocessing.get_context("fork").Process(target=read_and_close, args=(file,))
        process.start()
        process.join(30)
        assert process.exitcode == 0
        assert file.read(2) == IMAGES["c"]


def read_and_close(file: TarFile) -> None:
    assert file.read(2) == IMAGES["c"]
    file.close()


def test_files_of_a_tree(tmp_path: Path) -> None:
    for name in ("x/b.png", "x/a.JPEG", "y/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    shard = next(folder_shards(tmp_path))
    zeros = np.zeros(2, np.int64)
    index = build_index(str(write_tar(tmp_path / "t.tar", {"x/a.jpg": b"", "x/b.jpg": b""})))
    with FolderFile(shard, index) as file:
        assert [file.read(row) for row in (1, 0, *zeros)] == [b"x/b.png", b"x/a.JPEG", b"x/a.JPEG", b"x/a.JPEG"]
        (tmp_path / "x" / "b.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"/x/b\.png"):
            file.read(1)
