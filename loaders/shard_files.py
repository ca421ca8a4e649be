"""Open shards: the encoded image of a row, for any number of threads at once.

Local tars are read by `pread` on one descriptor. A memory map would be as fast, but a file that is truncated under a
map kills the process; here it is an error.
"""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

import fsspec

from loaders.index import ShardIndex
from tokenlabels.images import FolderShard
from tokenlabels.images.shards import TAR_IMAGE_EXTENSIONS
from tokenlabels.tars import TarError


class ShardFile(ABC):
    """A shard that can be read: `with shard.open() as file: file.read(row)`.

    Attributes:
        path: tar, URL or class folder, for messages.
        index: what is in the shard.
    """

    def __init__(self, path: str, index: ShardIndex) -> None:
        self.path = path
        self.index = index

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The encoded image of a row. For any number of threads, which do not wait for each other.

        Raises:
            TarError: the tar is not the one that was indexed.
            ValueError: the sample has no image, or the shard was closed.
            OSError: the image cannot be read.
        """

    def close(self) -> None:  # noqa: B027 - most shards hold nothing open
        """Give back what is open. Reads that have begun in other threads end well."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TarFile(ShardFile):
    """An open tar; what its storage has to do is in subclasses."""

    def read(self, row: int) -> bytes:
        """See `ShardFile`."""
        offset, size = int(self.index.offsets[row]), int(self.index.sizes[row])
        if offset < 0:
            what = f"has no image member (images are {', '.join(TAR_IMAGE_EXTENSIONS)})"
            raise ValueError(f"{self._sample(row)} {what}")
        data = self._read_range(row, offset, size) if size else b""
        if len(data) != size:
            what = f"{len(data)} bytes at byte {offset} where {size} were indexed"
            raise TarError(f"{self._sample(row)}: the tar was truncated or changed after it was indexed: {what}")
        return data

    @abstractmethod
    def _read_range(self, row: int, offset: int, size: int) -> bytes:
        """These bytes of the tar, fewer only at its end; `row` is for messages."""

    def _sample(self, row: int) -> str:
        return f"{self.path}: sample {self.index.keys[row]!r}"


class LocalTarFile(TarFile):
    """A tar on a local disk.

    Raises:
        TarError: the tar does not have the size that it had.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str, index: ShardIndex, size_bytes: int) -> None:
        super().__init__(path, index)
        self._size_bytes = size_bytes
        self._descriptor: _Descriptor | None = _Descriptor(path)
        found = os.fstat(self._descriptor.number).st_size
        if found != size_bytes:
            self.close()
            raise tar_changed(path, f"it has {found} bytes, had {size_bytes}")

    def close(self) -> None:
        """See `ShardFile`."""
        self._descriptor = None

    def __reduce__(self) -> tuple[type[Self], tuple[str, ShardIndex, int]]:
        # The number of a descriptor means another file in another process, so there the tar is opened anew.
        return type(self), (self.path, self.index, self._size_bytes)

    def _read_range(self, row: int, offset: int, size: int) -> bytes:
        descriptor = self._descriptor
        if descriptor is None:
            raise ValueError(f"{self._sample(row)}: read after the shard was closed")
        try:
            return os.pread(descriptor.number, size, offset)
        except OSError as error:
            raise OSError(error.errno, f"{self._sample(row)} cannot be read: {error.strerror}") from error


class RemoteTarFile(TarFile):
    """A tar that fsspec reads, range by range."""

    def __init__(self, path: str, index: ShardIndex) -> None:
        super().__init__(path, index)
        self._connect()
        if "::" in path:
            # What caches whole files is filled here: it is not made for several threads that all find it empty.
            self._filesystem.cat_file(self._name, start=0, end=1)

    def __reduce__(self) -> tuple[type[Self], tuple[str, ShardIndex]]:
        return type(self), (self.path, self.index)

    def _connect(self) -> None:
        self._process = os.getpid()
        self._filesystem, self._name = fsspec.url_to_fs(self.path)

    def _read_range(self, row: int, offset: int, size: int) -> bytes:
        try:
            if self._process != os.getpid():  # connections do not survive a fork
                self._connect()
            return bytes(self._filesystem.cat_file(self._name, start=offset, end=offset + size))
        except Exception as error:  # every storage system has exceptions of its own
            raise OSError(f"{self._sample(row)} cannot be read: {type(error).__name__}: {error}") from error


class FolderFile(ShardFile):
    """Images of an ImageFolder tree, one file for each."""

    def __init__(self, shard: FolderShard, index: ShardIndex) -> None:
        super().__init__(shard.path, index)
        self._shard = shard

    def read(self, row: int) -> bytes:
        """See `ShardFile`; the error names the file."""
        return Path(self._shard.root, self._shard.files[row]).read_bytes()


class _Descriptor:
    """An open file that is closed when nobody holds it any more.

    Whoever reads holds it, so that closing a shard cannot hand the number of a descriptor in use to another file.
    """

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def tar_changed(path: str, how: str) -> TarError:
    """The error of a tar that is another than the one the dataset was found with."""
    return TarError(f"{path}: the tar changed after the dataset was found: {how}; start again")
