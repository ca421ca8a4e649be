"""Writing shards: a label shard is absent or whole, whatever happens to the process.

Life of a shard: claim (a lock, so that two jobs never work on the same one) -> temporary sibling directory -> whole
arrays -> reopen and compare -> fsync -> rename -> fsync of the parent -> manifest. A killed writer leaves at most a
hidden temporary directory, which the next claim of the shard sweeps away, or a renamed group without a manifest,
which nobody reads and the next writer replaces.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.storage import MemoryStore

from tokenlabels.files import (
    file_lock,
    files_below,
    fsync,
    fsync_tree,
    remove_temporaries,
    sha256_of,
    staged_file,
    temporary_sibling,
    write_below,
)
from tokenlabels.store.layout import ROWS_PER_CHUNK, array_specs, values_of
from tokenlabels.store.schema import (
    LABELS_FILE,
    LOCK_FOLDER,
    MANIFEST_FOLDER,
    DiskFullError,
    FileRecord,
    ImageLevelRecord,
    LabelSet,
    LabelStoreError,
    Manifest,
    ShardAttributes,
    SkippedRecord,
    SourceRecord,
    StoreWriteError,
    keys_sha256,
    manifest_path,
    read_sealed,
    seal,
    shard_path,
    stem_of,
    write_sealed,
)
from tokenlabels.types import ScoreMaps, class_dtype


class ShardBusyError(RuntimeError):
    """Another process is working on this shard."""


def create_label_set(labels: Path, info: LabelSet) -> LabelSet:
    """Make labels.json, or join the set that is there already and add tars to it.

    Returns:
        What labels.json holds now: `info` with the tars of all jobs that joined.

    Raises:
        LabelStoreError: the folder holds labels made in another way; the message lists the differing fields.
    """
    path = labels / LABELS_FILE
    with file_lock(labels / LOCK_FOLDER / LABELS_FILE, wait=True):
        remove_temporaries(path)
        if path.exists():
            present = read_sealed(path, LabelSet)
            if differences := present.differences(info):
                lines = "\n  ".join(differences)
                raise LabelStoreError(
                    f"{labels} holds labels made in another way (there != asked for):\n  {lines}\n"
                    "Use the same settings, or another folder."
                )
            info = present.model_copy(update={"tars": tuple(sorted({*present.tars, *info.tars}))})
            if info == present:
                return present
        elif any((labels / MANIFEST_FOLDER).glob("*.json")):
            raise LabelStoreError(f"{path} is missing, but {labels / MANIFEST_FOLDER} is not; restore it")
        try:
            write_sealed(path, info)
        except OSError as error:
            raise _explained(error, path, len(seal(info))) from error
    return info


@contextmanager
def claim_shard(labels: Path, stem: str, info: LabelSet, *, wait: bool = False) -> Iterator["ShardWriter"]:
    """The sole right to write one shard, until the block or the process ends; sweeps what a dead writer left.

    Raises:
        ShardBusyError: another process holds the claim, and `wait` is false.
    """
    with file_lock(labels / LOCK_FOLDER / stem, wait=wait) as taken:
        if not taken:
            raise ShardBusyError(f"{shard_path(labels, stem)}: another process is writing it")
        remove_temporaries(shard_path(labels, stem))
        remove_temporaries(manifest_path(labels, stem))
        yield ShardWriter(labels, stem, info)


class ShardWriter:
    """Writes one claimed shard. Made by `claim_shard`."""

    def __init__(self, labels: Path, stem: str, info: LabelSet) -> None:
        self.labels, self.stem, self.info = labels, stem, info

    def write(
        self,
        maps: ScoreMaps,
        *,
        source: SourceRecord,
        image_level: ImageLevelRecord,
        skipped: Sequence[SkippedRecord] = (),
        versions: dict[str, str],
    ) -> Manifest:
        """Write and commit all maps of the shard, replacing whatever stood there.

        Raises:
            LabelStoreError: the maps do not fit the label set, the disk is full, or what was read back differs
                from what was written. The shard is then absent, or what it was before.
        """
        self._check(maps, source)
        final = shard_path(self.labels, self.stem)
        temporary = temporary_sibling(final)
        try:
            temporary.mkdir(parents=True)
            attributes = ShardAttributes(
                n=len(maps),
                grid=self.info.grid,
                k=self.info.k,
                num_classes=self.info.num_classes,
                source=source,
                keys_sha256=keys_sha256(maps.keys),
                teacher_digest=self.info.teacher.digest,
                versions=versions,
            )
            self._write_arrays(temporary, maps, attributes)
            self._compare(temporary, maps)
            manifest = Manifest(
                rows=len(maps),
                source=source,
                keys_sha256=attributes.keys_sha256,
                teacher_digest=attributes.teacher_digest,
                skipped=tuple(skipped),
                image_level=image_level,
                files=_describe_files(temporary),
            )
            fsync_tree(temporary)
            self._commit(temporary, final, manifest)
        except OSError as error:
            raise _explained(error, final, maps.num_bytes) from error
        except UnicodeEncodeError as error:
            text = error.object[max(0, error.start - 40) : error.end + 40]
            raise LabelStoreError(f"{final}: {text!r} is not valid Unicode; rename the image") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return manifest

    def _check(self, maps: ScoreMaps, source: SourceRecord) -> None:
        if stem_of(source.name) != self.stem:
            raise LabelStoreError(f"{shard_path(self.labels, self.stem)}: cannot hold the labels of {source.name}")
        ids = class_dtype(self.info.num_classes)
        if (maps.grid, maps.k, maps.classes.dtype) != (self.info.grid, self.info.k, ids):
            raise LabelStoreError(
                f"{shard_path(self.labels, self.stem)}: got {maps!r}; the label set holds "
                f"{self.info.grid} cells, k={self.info.k}, {ids} ids"
            )
        if len(set(maps.keys)) != len(maps):
            raise LabelStoreError(f"{shard_path(self.labels, self.stem)}: two maps have the same key")

    def _write_arrays(self, folder: Path, maps: ScoreMaps, attributes: ShardAttributes) -> None:
        # zarr encodes into memory, an array at a time, and the files are written here. Its own store writes in
        # threads that go on after one of them failed, so that files appear in a folder that is being removed.
        encoded: dict[str, Buffer] = {}
        group = zarr.create_group(MemoryStore(encoded), zarr_format=3, attributes=attributes.model_dump(mode="json"))
        for spec in array_specs(self.info):
            spec.create(group, len(maps))[...] = values_of(maps, spec.name)
            for name in [name for name in encoded if name.startswith(f"{spec.name}/")]:
                write_below(folder, name, encoded.pop(name).as_buffer_like())
        for name, content in encoded.items():
            write_below(folder, name, content.as_buffer_like())

    def _compare(self, folder: Path, maps: ScoreMaps) -> None:
        group = zarr.open_group(folder, mode="r")
        for spec in array_specs(self.info):
            array, expected = group[spec.name], values_of(maps, spec.name)
            # A chunk at a time: a second copy of everything would be the peak of a writer's memory.
            for start in range(0, len(maps), ROWS_PER_CHUNK):
                rows = slice(start, start + ROWS_PER_CHUNK)
                if not _same_bits(np.asarray(array[rows]), expected[rows]):  # type: ignore[index]
                    raise LabelStoreError(f"{folder / spec.name}: reading back gave other values than were written")

    def _commit(self, temporary: Path, final: Path, manifest: Manifest) -> None:
        mark = manifest_path(self.labels, self.stem)
        # Before anything is touched: a disk without room for the manifest must not cost the shard that is there.
        with staged_file(mark, seal(manifest)) as staged_mark:
            if mark.exists():
                mark.unlink()
                fsync(mark.parent)
            if final.exists():
                # Renamed before it is removed: a kill in the middle of removing must not leave half of a group there.
                discarded = temporary_sibling(final)
                final.rename(discarded)
                shutil.rmtree(discarded)
            temporary.rename(final)
            fsync(self.labels)
            staged_mark.replace(mark)
        fsync(mark.parent)


def _same_bits(written: NDArray[Any], expected: NDArray[Any]) -> bool:
    if expected.dtype == object:
        return list(written) == list(expected)
    return bool(np.array_equal(written.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8)))


def _describe_files(folder: Path) -> dict[str, FileRecord]:
    return {
        name: FileRecord(size_bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
        for name in files_below(folder)
    }


def _explained(error: OSError, path: Path, num_bytes: int) -> LabelStoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(
            f"{path}: {os.strerror(error.errno)} (up to {num_bytes / 1e6:.1f} MB were needed). What is there is "
            "absent or whole. Free some space and run the same command again."
        )
    return StoreWriteError(f"{path}: could not be written ({error}); what is there is absent or whole.")
