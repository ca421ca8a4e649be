"""The images of a training run: shards in order, how many samples each has, and what is in them when it is asked.

Finding a dataset opens no tar whose index is kept (`loaders.index`), or whose length an `_info.json` tells: those are
indexed when they are first read. All others are scanned at once. What a shard holds is not remembered here but read
again from its index, about a millisecond for a thousand samples: the keys of ImageNet would take 150 MB.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from loaders.index import ShardIndex, TarState, info_path, kept_num_samples, load_index, read_info, tar_state
from loaders.shard_files import FolderFile, LocalTarFile, RemoteTarFile, ShardFile, tar_changed
from tokenlabels.images import FolderShard, TarShard, find_shards
from tokenlabels.lazy import cached_property
from tokenlabels.tars import TarError

_SECONDS_BETWEEN_REPORTS = 10.0

_logger = logging.getLogger(__name__)


class DataShard(Protocol):
    """A shard of a dataset. Picklable."""

    @property
    def path(self) -> str:
        """Tar, URL or class folder, for messages."""

    @property
    def stem(self) -> str:
        """Name of the label group that belongs to it."""

    @property
    def num_samples(self) -> int:
        """With and without image."""

    @property
    def size_bytes(self) -> int:
        """Of the tar, or of all image files together."""

    @property
    def fingerprint(self) -> tuple[str, int, int | str]:
        """What tells the shard from others and stays when it is copied: stem, number of samples, and of a tar its size.

        A class folder has a hash of its file names instead: to ask a million files for their sizes takes too long.
        """

    def index(self) -> ShardIndex:
        """What is in the shard. Not remembered; an open shard has it too.

        Raises:
            TarError: the tar is damaged, has changed since the dataset was found, or has another number of samples than
                its `_info.json` says.
            OSError: it cannot be read.
        """

    def open(self) -> ShardFile:
        """Open the shard for reading.

        Raises:
            TarError, OSError: as `index`.
        """


@dataclass(frozen=True)
class TarDataShard:
    """A tar, local or an fsspec URL.

    Attributes:
        path, num_samples, size_bytes: as in `DataShard`, when the dataset was found.
        info_path: the `_info.json` that lists the tar, or None.
        index_dir: as in `load_index`.
    """

    path: str
    num_samples: int
    size_bytes: int
    info_path: str | None
    index_dir: Path | None

    @property
    def stem(self) -> str:
        """File name without its ".tar"."""
        return TarShard(self.path).stem

    @property
    def fingerprint(self) -> tuple[str, int, int]:
        """See `DataShard`."""
        return self.stem, self.num_samples, self.size_bytes

    def index(self) -> ShardIndex:
        """See `DataShard`."""
        size_bytes = tar_state(self.path).size_bytes
        if size_bytes != self.size_bytes:
            raise tar_changed(self.path, f"it has {size_bytes} bytes, had {self.size_bytes}")
        index = load_index(self.path, self.index_dir)
        if len(index) != self.num_samples:
            if self.info_path is not None:
                raise _other_length(self.path, len(index), self.info_path, self.num_samples)
            raise tar_changed(self.path, f"it has {len(index)} samples, had {self.num_samples}")
        return index

    def open(self) -> ShardFile:
        """See `DataShard`."""
        index = self.index()
        if "://" in self.path:
            return RemoteTarFile(self.path, index)
        return LocalTarFile(self.path, index, self.size_bytes)


@dataclass(frozen=True)
class FolderDataShard:
    """Images of one class of an ImageFolder tree; their label is its place among the sorted classes."""

    shard: FolderShard

    @property
    def path(self) -> str:
        """See `DataShard`."""
        return self.shard.path

    @property
    def stem(self) -> str:
        """See `DataShard`."""
        return self.shard.stem

    @property
    def num_samples(self) -> int:
        """See `DataShard`."""
        return len(self.shard.files)

    @property
    def size_bytes(self) -> int:
        """See `DataShard`; asks every file for its size."""
        return self.shard.size_bytes

    @property
    def fingerprint(self) -> tuple[str, int, str]:
        """See `DataShard`."""
        names = "\n".join(self.shard.files)
        return self.stem, self.num_samples, hashlib.sha256(names.encode()).hexdigest()

    def index(self) -> ShardIndex:
        """See `DataShard`."""
        passing = dataclasses.replace(self.shard)  # a FolderShard remembers its keys
        places = np.zeros(self.num_samples, np.int64)
        return ShardIndex(tuple(passing.keys()), places, places - 1, np.full_like(places, self.shard.label))

    def open(self) -> ShardFile:
        """See `DataShard`."""
        return FolderFile(self.shard, self.index())


@dataclass(frozen=True)
class ImageDataset:
    """Shards in order. Picklable; `len()` is the number of all samples.

    Attributes:
        shards: with distinct stems, at least one.
    """

    shards: tuple[DataShard, ...]

    @classmethod
    def find(cls, images: str | Path | Sequence[str | Path], index_dir: Path | None = None) -> "ImageDataset":
        """The shards that are named.

        Args:
            images: one or several tars, ImageFolder trees, globs, brace patterns or URLs, as `find_shards` takes them.
            index_dir: where the indexes of tars are kept; None for beside the tars, or where nothing can be written
                there, in the user's cache folder.

        Raises:
            ValueError: nothing is found, or not what was asked for (see `find_shards`).
            TarError: a tar is damaged, or has another number of samples than its `_info.json` says.
            OSError: a tar cannot be read.
        """
        patterns = [images] if isinstance(images, str | Path) else images
        found = find_shards([str(pattern) for pattern in patterns])
        if not found:
            raise ValueError("no images were named; give a tar, a pattern like 'train-{0000..1023}.tar', or a folder")
        if index_dir is not None:
            index_dir = index_dir.expanduser().absolute()  # a spawned process may have another working directory
        tars = _tar_shards([shard.path for shard in found if isinstance(shard, TarShard)], index_dir)
        return cls(tuple(FolderDataShard(shard) if isinstance(shard, FolderShard) else next(tars) for shard in found))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of samples of every shard."""
        return tuple(shard.num_samples for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """A name for these shards in this order, wherever they are and whenever they were written."""
        fingerprints = json.dumps([shard.fingerprint for shard in self.shards])
        return hashlib.sha256(fingerprints.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return sum(self.lengths)

    def __repr__(self) -> str:
        return f"ImageDataset({len(self)} samples in {len(self.shards)} shards, from {self.shards[0].path!r})"


def _tar_shards(paths: Sequence[str], index_dir: Path | None) -> Iterator[TarDataShard]:
    infos = {path: read_info(path) for path in dict.fromkeys(map(info_path, paths))}
    report = _Report(len(paths))
    for number, path in enumerate(paths):
        promised = infos[info_path(path)].get(Path(path).name)
        num_samples, state = _num_samples(path, index_dir, promised)
        report.show(number + 1)
        yield TarDataShard(
            path, num_samples, state.size_bytes, info_path(path) if promised is not None else None, index_dir
        )


def _num_samples(path: str, index_dir: Path | None, promised: int | None) -> tuple[int, TarState]:
    """How many samples a tar has, scanned only if nothing else tells, and its state."""
    state = tar_state(path)
    kept = kept_num_samples(path, state, index_dir)
    if promised is None:
        return kept or len(load_index(path, index_dir)), state
    if kept is not None and kept != promised:
        raise _other_length(path, kept, info_path(path), promised)
    return promised, state


def _other_length(path: str, num_samples: int, info: str, promised: int) -> TarError:
    return TarError(
        f"{path}: {num_samples} samples where {info} says {promised}; "
        "download the tar again, or delete that file if the tars were packed anew"
    )


class _Report:
    """Says in the log how far the indexing of tars has come, if it takes long."""

    def __init__(self, num_tars: int) -> None:
        self.num_tars = num_tars
        self.started = self.reported = time.monotonic()

    def show(self, num_done: int) -> None:
        now = time.monotonic()
        if now - self.reported < _SECONDS_BETWEEN_REPORTS:
            return
        self.reported = now
        _logger.info("indexed %d of %d tars in %.0f s", num_done, self.num_tars, now - self.started)
