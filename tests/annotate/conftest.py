"""Small image tars and fast teachers, shared by the tests of annotate."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from annotate.scenes import write_scenes
from annotate.specs import TeacherSpec

SCENES_PER_TAR = (5, 3, 2)


@pytest.fixture(autouse=True)
def _flush_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, and flushing is most of the time of a small write."""
    monkeypatch.setattr(os, "fsync", os.fstat)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The number of threads changes the last bits of convolutions; no test changes it for another one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def scene_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of scenes-0000.tar .. scenes-0002.tar with 5, 3 and 2 generated scenes (jpg, cls, json).

    Keys are scene_000000 .. scene_000009. Shared by all tests: copy it before changing anything.
    """
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, shard_sizes=SCENES_PER_TAR, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_spec() -> TeacherSpec:
    """A real timm model that loads in 0.1 s and labels 1,000 images/s: 64 px, 2 x 2 cells, 1000 classes with names.

    The weights are random but seeded, so that a second load gives the same teacher with the same digest.
    """
    return TeacherSpec("test_efficientnet_gn", seed=0, image_size=64)
