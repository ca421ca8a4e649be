"""What commands take beside a label set: names of its classes, and the images that it was made of."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import typer
from numpy.typing import NDArray

if TYPE_CHECKING:
    from loaders.dataset import DataShard
    from loaders.index import ShardIndex
    from tokenlabels.images import ImageShard
    from tokenlabels.store import LabelStore, ShardReader


def names_for(store: "LabelStore", given: str | None) -> tuple[str, ...]:
    """Names of the classes of a set, by class id; WordNet ids in words.

    Args:
        store: the set.
        given: what --class-names says; None takes the set's own names.

    Raises:
        ValueError: nothing names the classes, or not all of them.
        OSError: the file of names cannot be read.
    """
    from tokenlabels.class_names import in_words, read_class_names

    if given is not None:
        return _printable(read_class_names(given, store.info.num_classes))
    if store.info.class_names is None:
        raise ValueError(
            f"{store.path} does not name its {store.info.num_classes} classes; say --class-names FILE (one name per "
            "line, or JSON), or --class-names imagenet-1k"
        )
    return _printable(in_words(store.info.class_names))


def _printable(names: Sequence[str]) -> tuple[str, ...]:
    """The names on one line each, without what would command a terminal."""
    lines = (" ".join(name.split()) for name in names)
    return tuple("".join(char if char.isprintable() else repr(char)[1:-1] for char in line) for line in lines)


class SetImages:
    """The given images of a label set, row by row of its shards.

    What is in a tar is known from the index that `loaders.index` keeps: no image is read before it is asked for.
    Methods raise ValueError where the keys of the images are not those of the labels, or a tar is damaged.
    """

    def __init__(self, patterns: Sequence[str], store: "LabelStore") -> None:
        """Find the images.

        Args:
            patterns: as `tokenlabels annotate` takes them; none at all is a set without images.
            store: the set.

        Raises:
            ValueError: a pattern finds nothing, or no image belongs to the set.
        """
        from tokenlabels.images import find_shards

        self._store = store
        self._shards = {shard.stem: shard for shard in find_shards(patterns)}
        stems = [shard.stem for shard in store.shards]
        if self._shards and not self._shards.keys() & set(stems):
            ours = f"it has {stems[0]} and {len(stems) - 1} more" if stems else "it is empty"
            raise ValueError(f"{store.path} has no labels of {next(iter(self._shards))}: {ours}; give its own images")
        if strangers := sorted(self._shards.keys() - set(stems)):
            shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
            typer.echo(f"{store.path} has no labels of {len(strangers)} of the given shards: {shown}", err=True)

    def __contains__(self, shard: "ShardReader") -> bool:
        return shard.stem in self._shards

    def source(self, shard: "ShardReader") -> "ImageShard":
        """Where the images of a shard are; only for one that is in."""
        return self._shards[shard.stem]

    def labels(self, shard: "ShardReader") -> NDArray[np.int64]:
        """The data set's own class of every row, int64 [n]; -1 where there is none, or the images are not given.

        Raises:
            ValueError: a class that the labels do not have; see also the class.
        """
        if shard not in self:
            return np.full(len(shard), -1, np.int64)
        index, rows = self._rows(shard)
        labels = index.labels[rows]
        if labels.size and labels.max() >= (num_classes := shard.info.num_classes):
            key = shard.keys[int(labels.argmax())]
            raise ValueError(
                f"{self.source(shard).path}: {key!r} is of class {labels.max()}, but {self._store.path} has "
                f"{num_classes} classes; these are labels of another data set, or by a teacher of other classes"
            )
        return np.asarray(labels)

    def sizes(self, shard: "ShardReader") -> NDArray[np.int64]:
        """Bytes of every row's encoded image, int64 [n]; only for a shard that is in."""
        from pathlib import Path

        from tokenlabels.images import FolderShard

        index, rows = self._rows(shard)
        source = self.source(shard)
        if isinstance(source, FolderShard):
            return np.array([Path(source.root, source.files[row]).stat().st_size for row in rows.tolist()], np.int64)
        return np.asarray(index.sizes[rows])

    def read(self, shard: "ShardReader", rows: Sequence[int]) -> Iterator[bytes]:
        """The encoded images of these rows, in this order; only for a shard that is in."""
        _, places = self._rows(shard)
        with _data_shard(self.source(shard)).open() as file:
            for row in rows:
                yield file.read(int(places[row]))

    def _rows(self, shard: "ShardReader") -> "tuple[ShardIndex, NDArray[np.intp]]":
        """What is in the source of a shard, and the place in it of every row."""
        source = self.source(shard)
        index = _data_shard(source).index()
        skipped = {record.key for record in shard.manifest.skipped}
        rows = np.array([row for row, key in enumerate(index.keys) if key not in skipped], np.intp)
        if tuple(index.keys[row] for row in rows.tolist()) != shard.keys:
            strangers = set(index.keys) ^ {*shard.keys, *skipped}
            example = f", such as {min(strangers)!r}" if strangers else ", but in another order"
            raise ValueError(
                f"{source.path}: not the images of the labels {shard.path}: {len(strangers)} keys are in one of them "
                f"only{example}; give the images that were labelled"
            )
        return index, rows


def _data_shard(source: "ImageShard") -> "DataShard":
    from loaders.dataset import FolderDataShard, TarDataShard
    from loaders.index import load_index, tar_state
    from tokenlabels.images import FolderShard

    if isinstance(source, FolderShard):
        return FolderDataShard(source)
    return TarDataShard(source.path, len(load_index(source.path)), tar_state(source.path).size_bytes, None, None)
