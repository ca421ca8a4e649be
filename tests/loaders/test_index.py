import io
import json
import logging
import multiprocessing
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from loaders import index as index_module
from loaders.index import ShardIndex, build_index, info_path, kept_num_samples, load_index, read_info, tar_state
from tokenlabels.files import replace_file
from tokenlabels.tars import TarError, TarIndex, scan_tar

Files = list[tuple[str, bytes]]
FILES: Files = [
    ("a.jpg", b"A" * 600),
    ("a.cls", b"7"),
    ("ü/b.json", b'{"label": 3}'),
    ("ü/b.png", b"B"),
    ("c.cls", b"1"),
]


def write_tar(path: Path, files: Files = FILES) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder of indexes; no test touches the real one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index_module._warn_once.cache_clear()
    return tmp_path / "cache" / "tokenlabels" / "index"


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the path of every tar that is scanned."""
    scanned: list[str] = []

    def spy(path: str) -> TarIndex:
        scanned.append(path)
        return scan_tar(path)

    monkeypatch.setattr(index_module, "scan_tar", spy)
    return scanned


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def same(left: ShardIndex, right: ShardIndex) -> bool:
    pairs = ((left.offsets, right.offsets), (left.sizes, right.sizes), (left.labels, right.labels))
    return left.keys == right.keys and all(np.array_equal(a, b) for a, b in pairs)


def webdataset_samples(path: str) -> list[tuple[str, bytes, int]]:
    """The slow twin: key, image and label as WebDataset itself reads them."""

    def streams() -> Iterator[dict[str, object]]:
        with Path(path).open("rb") as stream:
            yield {"url": path, "stream": stream}

    return [(x["__key__"], x["jpg"], int(x["cls"])) for x in group_by_keys(tar_file_expander(streams()))]


@pytest.mark.parametrize(
    ("fixture", "tar"),
    [("imagenet_sample", "imagenet1k-train-0003.tar"), ("tiny_imagenet", "tiny-val-0000.tar")],
    ids=["imagenet", "tiny"],
)
def test_indexes_of_real_tars_are_what_webdataset_reads(
    fixture: str, tar: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = str(request.getfixturevalue(fixture) / tar)
    content = Path(path).read_bytes()
    for index in (build_index(path), load_index(path, tmp_path), load_index(path, tmp_path)):
        places = zip(index.keys, index.offsets, index.sizes, index.labels, strict=True)
        ours = [(key, content[offset : offset + size], label) for key, offset, size, label in places]
        assert ours == webdataset_samples(path)


def test_samples_of_every_kind(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [*FILES, ("d.webp", b""), ("d.json", b'{"label": %d}' % 10**30)])
    index = build_index(path)
    assert index.keys == ("a", "ü/b", "c", "d")
    assert index.sizes.tolist() == [600, 1, 0, 0]
    assert index.labels.tolist() == [7, 3, 1, -1]
    content = Path(path).read_bytes()
    assert content[index.offsets[1]] == ord("B")
    assert [offset >= 0 for offset in index.offsets] == [True, True, False, True]
    assert same(load_index(path), index)
    assert same(load_index(path), index)


def test_the_second_time_nothing_is_scanned(tmp_path: Path, scans: list[str]) -> None:
    path = write_tar(tmp_path / "data" / "t.tar")
    assert kept_num_samples(path, tar_state(path)) is None
    first = load_index(path)
    assert scans == [path]
    assert names_in(tmp_path / "data") == ["t.tar", "t.tar.index"]
    assert same(load_index(path), first)
    assert kept_num_samples(path, tar_state(path)) == 3
    assert scans == [path]


def test_indexes_are_kept_in_the_folder_that_is_named_and_nowhere_else(tmp_path: Path, scans: list[str]) -> None:
    paths = [write_tar(tmp_path / folder / "t.tar", FILES[:num]) for folder, num in (("x", 1), ("y", 5))]
    for _ in range(2):
        assert [len(load_index(path, tmp_path / "kept")) for path in paths] == [1, 3]
    assert scans == paths
    assert len(list((tmp_path / "kept").glob("t-*.index"))) == 2
    assert not list(tmp_path.glob("[xy]/*.index"))
    assert not (tmp_path / "cache").exists()


def test_a_relative_path_is_the_same_tar(tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    load_index(write_tar(tmp_path / "t.tar"), tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    assert len(load_index("t.tar", tmp_path / "kept")) == 3
    assert len(scans) == 1


def refuse_writing_below(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(path: Path, content: bytes) -> None:
        if path.is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(path))
        replace_file(path, content)

    monkeypatch.setattr(index_module, "replace_file", replace)


def test_beside_a_tar_that_is_read_only_the_cache_folder_is_used(
    tmp_path: Path, cache_folder: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "data" / "t.tar")
    refuse_writing_below(tmp_path / "data", monkeypatch)
    assert same(load_index(path), load_index(path))
    assert kept_num_samples(path, tar_state(path)) == 3
    assert scans == [path]
    assert [file.name.split("-")[0] for file in cache_folder.iterdir()] == ["t"]


@pytest.mark.parametrize("index_dir", [None, "kept"], ids=["anywhere", "named"])
def test_without_a_place_to_write_work_goes_on_and_the_log_says_so_once(
    index_dir: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "t.tar")
    refuse_writing_below(tmp_path, monkeypatch)
    for _ in range(3):
        assert len(load_index(path, tmp_path / index_dir if index_dir else None)) == 3
    (record,) = caplog.records
    assert "cannot be kept" in record.getMessage()
    assert "Permission denied" in record.getMessage()


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setattr(Path, "home", no_home)
    path = write_tar(tmp_path / "t.tar")
    refuse_writing_below(tmp_path, monkeypatch)
    assert len(load_index(path)) == 3


def test_the_default_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/t.tar", Path(write_tar(tmp_path / "t.tar")).read_bytes())
    load_index(f"memory://{tmp_path.name}/t.tar")
    assert len(list((tmp_path / ".cache/tokenlabels/index").glob("t-*.index"))) == 1


def test_urls(tmp_path: Path, scans: list[str]) -> None:
    memory, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/u.tar"
    memory.pipe_file(f"/{tmp_path.name}/u.tar", Path(write_tar(tmp_path / "t.tar")).read_bytes())
    expected = build_index(str(tmp_path / "t.tar"))
    scans.clear()
    for _ in range(2):
        assert same(load_index(url), expected)
    assert kept_num_samples(url, tar_state(url)) == 3
    assert scans == [url]
    memory.pipe_file(f"/{tmp_path.name}/u.tar", Path(write_tar(tmp_path / "s.tar", FILES[:1])).read_bytes())
    assert kept_num_samples(url, tar_state(url)) is None
    assert len(load_index(url)) == 1


def test_a_server_that_does_not_tell_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(memory), "info", lambda _, path: {"name": path, "size": None})
    with pytest.raises(TarError, match=r"memory://x/t\.tar: the server does not tell its size"):
        tar_state("memory://x/t.tar")


@pytest.mark.parametrize(
    ("info", "version"),
    [
        pytest.param({"ETag": '"5f"', "LastModified": "now", "name": "listing"}, '"5f"', id="s3"),
        pytest.param({"mtime": 17.5, "ino": 3, "created": 4}, "17.5", id="file"),
        pytest.param({}, "by its name", id="none"),
    ],
)
def test_versions_of_urls(info: dict[str, object], version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(memory, "info", lambda *_: info | {"size": 5})
    monkeypatch.setattr(memory, "ukey", lambda *_: "by its name")
    assert tar_state("memory://x/t.tar") == index_module.TarState(5, version)


def test_a_changed_tar_is_indexed_anew(tmp_path: Path, scans: list[str]) -> None:
    path = write_tar(tmp_path / "t.tar")
    load_index(path)
    other: Files = [(name.replace("a", "x"), data) for name, data in FILES]
    write_tar(tmp_path / "t.tar", other)  # of the same size
    os.utime(path, ns=(1, 1))
    assert load_index(path).keys == ("x", "ü/b", "c")
    write_tar(tmp_path / "t.tar", [*FILES, ("big.jpg", bytes(20_000))])
    os.utime(path, ns=(1, 1))  # at the same time
    assert len(load_index(path)) == 4
    assert len(scans) == 3


def test_an_index_of_another_format_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "t.tar")
    monkeypatch.setattr(index_module, "_FORMAT", "tokenlabels shard index 0")
    load_index(path)
    monkeypatch.undo()
    assert kept_num_samples(path, tar_state(path)) is None
    assert len(load_index(path)) == 3
    assert Path(path + ".index").read_bytes().find(b"tokenlabels shard index 1") > 0


def damaged(content: bytes) -> Iterator[bytes]:
    yield from (content[:length] for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1))
    yield content + b"\0"
    for place in range(len(content)):
        for bit in (0x01, 0x20, 0x80):
            yield content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


def test_a_damaged_index_is_never_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at several lengths, and every byte flipped: of the header, of the numbers, of the checksum."""
    path = write_tar(tmp_path / "t.tar", FILES[:2])
    expected, kept = load_index(path), Path(path + ".index")
    num_scans, num_damages = 0, 0

    def build(_: str) -> ShardIndex:
        nonlocal num_scans
        num_scans += 1
        return expected

    monkeypatch.setattr(index_module, "build_index", build)
    monkeypatch.setattr(index_module, "replace_file", lambda *_: None)
    for content in damaged(kept.read_bytes()):
        kept.write_bytes(content)
        assert same(load_index(path), expected)
        assert kept_num_samples(path, tar_state(path)) in (None, 1)
        num_damages += 1
    assert num_scans == num_damages > 1000


