"""What is in a tar, known without reading through it: keys, places of the images, labels.

An index is made by one scan of the headers and kept in a small file for the next time: beside the tar as `<tar>.index`,
or in the user's cache folder where nothing can be written beside it. That file is never trusted: one that is damaged,
or of a tar that has changed since, is made anew. If it can be written nowhere, work goes on without.

The file is a safetensors container. Tensors: `keys` uint8, UTF-8 with a line feed between keys; `offsets`, `sizes` and
`labels` int64 [n]. Metadata: what the tar looked like, and a checksum of the tensors.

Public releases have an `_info.json` beside their tars, which says how many samples each holds. It lets a dataset start
before any tar is scanned.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tokenlabels.files import replace_file
from tokenlabels.images.shards import image_extension, label_extension, parse_label
from tokenlabels.tars import TarError, TarReader, TarSample, scan_tar

INDEX_SUFFIX = ".index"
INFO_FILE = "_info.json"

# To be raised when the container changes, or the rules that say which file of a sample is its image and its label.
_FORMAT = "tokenlabels shard index 1"
_TENSORS = {"keys": np.uint8, "offsets": np.int64, "sizes": np.int64, "labels": np.int64}
_MAX_LABEL = np.iinfo(np.int64).max

# What storage systems call the version of a file, best first. The rest of what they say depends on how it was asked.
_VERSION_FIELDS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "created")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of a shard.

    Attributes:
        keys: WebDataset keys (paths without suffix in an ImageFolder tree), in the order of the shard.
        offsets: int64 [n], of the image's first byte in the tar; -1 for a sample without image. 0 in a tree.
        sizes: int64 [n], of the image in bytes; 0 for a sample without image. -1 in a tree, where a file is read whole.
        labels: int64 [n], class index, or -1 for none.
    """

    keys: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name in ("offsets", "sizes", "labels"):
            array = getattr(self, name)
            assert array.shape == (len(self),), f"{name} {array.shape} of {len(self)} samples"
            assert array.dtype == np.int64, f"{name} {array.dtype}"

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class TarState:
    """What tells a tar from an older one of the same name.

    Attributes:
        size_bytes: of the tar.
        version: time of the last change in nanoseconds, or what the storage system of a URL calls its version.
    """

    size_bytes: int
    version: str


def tar_state(path: str) -> TarState:
    """The tar as it is now.

    Raises:
        OSError: there is none.
        TarError: the server of a URL does not tell its size.
    """
    if "://" not in path:
        status = os.stat(path)  # noqa: PTH116 - a thousand tars are looked at before an epoch starts
        return TarState(status.st_size, str(status.st_mtime_ns))
    filesystem, name = fsspec.url_to_fs(path)
    info = filesystem.info(name)
    if info.get("size") is None:
        raise TarError(f"{path}: the server does not tell its size; download it, or serve it with a Content-Length")
    version = next((str(info[field]) for field in _VERSION_FIELDS if info.get(field)), None)
    return TarState(int(info["size"]), filesystem.ukey(name) if version is None else version)


def build_index(path: str) -> ShardIndex:
    """Scan a tar: its headers, and the small file with the label of every sample.

    Raises:
        TarError: the tar is damaged (see `scan_tar`).
        OSError: it cannot be read.
    """
    tar = scan_tar(path)
    offsets, sizes = np.full(len(tar.samples), -1, np.int64), np.zeros(len(tar.samples), np.int64)
    labels = np.full(len(tar.samples), -1, np.int64)
    with TarReader(tar) as reader:
        for row, sample in enumerate(tar.samples):
            if (extension := image_extension(sample)) is not None:
                image = sample.members[extension]
                offsets[row], sizes[row] = image.offset, image.size
            labels[row] = _read_label(reader, sample)
    return ShardIndex(tuple(sample.key for sample in tar.samples), offsets, sizes, labels)


def load_index(path: str, index_dir: Path | None = None) -> ShardIndex:
    """The index of a tar: the one that was kept if it fits, or else a new one, which is kept.

    Args:
        path: a local path or an fsspec URL.
        index_dir: where indexes are kept; None for beside the tar, or in the user's cache folder.

    Raises:
        TarError, OSError: as `build_index`; also if the tar changes meanwhile.
    """
    state, places = tar_state(path), _places(path, index_dir)
    for place in places:
        if (index := _read(place, state)) is not None:
            return index
    index = build_index(path)
    if tar_state(path) != state:
        raise TarError(f"{path}: the tar changed while it was indexed; start again when it is complete")
    _keep(places, _to_bytes(index, state))
    return index


def kept_num_samples(path: str, state: TarState, index_dir: Path | None = None) -> int | None:
    """The number of samples from the header of the index that is kept, or None if there is none that fits."""
    for place in _places(path, index_dir):
        try:
            with safe_open(place, framework="numpy") as file:
                if _fits(file.metadata(), state):
                    (num_samples,) = file.get_slice("labels").get_shape()
                    return int(num_samples)
        except (OSError, SafetensorError, ValueError):
            continue
    return None


