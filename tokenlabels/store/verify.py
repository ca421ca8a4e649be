"""Checking a label set from end to end: records, files, checksums, and every stored value."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenlabels.files import files_below, sha256_of
from tokenlabels.store.reader import ShardReader
from tokenlabels.store.schema import (
    LABELS_FILE,
    MANIFEST_FOLDER,
    LabelSet,
    LabelStoreError,
    ShardAttributes,
    manifest_path,
    read_sealed,
    shard_path,
    stem_of,
)
from tokenlabels.types import ScoreMaps


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `path` is the file, or the shard where no single file is to blame."""

    path: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def verify_store(
    labels: Path,
    *,
    source_keys: Callable[[str], Sequence[str] | None] = lambda _: None,
    on_shard: Callable[[str], None] = lambda _: None,
) -> Iterator[Finding]:
    """Check everything that can be checked without the teacher.

    Args:
        labels: folder of the label set.
        source_keys: gives the keys of the image tar of a shard (by stem), or None where it is not at hand.
        on_shard: called with the stem before a shard is checked.

    Yields:
        Findings; none for a whole set.
    """
    try:
        info = read_sealed(labels / LABELS_FILE, LabelSet)
    except LabelStoreError as error:
        yield _finding(labels / LABELS_FILE, error)
        return
    yield from _strays(labels, info)
    owners: dict[str, str] = {}
    for tar in info.tars:
        stem = stem_of(tar)
        on_shard(stem)
        try:
            yield from _verify_shard(labels, stem, info, source_keys(stem), owners)
        except LabelStoreError as error:
            yield _finding(shard_path(labels, stem), error)


def _verify_shard(
    labels: Path, stem: str, info: LabelSet, source_keys: Sequence[str] | None, owners: dict[str, str]
) -> Iterator[Finding]:
    path = shard_path(labels, stem)
    if not manifest_path(labels, stem).exists():
        yield Finding(path, "has no manifest" if path.exists() else "not annotated yet")
        return
    shard = ShardReader(labels, stem, info)
    damaged = list(_damaged_files(shard))
    yield from damaged
    if damaged:
        return
    yield from _wrong_attributes(shard)
    yield from _wrong_keys(shard, source_keys, owners)
    for start, maps in zip(range(0, len(shard), 256), shard.stream(), strict=True):
        for problem in wrong_values(maps, info.num_classes):
            yield Finding(path, f"rows {start}..{start + len(maps) - 1}: {problem}")


def wrong_values(maps: ScoreMaps, num_classes: int) -> Iterator[str]:
    """What no teacher can have said: one line per rule that is broken, with the first offending key."""
    flat_classes = np.sort(maps.classes, axis=-1)
    checks = (
        ("a score is not finite", ~np.isfinite(maps.scores)),
        ("scores are not in descending order", maps.scores[..., 1:] > maps.scores[..., :-1]),
        (f"a class id is not below {num_classes}", maps.classes >= num_classes),
        ("a class is stored twice in a cell", flat_classes[..., 1:] == flat_classes[..., :-1]),
        ("a tail is not in 0..1", ~((maps.tail >= 0) & (maps.tail <= 1))),
        ("a view is not finite, or not x0 < x1 and y0 < y1", _bad_views(maps.views)),
    )
    for problem, bad in checks:
        rows = np.flatnonzero(bad.reshape(len(maps), -1).any(axis=1))
        if rows.size:
            yield f"{problem} ({rows.size} images, first {maps.keys[rows[0]]})"


def _bad_views(views: NDArray[np.float32]) -> NDArray[np.bool_]:
    finite_and_ordered = np.isfinite(views).all(axis=1) & (views[:, :2] < views[:, 2:]).all(axis=1)
    return np.logical_not(finite_and_ordered)


def _damaged_files(shard: ShardReader) -> Iterator[Finding]:
    wrong = dict(shard.check_files())
    for name, problem in wrong.items():
        yield Finding(shard.path / name, problem)
    for name, expected in shard.manifest.files.items():
        if name not in wrong and sha256_of(shard.path / name) != expected.sha256:
            yield Finding(shard.path / name, "its checksum is not that of the manifest")
    for name in files_below(shard.path):
        if name not in shard.manifest.files:
            yield Finding(shard.path / name, "is not in the manifest")


def _wrong_attributes(shard: ShardReader) -> Iterator[Finding]:
    info, manifest = shard.info, shard.manifest
    expected: dict[str, Any] = {
        "n": manifest.rows,
        "grid": info.grid,
        "k": info.k,
        "num_classes": info.num_classes,
        "source": manifest.source,
        "keys_sha256": manifest.keys_sha256,
        "teacher_digest": info.teacher.digest,
    }
    attributes: ShardAttributes = shard.attributes
    for name, value in expected.items():
        if (got := getattr(attributes, name)) != value:
            yield Finding(shard.path, f"attribute {name} is {got}, expected {value}")


def _wrong_keys(shard: ShardReader, source_keys: Sequence[str] | None, owners: dict[str, str]) -> Iterator[Finding]:
    for key in shard.keys:
        if key in owners:
            yield Finding(shard.path, f"key {key} is in {owners[key]} too")
        owners[key] = shard.stem
    num_skipped = len(shard.manifest.skipped)
    if len(shard) + num_skipped != shard.manifest.source.num_samples:
        yield Finding(
            shard.path,
            f"{len(shard)} rows and {num_skipped} skipped do not make {shard.manifest.source.num_samples} samples",
        )
    if source_keys is None:
        return
    skipped = {record.key for record in shard.manifest.skipped}
    expected = tuple(key for key in source_keys if key not in skipped)
    if expected != shard.keys:
        lost, extra = set(expected) - set(shard.keys), set(shard.keys) - set(expected)
        example = f", such as {min(lost | extra)}" if lost or extra else ""
        yield Finding(
            shard.path,
            f"keys are not those of {shard.manifest.source.name}: {len(lost)} without labels, {len(extra)} unknown"
            + (example or ", another order"),
        )


def _strays(labels: Path, info: LabelSet) -> Iterator[Finding]:
    known = {stem_of(tar) for tar in info.tars}
    entries = [*labels.glob("*.zarr"), *(labels / MANIFEST_FOLDER).glob("*.json")]
    for path in sorted(entries):
        if path.stem not in known:
            yield Finding(path, f"belongs to no tar of {LABELS_FILE}")


def _finding(path: Path, error: LabelStoreError) -> Finding:
    """The error's own message starts with the path it is about; keep that one."""
    head, _, problem = str(error).partition(": ")
    return Finding(Path(head), problem) if problem and head.startswith(str(path.parent)) else Finding(path, str(error))
