"""tokenlabels audit and tokenlabels compare: pages, JSON, exit codes, pictures, and wrong use."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from tests.loaders.photos import Photos, random_maps, write_label_set, write_photos, write_tar
from tokenlabels.audit.audit import audit_store
from tokenlabels.audit.findings import KINDS
from tokenlabels.cli.label_inputs import SetImages
from tokenlabels.store import open_store
from tokenlabels.types import ScoreMaps

Run = Callable[..., Result]


def parse(text: str) -> Any:
    """JSON as the standard has it: without NaN."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    """Two shards of 3 and 2 photographs, with labels of 20 classes that nobody names."""
    return write_photos(tmp_path / "photos", [3, 2])


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("".join(f"name of {class_id}\n" for class_id in range(20)))
    return path


def labels_with(folder: Path, change: Callable[[ScoreMaps], None]) -> Path:
    """A label set of four maps after a change."""
    maps = random_maps(np.random.default_rng(0), [f"img_{row}" for row in range(4)])
    change(maps)
    return write_label_set(folder / "changed", {"t": maps})


def test_a_page_for_people(run: Run, labels: Path, pattern: str) -> None:
    result = run("audit", labels, "--images", pattern, "--boxes", "json")
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0] == f"{labels}: 10 maps in 3 shards"
    assert lines[1].startswith("most probable class: the data set's own in ")
    assert lines[2].startswith("boxes of 10 images: pointing game ")
    for kind, meaning in KINDS.items():
        assert any(line.startswith(kind) and line.endswith(meaning) for line in lines)
    assert any(line.startswith("Classes that agree least") for line in lines)


def test_json_for_machines(run: Run, labels: Path, pattern: str) -> None:
    result = run("audit", labels, "--images", pattern, "--json")
    assert result.exit_code == 0
    found = parse(result.stdout)
    store = open_store(labels)
    assert store.info.class_names is not None
    images = SetImages([pattern], store)
    audit = audit_store(store, images.labels, store.info.class_names, images=images)
    assert (found["num_images"], found["num_labelled"]) == (10, 10)
    assert found["agreement"] == audit.agreement == found["num_agreeing"] / 10
    assert found["counts"] == dict(audit.counts)
    assert [finding["detail"] for finding in found["findings"]] == [finding.detail for finding in audit.findings]
    assert len(found["findings"]) == sum(count or 0 for count in audit.counts.values())
    assert sum(known["num_images"] for known in found["classes"]) == 10
    assert sum(pair["count"] for pair in found["confusions"]) == 10 - found["num_agreeing"]
    assert all(pair["label_name"] == store.info.class_names[pair["label"]] for pair in found["confusions"])
    assert found["localisation"] is None
    boxed = parse(run("audit", labels, "--images", pattern, "--boxes", "json", "--json").stdout)
    assert boxed["localisation"]["num_boxed"] == 10
    assert sum(known["pointing_hits"] for known in boxed["classes"]) == boxed["localisation"]["num_hits"]


def test_labels_alone(run: Run, labels: Path) -> None:
    page = run("audit", labels)
    assert page.exit_code == 0
    assert "the data set's own classes are not known (--images)" in page.stdout
    assert page.stdout.count("not looked for") == 4
    found = parse(run("audit", labels, "--json").stdout)
    assert sum(count is None for count in found["counts"].values()) == 4
    assert (found["agreement"], found["num_labelled"], found["confusions"]) == (None, 0, [])


def test_lists_are_as_long_as_asked_for(run: Run, photos: Photos, names: Path) -> None:
    arguments = ("audit", photos.labels, "--class-names", names, "--images", f"{photos.labels.parent}/*.tar")
    counts = parse(run(*arguments, "--json").stdout)["counts"]
    count = counts["disagrees"]
    assert count > 1
    listed = [finding["kind"] for finding in parse(run(*arguments, "--json", "--num", 1).stdout)["findings"]]
    assert listed == [kind for kind in KINDS if counts[kind]]
    page = run(*arguments, "--num", 1).stdout
    assert f"disagrees, 1 of {count}" in page
    assert "Classes taken for others, 1 of " in page
    assert "name of " in page


def nan(maps: ScoreMaps) -> None:
    maps.scores[2, 0, 0, 0] = np.nan


def constant(maps: ScoreMaps) -> None:
    maps.scores[2], maps.classes[2] = maps.scores[2, 0, 0], maps.classes[2, 0, 0]


@pytest.mark.parametrize(("change", "kind"), [(nan, "broken"), (constant, "constant")])
def test_labels_that_are_unfit(
    change: Callable[[ScoreMaps], None], kind: str, run: Run, names: Path, tmp_path: Path
) -> None:
    labels = labels_with(tmp_path, change)
    result = run("audit", labels, "--class-names", names, "--json")
    assert result.exit_code == 1
    found = parse(result.stdout)
    assert not found["is_usable"]
    assert [(one["kind"], one["key"], one["shard"]) for one in found["findings"]] == [(kind, "img_2", "t")]
    page = run("audit", labels, "--class-names", names)
    assert page.exit_code == 1
    assert "img_2" in page.stdout


def test_keys_that_are_there_twice(run: Run, names: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = write_label_set(tmp_path / "twice", {stem: random_maps(rng, ["img"]) for stem in "ab"})
    result = run("audit", labels, "--class-names", names, "--json")
    assert result.exit_code == 1
    (finding,) = parse(result.stdout)["findings"]
    assert finding == {"kind": "duplicate key", "key": "img", "shard": "b", "detail": "the same as img of a"}


def test_a_set_that_is_not_finished(run: Run, photos: Photos, names: Path) -> None:
    (photos.labels / "manifest" / "train-01.json").unlink()
    shutil.rmtree(photos.labels / "train-01.zarr")
    line = "not finished: 1 of 2 shards have no labels yet"
    for arguments in (("audit", photos.labels), ("compare", photos.labels, photos.labels)):
        assert line in run(*arguments, "--class-names", names).stdout
        missing = parse(run(*arguments, "--class-names", names, "--json").stdout)["missing"]
        assert missing in (["train-01.tar"], {"first": ["train-01.tar"], "second": ["train-01.tar"]})


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_boxes_without_images(run: Run, labels: Path) -> None:
    refused(run("audit", labels, "--boxes", "json"), "--boxes needs --images too")


def test_boxes_that_are_not_there(run: Run, labels: Path, pattern: str, tmp_path: Path) -> None:
    refused(run("audit", labels, "--images", pattern, "--boxes", tmp_path / "no.json"), "no.json")


def test_boxes_of_other_images(run: Run, labels: Path, pattern: str, tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text('{"stranger": [0, 0, 1, 1]}')
    refused(
        run("audit", labels, "--images", pattern, "--boxes", tmp_path / "boxes.json"),
        "none of the boxes is of an image",
    )


def test_images_of_another_data_set(run: Run, labels: Path, photos: Photos) -> None:
    refused(run("audit", labels, "--images", photos.tars[0]), "has no labels of train-00")


def test_other_images_of_the_same_name(run: Run, labels: Path, tars: Path, tmp_path: Path) -> None:
    shutil.copy(tars / "scenes-0000.tar", tmp_path / "scenes-0001.tar")
    refused(run("audit", labels, "--images", tmp_path / "scenes-0001.tar"), "8 keys are in one of them only")


def test_no_class_names(run: Run, photos: Photos) -> None:
    refused(run("audit", photos.labels), "does not name its 20 classes; say --class-names")


def test_no_label_set(run: Run, tmp_path: Path) -> None:
    refused(run("audit", tmp_path), "labels.json")


def test_an_image_that_cannot_be_read(run: Run, photos: Photos, names: Path, tmp_path: Path) -> None:
    keys = photos.keys[1]
    write_tar(Path(photos.tars[1]), {key: {"jpg": b"no image", "cls": b"1"} for key in keys})
    (tmp_path / "boxes.json").write_text(json.dumps({keys[0]: [0, 0, 1, 1]}))
    arguments = ("--images", photos.tars[1], "--class-names", names)
    result = run("audit", photos.labels, *arguments, "--boxes", tmp_path / "boxes.json")
    refused(result, f"{photos.tars[1]}: '{keys[0]}': cannot be read as an image")
    drawn = run("compare", photos.labels, photos.labels, *arguments, "--out", tmp_path / "out")
    assert drawn.exit_code == 2
    assert drawn.stdout == ""
    assert drawn.stderr.count(photos.tars[1]) == 1
    assert f"{photos.tars[1]}: '{keys[0]}': broken header" in drawn.stderr


@pytest.fixture
def others(photos: Photos, tmp_path: Path) -> Path:
    """Other labels of the same images, on another grid."""
    rng = np.random.default_rng(7)
    maps = {Path(tar).stem: random_maps(rng, keys, (2, 3)) for tar, keys in zip(photos.tars, photos.keys, strict=True)}
    return write_label_set(tmp_path / "others", maps)


def test_compare_for_people(run: Run, photos: Photos, others: Path, names: Path) -> None:
    result = run("compare", photos.labels, others, "--class-names", names, "--num", 2)
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0] == f"A {photos.labels}, B {others}: 5 images compared, 0 only in A, 0 only in B"
    assert lines[1].endswith("of the points, the centres of 5 x 6 cells")
    assert "Most different images, 2 of 5" in lines
    assert any(line.startswith("name of ") for line in lines)


def test_compare_says_what_variation_covers(
    run: Run, photos: Photos, others: Path, names: Path, tmp_path: Path
) -> None:
    arguments = ("--class-names", names)
    page = " ".join(run("compare", photos.labels, others, *arguments).stdout.split())
    assert "total variation of the mean distributions over what each map covers" in page
    assert "part of it may be" not in page
    maps = random_maps(np.random.default_rng(0), photos.keys[0])
    fewer = replace(maps, scores=maps.scores[..., :1], classes=maps.classes[..., :1])
    narrow = write_label_set(tmp_path / "narrow", {"train-00": fewer})
    page = " ".join(run("compare", photos.labels, narrow, *arguments).stdout.split())
    assert "the tails hold different numbers of classes" in page


def test_compare_with_an_empty_set(run: Run, photos: Photos, names: Path, tmp_path: Path) -> None:
    maps = random_maps(np.random.default_rng(0), photos.keys[0])
    empty = write_label_set(tmp_path / "empty", {"train-00": maps})
    (empty / "manifest" / "train-00.json").unlink()
    shutil.rmtree(empty / "train-00.zarr")
    refused(run("compare", photos.labels, empty, "--class-names", names), f"{empty} has no labels yet")


def test_compare_for_machines(run: Run, photos: Photos, others: Path, names: Path) -> None:
    found = parse(run("compare", photos.labels, others, "--class-names", names, "--json", "--num", 5).stdout)
    assert (found["num_compared"], found["grid"]) == (5, [5, 6])
    different = found["most_different"]
    assert {one["key"] for one in different} == {key for keys in photos.keys for key in keys}
    assert [one["agreement"] for one in different] == sorted(one["agreement"] for one in different)
    assert found["agreement"] == pytest.approx(np.mean([one["agreement"] for one in different]))
    assert found["variation"] == pytest.approx(np.mean([one["variation"] for one in different]))
    assert sum(known["num_first"] for known in found["classes"]) == 5 * 30
    same = parse(run("compare", others, others, "--class-names", names, "--json").stdout)
    assert (same["agreement"], same["variation"]) == (1, 0)


def test_pictures_of_the_most_different_images(
    run: Run, photos: Photos, others: Path, names: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new/out"
    arguments = ("compare", photos.labels, others, "--class-names", names, "--json", "--num", 2)
    result = run(*arguments, "--images", photos.tars[0], "--out", out)
    assert result.exit_code == 0, result.output
    order = [one["key"] for one in parse(run(*arguments[:-1], 5).stdout)["most_different"]]
    drawn = [key for key in order if key in photos.keys[0]][:2]
    expected = [f"{rank:02d}-{key.replace('/', '_')}.png" for rank, key in enumerate(drawn, start=1)]
    assert sorted(path.name for path in out.iterdir()) == expected
    for name in expected:
        with Image.open(out / name) as picture:
            assert picture.width > 3 * 256
    assert f"2 pictures: {out}" in result.stderr


@pytest.mark.parametrize("option", ["--images", "--out"])
def test_half_of_what_pictures_need(option: str, run: Run, labels: Path, pattern: str) -> None:
    result = run("compare", labels, labels, option, pattern)
    refused(result, "pictures need both --images and --out FOLDER")


def test_a_folder_that_cannot_be_made(run: Run, labels: Path, pattern: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        result = run("compare", labels, labels, "--images", pattern, "--out", out)
        refused(result, f"{out}: cannot be made a folder for pictures")


def test_classes_of_other_names(run: Run, photos: Photos, names: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    maps = {"train-00": random_maps(rng, photos.keys[0])}
    named = [[f"{kind} {class_id}" for class_id in range(20)] for kind in ("cat", "dog")]
    first, second = (
        write_label_set(tmp_path / f"named {row}", maps, class_names=tuple(own)) for row, own in enumerate(named)
    )
    refused(run("compare", first, second), f"class 0 is 'cat 0' in {first} and 'dog 0' in {second}")
    assert run("compare", first, second, "--class-names", names).exit_code == 0
    assert run("compare", first, photos.labels).exit_code == 0
    assert run("compare", photos.labels, second).exit_code == 0
    refused(run("compare", photos.labels, photos.labels), "does not name its 20 classes")


def test_other_numbers_of_classes(run: Run, labels: Path, photos: Photos, names: Path) -> None:
    refused(run("compare", labels, photos.labels), "has 1000 classes")
    refused(run("compare", photos.labels, labels, "--class-names", names), "has 1000; only labels of the same classes")
