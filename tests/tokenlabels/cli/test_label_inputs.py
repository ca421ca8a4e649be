"""Names of classes and images beside a label set."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from annotate.scenes import write_scenes
from tests.loaders.photos import encode, random_maps, smooth_image, write_label_set, write_photos, write_tar
from tokenlabels.cli.label_inputs import SetImages, names_for
from tokenlabels.images import find_shards
from tokenlabels.store import LabelSet, SkippedRecord, create_label_set, open_store


def set_of(folder: Path, info: LabelSet, class_names: tuple[str, ...] | None) -> Path:
    fields = info.model_dump() | {"class_names": class_names, "num_classes": 2, "k": 2}
    create_label_set(folder, LabelSet(**fields))
    return folder


def test_names_are_the_sets_own(labels: Path) -> None:
    store = open_store(labels)
    assert store.info.class_names is not None
    assert names_for(store, None) == store.info.class_names


def test_names_are_words(labels: Path, tmp_path: Path) -> None:
    info = open_store(labels).info
    store = open_store(set_of(tmp_path / "wnids", info, ("n01440764", "n01443537")))
    assert names_for(store, None) == ("tench, Tinca tinca", "goldfish, Carassius auratus")


def test_names_that_are_given_win(labels: Path, tmp_path: Path) -> None:
    store = open_store(set_of(tmp_path / "set", open_store(labels).info, ("a", "b")))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert names_for(store, str(tmp_path / "names.txt")) == ("cat", "dog")


def test_nobody_names_the_classes(labels: Path, tmp_path: Path) -> None:
    store = open_store(set_of(tmp_path / "set", open_store(labels).info, None))
    with pytest.raises(ValueError, match=r"does not name its 2 classes; say --class-names FILE .* imagenet-1k"):
        names_for(store, None)


def test_names_are_of_one_line_and_command_no_terminal(labels: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["\x1b[31mred", "line\nbreak"]))
    nameless = open_store(set_of(tmp_path / "nameless", open_store(labels).info, None))
    assert names_for(nameless, str(names)) == ("\\x1b[31mred", "line break")
    store = open_store(set_of(tmp_path / "set", open_store(labels).info, ("a\tb", "鯉")))
    assert names_for(store, None) == ("a b", "鯉")


def test_shards_of_another_set_are_named(
    labels: Path, pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "other.tar", {"a": {"jpg": b""}})
    SetImages([pattern, str(tmp_path / "other.tar")], open_store(labels))
    assert "has no labels of 1 of the given shards: other" in " ".join(capsys.readouterr().err.split())


def test_names_of_other_classes(labels: Path, tmp_path: Path) -> None:
    store = open_store(set_of(tmp_path / "set", open_store(labels).info, None))
    with pytest.raises(ValueError, match="1000 class names for 2 classes"):
        names_for(store, "imagenet-1k")


def test_the_labels_sizes_and_bytes_of_all_rows(labels: Path, pattern: str) -> None:
    store = open_store(labels)
    images = SetImages([pattern], store)
    labels_of = SetImages([pattern], store).labels
    for shard, source in zip(store.shards, find_shards([pattern]), strict=True):
        samples = [*source.images()]
        assert shard in images
        assert labels_of(shard).tolist() == [sample.label for sample in samples]
        assert images.sizes(shard).tolist() == [len(sample.data or b"") for sample in samples]
        assert [*images.read(shard, [1, 0])] == [samples[1].data, samples[0].data]


def test_shards_without_images_have_no_labels(labels: Path, tars: Path) -> None:
    store = open_store(labels)
    images = SetImages([f"{tars}/scenes-0001.tar"], store)
    assert [shard in images for shard in store.shards] == [False, True, False]
    assert images.labels(store.shards[0]).tolist() == [-1] * 5
    assert images.labels(store.shards[1]).min() >= 0
    assert SetImages([], store).labels(store.shards[1]).tolist() == [-1] * 3


def test_rows_pass_over_images_without_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {key: encode(smooth_image(rng, 20, 20)) for key in "abcd"}
    tar = tmp_path / "images/t.tar"
    write_tar(tar, {key: {"jpg": data, "cls": b"%d" % row} for row, (key, data) in enumerate(images.items())})
    skipped = {"t": [SkippedRecord(key="b", reason="broken")]}
    store = open_store(write_label_set(tmp_path / "labels", {"t": random_maps(rng, ["a", "c", "d"])}, skipped=skipped))
    given = SetImages([str(tar)], store)
    (shard,) = store.shards
    assert given.labels(shard).tolist() == [0, 2, 3]
    assert given.sizes(shard).tolist() == [len(images[key]) for key in "acd"]
    assert [*given.read(shard, [0, 1, 2])] == [images[key] for key in "acd"]


def test_class_folders_are_images_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {key: encode(smooth_image(rng, 20, 20)) for key in ("cat/1", "cat/2", "dog/1")}
    for key, data in images.items():
        file = tmp_path / f"tree/{key}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    maps = {"cat": random_maps(rng, ["cat/1", "cat/2"]), "dog": random_maps(rng, ["dog/1"])}
    store = open_store(write_label_set(tmp_path / "labels", maps))
    given = SetImages([str(tmp_path / "tree")], store)
    cat, dog = store.shards
    assert (given.labels(cat).tolist(), given.labels(dog).tolist()) == ([0, 0], [1])
    assert given.sizes(cat).tolist() == [len(images["cat/1"]), len(images["cat/2"])]
    assert [*given.read(cat, [1])] == [images["cat/2"]]


def test_images_of_another_data_set_are_refused(labels: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "others", shard_sizes=(2,), seed=1)
    other = Path(shutil.move(tmp_path / "others/scenes-0000.tar", tmp_path / "val-0000.tar"))
    with pytest.raises(ValueError, match=r"has no labels of val-0000: it has scenes-0000 and 2 more") as refusal:
        SetImages([str(other)], open_store(labels))
    assert str(labels) in str(refusal.value)


def test_other_images_of_the_same_name_are_refused(labels: Path, tars: Path, tmp_path: Path) -> None:
    tar = tmp_path / "scenes-0001.tar"
    shutil.copy(tars / "scenes-0000.tar", tar)
    store = open_store(labels)
    labels_of = SetImages([str(tar)], store).labels
    with pytest.raises(ValueError, match=r"8 keys are in one of them only, such as 'scene_000000'") as refusal:
        labels_of(store.shards[1])
    assert str(tar) in str(refusal.value)
    assert "scenes-0001.zarr" in str(refusal.value)


def test_classes_that_the_labels_do_not_have_are_refused(tmp_path: Path) -> None:
    photos = write_photos(tmp_path, [2, 1])
    write_tar(Path(photos.tars[1]), {photos.keys[1][0]: {"jpg": b"x", "cls": b"20"}})
    store = open_store(photos.labels)
    labels_of = SetImages(photos.tars, store).labels
    assert labels_of(store.shards[0]).tolist() == [photos.classes[key] for key in photos.keys[0]]
    with pytest.raises(ValueError, match=r"'train-01/img_000' is of class 20, but .* has 20 classes"):
        labels_of(store.shards[1])
