"""Small deterministic label sets, shared by the tests of the store."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenlabels.files import files_below
from tokenlabels.store import (
    ImageLevelRecord,
    LabelSet,
    Manifest,
    ModelRecord,
    SourceRecord,
    TeacherRecord,
    claim_shard,
    create_label_set,
)
from tokenlabels.store.writer import LOCK_FOLDER
from tokenlabels.types import ScoreMaps, class_dtype

MODEL = ModelRecord(
    name="tiny",
    weights="random:0",
    digest="m0",
    image_size=(96, 64),
    interpolation="bicubic",
    crop_pct=0.9,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
TEACHER = TeacherRecord(models=(MODEL,), flip=False, amp="none", digest="t0")


@pytest.fixture(autouse=True)
def _flush_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, and flushing is most of the time of a small write; test_writer checks its order."""
    monkeypatch.setattr(os, "fsync", os.fstat)


def info_with(**changes: Any) -> LabelSet:
    fields = {"grid": (3, 2), "k": 3, "num_classes": 10, "class_names": None, "teacher": TEACHER}
    return LabelSet(**{**fields, "resize": "squash", "tars": ("a.tar", "b.tar"), **changes})


INFO = info_with()


@pytest.fixture(scope="session")
def make_info() -> Callable[..., LabelSet]:
    """make_info(**changes) -> LabelSet of 3 x 2 cells, k=3, 10 classes, for the tars a and b."""
    return info_with


@pytest.fixture(scope="session")
def make_maps() -> Callable[..., ScoreMaps]:
    """make_maps(num_maps, info=INFO, *, seed=0, prefix="img") -> ScoreMaps that a teacher could have said."""

    def make(num_maps: int, info: LabelSet = INFO, *, seed: int = 0, prefix: str = "img") -> ScoreMaps:
        random = np.random.default_rng(seed)
        cells = (num_maps, *info.grid)
        scores = -np.sort(-random.normal(scale=8, size=(*cells, info.k)), axis=-1)
        # A random start and k strides: distinct ids in every cell, up to the largest one.
        strides = np.arange(info.k) * (info.num_classes // info.k)
        classes = (random.integers(info.num_classes, size=(*cells, 1)) + strides) % info.num_classes
        corners = random.uniform(-0.2, 0.3, size=(num_maps, 2))
        return ScoreMaps(
            tuple(f"{prefix}_{row:05d}" for row in range(num_maps)),
            scores.astype(np.float16),
            classes.astype(class_dtype(info.num_classes)),
            random.random(cells).astype(np.float16),
            np.concatenate([corners, corners + 0.7], axis=1).astype(np.float32),
        )

    return make


@pytest.fixture(scope="session")
def write_shard() -> Callable[..., Manifest]:
    """write_shard(labels, stem, maps, info=INFO, **changes) -> Manifest; changes go to `ShardWriter.write`."""

    def write(labels: Path, stem: str, maps: ScoreMaps, info: LabelSet = INFO, **changes: Any) -> Manifest:
        record = {
            "source": SourceRecord(name=f"{stem}.tar", size_bytes=10_240, num_samples=len(maps)),
            "image_level": ImageLevelRecord(num_labelled=len(maps), num_agreeing=len(maps) // 2),
            "versions": {"torch": "2.0"},
            **changes,
        }
        with claim_shard(labels, stem, info) as writer:
            return writer.write(maps, **record)

    return write


@pytest.fixture(scope="session")
def _pristine(
    tmp_path_factory: pytest.TempPathFactory,
    make_maps: Callable[..., ScoreMaps],
    write_shard: Callable[..., Manifest],
) -> Path:
    labels = tmp_path_factory.mktemp("pristine") / "labels"
    create_label_set(labels, INFO)
    write_shard(labels, "a", make_maps(300, prefix="a"))
    write_shard(labels, "b", make_maps(5, prefix="b"))
    return labels


@pytest.fixture
def label_set(_pristine: Path, tmp_path: Path) -> Path:
    """Folder of a whole label set of this test's own: shard a with 300 maps (two chunks), shard b with 5."""
    return Path(shutil.copytree(_pristine, tmp_path / "labels"))


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """contents(folder) -> every file but the locks, by relative path."""

    def read(folder: Path) -> dict[str, bytes]:
        names = [name for name in files_below(folder) if not name.startswith(LOCK_FOLDER)]
        return {name: (folder / name).read_bytes() for name in names}

    return read
