"""tokenlabels report: one page, or one line that says why not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

from tests.loaders.photos import random_maps, write_label_set
from tests.tokenlabels.report.cases import LENGTHS, Case, write_case
from tokenlabels.store import open_store

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """40 images in two tars and their labels, read only."""
    return write_case(tmp_path_factory.mktemp("case"))


def data_of(page: Path) -> dict[str, list[dict[str, object]]]:
    text = page.read_text(encoding="utf-8")
    data: dict[str, list[dict[str, object]]] = json.loads(text.split('id="data">')[1].split("</script>")[0])
    return data


def refused(run: Run, *arguments: object) -> str:
    """What a command that is used wrongly says, on one line."""
    result = run("report", *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    return line


def test_a_page(run: Run, case: Case, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    result = run("report", case.labels, "--images", case.pattern, "--sample", 15, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"page of 15 images, {out.stat().st_size / 1e6:.1f} MB: {out}\n"
    assert len(data_of(out)["items"]) == 15
    assert [*out.parent.iterdir()] == [out]


def test_a_page_of_labels_that_were_just_made(run: Run, labels: Path, pattern: str, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert run("report", labels, "--images", pattern, "--out", out, "--boxes", "json").exit_code == 0
    data = data_of(out)
    assert {item["key"] for item in data["items"]} == {*open_store(labels).keys()}
    assert data["names"][0] == "tench, Tinca tinca"
    assert "no boxes were given" not in out.read_text(encoding="utf-8")


def test_the_same_page_again_and_another_seed(run: Run, case: Case, tmp_path: Path) -> None:
    pages = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}.html"
        assert (
            run("report", case.labels, "--images", case.pattern, "--sample", 15, "--out", out, "--seed", seed).exit_code
            == 0
        )
        pages.append(out.read_bytes())
    assert pages[0] == pages[1]
    assert pages[0] != pages[2]


def test_boxes_from_a_file(run: Run, case: Case, tmp_path: Path) -> None:
    keys = [key for stem in LENGTHS for key in case.maps[stem].keys]
    (tmp_path / "boxes.json").write_text(json.dumps({key: [0, 0, 60, 60] for key in keys}))
    out = tmp_path / "page.html"
    arguments = ("--images", case.pattern, "--sample", 5, "--out", out, "--boxes", tmp_path / "boxes.json")
    assert run("report", case.labels, *arguments).exit_code == 0
    assert "images with a box" in out.read_text(encoding="utf-8")


def test_names_from_a_file(run: Run, case: Case, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(f"thing {number}" for number in range(20)))
    out = tmp_path / "page.html"
    arguments = ("--images", case.pattern, "--sample", 5, "--out", out, "--class-names", tmp_path / "names.txt")
    assert run("report", case.labels, *arguments).exit_code == 0
    assert data_of(out)["names"][7] == "thing 7"


def test_an_unreadable_image_is_named(run: Run, tmp_path: Path) -> None:
    damaged = write_case(tmp_path / "damaged", damaged=frozenset({"b_000"}))
    out = tmp_path / "page.html"
    result = run("report", damaged.labels, "--images", damaged.pattern, "--out", out)
    assert result.exit_code == 0
    assert "not shown: 'b_000' of b cannot be read (broken header" in result.stderr
    assert "b_000 of b: broken header" in out.read_text(encoding="utf-8")
    assert len(data_of(out)["items"]) == 38  # of 40 one is damaged, and the map of one is broken


def test_no_images(run: Run, case: Case) -> None:
    assert "name the images that were labelled, --images 'train-*.tar'" in refused(run, case.labels)


def test_images_of_another_set(run: Run, case: Case, pattern: str, tmp_path: Path) -> None:
    message = refused(run, case.labels, "--images", pattern, "--out", tmp_path / "page.html")
    assert "has no labels of scenes-0000" in message


def test_other_images_under_the_same_name(run: Run, case: Case, tars: Path, tmp_path: Path) -> None:
    shutil.copy(tars / "scenes-0000.tar", tmp_path / "a.tar")
    message = refused(run, case.labels, "--images", tmp_path / "a.tar", "--out", tmp_path / "page.html")
    assert "not the images of the labels" in message


def test_no_class_names(run: Run, case: Case, tmp_path: Path) -> None:
    labels = write_label_set(tmp_path / "labels", {"a": random_maps(np.random.default_rng(0), ["x"])})
    assert "--class-names FILE" in refused(run, labels, "--images", case.pattern)


def test_no_label_set(run: Run, case: Case, tmp_path: Path) -> None:
    assert "labels.json" in refused(run, tmp_path, "--images", case.pattern)


@pytest.mark.parametrize(
    ("name", "message"), [("", "is a folder"), ("file/page.html", "is no folder that can be written to")]
)
def test_an_output_that_cannot_be_written_is_refused_before_the_set_is_read(
    run: Run, case: Case, tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("tokenlabels.audit.audit.audit_store", lambda *_, **__: pytest.fail("the set was read"))
    assert message in refused(run, case.labels, "--images", case.pattern, "--out", tmp_path / name)


def test_an_empty_sample(run: Run, case: Case) -> None:
    result = run("report", case.labels, "--images", case.pattern, "--sample", 0)
    assert result.exit_code == 2
    assert "--sample" in result.stderr
