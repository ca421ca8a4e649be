"""Durable steps on a file system: what is renamed into place is whole and survives a power cut."""

import fcntl
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_MARK = ".tmp-"


def fsync(path: Path) -> None:
    """Flush one file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Flush every file below a directory, then every directory, deepest first."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            fsync(Path(folder, name))
        fsync(Path(folder))


def temporary_sibling(path: Path) -> Path:
    """A fresh hidden name beside `path`, on the same file system, that `remove_temporaries` knows."""
    return path.with_name(f".{path.name}{TEMPORARY_MARK}{uuid.uuid4().hex}")


@contextmanager
def staged_file(path: Path, content: bytes | Callable[[BinaryIO], object]) -> Iterator[Path]:
    """A flushed temporary sibling of `path`, to be renamed to it inside the block and gone after it.

    Args:
        path: to be.
        content: bytes, or a function that writes them to the open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        with temporary.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that readers see the old content or the new one, never a part. `content`: see `staged_file`."""
    with staged_file(path, content) as staged:
        staged.replace(path)
    fsync(path.parent)


def write_below(root: Path, name: str, content: bytes | bytearray | memoryview) -> None:
    """Write a file of a directory that nobody reads yet, with the folders it needs."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def sha256_of(path: Path) -> str:
    """Checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(root: Path) -> list[str]:
    """Paths of all files below a directory, relative to it, sorted."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())


def remove_temporaries(path: Path) -> None:
    """Remove what interrupted writers of `path` left beside it."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}{TEMPORARY_MARK}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an advisory lock on `path`; the kernel gives it back however the process ends.

    Yields:
        Whether the lock was taken; always True with `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock on `path` now. Needs no right to write."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
