"""tokenlabels show LABELS: what is drawn, and what is refused with exit code 2."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.loaders.photos import encode, random_maps, smooth_image, write_label_set, write_tar
from tests.tokenlabels.cli.conftest import Run
from tokenlabels.store import open_store
from tokenlabels.views.labelled import Labelled

KEY = "scene_000006"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Labelled]:
    """What the command draws, in order."""
    import tokenlabels.views.labelled as pictures

    calls: list[Labelled] = []
    make = pictures.labelled_figure

    def record(labelled: Labelled, **options: Any) -> Any:
        calls.append(labelled)
        return make(labelled, **options)

    monkeypatch.setattr(pictures, "labelled_figure", record)
    return calls


def show(run: Run, labels: Path, pattern: str, *options: object) -> Any:
    return run("show", labels, "--images", pattern, *options)


class TestDrawn:
    def test_an_image_with_its_map(
        self, run: Run, labels: Path, pattern: str, tmp_path: Path, drawn: list[Labelled]
    ) -> None:
        out = tmp_path / "new" / "one.png"
        result = show(run, labels, pattern, "--key", KEY, "--cell", "1,0", "--class", "7", "--out", out)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == f"picture: {out}\n"
        with Image.open(out) as picture:
            assert (picture.format, picture.mode) == ("PNG", "RGB")
            assert picture.height > 1000
        (one,) = drawn
        store = open_store(labels)
        np.testing.assert_array_equal(one.score_map.scores, store[KEY].scores)
        assert one.names == store.info.class_names
        assert (one.cell, one.class_id, one.crop) == ((1, 0), 7, None)
        assert one.label is not None
        assert one.names[one.label]
        assert "test_efficientnet_gn (random, seed 0, 64x64 px); squash; 5 of 1,000 classes kept" in one.source
        assert one.source.endswith("scenes-0001.tar")

    def test_images_below_each_other(
        self, run: Run, labels: Path, pattern: str, tmp_path: Path, drawn: list[Labelled]
    ) -> None:
        heights = []
        for options in (("--key", KEY), ("--key", "scene_000001"), ("--key", KEY, "--key", "scene_000001")):
            result = show(run, labels, pattern, *options, "--out", tmp_path / "a.png")
            assert result.exit_code == 0, result.stderr
            with Image.open(tmp_path / "a.png") as picture:
                heights.append(picture.height)
        assert heights[2] == heights[0] + heights[1]
        assert [one.score_map.key for one in drawn[2:]] == [KEY, "scene_000001"]

    def test_the_first_ones_without_keys(
        self, run: Run, labels: Path, pattern: str, tmp_path: Path, drawn: list[Labelled], monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert show(run, labels, pattern).exit_code == 0
        assert (tmp_path / "labels.png").exists()
        assert show(run, labels, pattern, "--num", "3", "--out", "three.webp").exit_code == 0
        firsts = ["scene_000000", "scene_000000", "scene_000005", "scene_000008"]  # of 5, 3 and 2 scenes
        assert [one.score_map.key for one in drawn] == firsts

    def test_a_crop(self, run: Run, labels: Path, pattern: str, tmp_path: Path, drawn: list[Labelled]) -> None:
        options = ("--key", KEY, "--out", tmp_path / "a.png", "--crop", "0.25,0,0.75,1")
        assert show(run, labels, pattern, *options).exit_code == 0
        assert show(run, labels, pattern, *options, "--flip").exit_code == 0
        straight, mirrored = (one.crop for one in drawn)
        assert straight is not None
        assert mirrored is not None
        assert straight.box == pytest.approx((0.25, 0, 0.75, 1), abs=0.01)
        np.testing.assert_array_equal(straight.pixels[:, ::-1], mirrored.pixels)
        np.testing.assert_allclose(straight.targets[:, ::-1], mirrored.targets, atol=1e-6)

    @pytest.mark.parametrize("ending", ["svg", "pdf"])
    def test_vector_formats(self, run: Run, labels: Path, pattern: str, tmp_path: Path, ending: str) -> None:
        out = tmp_path / f"a.{ending}"
        result = show(run, labels, pattern, "--key", KEY, "--out", out)
        assert result.exit_code == 0, result.stderr
        content = out.read_bytes()
        if ending == "svg":
            assert f">{KEY}</text>".encode() in content
            assert b">2 x 2 token labels</text>" in content
        else:
            assert content.startswith(b"%PDF")

    def test_class_names_of_the_user(
        self, run: Run, labels: Path, pattern: str, tmp_path: Path, drawn: list[Labelled]
    ) -> None:
        names = tmp_path / "names.json"
        names.write_text(json.dumps([f"kind {index}" for index in range(1000)]))
        options = ("--class-names", names, "--class", "kind 12", "--out", tmp_path / "a.png")
        assert show(run, labels, pattern, *options).exit_code == 0
        assert drawn[0].names[12] == "kind 12"
        assert drawn[0].class_id == 12

    def test_photographs(self, run: Run, imagenet_sample: Path, tmp_path: Path) -> None:
        """Real images, in a label set with random maps."""
        from tokenlabels.images import find_shards

        (shard, *_) = find_shards([f"{imagenet_sample}/*.tar"])
        names = tuple(f"kind {index}" for index in range(1000))
        maps = random_maps(np.random.default_rng(0), shard.keys(), num_classes=1000)
        labels = write_label_set(tmp_path / "labels", {shard.stem: maps}, num_classes=1000, class_names=names)
        result = show(run, labels, f"{imagenet_sample}/*.tar", "--num", "2", "--out", tmp_path / "a.png")
        assert result.exit_code == 0, result.stderr


class TestTerminal:
    def test_map_and_cell(self, run: Run, labels: Path, pattern: str) -> None:
        result = show(run, labels, pattern, "--key", KEY, "--key", "scene_000001", "--terminal", "--cell", "0,1")
        assert result.exit_code == 0, result.stderr
        lines = [line.strip() for line in result.stdout.splitlines()]
        assert lines[0] == KEY
        assert lines.count("cell 0,1") == 2
        assert "▀" not in result.stdout, "without colours there is no image"
        shares = re.findall(r"^\s*([\d.]+)% [█ ]{20} ", result.stdout, re.MULTILINE)
        assert sum(map(float, shares)) == pytest.approx(200, abs=1)

    @pytest.mark.parametrize(("width", "has_image"), [(10, True), (9, False)])
    def test_the_image_lies_beside_it_if_there_is_room(
        self, run: Run, labels: Path, pattern: str, width: int, has_image: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=True, color_system="truecolor")
        monkeypatch.setattr("rich.console.Console", lambda *_, **__: console)
        assert show(run, labels, pattern, "--terminal").exit_code == 0
        assert ("▀" in out.getvalue()) == has_image


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no labels here": (("NONE",), "none"),
    "no images": (("LABELS",), "name the images that were labelled: --images"),
    "images that are not there": (("LABELS", "--images", "none-*.tar"), "'none-*.tar' finds no images"),
    "unknown key": (("LABELS", "--images", "IMAGES", "--key", "scene_00001"), "near it are scene_00000"),
    "keys and a number": (("LABELS", "--images", "IMAGES", "--key", KEY, "--num", "2"), "give keys or a number"),
    "cell": (("LABELS", "--images", "IMAGES", "--cell", "2,0"), "outside the map of 2 rows and 2 columns"),
    "class": (("LABELS", "--images", "IMAGES", "--class", "tenhc"), "near it are 0: tench"),
    "empty crop": (("LABELS", "--images", "IMAGES", "--crop", "1,0,0,1"), "is empty"),
    "flip without crop": (("LABELS", "--images", "IMAGES", "--flip"), "--flip mirrors a crop: give --crop"),
    "ending": (("LABELS", "--images", "IMAGES", "--out", "a.txt"), "written as .png, .webp, .jpg, .svg, .pdf"),
    "a mode of its own": (("LABELS", "--aligned"), "one thing at a time. There is LABELS: a label set"),
    "a model": (("LABELS", "--model", "test_vit"), "--model is for --aligned and --layout; leave it out with LABELS"),
    "a device without model": (("LABELS", "--device", "cpu"), "--device is for --aligned and --layout and LABELS --"),
    "epoch and a wrong key": (
        ("LABELS", "--images", "IMAGES", "--epoch", "1", "--key", "scene_00007"),
        "have the key 'scene_00007'; near it are scene_",
    ),
    "a seed without epoch": (("LABELS", "--seed", "1"), "--seed is for --aligned and LABELS --epoch"),
    "a recipe without epoch": (("LABELS", "--recipe", "x"), "--recipe is for LABELS --epoch; leave it out"),
    "terminal and file": (("LABELS", "--terminal", "--out", "a.png"), "--out, --crop and --class are for files"),
    "epoch without labels": (("--aligned", "--epoch", "1"), "--epoch is for LABELS; leave it out with --aligned"),
    "epoch without key": (("LABELS", "--images", "IMAGES", "--epoch", "1"), "give one --key, got 0"),
    "epoch and cell": (
        ("LABELS", "--epoch", "1", "--cell", "0,0"),
        "--cell is for LABELS; leave it out with LABELS --",
    ),
    "epoch as SVG": (("LABELS", "--epoch", "1", "--key", "a", "--out", "a.svg"), "a.svg: pictures are written as"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_use_exits_with_2(
    run: Run,
    labels: Path,
    pattern: str,
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {"LABELS": str(labels), "IMAGES": pattern, "NONE": "none"}
    result = run("show", *(words.get(word, word) for word in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["labels"]


def test_a_set_without_class_names(run: Run, tmp_path: Path) -> None:
    labels = write_label_set(tmp_path / "labels", {"a": random_maps(np.random.default_rng(0), ["one"])})
    write_tar(tmp_path / "a.tar", {"one": {"jpg": encode(smooth_image(np.random.default_rng(0), 9, 9))}})
    result = show(run, labels, f"{tmp_path}/a.tar", "--out", tmp_path / "a.png")
    assert result.exit_code == 2
    assert "--class-names FILE" in result.stderr


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"jpg": b"no image"}, "a.tar: sample 'one': broken header"),
        (
            {"jpg": encode(Image.new("RGB", (9, 9))), "cls": b"20"},
            "'one' is of class 20, but the labels have 20 classes",
        ),
    ],
    ids=["unreadable", "of another data set"],
)
def test_images_that_cannot_be_used(run: Run, tmp_path: Path, sample: dict[str, bytes], message: str) -> None:
    names = tuple(map(str, range(20)))
    maps = {"a": random_maps(np.random.default_rng(0), ["one"])}
    labels = write_label_set(tmp_path / "labels", maps, class_names=names)
    write_tar(tmp_path / "a.tar", {"one": sample})
    result = show(run, labels, f"{tmp_path}/a.tar", "--out", tmp_path / "a.png")
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    run: Run, labels: Path, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(labels)
    monkeypatch.setattr("os.access", lambda *_: False)
    result = show(run, labels, pattern, "--out", tmp_path / "place" / "a.png")
    assert result.exit_code == 2
    assert f"{tmp_path} is no folder that can be written to" in result.stderr


def test_vector_formats_need_matplotlib(
    run: Run, labels: Path, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenlabels.views.typeface.matplotlib_font", lambda: None)
    result = show(run, labels, pattern, "--out", tmp_path / "a.svg")
    assert result.exit_code == 2
    assert "pip install 'tokenlabels[viz]'" in result.stderr


def test_the_options_of_a_replay_are_handed_on(
    run: Run, labels: Path, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def draw_replay(*arguments: Any, **options: Any) -> Image.Image:
        calls.append((arguments, options))
        return Image.new("RGB", (3, 3))

    monkeypatch.setattr("tokenlabels.cli.show_replay.draw_replay", draw_replay)
    options = ("--epoch", "3", "--seed", "4", "--set", "data.batch_size=8", "--world-size", "2")
    result = show(run, labels, pattern, "--key", KEY, *options, "--out", tmp_path / "a.png")
    assert result.exit_code == 0, result.stderr
    ((arguments, given),) = calls
    assert arguments == (labels, [pattern], KEY)
    assert (given["epoch"], given["seed"], given["settings"], given["world_size"]) == (3, 4, ["data.batch_size=8"], 2)
    assert (given["recipe"], given["run"]) == (None, None)
    assert len(given["names"]) == 1000
    assert (tmp_path / "a.png").exists()


def test_drawing_imports_no_torch(labels: Path, pattern: str, tmp_path: Path) -> None:
    """Torch alone takes longer than the picture may."""
    import subprocess
    import sys

    code = "import sys\nsys.modules['torch'] = None\nfrom tokenlabels.cli import app\napp()"
    command = [
        sys.executable,
        "-c",
        code,
        "show",
        labels,
        "--images",
        pattern,
        "--key",
        KEY,
        "--out",
        tmp_path / "a.png",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