def test_a_damaged_index_is_replaced(tmp_path: Path, scans: list[str]) -> None:
    path = write_tar(tmp_path / "t.tar")
    load_index(path)
    Path(path + ".index").write_bytes(b"")
    load_index(path)
    load_index(path)
    assert len(scans) == 2


def test_a_tar_that_is_still_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "t.tar")

    def grow(path: str) -> ShardIndex:
        index = build_index(path)
        os.utime(path, ns=(5, 5))
        return index

    monkeypatch.setattr(index_module, "build_index", grow)
    with pytest.raises(TarError, match=r"t\.tar: the tar changed while it was indexed"):
        load_index(path)
    assert not Path(path + ".index").exists()


def test_a_damaged_tar_is_an_error_and_keeps_no_index(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar")
    Path(path).write_bytes(Path(path).read_bytes()[:1500])
    with pytest.raises(TarError, match=r"t\.tar: truncated"):
        load_index(path)
    assert names_in(tmp_path) == ["t.tar"]
    with pytest.raises(FileNotFoundError, match=r"gone\.tar"):
        load_index(str(tmp_path / "gone.tar"))


def test_several_threads_may_index_one_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar")
    with ThreadPoolExecutor(8) as pool:
        indexes = list(pool.map(load_index, [path] * 32))
    assert all(same(index, indexes[0]) for index in indexes)
    assert names_in(tmp_path) == ["t.tar", "t.tar.index"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_several_processes_may_index_one_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        indexes = pool.map(load_index, [path] * 16, chunksize=1)
    assert all(same(index, build_index(path)) for index in indexes)
    assert names_in(tmp_path) == ["t.tar", "t.tar.index"]


def info_of(*splits: dict[str, object]) -> dict[str, object]:
    return {"splits": {f"split{number}": split for number, split in enumerate(splits)}}


TRAIN = {"filenames": ["a.tar", "b.tar"], "shard_lengths": [3, 5], "num_samples": 8, "name": "train"}
VAL = {"filenames": ["v.tar"], "shard_lengths": [2], "num_samples": 2}


@pytest.mark.parametrize(
    ("info", "lengths"),
    [
        pytest.param(info_of(TRAIN), {"a.tar": 3, "b.tar": 5}, id="one"),
        pytest.param(info_of(TRAIN, VAL), {"a.tar": 3, "b.tar": 5, "v.tar": 2}, id="two"),
        pytest.param(info_of(TRAIN, TRAIN), {"a.tar": 3, "b.tar": 5}, id="twice-the-same"),
        pytest.param(info_of(), {}, id="no-splits"),
    ],
)
def test_infos_of_releases(
    info: object, lengths: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "_info.json"
    path.write_text(json.dumps(info))
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/_info.json", path.read_bytes())
    assert read_info(info_path(str(tmp_path / "a.tar"))) == lengths
    assert read_info(info_path(f"memory://{tmp_path.name}/a.tar")) == lengths
    assert not caplog.records


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="no-json"),
        pytest.param("[1]", id="list"),
        pytest.param("{}", id="nothing"),
        pytest.param('{"splits": [1]}', id="splits-list"),
        pytest.param(json.dumps(info_of({"filenames": ["a.tar"]})), id="no-lengths"),
        pytest.param(json.dumps(info_of(TRAIN | {"shard_lengths": [3]})), id="too-few-lengths"),
        pytest.param(json.dumps(info_of(TRAIN | {"shard_lengths": [3, 0]})), id="zero"),
        pytest.param(json.dumps(info_of(TRAIN | {"shard_lengths": [3, True]})), id="true"),
        pytest.param(json.dumps(info_of(TRAIN | {"shard_lengths": [3, "5"]})), id="text"),
        pytest.param(json.dumps(info_of(TRAIN | {"filenames": ["a.tar", None]})), id="null-name"),
        pytest.param(json.dumps(info_of(TRAIN, TRAIN | {"shard_lengths": [3, 6]})), id="two-lengths"),
        pytest.param('{"splits": "\\ud800"}\xff', id="not-utf-8"),
    ],
)
def test_broken_infos_are_ignored_and_the_log_says_so(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "_info.json").write_bytes(content.encode("latin-1"))
    assert read_info(str(tmp_path / "_info.json")) == {}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(tmp_path / "_info.json") in record.getMessage()


def test_no_info_is_nothing_to_speak_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_info(str(tmp_path / "_info.json")) == {}
    assert read_info(f"memory://{tmp_path.name}/_info.json") == {}
    assert not caplog.records
