"""Finds image shards, WebDataset tars and ImageFolder trees alike, and reads the samples of tars.

A shard is a unit of work and of output: its `stem` names the label group that it becomes. Finding shards opens no tar;
a tar's headers are read when a shard is first asked what it holds. Whatever keeps a sample from being used is its
`problem`, so that nothing is left out in silence; whatever makes a shard as a whole unusable is an error.

The label of a tar's sample is its `cls` file, an integer in ASCII, or without one the integer "label" of its `json`.
-1 means no label, as in unlabelled test sets, and so does anything else: teachers do not need the label, and a `cls`
may be a word. Manifests count the images that have one.
"""

import glob
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
from braceexpand import braceexpand
from fsspec.core import has_magic

from tokenlabels.images.folders import folder_shards
from tokenlabels.images.samples import EncodedImage, ImageShard
from tokenlabels.lazy import cached_property
from tokenlabels.tars import TarIndex, TarReader, TarSample, scan_tar

TAR_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Files of a tar's sample that are its image, the first that is there."""

TAR_LABEL_EXTENSIONS = ("cls", "json")
"""Files of a tar's sample that hold its label, the first that is there."""

INDEX_SUFFIX = ".tar.index"
"""Kept beside a tar, what is in it; no shard."""

_CLASS_INDEX = re.compile(rb"\s*(-1|[0-9]{1,9})\s*")


@dataclass(frozen=True)
class TarShard(ImageShard):
    """A WebDataset tar; `path` is local or an fsspec URL. Its methods raise `TarError` for one that is damaged."""

    path: str

    @property
    def stem(self) -> str:
        """File name without its ".tar"."""
        return self.name.removesuffix(".tar")

    @property
    def name(self) -> str:
        """File name."""
        return Path(self.path).name

    @property
    def size_bytes(self) -> int:
        """Of the tar, now."""
        if "://" not in self.path:
            return Path(self.path).stat().st_size
        filesystem, path = fsspec.url_to_fs(self.path)
        return int(filesystem.size(path))

    @property
    def num_ignored(self) -> int:
        """Members that belong to no sample."""
        return len(self._index.ignored)

    def keys(self) -> list[str]:
        """The WebDataset keys, in the order of the tar."""
        return [sample.key for sample in self._index.samples]

    def read(self, keys: Sequence[str]) -> Iterator[EncodedImage]:
        """The samples of these keys, in this order."""
        with TarReader(self._index) as reader:
            for key in keys:
                if key not in self._samples:
                    raise self._unknown(key)
                yield _read_sample(reader, self._samples[key])

    @cached_property
    def _index(self) -> TarIndex:
        return scan_tar(self.path)

    @cached_property
    def _samples(self) -> dict[str, TarSample]:
        return {sample.key: sample for sample in self._index.samples}


def find_shards(patterns: Sequence[str]) -> list[ImageShard]:
    """The shards that the patterns name, in the order of the patterns; what a glob finds is sorted.

    Args:
        patterns: each a tar (`a.tar`), a directory of class directories (`imagenet/train`), or several of them with
            braces (`train-{0000..1023}.tar`, `{a,b}.tar`) or a glob (`data/train-*.tar`); tars also as fsspec URLs
            (`s3://bucket/train-{0000..1023}.tar`). Braces are WebDataset's: a backslash keeps one from being special.

    Raises:
        ValueError: a pattern finds nothing, finds something that is neither a tar nor a tree, or two shards would get
            the same name; a tree has no images where they are needed, or two with the same key.
    """
    shards: list[ImageShard] = []
    for pattern in patterns:
        for path in _expand(pattern):
            shards.extend(_shards_at(path))
    path_by_stem: dict[str, str] = {}
    for shard in shards:
        if shard.stem in path_by_stem:
            raise ValueError(
                f"{path_by_stem[shard.stem]} and {shard.path} would both become the labels {shard.stem!r}; "
                "rename one, or annotate them into two label sets"
            )
        path_by_stem[shard.stem] = shard.path
    return shards


def _expand(pattern: str) -> list[str]:
    """Paths and URLs that a pattern stands for, all there as far as that is cheap to know."""
    try:
        names = list(braceexpand(pattern))
    except ValueError:
        raise ValueError(f"{pattern!r}: unbalanced braces; write ranges as {{0000..1023}}") from None
    paths: list[str] = []
    missing: list[str] = []
    for name in names:
        found = _find_remote(name) if "://" in name else _find_local(name)
        paths.extend(found)
        if not found:
            missing.append(name)
    if missing:
        which = "nothing there" if len(names) == 1 else f"{len(missing)} of its {len(names)} names are not there"
        raise ValueError(f"{pattern!r} finds no images: {which} (the first is {missing[0]!r})")
    return paths


def _find_local(name: str) -> list[str]:
    path = str(Path(name).expanduser().absolute())  # a worker has a working directory of its own
    if Path(path).exists():
        return [path]
    found = glob.glob(path, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    # "train-*" is meant for the tars and not for the indexes that are kept beside them.
    return sorted(name for name in found if not name.endswith(INDEX_SUFFIX))


def _find_remote(url: str) -> list[str]:
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url!r}: {error}. For s3:// pip install 'tokenlabels[s3]', for hf:// [hub].") from error
    if not has_magic(path):
        return [url] if filesystem.exists(path) else []
    if "::" in url:
        raise ValueError(f"{url!r}: a chained URL takes no glob; name its tars with braces: {{0000..1023}}")
    return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path))


def _shards_at(path: str) -> list[ImageShard]:
    if "://" not in path and Path(path).is_dir():
        return list(folder_shards(Path(path)))
    if not path.endswith(".tar"):
        raise ValueError(f"{path}: neither a .tar nor a directory of class directories; decompress tars first")
    return [TarShard(path)]


def image_extension(sample: TarSample) -> str | None:
    """Which of a sample's files is its image, or None if it has none."""
    return _first_of(TAR_IMAGE_EXTENSIONS, sample)


def label_extension(sample: TarSample) -> str | None:
    """Which of a sample's files holds its label, or None if it has none."""
    return _first_of(TAR_LABEL_EXTENSIONS, sample)


def parse_label(extension: str, text: bytes) -> int | None:
    """The class index in a `cls` or `json` file; None where there is none."""
    return _label_of_cls(text) if extension == "cls" else _label_of_json(text)


def _read_sample(reader: TarReader, sample: TarSample) -> EncodedImage:
    image, label_file = image_extension(sample), label_extension(sample)
    wanted = [sample.members[extension] for extension in (image, label_file) if extension]
    # In the order of the tar: a remote file is read ahead, and going back would fetch it again.
    data = {member: reader.read(member) for member in sorted(wanted, key=lambda member: member.offset)}
    label = parse_label(label_file, data[sample.members[label_file]]) if label_file else None
    if not image:
        has = ", ".join(sorted(sample.members))
        problem = f"no image member (has {has}; images are {', '.join(TAR_IMAGE_EXTENSIONS)})"
        return EncodedImage(sample.key, None, label, problem)
    return EncodedImage(sample.key, data[sample.members[image]], label, None)


def _first_of(extensions: Sequence[str], sample: TarSample) -> str | None:
    return next((extension for extension in extensions if extension in sample.members), None)


def _label_of_cls(text: bytes) -> int | None:
    match = _CLASS_INDEX.fullmatch(text)
    return _label_or_none(int(match[1])) if match else None


def _label_of_json(text: bytes) -> int | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    label = content.get("label") if isinstance(content, dict) else None
    return _label_or_none(label) if type(label) is int else None


def _label_or_none(label: int) -> int | None:
    return label if label >= 0 else None
