"""Reading label sets. Nothing is trusted that a manifest does not confirm.

Opening a shard compares every file's size, and the checksum of every metadata file, with the manifest; the arrays
themselves carry a crc32c per 256 rows, so that a flipped bit raises when it is read.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from pydantic import ValidationError

from tokenlabels.files import is_locked, sha256_of
from tokenlabels.lazy import cached_property
from tokenlabels.store.layout import ROWS_PER_CHUNK, ArraySpec, array_specs
from tokenlabels.store.schema import (
    LABELS_FILE,
    LOCK_FOLDER,
    LabelSet,
    LabelStoreError,
    Manifest,
    ShardAttributes,
    keys_sha256,
    manifest_path,
    read_sealed,
    shard_path,
    stem_of,
)
from tokenlabels.types import ScoreMap, ScoreMaps


def open_store(path: str | os.PathLike[str]) -> "LabelStore":
    """Open a label set for reading.

    Args:
        path: the folder that holds labels.json.

    Raises:
        LabelStoreError: there is no label set, a record is damaged, a manifest has no shard, or a shard has no
            manifest. The message names the file.
    """
    return LabelStore(Path(path))


class LabelStore:
    """A label set: a mapping from WebDataset keys to score maps, and a sequence of shards.

    Attributes:
        path: the folder.
        info: what labels.json says of the whole set.
        shards: the finished shards, in the order of `info.tars`.
        missing: names of tars that have no labels yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info = read_sealed(path / LABELS_FILE, LabelSet)
        _refuse_unconfirmed(path)
        self.shards = tuple(
            ShardReader(path, stem_of(tar), self.info)
            for tar in self.info.tars
            if manifest_path(path, stem_of(tar)).exists()
        )
        finished = {shard.stem for shard in self.shards}
        self.missing = tuple(tar for tar in self.info.tars if stem_of(tar) not in finished)

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def keys(self) -> Iterator[str]:
        """All keys, shard by shard."""
        for shard in self.shards:
            yield from shard.keys

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> ScoreMap:
        """The map of one image. Decodes 256 rows for one: for many images read whole shards.

        Raises:
            KeyError: no image has this key.
            LabelStoreError: several shards have it, or the shard is damaged.
        """
        shard, row = self._places[key]
        return shard.row(row)

    @cached_property
    def _places(self) -> "_Places":
        return _Places(self)

    def __repr__(self) -> str:
        height, width = self.info.grid
        return (
            f"LabelStore({str(self.path)!r}, {len(self)} maps in {len(self.shards)} of {len(self.info.tars)} shards, "
            f"{height}x{width} cells, k={self.info.k}, {self.info.num_classes} classes)"
        )


