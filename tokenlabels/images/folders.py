"""ImageFolder trees, `root/<class>/<file>`, as image shards: one for each class, or several for a large one.

Classes and images are those of torchvision's ImageFolder, with its numbering: the class directories in sorted order,
and all files below them, at any depth, with the suffix of an image. Only hidden files and directories are left out,
which it takes as well (`.ipynb_checkpoints`, the `._x.jpg` of macOS).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tokenlabels.images.samples import EncodedImage, ImageShard
from tokenlabels.lazy import cached_property
from tokenlabels.tars import is_plain_name

FOLDER_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Files of a tree that are images: those of torchvision's ImageFolder."""

MAX_FOLDER_SHARD_IMAGES = 4096

_SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class FolderShard(ImageShard):
    """Images of one class of an ImageFolder tree, all or a part.

    Attributes:
        root: the tree, a local directory of class directories.
        path: the class directory.
        part: number of the part, or None if this is all of the class.
        label: place of the class among the sorted class directories.
        files: paths of the images in the tree, with "/", sorted.
        num_other_files: not images by their suffix, or hidden; those of the class, counted in its first part.
    """

    root: str
    path: str
    part: int | None
    label: int
    files: tuple[str, ...]
    num_other_files: int

    @property
    def stem(self) -> str:
        """Name of the class, with the number of the part if there are several."""
        name = Path(self.path).name
        return name if self.part is None else f"{name}-{self.part:05d}"

    @property
    def name(self) -> str:
        """The stem: a class has no file of its own."""
        return self.stem

    @cached_property
    def size_bytes(self) -> int:
        """Of the files that are there."""
        files = (Path(self.root, file) for file in self.files)
        return sum(file.stat().st_size for file in files if file.exists())

    @property
    def num_ignored(self) -> int:
        """Files that are no images by their suffix, or hidden."""
        return self.num_other_files

    def keys(self) -> list[str]:
        """Paths in the tree without their last suffix ("n01440764/n01440764_10026")."""
        return list(self._files_by_key)

    def read(self, keys: Sequence[str]) -> Iterator[EncodedImage]:
        """The samples of these keys, in this order. A file that cannot be read is a problem of its sample."""
        for key in keys:
            if key not in self._files_by_key:
                raise self._unknown(key)
            try:
                data = Path(self.root, self._files_by_key[key]).read_bytes()
            except OSError as error:
                yield EncodedImage(key, None, self.label, f"cannot be read: {error.strerror}")
            else:
                yield EncodedImage(key, data, self.label, None)

    @cached_property
    def _files_by_key(self) -> dict[str, str]:
        return {_folder_key(file): file for file in self.files}


def folder_shards(root: Path) -> Iterator[FolderShard]:
    """The shards of a tree, in the order of its classes.

    Raises:
        ValueError: there are no class directories, or they are splits; images lie beside them; a class has no images,
            or two with the same key; links lead to a directory twice; a name cannot be written as UTF-8.
    """
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    classes = [entry for entry in entries if entry.is_dir()]
    names = [entry.name for entry in classes]
    if not classes:
        raise ValueError(f"{root}: no class directories in it; for the tars in it write '{root}/*.tar'")
    if _SPLIT_NAMES.issuperset(names):
        raise ValueError(f"{root}: its directories are splits, not classes; name one of them: {root / names[0]}")
    if strays := [entry for entry in entries if entry.suffix.lower() in FOLDER_IMAGE_SUFFIXES and entry.is_file()]:
        raise ValueError(f"{root}: images without a class, as {strays[0]}; move them into a class directory")
    for label, folder in enumerate(classes):
        files, num_other_files = _class_files(root, folder)
        starts = range(0, len(files), MAX_FOLDER_SHARD_IMAGES)
        for number, start in enumerate(starts):
            yield FolderShard(
                root=str(root),
                path=str(folder),
                part=None if len(starts) == 1 else number,
                label=label,
                files=tuple(files[start : start + MAX_FOLDER_SHARD_IMAGES]),
                num_other_files=num_other_files if number == 0 else 0,
            )


def _class_files(root: Path, folder: Path) -> tuple[list[str], int]:
    """Images at any depth below a class directory, following links as ImageFolder does, and the number of others."""
    file_by_key: dict[str, str] = {}
    num_other_files = 0
    visited: set[Path] = set()
    for directory, _, names in os.walk(folder, followlinks=True, onerror=_raise):
        real = Path(directory).resolve()
        if real in visited:
            raise ValueError(f"{directory}: links lead to {real} twice; remove one of them")
        visited.add(real)
        prefix = Path(directory).relative_to(root).as_posix()
        for name in names:
            file = f"{prefix}/{name}"
            if "/." in file or not name.lower().endswith(FOLDER_IMAGE_SUFFIXES):
                num_other_files += 1
                continue
            if not is_plain_name(file):
                raise ValueError(f"{root}: the name {file!r} is not plain UTF-8; rename the file")
            key = _folder_key(file)
            if key in file_by_key:
                raise ValueError(f"{root / file_by_key[key]} and {root / file} have the same key; rename one of them")
            file_by_key[key] = file
    if not file_by_key:
        raise ValueError(f"{folder}: a class without images ({', '.join(FOLDER_IMAGE_SUFFIXES)})")
    return sorted(file_by_key.values()), num_other_files


def _raise(error: OSError) -> NoReturn:
    raise error


def _folder_key(file: str) -> str:
    return file[: file.rindex(".")]
