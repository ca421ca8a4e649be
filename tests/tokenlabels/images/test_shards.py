import io
import json
import pickle
import tarfile
from pathlib import Path

import fsspec
import pytest

from tokenlabels.images import EncodedImage, SourceInfo, TarShard, find_shards
from tokenlabels.tars import Member, TarError, TarReader

Files = list[tuple[str, bytes]]
FILES: Files = [("a.jpg", b"A"), ("a.cls", b"7"), ("b.json", b'{"label": 3}'), ("b.png", b"B"), ("notes", b"")]


def write_tar(path: Path, files: Files) -> TarShard:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return TarShard(str(path))


def test_a_tar_gives_its_samples_in_order(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "train-00.tar", FILES)
    assert (shard.stem, shard.name) == ("train-00", "train-00.tar")
    assert shard.source == SourceInfo("train-00.tar", 10_240, num_samples=2, num_ignored=1)
    assert shard.size_bytes == 10_240
    assert shard.keys() == ["a", "b"]
    assert list(shard.images()) == [EncodedImage("a", b"A", 7, None), EncodedImage("b", b"B", 3, None)]


def test_a_few_samples_by_key(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "t.tar", FILES)
    assert [image.data for image in shard.read(["b", "a", "b"])] == [b"B", b"A", b"B"]
    assert list(shard.read([])) == []
    with pytest.raises(ValueError, match=r"t\.tar: no sample with the key 'c'"):
        list(shard.read(["a", "c"]))


def test_a_tar_is_not_opened_before_it_is_asked(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "t.tar", FILES)
    Path(shard.path).write_bytes(b"damaged")
    assert find_shards([shard.path]) == [shard]
    assert (shard.stem, shard.size_bytes) == ("t", 7)
    with pytest.raises(TarError, match=r"t\.tar: not a tar"):
        shard.keys()


def test_tar_shards_travel_before_and_after_reading(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "t.tar", FILES)
    before = pickle.loads(pickle.dumps(shard))
    images = list(shard.images())
    after = pickle.loads(pickle.dumps(shard))
    assert before == after == shard
    assert list(before.images()) == list(after.images()) == images


