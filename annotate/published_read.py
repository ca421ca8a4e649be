"""Reads the layout in which token labels have been published: one `.pt` file per image, <class folder>/<image name>.pt.

Each file is a float16 tensor [2, k, H, W]: the k highest logits of every cell in descending order, then their class ids
as floats. It holds neither the name of the teacher nor the part of the image that the map covers, and nothing about the
classes that are not among the k. Files lie in a folder tree, a tar or a zip, and are found by their base name up to the
first dot, as the published code names them; folders in front of it do not matter.
"""

import hashlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tokenlabels.tars import TarReader, scan_tar

MAX_EXACT_ID = 2048
"""float16 holds every whole number up to here, and only every second one from here on."""

Axes = Literal["hw", "wh"]


class PublishedLayoutError(ValueError):
    """An archive or a file in it is not what the published layout says, or labels cannot be written in that layout."""


@dataclass(frozen=True)
class ImportSettings:
    """What the published layout does not say about its files. Two imports that differ here give different labels.

    Attributes:
        axes: order of the last two axes of the tensors: rows first ("hw", as published) or columns first ("wh").
        view: what a map shows: the centre square ("center", as published) or the whole image ("squash").
        crop_pct: with "center", side of the square as a share of the shorter side, above 0 and at most 1.
        num_classes: classes of the teacher.
    """

    axes: Axes = "hw"
    view: Literal["center", "squash"] = "center"
    crop_pct: float = 1.0
    num_classes: int = 1000

    def __post_init__(self) -> None:
        if self.axes not in ("hw", "wh"):
            raise ValueError(f"axes must be hw or wh, got {self.axes!r}")
        if self.view not in ("center", "squash"):
            raise ValueError(f"view must be center or squash, got {self.view!r}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if self.view == "squash" and self.crop_pct != 1:
            raise ValueError(f"crop_pct={self.crop_pct} has no meaning for view squash; leave it out")
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")

    def __str__(self) -> str:
        view = f"{self.view} (crop_pct {self.crop_pct:g})" if self.view == "center" else self.view
        return f"axes {self.axes}, view {view}"


@dataclass(frozen=True, eq=False)
class PublishedMap:
    """The map of one file.

    Attributes:
        scores: float16 [H, W, k], logits, descending along k.
        classes: int64 [H, W, k], the ids that belong to the scores.
    """

    scores: NDArray[np.float16]
    classes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str
    size_bytes: int
    place: Any


class LabelFiles:
    """The label files of an archive by base name. Made by `open_label_files`, and used inside its `with` block."""

    def __init__(self, archive: Path, entries: Iterable[_Entry], read: Callable[[Any], bytes]) -> None:
        self.archive = archive
        self._read = read
        self._entries: dict[str, _Entry] = {}
        for entry in entries:
            base = base_name(entry.path)
            if not entry.path.lower().endswith(".pt") or not base:
                continue
            if base in self._entries:
                raise PublishedLayoutError(
                    f"{archive} has two files for images named {base!r}: {self._entries[base].path} and {entry.path}. "
                    "Images are matched by base name alone; remove one, or import the folders one by one."
                )
            self._entries[base] = entry
        if not self._entries:
            raise PublishedLayoutError(f"{archive}: no .pt files in it; the published layout has one per image")

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, base: object) -> bool:
        return base in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def name(self, base: str) -> str:
        """Archive and path of a file, for messages."""
        return f"{self.archive}: {self._entries[base].path}"

    def load(self, base: str, settings: ImportSettings) -> PublishedMap:
        """Read and decode a file.

        Raises:
            PublishedLayoutError: the archive is damaged there, or the file is not a map. The message names the file.
        """
        try:
            data = self._read(self._entries[base].place)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise PublishedLayoutError(f"{self.name(base)}: cannot be unpacked ({error})") from error
        return parse_label_file(data, self.name(base), settings)

    def digest(self) -> str:
        """sha256 over all base names and sizes: the same for one set of files in a folder, a tar and a zip."""
        lines = (f"{base} {entry.size_bytes}\n" for base, entry in sorted(self._entries.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def base_name(path: str) -> str:
    """By what files and keys are matched: the last part of a path up to its first dot."""
    return path.rpartition("/")[2].partition(".")[0]


@contextmanager
def open_label_files(archive: Path) -> Iterator[LabelFiles]:
    """Index an archive, by one look at its headers, for reading its files in any order.

    Args:
        archive: a folder tree, a `.tar` or a `.zip`.

    Raises:
        PublishedLayoutError: it is none of these, is damaged, has no `.pt` file, or two of one base name.
        TarError: the tar is damaged.
        FileNotFoundError: it is not there.
    """
    if not archive.exists():
        raise FileNotFoundError(f"{archive}: no such file or folder")
    if archive.is_dir():
        yield LabelFiles(archive, _in_folder(archive), lambda path: Path(path).read_bytes())
    elif archive.suffix == ".tar":
        entries, tar = _in_tar(archive)
        with tar as reader:
            yield LabelFiles(archive, entries, reader.read)
    elif archive.suffix == ".zip":
        with _open_zip(archive) as zipped:
            members = (_Entry(member.filename, member.file_size, member) for member in zipped.infolist())
            yield LabelFiles(archive, members, zipped.read)
    else:
        raise PublishedLayoutError(
            f"{archive}: labels are read from a folder, a .tar or a .zip; decompress a .tar.gz first, because its "
            "files cannot be reached one by one"
        )


def parse_label_file(data: bytes, name: str, settings: ImportSettings) -> PublishedMap:
    """Decode a label file and check every value. Cells whose scores are not in descending order are sorted.

    Args:
        data: content of the file.
        name: of the file, for messages.
        settings: the order of its axes, and the number of classes that ids must be below.

    Raises:
        PublishedLayoutError: the file is no tensor, or not one of a map. The message starts with `name`.
    """
    scores_HWk, ids_HWk = _load(data, name, settings.axes)
    if not np.isfinite(scores_HWk).all():
        raise PublishedLayoutError(f"{name}: a score is not finite")
    _check_ids(ids_HWk, name, settings.num_classes)
    classes_HWk = ids_HWk.astype(np.int64)
    ordered = np.sort(classes_HWk, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise PublishedLayoutError(f"{name}: a cell names a class twice")
    return _sorted(scores_HWk, classes_HWk)


def tail_of_zero_logits(scores: NDArray[np.float16], num_classes: int) -> NDArray[np.float16]:
    """Softmax mass of the classes that are not stored if each of them has the logit 0.

    Args:
        scores: float16 [..., k], the stored logits.
        num_classes: K, stored and not stored.

    Returns:
        float16 [...], (K - k) / (sum of exp(scores) + K - k).
    """
    num_absent = num_classes - scores.shape[-1]
    if num_absent == 0:
        return np.zeros(scores.shape[:-1], np.float16)
    stored = np.logaddexp.reduce(scores.astype(np.float64), axis=-1)
    return np.asarray(np.exp(-np.logaddexp(0, stored - math.log(num_absent))), np.float16)


def _load(data: bytes, name: str, axes: Axes) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle or zip may raise anything
        reason = " ".join(str(error).split())[:160]
        raise PublishedLayoutError(f"{name}: not a tensor file ({type(error).__name__}: {reason})") from error
    if not isinstance(tensor, torch.Tensor):
        raise PublishedLayoutError(f"{name}: holds a {type(tensor).__name__}, expected one tensor [2, k, H, W]")
    if tensor.dtype != torch.float16 or tensor.ndim != 4 or tensor.shape[0] != 2 or tensor.numel() == 0:
        raise PublishedLayoutError(
            f"{name}: holds {tensor.dtype} {list(tensor.shape)}, expected torch.float16 [2, k, H, W]"
        )
    order = (0, 2, 3, 1) if axes == "hw" else (0, 3, 2, 1)
    both_2HWk = np.ascontiguousarray(tensor.detach().permute(order).numpy())
    # Ids leave float16 before they are compared: there a limit of 2049 would become 2048.
    return both_2HWk[0], both_2HWk[1].astype(np.float32)


def _check_ids(ids_HWk: NDArray[np.float32], name: str, num_classes: int) -> None:
    limit = min(num_classes, MAX_EXACT_ID + 1)
    valid = (ids_HWk >= 0) & (ids_HWk < limit) & (ids_HWk == np.floor(ids_HWk))
    if valid.all():
        return
    wrong = float(ids_HWk[~valid][0])
    lost = f"float16 rounds above {MAX_EXACT_ID}, so such ids are lost already"
    advice = lost if wrong > MAX_EXACT_ID else f"are there really {num_classes} classes?"
    raise PublishedLayoutError(f"{name}: class id {wrong:g} is not a whole number in 0..{limit - 1}; {advice}")


def _sorted(scores_HWk: NDArray[np.float16], classes_HWk: NDArray[np.int64]) -> PublishedMap:
    if (scores_HWk[..., 1:] <= scores_HWk[..., :-1]).all():
        return PublishedMap(scores_HWk, classes_HWk)
    order = np.argsort(-scores_HWk, axis=-1, kind="stable")
    return PublishedMap(np.take_along_axis(scores_HWk, order, -1), np.take_along_axis(classes_HWk, order, -1))


def _in_folder(root: Path) -> Iterator[_Entry]:
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            yield _Entry(path.relative_to(root).as_posix(), path.stat().st_size, path)


def _in_tar(archive: Path) -> tuple[list[_Entry], TarReader]:
    index = scan_tar(str(archive))
    entries = [
        _Entry(f"{sample.key}.{extension}", member.size, member)
        for sample in index.samples
        for extension, member in sample.members.items()
    ]
    # The reader needs no samples, and those of a million files are larger than all that is kept of them here.
    return entries, TarReader(replace(index, samples=()))


def _open_zip(archive: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        raise PublishedLayoutError(f"{archive}: not a whole zip ({error}); was the download complete?") from error
