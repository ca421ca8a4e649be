"""The material of the pages, made once, and a copy of it to work in."""

import os
import shutil
from pathlib import Path

import pytest

from tests.docs.material import write_material


@pytest.fixture(autouse=True)
def _flush_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, and flushing is most of the time of a small write."""
    monkeypatch.setattr(os, "fsync", os.fstat)
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def workplace(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the material, in which the test is."""
    folder = Path(shutil.copytree(material, tmp_path / "workplace"))
    monkeypatch.chdir(folder)
    return folder
