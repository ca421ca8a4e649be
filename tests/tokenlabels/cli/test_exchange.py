"""tokenlabels export and import: there and back through the command line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import Result

from tokenlabels.store import open_store, verify_store

Run = Callable[..., Result]

KEYS = tuple(f"scene_{index:06d}" for index in range(10))


@pytest.mark.parametrize("suffix", ["", ".tar", ".zip"], ids=["folder", "tar", "zip"])
def test_there_and_back(suffix: str, run: Run, labels: Path, pattern: str, tmp_path: Path) -> None:
    published, back = tmp_path / f"published{suffix}", tmp_path / "back"
    away = run("export", labels, published)
    assert away.exit_code == 0, away.stderr
    assert away.stdout.startswith(f"{published}: 10 files, ")
    home = run("import", published, "--out", back, "--images", pattern, "--view", "squash")
    assert home.exit_code == 0, home.stderr
    assert home.stdout == (
        f"{back}: 10 images in 3 shards imported, 0 shards were finished before, "
        "0 images without labels, 0 maps turned upright with their image, 0 label files without image\n"
    )
    before, after = open_store(labels), open_store(back)
    assert tuple(after.keys()) == KEYS
    for old, new in zip(before.shards, after.shards, strict=True):
        for name in ("scores", "classes", "views"):
            np.testing.assert_array_equal(getattr(new.read(), name), getattr(old.read(), name))
    assert list(verify_store(back)) == []
    assert run("inspect", back).exit_code == 0


def test_the_options_of_an_import_reach_the_labels(run: Run, labels: Path, pattern: str, tmp_path: Path) -> None:
    run("export", labels, tmp_path / "published")
    names = tmp_path / "names.txt"
    names.write_text("".join(f"sort {number}\n" for number in range(1200)))
    options = ("--axes", "wh", "--view", "center", "--crop-pct", 0.5, "--num-classes", 1200, "--class-names", names)
    back = tmp_path / "back"
    result = run("import", tmp_path / "published", "--out", back, "--images", pattern, *options)
    assert result.exit_code == 0, result.stderr
    old, new = open_store(labels)[KEYS[3]], open_store(back)[KEYS[3]]
    np.testing.assert_array_equal(new.scores, old.scores.swapaxes(0, 1))
    x0, y0, x1, y1 = new.view.tolist()
    assert (x0 + x1, y0 + y1) == pytest.approx((1, 1))
    assert max(x1 - x0, y1 - y0) == pytest.approx(0.5), "half of the shorter side"
    info = open_store(back).info
    assert (info.resize, info.num_classes) == ("center", 1200)
    assert info.class_names is not None
    assert info.class_names[1199] == "sort 1199"


def test_images_without_labels(run: Run, labels: Path, pattern: str, tmp_path: Path) -> None:
    run("export", labels, tmp_path / "published")
    (lost,) = (tmp_path / "published").rglob(f"{KEYS[2]}.pt")
    lost.unlink()
    arguments = ("import", tmp_path / "published", "--out", tmp_path / "back", "--images", pattern)
    strict = run(*arguments)
    assert strict.exit_code == 2
    assert KEYS[2] in strict.stderr
    lenient = run(*arguments, "--max-skip", 0.2)
    assert lenient.exit_code == 0
    assert "1 images without labels" in lenient.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--axes", "hwk"), "--axes"),
        (("--view", "letterbox"), "--view"),
        (("--crop-pct", 1.5), "--crop-pct"),
        (("--view", "squash", "--crop-pct", 0.9), "has no meaning for view squash"),
        (("--num-classes", 3), "are there really 3 classes?"),
    ],
    ids=["axes", "view", "crop", "crop of a whole image", "fewer classes than ids"],
)
def test_imports_asked_for_wrongly(
    options: tuple[object, ...], message: str, run: Run, labels: Path, pattern: str, tmp_path: Path
) -> None:
    run("export", labels, tmp_path / "published")
    result = run("import", tmp_path / "published", "--out", tmp_path / "back", "--images", pattern, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_archive_that_is_not_there(run: Run, pattern: str, tmp_path: Path) -> None:
    result = run("import", tmp_path / "nothing", "--out", tmp_path / "back", "--images", pattern)
    assert result.exit_code == 2
    assert str(tmp_path / "nothing") in result.stderr


def test_a_file_with_code_in_it_is_refused(run: Run, labels: Path, pattern: str, tmp_path: Path) -> None:
    run("export", labels, tmp_path / "published")
    (file,) = (tmp_path / "published").rglob(f"{KEYS[0]}.pt")
    torch.save(torch.nn.Linear(1, 1), file)
    result = run("import", tmp_path / "published", "--out", tmp_path / "back", "--images", pattern)
    assert result.exit_code == 2
    assert KEYS[0] in result.stderr


def test_an_export_does_not_replace_anything(run: Run, labels: Path, tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    result = run("export", labels, tmp_path / "published")
    assert result.exit_code == 2
    assert f"{tmp_path / 'published'} exists already" in result.stderr
