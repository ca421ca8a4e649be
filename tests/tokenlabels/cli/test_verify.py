"""tokenlabels verify: whole sets, damaged ones, and labels that are not what the teacher says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

from annotate.scenes import write_scenes
from tokenlabels.store import claim_shard, manifest_path, open_store, shard_path
from tokenlabels.types import ScoreMaps

Run = Callable[..., Result]

TEACHER = ("--teacher", "test_efficientnet_gn", "--random-weights", "0", "--image-size", "64")
STEM = "scenes-0001"


@pytest.fixture
def damaged_file(labels: Path) -> Path:
    """One bit of it is flipped."""
    path = shard_path(labels, STEM) / "scores/c/0/0/0/0"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


@pytest.fixture
def swapped(labels: Path) -> Path:
    """The set with the scores of one shard in the order of other images: sound in itself, but not the teacher's."""
    shard = open_store(labels).shards[0]
    maps = shard.read()
    turned = ScoreMaps(maps.keys, maps.scores[::-1] - np.float16(2), maps.classes[::-1], maps.tail[::-1], maps.views)
    with claim_shard(labels, shard.stem, shard.info) as writer:
        writer.write(turned, source=shard.manifest.source, image_level=shard.manifest.image_level, versions={})
    return labels


def test_a_whole_set(run: Run, labels: Path, pattern: str) -> None:
    result = run("verify", labels, "--images", pattern)
    assert result.exit_code == 0
    assert result.stdout == f"{labels}: whole. 10 maps in 3 shards, keys compared with the images of 3\n"


def test_a_damaged_file_is_named(run: Run, labels: Path, damaged_file: Path) -> None:
    result = run("verify", labels)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{damaged_file}: its checksum is not that of the manifest",
        f"{labels}: 1 findings",
    ]


def test_every_finding_has_a_line(run: Run, labels: Path, damaged_file: Path) -> None:
    shutil.rmtree(shard_path(labels, "scenes-0000"))
    manifest_path(labels, "scenes-0000").unlink()
    manifest_path(labels, "scenes-0002").unlink()
    result = run("verify", labels)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{shard_path(labels, 'scenes-0000')}: not annotated yet",
        f"{damaged_file}: its checksum is not that of the manifest",
        f"{shard_path(labels, 'scenes-0002')}: has no manifest",
        f"{labels}: 3 findings",
    ]


def test_other_images_are_found_out(run: Run, labels: Path, tars: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy(tars / "scenes-0000.tar", tmp_path / "images" / f"{STEM}.tar")
    result = run("verify", labels, "--images", tmp_path / f"images/{STEM}.tar")
    assert result.exit_code == 1
    assert "keys are not those of scenes-0001.tar: 5 without labels, 3 unknown" in result.stdout


def test_a_damaged_tar_is_a_finding_and_the_other_shards_are_checked(
    run: Run, labels: Path, tars: Path, damaged_file: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(tars, tmp_path / "images"))
    tar = images / "scenes-0000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    result = run("verify", labels, "--images", f"{images}/*.tar")
    assert result.exit_code == 1
    of_shard, of_tar, last = result.stdout.splitlines()
    assert of_shard.startswith(f"{damaged_file}: ")
    assert of_tar.startswith(f"{tar}: cannot be compared with its labels (")
    assert last == f"{labels}: 2 findings"


def test_what_is_no_label_set(run: Run, tmp_path: Path) -> None:
    result = run("verify", tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path / 'labels.json'}: no such file" in result.stdout


def test_json_of_a_whole_set(run: Run, labels: Path) -> None:
    result = run("verify", labels, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"findings": []}


def test_json_of_a_damaged_set(run: Run, labels: Path, damaged_file: Path) -> None:
    result = run("verify", labels, "--json")
    assert result.exit_code == 1
    problem = "its checksum is not that of the manifest"
    assert json.loads(result.stdout) == {"findings": [{"path": str(damaged_file), "problem": problem}]}


@pytest.mark.parametrize("num_images", [3, 100], ids=["some", "more than there are"])
def test_recompute_finds_nothing_in_what_the_teacher_said(
    num_images: int, run: Run, labels: Path, pattern: str
) -> None:
    result = run("verify", labels, "--images", pattern, "--recompute", num_images, *TEACHER)
    assert result.exit_code == 0, result.output
    compared = "keys compared with the images of 3"
    again = f"{min(num_images, 10)} images labelled again"
    assert result.stdout == f"{labels}: whole. 10 maps in 3 shards, {compared}, {again}\n"


def test_recompute_finds_labels_that_are_of_other_images(run: Run, swapped: Path, pattern: str) -> None:
    assert run("verify", swapped, "--images", pattern).exit_code == 0
    result = run("verify", swapped, "--images", pattern, "--recompute", 10, *TEACHER)
    assert result.exit_code == 1
    *findings, last = result.stdout.splitlines()
    keys = open_store(swapped).shards[0].keys
    prefix = f"{shard_path(swapped, 'scenes-0000')}: "
    assert {line.removeprefix(prefix).split(":")[0] for line in findings} == {*keys}
    assert all("scores differ by up to" in line for line in findings)
    assert last == f"{swapped}: 5 findings"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TEACHER, "--recompute needs the images too"),
        (("--images", "PATTERN"), "name a teacher"),
        (("--images", "PATTERN", *TEACHER[:2], "--random-weights", 1, *TEACHER[4:]), "was made by another teacher"),
        (("--images", "nothing/*.tar", *TEACHER), "finds no images"),
    ],
    ids=["no images", "no teacher", "another teacher", "images that are not there"],
)
def test_recompute_that_is_asked_for_wrongly(
    options: tuple[object, ...], message: str, run: Run, labels: Path, pattern: str
) -> None:
    spelled = [pattern if option == "PATTERN" else option for option in options]
    result = run("verify", labels, "--recompute", 2, *spelled)
    assert result.exit_code == 2
    assert message in result.stderr


def test_images_of_another_set_are_refused(run: Run, labels: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "other", shard_sizes=(1,), seed=5)
    (tmp_path / "other" / "scenes-0000.tar").rename(tmp_path / "other" / "unrelated.tar")
    result = run("verify", labels, "--images", tmp_path / "other" / "unrelated.tar")
    assert result.exit_code == 2
    assert "none of the given images belong to a shard" in result.stderr


def test_a_teacher_without_recompute_is_refused(run: Run, labels: Path) -> None:
    result = run("verify", labels, *TEACHER)
    assert result.exit_code == 2
    assert "--recompute" in result.stderr
