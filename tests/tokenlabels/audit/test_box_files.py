"""Boxes from files and from the json of samples."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.experiments import localisation
from tests.loaders.photos import encode, random_maps, smooth_image, write_label_set, write_tar
from tokenlabels.audit.box_files import boxes_from_file, boxes_from_json, read_boxes
from tokenlabels.cli.label_inputs import SetImages
from tokenlabels.store import ShardReader, open_store

RNG = np.random.default_rng(0)
IMAGE = encode(smooth_image(RNG, 40, 20))


def opened(folder: Path, samples: Mapping[str, Mapping[str, bytes]]) -> tuple[SetImages, ShardReader]:
    """A label set of one tar, and its images."""
    write_tar(folder / "t.tar", samples)
    store = open_store(write_label_set(folder / "labels", {"t": random_maps(RNG, [*samples])}))
    return SetImages([str(folder / "t.tar")], store), store.shards[0]


def in_json(description: Any, label: int = 3) -> dict[str, bytes]:
    return {"jpg": IMAGE, "cls": str(label).encode(), "json": json.dumps(description).encode()}


def written(folder: Path, content: Any) -> Path:
    path = folder / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_one_box_and_several(tmp_path: Path) -> None:
    boxes = read_boxes(written(tmp_path, {"a": [1, 2, 3, 4], "b": [[0, 0, 0, 0], [5, 6, 7, 8.5]], "c": []}))
    assert {key: box.tolist() for key, box in boxes.items()} == {
        "a": [[1, 2, 4, 5]],
        "b": [[0, 0, 1, 1], [5, 6, 8, 9.5]],
        "c": [],
    }


def test_the_experiment_reads_the_same_boxes(tiny_imagenet: Path) -> None:
    boxes = localisation.read_boxes(tiny_imagenet / "boxes.json", 64)
    annotated = json.loads((tiny_imagenet / "boxes.json").read_text())
    assert boxes == {
        key: (x0 / 64, y0 / 64, (x1 + 1) / 64, (y1 + 1) / 64) for key, (x0, y0, x1, y1) in annotated.items()
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([[1, 2, 3, 4]], "not boxes by key"),
        ({"cat": [1, 2, 3]}, r"'cat': a box is \[x0, y0, x1, y1\]"),
        ({"cat": [3, 2, 1, 4]}, r"'cat': .* x0 <= x1 .* got \[3, 2, 1, 4\]"),
        ({"cat": ["a", 0, 0, 0]}, "'cat': a box is"),
        ({"cat": [[1, 2, 3, 4], [1, 2]]}, "'cat': a box is"),
        ({"cat": {"x": 1}}, "'cat': a box is"),
        ('{"cat": [NaN, 0, 1, 1]}', "'cat': a box is"),
    ],
)
def test_files_that_hold_something_else(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_boxes(written(tmp_path, content))


def test_boxes_of_a_file_are_shares_of_their_images(tmp_path: Path) -> None:
    images, shard = opened(tmp_path, {key: {"jpg": IMAGE, "cls": b"1"} for key in "abc"})
    boxes_of = boxes_from_file(written(tmp_path, {"b": [10, 5, 19, 9], "stranger": [0, 0, 1, 1]}), images)
    assert [boxes.tolist() for boxes in boxes_of(shard)] == [[], [[0.25, 0.25, 0.5, 0.5]], []]


def test_one_pixel_too_many_is_cut(tmp_path: Path) -> None:
    images, shard = opened(tmp_path, {"a": {"jpg": IMAGE}})
    (boxes,) = boxes_from_file(written(tmp_path, {"a": [20, -1, 40, 20]}), images)(shard)
    assert boxes.tolist() == [[0.5, 0, 1, 1]]


def test_boxes_of_images_of_another_size(tmp_path: Path) -> None:
    images, shard = opened(tmp_path, {"a": {"jpg": IMAGE}})
    boxes_of = boxes_from_file(written(tmp_path, {"a": [0, 0, 60, 10]}), images)
    with pytest.raises(
        ValueError, match=r"t.tar: 'a': has 40 x 20 pixels, but a box at .*61.*; were the images resized"
    ):
        boxes_of(shard)


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    images, shard = opened(tmp_path, {"a": {"jpg": b"no image"}})
    with pytest.raises(ValueError, match=r"t.tar: 'a': cannot be read as an image"):
        boxes_from_file(written(tmp_path, {"a": [0, 0, 1, 1]}), images)(shard)


def test_boxes_are_of_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "sideways.jpg"
    smooth_image(RNG, 40, 20).save(path, exif=exif)
    images, shard = opened(tmp_path, {"a": {"jpg": path.read_bytes()}})
    (boxes,) = boxes_from_file(written(tmp_path, {"a": [0, 0, 9, 9]}), images)(shard)
    assert boxes.tolist() == [[0, 0, 0.5, 0.25]]


def test_boxes_in_the_json_of_samples(tmp_path: Path) -> None:
    things = [{"class": 3, "box_xyxy": [0, 0, 10, 10]}, {"class": 4, "box_xyxy": [0, 0, 1, 1]}, {"class": 3}, "thing"]
    samples = {
        "one": in_json({"box_xyxy": [10, 5, 20, 10]}),
        "two": in_json({"box_xyxy": [[0, 0, 40, 20], [10, 5, 20, 10]]}),
        "objects": in_json({"width": 40, "objects": things}),
        "none": in_json({"label": 3}),
        "list": in_json([1, 2]),
        "without": {"jpg": IMAGE, "cls": b"3"},
    }
    images, shard = opened(tmp_path, samples)
    assert [boxes.tolist() for boxes in boxes_from_json(images)(shard)] == [
        [[0.25, 0.25, 0.5, 0.5]],
        [[0, 0, 1, 1], [0.25, 0.25, 0.5, 0.5]],
        [[0, 0, 0.25, 0.5]],
        [],
        [],
        [],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{", "json of 'a': not JSON"), (b'{"box_xyxy": [1]}', "json of 'a': a box is"), (b"\xff", "not JSON")],
)
def test_json_that_cannot_be_understood(text: bytes, message: str, tmp_path: Path) -> None:
    images, shard = opened(tmp_path, {"a": {"jpg": IMAGE, "cls": b"3", "json": text}})
    with pytest.raises(ValueError, match=message):
        boxes_from_json(images)(shard)


def test_folders_have_no_json(tmp_path: Path) -> None:
    (tmp_path / "tree/cat").mkdir(parents=True)
    (tmp_path / "tree/cat/1.jpg").write_bytes(IMAGE)
    store = open_store(write_label_set(tmp_path / "labels", {"cat": random_maps(RNG, ["cat/1"])}))
    with pytest.raises(ValueError, match="has no json with boxes; give a file"):
        boxes_from_json(SetImages([str(tmp_path / "tree")], store))(store.shards[0])


def test_shards_without_images_have_no_boxes(tmp_path: Path) -> None:
    maps = {stem: random_maps(RNG, [stem]) for stem in "tu"}
    write_tar(tmp_path / "t.tar", {"t": in_json({"box_xyxy": [0, 0, 40, 20]})})
    store = open_store(write_label_set(tmp_path / "labels", maps))
    images = SetImages([str(tmp_path / "t.tar")], store)
    for boxes_of in (
        boxes_from_json(images),
        boxes_from_file(written(tmp_path, {"t": [0, 0, 39, 19], "u": [0, 0, 1, 1]}), images),
    ):
        assert [[boxes.tolist() for boxes in boxes_of(shard)] for shard in store.shards] == [[[[0, 0, 1, 1]]], [[]]]
