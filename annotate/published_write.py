"""Writes a label set in the published layout, for other people's trainers: <class folder>/<image name>.pt.

The class folder is the folder of the key, or for keys without one the WordNet id in front of an ImageNet name
("n01440764_10026"), or else there is none. The published layout has no room for views, tails and source images:
published trainers read every map as if it covered the whole image as stored, without its EXIF orientation. So the
`resize` of the set is in the report, and maps that were turned upright by an import stay as they are.
"""

import io
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from annotate.published_read import MAX_EXACT_ID, PublishedLayoutError, base_name
from tokenlabels.files import fsync, remove_temporaries, temporary_sibling
from tokenlabels.store import LabelStore, open_store
from tokenlabels.types import ScoreMap

_COMPRESSED = {".gz", ".tgz", ".bz2", ".xz", ".zst"}
_WORDNET_ID = re.compile(r"(n\d{8})_")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        num_files: label files, one per image.
        num_bytes: of all of them together.
        num_without: images of the source that have no labels, and so no file; a trainer has to leave them out.
        resize: which part of the image the maps show; readers of the published layout assume "squash", all of it.
    """

    num_files: int
    num_bytes: int
    num_without: int
    resize: str


def export_published(labels: Path, out: Path, *, on_shard: Callable[[str], None] = lambda _: None) -> ExportReport:
    """Write all maps of a label set in the published layout.

    Scores and ids are written as they are stored, so that what was imported comes out as the same tensors, if cells
    were in descending order, rows first, and the images upright. One shard is in memory at a time. `out` appears
    when it is whole; an interrupted export leaves only a hidden file or folder beside it, and the next one removes it.

    Args:
        labels: folder of the label set.
        out: a `.tar`, a `.zip`, or the name of a folder; nothing may be there.
        on_shard: called with the stem of every shard before it is written.

    Raises:
        PublishedLayoutError: the set is not complete, has an id above 2048, which float16 cannot hold, or two keys
            that the layout cannot tell apart; or `out` cannot be written to. Nothing is written then.
        LabelStoreError: the label set is damaged.
    """
    store = open_store(labels)
    if out.suffix in _COMPRESSED:
        raise PublishedLayoutError(
            f"{out}: labels are written to a folder, a .tar or a .zip; compress the tar yourself"
        )
    if out.exists():
        raise PublishedLayoutError(f"{out} exists already; remove it, or name another place")
    _check(store)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(out)
    temporary = temporary_sibling(out)
    num_bytes = 0
    try:
        with _new_container(temporary, out.suffix) as add:
            for shard in store.shards:
                on_shard(shard.stem)
                for score_map in shard.read():
                    data = published_bytes(score_map)
                    add(published_path(score_map.key), data)
                    num_bytes += len(data)
        if temporary.is_dir():
            os.sync()  # one call, where fsync would be a million
        else:
            fsync(temporary)
        temporary.rename(out)
        fsync(out.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return ExportReport(
        num_files=len(store),
        num_bytes=num_bytes,
        num_without=sum(len(shard.manifest.skipped) for shard in store.shards),
        resize=store.info.resize,
    )


def published_path(key: str) -> str:
    """Where the published layout keeps the labels of an image, relative to its root."""
    folder, name = PurePosixPath(key).parent.name, base_name(key)
    if not name or folder == "..":
        raise PublishedLayoutError(f"the key {key!r} has no place in the published layout, <class folder>/<name>.pt")
    if not folder and (match := _WORDNET_ID.match(name)):
        folder = match[1]
    return f"{folder}/{name}.pt" if folder else f"{name}.pt"


def published_bytes(score_map: ScoreMap) -> bytes:
    """The content of a label file: float16 [2, k, H, W], with the strides that the published files have."""
    both_2HWk = np.stack([score_map.scores, score_map.classes.astype(np.float16)])
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(both_2HWk).permute(0, 3, 1, 2), buffer)
    return buffer.getvalue()


def _check(store: LabelStore) -> None:
    """Refuse what the layout cannot hold before anything is written."""
    if store.missing:
        raise PublishedLayoutError(
            f"{store.path}: {len(store.missing)} of {len(store.info.tars)} shards have no labels yet (the first is "
            f"{store.missing[0]}), and a trainer would not notice; finish the set first"
        )
    if store.info.num_classes > MAX_EXACT_ID + 1:
        for shard in store.shards:
            largest = max((int(maps.classes.max()) for maps in shard.stream()), default=0)
            if largest > MAX_EXACT_ID:
                raise PublishedLayoutError(
                    f"{shard.path}: has class id {largest}; the published layout stores ids as float16, which is exact "
                    f"up to {MAX_EXACT_ID} only"
                )
    key_by_path: dict[str, str] = {}
    for key in store:
        path = published_path(key)
        if path in key_by_path:
            raise PublishedLayoutError(f"{store.path}: keys {key_by_path[path]!r} and {key!r} would both be {path}")
        key_by_path[path] = key


@contextmanager
def _new_container(path: Path, suffix: str) -> Iterator[Callable[[str, bytes], None]]:
    """Make a tar, a zip or a folder at `path`, and give a function that adds a file: relative path, content."""
    if suffix == ".tar":
        with tarfile.open(path, "x") as tar:
            yield partial(_add_to_tar, tar)
    elif suffix == ".zip":
        with zipfile.ZipFile(path, "x") as zipped:
            yield partial(_add_to_zip, zipped)
    else:
        path.mkdir()
        yield partial(_add_to_folder, path)


def _add_to_tar(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    tar.members.clear()  # type: ignore[attr-defined]  # kept by tarfile: 1 GB for a million files


def _add_to_zip(zipped: zipfile.ZipFile, name: str, data: bytes) -> None:
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o644 << 16  # without it, unzip makes files that nobody may read
    zipped.writestr(member, data)


def _add_to_folder(root: Path, name: str, data: bytes) -> None:
    file = root / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