def info_path(path: str) -> str:
    """Where the `_info.json` of a tar would be."""
    folder, slash, _ = path.rpartition("/")
    return f"{folder}{slash}{INFO_FILE}"


def read_info(path: str) -> dict[str, int]:
    """The number of samples by name of the tar, as an `_info.json` has them; empty if there is none, or a broken one.

    The layout is that of timm's public releases: {"splits": {"train": {"filenames": [...], "shard_lengths": [...]}}}.
    """
    try:
        with fsspec.open(path, "rb") if "://" in path else Path(path).open("rb") as file:
            return _info_lengths(json.load(file))
    except FileNotFoundError:
        return {}
    except Exception as error:  # of JSON, of its layout, or of a storage system, each with exceptions of its own
        _logger.warning("%s is ignored, tars are scanned instead: %s: %s", path, type(error).__name__, error)
        return {}


def _info_lengths(info: Mapping[str, Mapping[str, Mapping[str, list[object]]]]) -> dict[str, int]:
    lengths: dict[str, int] = {}
    for split in info["splits"].values():
        for name, length in zip(split["filenames"], split["shard_lengths"], strict=True):
            if not isinstance(name, str) or type(length) is not int or length < 1:
                raise ValueError(f"{name!r} with {length!r} samples")
            if lengths.setdefault(name, length) != length:
                raise ValueError(f"{name!r} with {length} samples and with {lengths[name]}")
    return lengths


def _read_label(reader: TarReader, sample: TarSample) -> int:
    extension = label_extension(sample)
    label = parse_label(extension, reader.read(sample.members[extension])) if extension else None
    return -1 if label is None or label > _MAX_LABEL else label


def _places(path: str, index_dir: Path | None) -> list[Path]:
    """Where the index of a tar may be kept, best first."""
    if index_dir is not None:
        return [_place_in(index_dir, path)]
    places = [] if "://" in path else [Path(path + INDEX_SUFFIX)]
    if (folder := _cache_folder()) is not None:
        places.append(_place_in(folder, path))
    return places


def _place_in(folder: Path, path: str) -> Path:
    full_path = path if "://" in path else str(Path(path).absolute())
    digest = hashlib.blake2b(full_path.encode(), digest_size=8).hexdigest()
    return folder / f"{Path(path).name.removesuffix('.tar')}-{digest}{INDEX_SUFFIX}"


def _cache_folder() -> Path | None:
    """The user's folder for what can be made again (XDG Base Directory Specification)."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in containers
        return None
    return folder / "tokenlabels" / "index"


def _keep(places: list[Path], content: bytes) -> None:
    problems = []
    for place in places:
        try:
            replace_file(place, content)
            return
        except OSError as error:
            problems.append(f"{place.parent}: {error.strerror}")
    _warn_once("indexes of tars cannot be kept and are made anew each time (%s)", "; ".join(problems) or "no folder")


@cache
def _warn_once(message: str, reason: str) -> None:
    _logger.warning(message, reason)


def _to_bytes(index: ShardIndex, state: TarState) -> bytes:
    # Keys have no control characters: the scan refuses them.
    keys = np.frombuffer("\n".join(index.keys).encode(), np.uint8)
    tensors: dict[str, NDArray[Any]] = {
        "keys": keys,
        "offsets": index.offsets,
        "sizes": index.sizes,
        "labels": index.labels,
    }
    return bytes(save(tensors, metadata=_described(state) | {"crc32": _checksum(tensors)}))


def _read(place: Path, state: TarState) -> ShardIndex | None:
    """The index in a file, or None if there is none that fits."""
    try:
        with safe_open(place, framework="numpy") as file:
            metadata = file.metadata()
            if not _fits(metadata, state):
                return None
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        if any(tensors[name].dtype != dtype for name, dtype in _TENSORS.items()):
            return None
        if metadata.get("crc32") != _checksum(tensors):
            return None
        keys = tuple(tensors.pop("keys").tobytes().decode().split("\n"))
        return ShardIndex(keys, **tensors)
    except (OSError, SafetensorError, ValueError):
        return None


def _fits(metadata: dict[str, str] | None, state: TarState) -> bool:
    return metadata is not None and _described(state).items() <= metadata.items()


def _described(state: TarState) -> dict[str, str]:
    return {"format": _FORMAT, "size_bytes": str(state.size_bytes), "version": state.version}


def _checksum(tensors: Mapping[str, NDArray[Any]]) -> str:
    checksum = 0
    for name in _TENSORS:
        checksum = zlib.crc32(tensors[name].tobytes(), checksum)
    return f"{checksum:08x}"
