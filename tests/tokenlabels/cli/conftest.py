"""The command line in this process, ten generated scenes, and a label set of them."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from annotate.scenes import write_scenes
from tokenlabels.cli import app

TEACHER = ("--teacher", "test_efficientnet_gn", "--random-weights", "0", "--image-size", "64", "--torch-threads", "1")

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _flush_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, and flushing is most of the time of a small write."""
    monkeypatch.setattr(os, "fsync", os.fstat)
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture(autouse=True)
def _restore_torch_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def run() -> Run:
    """run(*arguments) -> Result with exit_code, stdout and stderr; an exception that the command lets out is raised."""
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "FORCE_COLOR": None})

    def invoke(*arguments: object) -> Result:
        return runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)

    return invoke


@pytest.fixture(scope="session")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of scenes-0000.tar .. scenes-0002.tar with 5, 3 and 2 scenes, scene_000000 .. scene_000009."""
    folder = tmp_path_factory.mktemp("images")
    write_scenes(folder, shard_sizes=(5, 3, 2), seed=0)
    return folder


@pytest.fixture(scope="session")
def pattern(tars: Path) -> str:
    return f"{tars}/*.tar"


@pytest.fixture(scope="session")
def _pristine(run: Run, pattern: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = tmp_path_factory.mktemp("pristine") / "labels"
    num_threads = torch.get_num_threads()
    result = run("annotate", pattern, "--out", labels, *TEACHER)
    torch.set_num_threads(num_threads)
    assert result.exit_code == 0, result.output
    return labels


@pytest.fixture
def labels(_pristine: Path, tmp_path: Path) -> Path:
    """A label set of the tars by `TEACHER`, this test's own: 2 x 2 cells, top 5 of 1000 classes with names."""
    return Path(shutil.copytree(_pristine, tmp_path / "labels"))
