"""The index of a WebDataset tar: which samples it holds and where their bytes are, found in one pass over the headers.

The standard library parses the headers (ustar, pax, GNU long names), but takes a damaged header in the middle of a
file for its end, and follows hostile sizes; here neither goes unnoticed. Whatever is wrong with a tar is a `TarError`
that names the tar, the byte and the last key before it.

Members become samples by the rules of WebDataset 1.0.2: the key is the path up to the first dot of the base name, the
extension is the rest in lower case. Directories are no samples. Members without a dot, hidden ones (the base name
starts with a dot, as in the `._x.jpg` of macOS) and those named `__x__` or inside a top-level folder `__x__/` belong to
no sample either and are listed as `ignored`. Where WebDataset goes on in silence we refuse: links, devices and sparse
members (their bytes are elsewhere), names that are not plain UTF-8, and samples whose members are not neighbours.
"""

import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self, cast

import fsspec

_META_NAME = re.compile(r"__[^/]*__($|/)")
_CONTROL_OR_SURROGATE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

# Extended headers hold a path and a few attributes. The limit bounds memory, and the time of tarfile's own search
# through them, which grows with the square of their length.
MAX_EXTENDED_HEADER_BYTES = 32 * 1024

# Writers fill up their last record, of 1 MiB at the most. More zeros are the unwritten rest of a preallocated file.
MAX_END_BYTES = 1024 * 1024 + 2 * tarfile.BLOCKSIZE


class TarError(ValueError):
    """A tar that is damaged, truncated, hostile or not laid out as WebDataset needs it."""


@dataclass(frozen=True, slots=True)
class Member:
    """The bytes of one file in a tar.

    Attributes:
        offset: of the first byte, from the start of the tar.
        size: in bytes.
    """

    offset: int
    size: int


@dataclass(frozen=True)
class TarSample:
    """The files that share a key.

    Attributes:
        key: WebDataset key.
        members: where the bytes of every file are, by extension in lower case ("jpg", "cls").
    """

    key: str
    members: dict[str, Member]


@dataclass(frozen=True)
class TarIndex:
    """What is in a tar.

    Attributes:
        path: of the tar, local or an fsspec URL.
        size_bytes: of the tar.
        samples: in the order of the tar, with distinct keys, at least one.
        ignored: names of the members that belong to no sample.
    """

    path: str
    size_bytes: int
    samples: tuple[TarSample, ...]
    ignored: tuple[str, ...]


def scan_tar(path: str) -> TarIndex:
    """Read the headers of a tar.

    Args:
        path: a local path or anything that fsspec opens (s3://, hf://, memory://, `simplecache::s3://...`).

    Raises:
        TarError: the tar is empty, compressed, truncated or damaged, something follows its end, the members of a
            sample are not neighbours, a file is there twice, or a member is not a plain file.
        OSError: the tar cannot be opened or read.
    """
    with _open_binary(path) as file:
        return _Scan(path, file).run()


def is_plain_name(name: str) -> bool:
    """Whether a name can be written as UTF-8 and printed on one line, and so become a key."""
    return _CONTROL_OR_SURROGATE.search(name) is None


