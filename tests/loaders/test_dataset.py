import dataclasses
import gc
import io
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from loaders import dataset as dataset_module
from loaders import index as index_module
from loaders.dataset import FolderDataShard, ImageDataset, TarDataShard
from tokenlabels.images import find_shards
from tokenlabels.tars import TarError


def write_tar(path: Path, num_samples: int, first: int = 0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in range(first, first + num_samples):
            for extension, data in (("jpg", b"image %d" % number), ("cls", b"%d" % number)):
                info = tarfile.TarInfo(f"k{number}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Folder of two tars, t0 with 3 samples and t1 with 2."""
    write_tar(tmp_path / "tars" / "t0.tar", 3)
    write_tar(tmp_path / "tars" / "t1.tar", 2, first=3)
    return tmp_path / "tars"


def write_info(folder: Path, **lengths: int) -> None:
    split = {"filenames": [f"{stem}.tar" for stem in lengths], "shard_lengths": list(lengths.values())}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": split}}))


def refuse_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(path: str) -> None:
        raise AssertionError(f"{path} was scanned")

    monkeypatch.setattr(index_module, "scan_tar", scan)


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def contents(dataset: ImageDataset) -> list[tuple[str, int, bytes]]:
    """Key, label and image of every sample."""
    samples = []
    for shard in dataset.shards:
        with shard.open() as file:
            index = file.index
            samples += [(key, int(index.labels[row]), file.read(row)) for row, key in enumerate(index.keys)]
    return samples


@pytest.mark.parametrize(
    ("fixture", "pattern"),
    [("imagenet_sample", "imagenet1k-train-{0000..0003}.tar"), ("tiny_imagenet", "tiny-val-*.tar")],
    ids=["imagenet", "tiny"],
)
def test_real_tars_are_what_the_slow_path_reads(
    fixture: str, pattern: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    images = request.getfixturevalue(fixture) / pattern
    dataset = ImageDataset.find(images, tmp_path)
    slow = [(image.key, image.label, image.data) for shard in find_shards([str(images)]) for image in shard.images()]
    assert contents(dataset) == slow
    assert len(dataset) == sum(dataset.lengths) == len(slow)


def test_what_a_dataset_says_of_itself(imagenet_sample: Path, tmp_path: Path) -> None:
    path = imagenet_sample / "imagenet1k-train-0000.tar"
    dataset = ImageDataset.find([path, str(imagenet_sample / "imagenet1k-train-0003.tar")], tmp_path)
    assert dataset.lengths == (128, 44)
    assert repr(dataset) == f"ImageDataset(172 samples in 2 shards, from '{path}')"
    shard = dataset.shards[0]
    assert (shard.path, shard.stem, shard.num_samples) == (str(path), "imagenet1k-train-0000", 128)
    assert shard.size_bytes == path.stat().st_size


def test_nothing_is_scanned_the_second_time(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(ImageDataset.find(f"{tars}/*.tar"))
    refuse_scans(monkeypatch)
    assert contents(ImageDataset.find(f"{tars}/*.tar")) == expected
    assert names_in(tars) == ["t0.tar", "t0.tar.index", "t1.tar", "t1.tar.index"]


def test_indexes_are_read_anew_and_not_remembered(tars: Path) -> None:
    shard = ImageDataset.find(tars / "t0.tar").shards[0]
    before = len(pickle.dumps(shard))
    assert shard.index() is not shard.index()
    assert len(pickle.dumps(shard)) == before


def test_a_relative_index_folder_is_the_same_everywhere(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tars)
    dataset = ImageDataset.find("t0.tar", Path("kept"))
    monkeypatch.chdir("/")
    refuse_scans(monkeypatch)
    assert len(dataset.shards[0].index()) == 3


def test_nothing_named_is_refused(tars: Path) -> None:
    with pytest.raises(ValueError, match="no images were named"):
        ImageDataset.find([])
    with pytest.raises(ValueError, match="finds no images"):
        ImageDataset.find(tars / "gone.tar")


def test_urls(tars: Path) -> None:
    for file in tars.iterdir():
        fsspec.filesystem("memory").pipe_file(str(file), file.read_bytes())
    remote, local = ImageDataset.find(f"memory:/{tars}/t{{0..1}}.tar"), ImageDataset.find(f"{tars}/*.tar")
    assert contents(pickle.loads(pickle.dumps(remote))) == contents(local)
    assert (remote.lengths, remote.digest) == (local.lengths, local.digest)


class TestInfoOfAPublicRelease:
    def test_tells_the_lengths_and_tars_are_scanned_when_they_are_read(
        self, tars: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_info(tars, t0=3, t1=2, t2=9)
        with monkeypatch.context() as patched:
            refuse_scans(patched)
            dataset = ImageDataset.find(f"{tars}/*.tar")
            assert (dataset.lengths, len(dataset.digest)) == ((3, 2), 32)
        assert [image for _, _, image in contents(dataset)] == [b"image %d" % number for number in range(5)]

    @pytest.mark.parametrize("opened", [True, False], ids=["open", "index"])
    def test_that_is_wrong_is_an_error_when_the_tar_is_scanned(self, opened: bool, tars: Path) -> None:
        write_info(tars, t0=3, t1=4)
        dataset = ImageDataset.find(f"{tars}/*.tar")
        assert len(dataset.shards[0].index()) == 3
        with pytest.raises(TarError, match=r"t1\.tar: 2 samples where \S*/tars/_info\.json says 4"):
            dataset.shards[1].open() if opened else dataset.shards[1].index()

    def test_that_is_wrong_is_an_error_where_the_tar_is_indexed(self, tars: Path) -> None:
        ImageDataset.find(f"{tars}/*.tar")
        write_info(tars, t0=3, t1=4)
        with pytest.raises(TarError, match=r"t1\.tar: 2 samples where \S*/tars/_info\.json says 4"):
            ImageDataset.find(f"{tars}/*.tar")

    def test_without_a_tar_that_is_there_is_of_no_use_for_it(self, tars: Path) -> None:
        write_info(tars, t0=3)
        dataset = ImageDataset.find(f"{tars}/*.tar")
        assert dataset.lengths == (3, 2)
        assert names_in(tars) == ["_info.json", "t0.tar", "t1.tar", "t1.tar.index"]

    def test_that_is_broken_is_ignored(self, tars: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tars / "_info.json").write_text("{")
        assert ImageDataset.find(f"{tars}/*.tar").lengths == (3, 2)
        assert len(caplog.records) == 1


class TestTarsThatChange:
    def test_another_size_is_an_error_before_anything_is_read(
        self, tars: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shard = ImageDataset.find(tars / "t0.tar").shards[0]
        os.truncate(shard.path, 2000)
        refuse_scans(monkeypatch)
        for ask in (shard.index, shard.open):
            with pytest.raises(TarError, match=r"t0\.tar: the tar changed .* it has 2000 bytes, had 10240"):
                ask()

    def test_another_number_of_samples_is_an_error(self, tars: Path) -> None:
        shard = ImageDataset.find(tars / "t0.tar").shards[0]
        write_tar(tars / "t0.tar", 2)
        with pytest.raises(TarError, match=r"t0\.tar: the tar changed .* it has 2 samples, had 3"):
            shard.open()

    def test_another_time_alone_is_none(self, tars: Path) -> None:
        dataset = ImageDataset.find(f"{tars}/*.tar")
        expected = contents(dataset)
        os.utime(tars / "t0.tar", ns=(7, 7))
        assert contents(dataset) == expected

    def test_gone_names_it(self, tars: Path) -> None:
        shard = ImageDataset.find(tars / "t0.tar").shards[0]
        Path(shard.path).unlink()
        with pytest.raises(FileNotFoundError, match=r"t0\.tar"):
            shard.index()

    def test_damaged_is_an_error_when_the_dataset_is_found(self, tars: Path) -> None:
        os.truncate(tars / "t1.tar", 2000)
        with pytest.raises(TarError, match=r"t1\.tar: truncated"):
            ImageDataset.find(f"{tars}/*.tar")


class TestDigest:
    def test_stays_when_the_folder_is_copied_or_touched(self, tars: Path, tmp_path: Path) -> None:
        digest = ImageDataset.find(f"{tars}/*.tar").digest
        shutil.copytree(tars, tmp_path / "elsewhere")
        for file in (tmp_path / "elsewhere").iterdir():
            os.utime(file, ns=(9, 9))
        assert ImageDataset.find(f"{tmp_path}/elsewhere/*.tar").digest == digest

    def test_is_the_same_with_every_version(self, tars: Path) -> None:
        """Saved states hold it. Change it only together with the version of the state."""
        assert ImageDataset.find(f"{tars}/*.tar").digest == "bdff83f5e5dad21fa0844e1d0029d8d4"

    @pytest.mark.parametrize(
        ("field", "value"), [("num_samples", 4), ("size_bytes", 10_241), ("path", "/x/t2.tar")], ids=str
    )
    def test_changes_with_every_part_of_a_shard(self, field: str, value: int | str, tars: Path) -> None:
        dataset = ImageDataset.find(f"{tars}/*.tar")
        shard = dataset.shards[0]
        assert isinstance(shard, TarDataShard)
        other = ImageDataset((dataclasses.replace(shard, **{field: value}), dataset.shards[1]))
        assert other.digest != dataset.digest

    def test_changes_with_the_order(self, tars: Path) -> None:
        digests = [ImageDataset.find(f"{tars}/{pattern}").digest for pattern in ("t{0,1}.tar", "t{1,0}.tar", "t0.tar")]
        assert len(set(digests)) == 3


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An ImageFolder tree of three classes with 3, 1 and 2 images."""
    for name in ("cat/b.jpg", "cat/a.png", "cat/deep/c.JPEG", "ant/x.jpg", "dog/y.webp", "dog/z.jpg", "dog/notes.txt"):
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return tmp_path / "tree"


class TestImageFolder:
    def test_is_torchvisions(self, tree: Path) -> None:
        folder = ImageFolder(str(tree), loader=lambda path: Path(path).read_bytes())
        dataset = ImageDataset.find(tree)
        assert [(image, label) for _, label, image in contents(dataset)] == list(folder)
        assert [shard.stem for shard in dataset.shards] == folder.classes
        assert dataset.lengths == (1, 3, 2)

    def test_has_keys_sizes_and_places(self, tree: Path) -> None:
        shard = ImageDataset.find(tree).shards[1]
        index = shard.index()
        assert index.keys == ("cat/a", "cat/b", "cat/deep/c")
        assert (index.offsets.tolist(), index.sizes.tolist(), index.labels.tolist()) == ([0] * 3, [-1] * 3, [1] * 3)
        assert (shard.path, shard.size_bytes) == (str(tree / "cat"), 9 + 9 + 15)

    def test_in_parts(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = contents(ImageDataset.find(tree))
        monkeypatch.setattr("tokenlabels.images.folders.MAX_FOLDER_SHARD_IMAGES", 2)
        dataset = ImageDataset.find(tree)
        assert dataset.lengths == (1, 2, 1, 2)
        assert contents(dataset) == whole

    def test_names_a_file_that_cannot_be_read(self, tree: Path) -> None:
        (tree / "cat" / "b.jpg").unlink()
        (tree / "cat" / "b.jpg").symlink_to("nowhere")
        with ImageDataset.find(tree).shards[1].open() as file, pytest.raises(FileNotFoundError, match=r"cat/b\.jpg"):
            file.read(1)

    def test_digest_is_that_of_its_file_names(self, tree: Path, tmp_path: Path) -> None:
        digest = ImageDataset.find(tree).digest
        shutil.copytree(tree, tmp_path / "copy")
        assert ImageDataset.find(tmp_path / "copy").digest == digest
        (tree / "cat" / "b.jpg").rename(tree / "cat" / "bb.jpg")
        assert ImageDataset.find(tree).digest != digest

    def test_together_with_tars_in_the_order_that_is_named(self, tree: Path, tars: Path) -> None:
        dataset = ImageDataset.find([tars / "t1.tar", tree, tars / "t0.tar"])
        assert [shard.stem for shard in dataset.shards] == ["t1", "ant", "cat", "dog", "t0"]
        assert dataset.lengths == (2, 1, 3, 2, 3)

    def test_keys_are_not_remembered(self, tree: Path) -> None:
        shard = ImageDataset.find(tree).shards[1]
        assert isinstance(shard, FolderDataShard)
        before = set(vars(shard.shard))
        shard.open().close()
        assert set(vars(shard.shard)) == before


@pytest.mark.parametrize("kind", ["tars", "tree", "urls"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_datasets_travel_and_survive_a_fork(kind: str, tars: Path, tree: Path) -> None:
    fsspec.filesystem("memory").pipe_file(f"{tars}/t0.tar", (tars / "t0.tar").read_bytes())
    images = {"tars": f"{tars}/*.tar", "tree": tree, "urls": f"memory:/{tars}/t0.tar"}
    dataset = ImageDataset.find(images[kind])
    expected = contents(dataset)
    assert (dataset.lengths, dataset.digest) == (pickle.loads(pickle.dumps(dataset)).lengths, dataset.digest)
    travelled = pickle.loads(pickle.dumps(dataset))
    assert (travelled, contents(travelled)) == (dataset, expected)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(contents, [dataset]) == expected


def test_no_descriptor_is_left(tars: Path, tree: Path) -> None:
    def num_descriptors() -> int:
        gc.collect()  # of earlier tests
        return len(list(Path("/proc/self/fd").iterdir()))

    contents(ImageDataset.find([tree, f"{tars}/*.tar"]))
    before = num_descriptors()
    for _ in range(20):
        contents(ImageDataset.find([tree, f"{tars}/*.tar"]))
    assert num_descriptors() == before


def test_long_scans_are_reported_in_the_log(
    tars: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter(np.arange(0.0, 100.0, 6.0).tolist())
    monkeypatch.setattr(dataset_module.time, "monotonic", lambda: next(seconds))
    with caplog.at_level(logging.INFO, "loaders"):
        ImageDataset.find(f"{tars}/*.tar")
    assert [record.getMessage() for record in caplog.records] == ["indexed 2 of 2 tars in 12 s"]
    assert capsys.readouterr() == ("", "")