@pytest.mark.parametrize(
    ("extensions", "used"),
    [
        (["webp", "png", "jpeg", "jpg"], "jpg"),
        (["webp", "png", "jpeg"], "jpeg"),
        (["webp", "png"], "png"),
        (["webp", "seg.png"], "webp"),
        (["txt", "JPG"], "JPG"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_the_image_of_a_sample(extensions: list[str], used: str, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "t.tar", [(f"a.{extension}", extension.encode()) for extension in extensions])
    assert [image.data for image in shard.images()] == [used.encode()]


def test_a_sample_is_read_forwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remote file is read ahead: going back would fetch it twice."""
    offsets = []
    read = TarReader.read

    def spy(reader: TarReader, member: Member) -> bytes:
        offsets.append(member.offset)
        return read(reader, member)

    monkeypatch.setattr(TarReader, "read", spy)
    list(write_tar(tmp_path / "t.tar", [("a.cls", b"1"), ("a.jpg", b"A"), ("b.jpg", b"B"), ("b.cls", b"1")]).images())
    assert len(offsets) == 4
    assert offsets == sorted(offsets)


def test_a_sample_without_image_is_a_problem(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "t.tar", [("a.json", b"{}"), ("a.cls", b"4"), ("b.jpg", b"B")])
    problem = "no image member (has cls, json; images are jpg, jpeg, png, webp)"
    assert list(shard.images()) == [EncodedImage("a", None, 4, problem), EncodedImage("b", b"B", None, None)]


@pytest.mark.parametrize(
    ("files", "label"),
    [
        pytest.param({"cls": b"0"}, 0, id="zero"),
        pytest.param({"cls": b" 12\n"}, 12, id="spaces"),
        pytest.param({"cls": b"-1"}, None, id="unlabelled"),
        pytest.param({"cls": b"5", "json": b'{"label": 6}'}, 5, id="cls-before-json"),
        pytest.param({"json": b'{"label": 6}'}, 6, id="json"),
        pytest.param({"json": b'{"label": -1}'}, None, id="json-unlabelled"),
        pytest.param({"json": b'{"label": "dog"}'}, None, id="json-text"),
        pytest.param({"json": b'{"label": true}'}, None, id="json-true"),
        pytest.param({"json": b"{}"}, None, id="json-without"),
        pytest.param({"json": b"[1]"}, None, id="json-list"),
        pytest.param({}, None, id="none"),
    ],
)
def test_labels(files: dict[str, bytes], label: int | None, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "t.tar", [("a.jpg", b"A"), *((f"a.{ext}", data) for ext, data in files.items())])
    assert list(shard.images()) == [EncodedImage("a", b"A", label, None)]


@pytest.mark.parametrize("content", [b"", b"dog", b"1.5", b"-2", b"1_0", b"9" * 5000, b"\xff", "٣".encode()], ids=repr)
def test_a_cls_that_is_no_index_is_no_label(content: bytes, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "t.tar", [("a.jpg", b"A"), ("a.cls", content), ("a.json", b'{"label": 6}')])
    assert list(shard.images()) == [EncodedImage("a", b"A", None, None)]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{", b"[" * 100_000, b"9" * 5000], ids=lambda value: repr(value[:4])
)
def test_a_broken_json_is_no_label(content: bytes, tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "t.tar",
        [("a.jpg", b"A"), ("a.json", content), ("b.jpg", b"B"), ("b.cls", b"1"), ("b.json", content)],
    )
    assert list(shard.images()) == [EncodedImage("a", b"A", None, None), EncodedImage("b", b"B", 1, None)]


def names_of(patterns: list[str], root: Path) -> list[str]:
    return [Path(shard.path).relative_to(root).as_posix() for shard in find_shards(patterns)]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for name in ("train-0002", "train-0000", "train-0001", "val-0000", "x/deep"):
        write_tar(tmp_path / f"{name}.tar", FILES)
    (tmp_path / "labels.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        pytest.param(["val-0000.tar"], ["val-0000.tar"], id="plain"),
        pytest.param(["train-{0000..0002}.tar"], [f"train-000{i}.tar" for i in range(3)], id="range"),
        pytest.param(["train-{0002..0000}.tar"], [f"train-000{i}.tar" for i in (2, 1, 0)], id="range-down"),
        pytest.param(["{val-0000,train-0001}.tar"], ["val-0000.tar", "train-0001.tar"], id="list-as-written"),
        pytest.param(["train-*.tar"], [f"train-000{i}.tar" for i in range(3)], id="glob-sorted"),
        pytest.param(["**/d*.tar"], ["x/deep.tar"], id="recursive-glob"),
        pytest.param(["{val,train}-*1.tar", "val-*.tar"], [], id="one-of-two-globs-empty"),
        pytest.param(
            ["val-*.tar", "train-{0000..0001}.tar"], ["val-0000.tar", "train-0000.tar", "train-0001.tar"], id="two"
        ),
    ],
)
def test_patterns(patterns: list[str], found: list[str], tars: Path) -> None:
    full = [str(tars / pattern) for pattern in patterns]
    if found:
        assert names_of(full, tars) == found
    else:
        with pytest.raises(ValueError, match="1 of its 2 names are not there"):
            find_shards(full)


def test_a_name_with_glob_characters_is_a_name(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a[1].tar", FILES)
    assert find_shards([shard.path]) == [shard]


def test_the_home_directory_in_a_quoted_pattern(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tars))
    assert len(find_shards(["~/train-{0000..0002}.tar", "~/val-*.tar"])) == 4


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        pytest.param("gone.tar", r"gone\.tar' finds no images: nothing there", id="missing"),
        pytest.param("gone-*.tar", r"gone-\*\.tar' finds no images: nothing there", id="empty-glob"),
        pytest.param(
            "train-{0001..0005}.tar", r"3 of its 5 names .*the first is '.*train-0003\.tar'", id="some-missing"
        ),
        pytest.param("train-{0000..0002.tar", "unbalanced braces", id="braces"),
        pytest.param("labels.json", r"labels\.json: neither a \.tar nor a directory", id="not-a-tar"),
        pytest.param("*", r"labels\.json: neither", id="glob-of-everything"),
    ],
)
def test_bad_patterns_are_refused(pattern: str, message: str, tars: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find_shards([str(tars / pattern)])


def test_two_shards_of_one_name_are_refused_with_both_paths(tars: Path) -> None:
    write_tar(tars / "y" / "val-0000.tar", FILES)
    with pytest.raises(
        ValueError, match=r"/val-0000\.tar and \S*/y/val-0000\.tar would both become the labels 'val-0000'"
    ):
        find_shards([str(tars / "val-*.tar"), str(tars / "y" / "*.tar")])
    with pytest.raises(ValueError, match="would both become"):
        find_shards([str(tars / "val-0000.tar")] * 2)


def test_urls(tars: Path) -> None:
    memory = fsspec.filesystem("memory")
    base = f"/{tars.name}-urls"
    for name in ("b", "a"):
        memory.pipe_file(f"{base}/{name}.tar", (tars / "val-0000.tar").read_bytes())
    braces = find_shards([f"memory:/{base}/{{b,a}}.tar"])
    assert [shard.stem for shard in braces] == ["b", "a"]
    globbed = find_shards([f"memory:/{base}/*.tar"])
    assert [shard.stem for shard in globbed] == ["a", "b"]
    for shard in (*braces, *globbed):
        assert shard.source == SourceInfo(f"{shard.stem}.tar", 10_240, 2, 1)
        assert [image.data for image in pickle.loads(pickle.dumps(shard)).images()] == [b"A", b"B"]
    assert [shard.stem for shard in find_shards([f"file://{tars}/train-*.tar"])] == [f"train-000{i}" for i in range(3)]


def test_bad_urls_are_refused(tars: Path) -> None:
    with pytest.raises(ValueError, match="finds no images: nothing there"):
        find_shards([f"memory://{tars.name}/gone.tar"])
    with pytest.raises(ValueError, match="a chained URL takes no glob"):
        find_shards([f"simplecache::memory://{tars.name}/*.tar"])


def test_real_shards_as_published(imagenet_sample: Path) -> None:
    shards = find_shards([str(imagenet_sample / "imagenet1k-train-{0000..0003}.tar")])
    assert [shard.source.num_samples for shard in shards] == [128, 128, 100, 44]
    images = [image for shard in shards for image in shard.images()]
    assert all(image.data is not None and image.data.startswith(b"\xff\xd8") for image in images)
    assert len({image.label for image in images}) == 400


def test_labels_of_real_shards_are_those_of_their_json(imagenet_sample: Path) -> None:
    path = imagenet_sample / "imagenet1k-train-0003.tar"
    with tarfile.open(path) as archive:
        expected = {}
        for name in archive.getnames():
            if name.endswith(".json"):
                file = archive.extractfile(name)
                assert file is not None
                expected[name.removesuffix(".json")] = json.load(file)["label"]
    assert {image.key: image.label for image in TarShard(str(path)).images()} == expected


def test_real_tiny_images(tiny_imagenet: Path) -> None:
    shards = find_shards([str(tiny_imagenet / "tiny-{train-{0000..0009},val-000{0,1}}.tar")])
    assert sum(len(shard.keys()) for shard in shards) == 27_500
    labels = {image.label for image in shards[-1].images()}
    assert labels == set(range(50))


def test_a_protocol_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError(f"Install s3fs to access {url}")

    monkeypatch.setattr("fsspec.url_to_fs", missing)
    with pytest.raises(ValueError, match=r"tokenlabels\[s3\]"):
        find_shards(["s3://bucket/train-0000.tar"])