class TarReader:
    """Reads members of a scanned tar: `with TarReader(index) as reader: reader.read(member)`. For one thread."""

    def __init__(self, index: TarIndex) -> None:
        self.index = index
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._file = _open_binary(self.index.path)
        size_bytes = _size_of(self._file)
        if size_bytes != self.index.size_bytes:
            self._file.close()
            raise self._changed(f"it has {size_bytes} bytes, had {self.index.size_bytes}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None

    def read(self, member: Member) -> bytes:
        """The bytes of a member.

        Raises:
            TarError: the tar is not the one that was scanned.
        """
        assert self._file is not None, "a TarReader reads inside its with block"
        self._file.seek(member.offset)
        data = self._file.read(member.size)
        if len(data) != member.size:
            raise self._changed(f"{len(data)} bytes at byte {member.offset} where {member.size} were announced")
        return data

    def _changed(self, how: str) -> TarError:
        return TarError(f"{self.index.path}: the tar changed after it was scanned: {how}; start again")


class _Scan:
    """One pass over the headers of a tar."""

    def __init__(self, path: str, file: IO[bytes]) -> None:
        self.path = path
        self.file = file
        self.size_bytes = _size_of(file)
        self.samples: dict[str, dict[str, Member]] = {}
        self.ignored: list[str] = []
        self.last_key: str | None = None

    def run(self) -> TarIndex:
        archive = self._open()
        while member := self._next(archive):
            self._check_kind(member)
            self._check_extent(member, archive.offset)
            if not member.isdir():
                self._add(member)
        self._check_end(archive.offset)
        if not self.samples:
            raise self._error("no sample in it: a sample is a file named <key>.<extension>", 0)
        samples = tuple(TarSample(key, members) for key, members in self.samples.items())
        return TarIndex(self.path, self.size_bytes, samples, tuple(self.ignored))

    def _open(self) -> tarfile.TarFile:
        headers = cast(IO[bytes], _HeaderFile(self.file))
        try:
            return tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape")
        except OSError:
            raise
        except Exception as error:
            what = f"not a tar, or compressed ({error}); tars are read in place, so decompress it first"
            raise self._error(what, 0) from error

    def _next(self, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        try:
            member = archive.next()
        except OSError:
            raise
        except Exception as error:  # tarfile lets whatever its parsing runs into through: KeyError, RecursionError
            raise self._error(f"damaged header ({error})", archive.offset) from error
        # tarfile keeps every header it has seen: 1 GB in a tar of a million files.
        archive.members.clear()  # type: ignore[attr-defined]
        return member

    def _check_kind(self, member: tarfile.TarInfo) -> None:
        if not is_plain_name(member.name):
            raise self._error(f"the name {member.name!r} is not plain UTF-8; rename the file and repack", member.offset)
        if not (member.isreg() or member.isdir()) or member.issparse():
            what = f"{member.name!r} is {_kind_of(member)}, not a plain file; repack with `tar --hard-dereference -h`"
            raise self._error(what, member.offset)

    def _check_extent(self, member: tarfile.TarInfo, next_offset: int) -> None:
        """Hold a member inside the file and the next header behind it, so that the scan always moves on."""
        num_blocks = 0 if member.isdir() else -(-member.size // tarfile.BLOCKSIZE)
        end = member.offset_data + num_blocks * tarfile.BLOCKSIZE
        if member.size < 0:
            raise self._error(f"damaged header: {member.name!r} has {member.size} bytes", member.offset)
        if end > self.size_bytes:
            what = f"truncated: {member.name!r} would end at byte {end} of {self.size_bytes}"
            raise self._error(what, member.offset)
        if next_offset != end:
            raise self._error(f"damaged header: two sizes for {member.name!r}", member.offset)

    def _add(self, member: tarfile.TarInfo) -> None:
        parts = _split_name(member.name)
        if parts is None:
            self.ignored.append(member.name)
            return
        key, extension = parts
        if key != self.last_key and key in self.samples:
            what = (
                f"interleaved: key {key!r} returns after {self.last_key!r}; the files of a sample must be neighbours "
                "(repack with `tar --sort=name`)"
            )
            raise self._error(what, member.offset)
        members = self.samples.setdefault(key, {})
        if extension in members:
            what = f"duplicate: key {key!r} has two {extension!r} files, at bytes {members[extension].offset} and here"
            raise self._error(what, member.offset_data)
        members[extension] = Member(member.offset_data, member.size)
        self.last_key = key

    def _check_end(self, offset: int) -> None:
        """After the last member there is a block of zeros or more, up to the end of the file, and nothing else."""
        self.file.seek(offset)
        tail = self.file.read(MAX_END_BYTES + 1)
        num_zeros = len(tail) - len(tail.lstrip(b"\0"))
        if len(tail) < tarfile.BLOCKSIZE:
            raise self._error("truncated: the file ends without an end-of-archive marker", offset)
        if num_zeros < tarfile.BLOCKSIZE:
            raise self._error("damaged header", offset)
        if num_zeros < len(tail):
            what = "data after the end-of-archive marker: tars that were joined (use `tar -A`), or a header wiped out"
            raise self._error(what, offset + num_zeros)
        if num_zeros > MAX_END_BYTES:
            what = f"truncated: {self.size_bytes - offset} bytes of zeros at the end, as an unfinished download leaves"
            raise self._error(what, offset)

    def _error(self, what: str, offset: int) -> TarError:
        last = "no key before it" if self.last_key is None else f"last good key {self.last_key!r}"
        return TarError(f"{self.path}: {what} (at byte {offset}, {last})")


class _HeaderFile:
    """The file as tarfile sees it: reads are headers, so a long or negative one is a lie of the header before it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek = file.seek
        self.tell = file.tell
        self._file = file

    def read(self, num_bytes: int) -> bytes:
        if not 0 <= num_bytes <= MAX_EXTENDED_HEADER_BYTES:
            raise tarfile.ReadError(f"extended header of {num_bytes} bytes")
        return self._file.read(num_bytes)


def _split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, or None if it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _META_NAME.match(name):
        return None
    return folder + slash + stem, extension.lower()


def _kind_of(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "sparse"
    if member.issym() or member.islnk():
        return f"a link to {member.linkname!r}"
    return f"of type {member.type!r}"


def _open_binary(path: str) -> IO[bytes]:
    if "://" in path:
        return cast(IO[bytes], fsspec.open(path, "rb").open())
    return Path(path).open("rb")


def _size_of(file: IO[bytes]) -> int:
    file.seek(0, os.SEEK_END)
    size_bytes = file.tell()
    file.seek(0)
    return size_bytes