class ShardReader:
    """The labels of one image tar, rows in the order of the tar.

    Attributes:
        stem: name of the tar without `.tar`.
        path: the zarr group.
        manifest: the record that confirms it.
    """

    def __init__(self, labels: Path, stem: str, info: LabelSet) -> None:
        self.stem, self.info = stem, info
        self._opened: dict[str, zarr.Array[Any]] = {}
        self.path, self._mark = shard_path(labels, stem), manifest_path(labels, stem)
        self.manifest = read_sealed(self._mark, Manifest)
        if self.manifest.teacher_digest != info.teacher.digest:
            raise LabelStoreError(f"{self.path}: made by another teacher than {labels / LABELS_FILE} names")
        if stem_of(self.manifest.source.name) != stem:
            raise LabelStoreError(f"{self.path}: holds the labels of {self.manifest.source.name}; was it renamed?")
        if not self.path.is_dir():
            raise LabelStoreError(f"{self.path}: missing, though {self._mark} says it is whole")

    def __len__(self) -> int:
        return self.manifest.rows

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """WebDataset keys of the rows."""
        keys = tuple(self._read("keys", slice(None)).tolist())
        if keys_sha256(keys) != self.manifest.keys_sha256:
            raise LabelStoreError(f"{self.path / 'keys'}: the keys are not those of the manifest")
        return keys

    def read(self) -> ScoreMaps:
        """All rows at once: the fast way, for shards of up to some 32 MB (`ScoreMaps.num_bytes`)."""
        return self._rows(slice(0, len(self)))

    def stream(self, rows: int = ROWS_PER_CHUNK) -> Iterator[ScoreMaps]:
        """The rows in order, `rows` at a time; multiples of 256 read every chunk once."""
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        for start in range(0, len(self), rows):
            yield self._rows(slice(start, min(start + rows, len(self))))

    def row(self, index: int) -> ScoreMap:
        """One row. Costs about as much as 256 of them."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has rows 0..{len(self) - 1}, got {index}")
        return self._rows(slice(index, index + 1))[0]

    @cached_property
    def attributes(self) -> ShardAttributes:
        """What the shard says of itself: source, versions, shapes."""
        try:
            return ShardAttributes.model_validate(dict(self._group.attrs))
        except ValidationError as error:
            raise LabelStoreError(f"{self.path}: not the attributes of a shard ({error})") from error

    def check_files(self, *, checksums: bool = True) -> Iterator[tuple[str, str]]:
        """Compare the files with the manifest: sizes of all and, with `checksums`, the sha256 of metadata files.

        Yields:
            (file relative to the group, problem) for each that differs.
        """
        for name, expected in self.manifest.files.items():
            file = self.path / name
            try:
                size_bytes = file.stat().st_size
            except OSError:
                yield name, "missing"
                continue
            if size_bytes != expected.size_bytes:
                yield name, f"has {size_bytes} bytes, the manifest says {expected.size_bytes}"
            elif checksums and file.name == "zarr.json" and sha256_of(file) != expected.sha256:
                yield name, "its checksum is not that of the manifest"

    @cached_property
    def _group(self) -> zarr.Group:
        self._require_files(checksums=True)
        return zarr.open_group(self.path, mode="r")

    def _array(self, name: str) -> "zarr.Array[Any]":
        if name not in self._opened:
            self._opened[name] = next(self._open(spec) for spec in array_specs(self.info) if spec.name == name)
        return self._opened[name]

    def _open(self, spec: ArraySpec) -> "zarr.Array[Any]":
        array, shape = self._group.get(spec.name), (len(self), *spec.row_shape)
        if not isinstance(array, zarr.Array):
            raise self._damaged(spec.name, "no array")
        if array.shape != shape or (spec.dtype is not str and array.dtype != spec.dtype):
            problem = f"{array.dtype} {array.shape}, but {LABELS_FILE} asks for {spec.dtype} {shape}"
            raise self._damaged(spec.name, problem)
        return array

    def _read(self, name: str, rows: slice) -> Any:
        array = self._array(name)
        # zarr gives fill values for a file that went missing, so the files are looked at before every read.
        self._require_files(checksums=False)
        try:
            return np.asarray(array[rows])
        except (ValueError, RuntimeError, OSError) as error:
            raise self._damaged(name, f"damaged ({error})") from error

    def _require_files(self, *, checksums: bool) -> None:
        for name, problem in self.check_files(checksums=checksums):
            raise self._damaged(name, problem)

    def _damaged(self, name: str, problem: str) -> LabelStoreError:
        return LabelStoreError(
            f"{self.path / name}: {problem}. To make this shard again, remove {self._mark} and annotate once more."
        )

    def _rows(self, rows: slice) -> ScoreMaps:
        names = [spec.name for spec in array_specs(self.info) if spec.name != "keys"]
        return ScoreMaps(self.keys[rows], *(self._read(name, rows) for name in names))

    def __repr__(self) -> str:
        return f"ShardReader({str(self.path)!r}, {len(self)} maps)"


class _Places(dict[str, tuple[ShardReader, int]]):
    """Where each key is: (shard, row)."""

    def __init__(self, store: LabelStore) -> None:
        super().__init__()
        self._path = store.path
        for shard in store.shards:
            for row, key in enumerate(shard.keys):
                if key in self:
                    raise LabelStoreError(
                        f"{store.path}: key {key!r} is in {self[key][0].stem} and in {shard.stem}; "
                        "read such a set shard by shard"
                    )
                self[key] = shard, row

    def __missing__(self, key: str) -> tuple[ShardReader, int]:
        raise KeyError(f"{self._path} has no labels for {key!r}")


def _refuse_unconfirmed(labels: Path) -> None:
    for group in sorted(labels.glob("*.zarr")):
        mark = manifest_path(labels, group.stem)
        # A running job is between its two renames for a moment; it holds the lock, or has given it back by now.
        if not mark.exists() and not is_locked(labels / LOCK_FOLDER / group.stem) and not mark.exists():
            raise LabelStoreError(
                f"{group}: has no manifest, so an interrupted job left it; run the same annotate command again"
            )
