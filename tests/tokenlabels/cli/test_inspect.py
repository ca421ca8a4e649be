"""tokenlabels inspect: a label set, or one map of it, for people and for machines."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from typer.testing import Result

from tokenlabels.store import create_label_set, open_store, shard_path
from tokenlabels.summary import StoreSummary, summarise_map, summarise_store

Run = Callable[..., Result]

KEY = "scene_000006"


def parse(text: str) -> Any:
    """JSON as the standard has it: without NaN."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def empty(labels: Path, tmp_path: Path) -> Path:
    """A label set that has begun, with no shard yet."""
    create_label_set(tmp_path / "empty", open_store(labels).info)
    return tmp_path / "empty"


def test_a_page_for_people(run: Run, labels: Path) -> None:
    result = run("inspect", labels)
    assert result.exit_code == 0
    shown = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert [*shown] == [field.name.replace("_", " ") for field in fields(StoreSummary)]
    found = {name: value.strip() for name, value in shown.items()}
    assert found["teacher"] == "test_efficientnet_gn (random, seed 0, 64x64 px)"
    assert (found["num images"], found["num shards"], found["grid"], found["k"]) == ("10", "3", "2 x 2", "5")


def test_json_for_machines(run: Run, labels: Path) -> None:
    result = run("inspect", labels, "--json")
    assert result.exit_code == 0
    summary = summarise_store(open_store(labels))
    assert parse(result.stdout) == {**asdict(summary), "grid": [2, 2]}
    files = [path for path in labels.glob("*.zarr/**/*") if path.is_file()]
    assert parse(result.stdout)["size_bytes"] == sum(path.stat().st_size for path in files)


def test_a_set_that_has_only_begun(run: Run, empty: Path) -> None:
    page = run("inspect", empty)
    assert page.exit_code == 0
    assert "num missing shards" in page.stdout
    found = parse(run("inspect", empty, "--json").stdout)
    assert (found["num_images"], found["num_missing_shards"]) == (0, 3)
    assert found["distinct_classes_median"] is None
    assert "near it are none: it is empty" in run("inspect", empty, "--key", KEY).stderr


def test_a_map_for_people(run: Run, labels: Path) -> None:
    result = run("inspect", labels, "--key", KEY)
    assert result.exit_code == 0
    title, blocks, table = result.stdout.split("\n\n")
    assert title.startswith(KEY)
    assert "2 x 2 cells, 5 classes" in title
    letters = "".join(blocks.split()).lower()
    assert len(letters) == 4
    score_map = open_store(labels)[KEY]
    leading = score_map.classes[..., 0].ravel()
    for one, other in np.ndindex(4, 4):
        assert (letters[one] == letters[other]) == (leading[one] == leading[other])
    names = open_store(labels).info.class_names
    assert names is not None
    for class_id in leading.tolist():
        (row,) = (line.split() for line in table.splitlines() if str(class_id) in line.split())
        assert row[0].lower() in letters
        assert row[1] == names[class_id].split()[0]


def test_a_map_for_machines(run: Run, labels: Path) -> None:
    result = run("inspect", labels, "--key", KEY, "--json")
    assert result.exit_code == 0
    store = open_store(labels)
    assert parse(result.stdout) == json.loads(json.dumps(asdict(summarise_map(store[KEY], store.info.class_names))))


def test_an_unknown_key_exits_with_2(run: Run, labels: Path) -> None:
    result = run("inspect", labels, "--key", "scene_6")
    assert result.exit_code == 2
    assert f"{labels} has no labels for 'scene_6'; near it are scene_0000" in result.stderr


def test_what_is_no_label_set(run: Run, tmp_path: Path) -> None:
    result = run("inspect", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path / 'labels.json'}: no such file" in result.stderr


def test_a_damaged_set_is_not_summarised(run: Run, labels: Path) -> None:
    tail = shard_path(labels, "scenes-0002") / "tail/c/0/0/0"
    tail.unlink()
    for options in ((), ("--json",), ("--key", "scene_000009")):
        result = run("inspect", labels, *options)
        assert result.exit_code != 0
        assert result.stdout == ""
        assert str(tail) in result.stderr
