import os
import pickle
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from tokenlabels.images import EncodedImage, FolderShard, SourceInfo, find_shards, folders


def write_tree(root: Path, files: list[str]) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.encode())
    return root


TREE = [
    "n02/b.JPEG",
    "n02/a.jpg",
    "n01/deep/er/c.png",
    "n01/n01_10026.jpg",
    "n01/n01_2.v1.webp",
    "n01/notes.txt",
    "n03/x.ppm",
]


def test_one_shard_for_each_class(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "train", TREE)
    shards = find_shards([str(root)])
    assert [shard.stem for shard in shards] == ["n01", "n02", "n03"]
    assert [shard.path for shard in shards] == [f"{root}/n01", f"{root}/n02", f"{root}/n03"]
    assert shards[0].keys() == ["n01/deep/er/c", "n01/n01_10026", "n01/n01_2.v1"]
    assert list(shards[1].images()) == [
        EncodedImage("n02/a", b"n02/a.jpg", 1, None),
        EncodedImage("n02/b", b"n02/b.JPEG", 1, None),
    ]
    size_bytes = len("n01/deep/er/c.png" + "n01/n01_10026.jpg" + "n01/n01_2.v1.webp")
    assert shards[0].source == SourceInfo("n01", size_bytes, num_samples=3, num_ignored=1)


def test_images_and_labels_are_those_of_torchvision(tmp_path: Path) -> None:
    root = write_tree(tmp_path, TREE)
    theirs = {(Path(path).read_bytes(), label) for path, label in ImageFolder(str(root)).samples}
    ours = {(image.data, image.label) for shard in find_shards([str(root)]) for image in shard.images()}
    assert ours == theirs


def test_a_few_samples_by_key(tmp_path: Path) -> None:
    (shard,) = find_shards([str(write_tree(tmp_path, ["k/a.jpg", "k/b.jpg"]))])
    assert [image.data for image in shard.read(["k/b", "k/a"])] == [b"k/b.jpg", b"k/a.jpg"]
    with pytest.raises(ValueError, match=r"/k: no sample with the key 'a'"):
        list(shard.read(["a"]))


def test_large_classes_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MAX_FOLDER_SHARD_IMAGES", 3)
    root = write_tree(tmp_path, [*(f"cat/{number}.jpg" for number in range(7)), "cat/x.txt", "dog/1.jpg", "dog/2.jpg"])
    shards = find_shards([str(root)])
    assert [(shard.stem, len(shard.keys()), shard.num_ignored) for shard in shards] == [
        ("cat-00000", 3, 1),
        ("cat-00001", 3, 0),
        ("cat-00002", 1, 0),
        ("dog", 2, 0),
    ]
    keys = [key for shard in shards for key in shard.keys()]  # noqa: SIM118 - a shard is no dict
    assert keys == [*(f"cat/{number}" for number in range(7)), "dog/1", "dog/2"]
    assert [image.label for shard in shards for image in shard.images()] == [0] * 7 + [1] * 2


def test_a_class_named_like_a_part_of_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MAX_FOLDER_SHARD_IMAGES", 1)
    root = write_tree(tmp_path, ["cat/1.jpg", "cat/2.jpg", "cat-00001/1.jpg"])
    with pytest.raises(ValueError, match=r"cat and \S*cat-00001 would both become the labels 'cat-00001'"):
        find_shards([str(root)])


def test_shards_travel(tmp_path: Path) -> None:
    for shard in find_shards([str(write_tree(tmp_path, TREE))]):
        copy = pickle.loads(pickle.dumps(shard))
        assert copy == shard
        assert list(copy.images()) == list(shard.images())
        assert pickle.loads(pickle.dumps(copy)).source == shard.source


def test_hidden_files_and_directories_are_left_out(tmp_path: Path) -> None:
    hidden = [".ipynb_checkpoints/x.jpg", "a/._1.jpg", "a/.cache/y.jpg", ".DS_Store"]
    (shard,) = find_shards([str(write_tree(tmp_path, ["a/1.jpg", *hidden]))])
    assert (shard.keys(), shard.num_ignored) == (["a/1"], 2)


def test_links_are_followed(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "root", ["a/1.jpg"])
    elsewhere = write_tree(tmp_path / "elsewhere", ["2.jpg", "3.jpg"])
    (root / "b").symlink_to(elsewhere)
    (root / "a" / "more").symlink_to(elsewhere)
    (root / "a" / "4.jpg").symlink_to(elsewhere / "2.jpg")
    shards = find_shards([str(root)])
    assert [shard.keys() for shard in shards] == [["a/1", "a/4", "a/more/2", "a/more/3"], ["b/2", "b/3"]]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    root = write_tree(tmp_path, ["a/1.jpg", "a/2.jpg", "a/3.jpg"])
    (root / "a" / "0.jpg").symlink_to(root / "gone.jpg")
    (shard,) = find_shards([str(root)])
    (root / "a" / "2.jpg").unlink()
    images = list(shard.images())
    assert [image.problem for image in images] == [
        "cannot be read: No such file or directory",
        None,
        "cannot be read: No such file or directory",
        None,
    ]
    assert shard.size_bytes == len("a/1.jpg" + "a/3.jpg")


BAD_TREES = {
    "empty": ([], "no class directories in it; for the tars in it write"),
    "only-files": (["a.tar", "b.jpg"], "no class directories in it"),
    "only-hidden": ([".git/a.jpg"], "no class directories in it"),
    "splits": (["train/a/1.jpg", "val/a/1.jpg"], "its directories are splits, not classes; name one of them: .*/train"),
    "stray-images": (["a/1.jpg", "b.jpg"], "images without a class, as .*/b.jpg"),
    "empty-class": (["a/1.jpg", "b/notes.txt"], r"/b: a class without images \(\.jpg, "),
    "same-key": (["a/cat.jpg", "a/cat.png"], r"a/cat\.\w+ and \S*a/cat\.\w+ have the same key"),
    "newline": (["a/1\n.jpg"], "is not plain UTF-8; rename the file"),
}


@pytest.mark.parametrize(("files", "message"), BAD_TREES.values(), ids=BAD_TREES.keys())
def test_bad_trees_are_refused(files: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find_shards([str(write_tree(tmp_path, files))])


def test_a_link_that_leads_back_is_refused(tmp_path: Path) -> None:
    root = write_tree(tmp_path, ["a/1.jpg"])
    (root / "a" / "again").symlink_to(root / "a")
    with pytest.raises(ValueError, match=r"a/again: links lead to \S*/a twice"):
        find_shards([str(root)])


def test_an_unreadable_directory_is_an_error_and_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path, ["a/1.jpg", "a/b/2.jpg"])
    scandir = os.scandir

    def denied(path: str) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match=r"Permission denied: .*/b"):
        find_shards([str(root)])


def test_trees_and_tars_together_are_found_as_written(tmp_path: Path, imagenet_sample: Path) -> None:
    root = write_tree(tmp_path, ["b/1.jpg", "a/1.jpg"])
    shards = find_shards([str(imagenet_sample / "*-0003.tar"), str(root)])
    assert [shard.stem for shard in shards] == ["imagenet1k-train-0003", "a", "b"]
    assert isinstance(shards[1], FolderShard)
