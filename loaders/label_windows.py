"""The labels of a window's samples, in the order of the plan, so that the labels of a batch are a slice.

A label shard is read once per window, in bulk: its rows are joined to the image shard by key, those of the window are
copied to their places, and the shard is let go. A window of m samples takes m * H * W * (k * 4 + 2) bytes with uint16
ids (130 MB for 20,000 samples of 18x18 cells, k=5), and up to `BULK_BYTES` more for the shard that is being read.

Legend: m samples, H x W cells of a map, k stored classes per cell.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loaders.plan import Window
from tokenlabels.store import LabelSet, LabelStore, LabelStoreError, ShardReader, keys_sha256, stem_of
from tokenlabels.store.layout import ROWS_PER_CHUNK
from tokenlabels.types import ClassIds, ScoreMaps, class_dtype

BULK_BYTES = 32 * 2**20

_ARRAYS = ("scores", "classes", "tail", "views")
_Values = tuple[NDArray[np.float16], ClassIds, NDArray[np.float16], NDArray[np.float32]]
# float16 read as integers: infinities and NaN are the largest without their sign; 0..1 are those up to 1, and -0.
_FLOAT16_SIGN, _FLOAT16_INFINITY, _FLOAT16_ONE = 0x8000, 0x7C00, 0x3C00


@dataclass(frozen=True, eq=False)
class LabelBlock:
    """Score maps of m samples, as stored.

    Attributes:
        scores: float16 [m, H, W, k], teacher logits, descending along k.
        classes: uint16 or uint32 [m, H, W, k], the ids that belong to the scores. Of these types torch computes
            little: `.astype(np.int32)` before they are looked up in anything.
        tail: float16 [m, H, W], softmax mass of the classes that are not stored, 0..1.
        views: float32 [m, 4], the part of each image that its map covers, xyxy in 0..1 of the image.
        problems: why a sample has no labels, naming tar and key, by its position 0..m-1; its values are zeros.
    """

    scores: NDArray[np.float16]
    classes: ClassIds
    tail: NDArray[np.float16]
    views: NDArray[np.float32]
    problems: dict[int, str]

    def __post_init__(self) -> None:
        assert self.scores.shape == self.classes.shape, f"{self.scores.shape} scores, {self.classes.shape} classes"
        assert self.tail.shape == self.scores.shape[:-1], f"{self.scores.shape} scores, {self.tail.shape} tails"
        assert self.views.shape == (len(self), 4), f"{self.scores.shape} scores, {self.views.shape} views"
        assert all(0 <= position < len(self) for position in self.problems), "problems of samples that are not here"

    def __len__(self) -> int:
        return len(self.scores)

    def slice(self, start: int, stop: int) -> "LabelBlock":
        """Samples start..stop-1: views, which keep the whole block in memory. `concatenate([part])` copies."""
        part = slice(start, stop)
        problems = {position - start: text for position, text in self.problems.items() if start <= position < stop}
        return LabelBlock(self.scores[part], self.classes[part], self.tail[part], self.views[part], problems)

    def take(self, positions: Sequence[int]) -> "LabelBlock":
        """Copies of these samples, in this order; one may come several times."""
        rows = list(positions)
        problems = {new: self.problems[old] for new, old in enumerate(rows) if old in self.problems}
        return LabelBlock(self.scores[rows], self.classes[rows], self.tail[rows], self.views[rows], problems)

    @staticmethod
    def concatenate(blocks: Sequence["LabelBlock"]) -> "LabelBlock":
        """A block with copies of all samples of some blocks, at least one, of the same label set."""
        firsts = np.cumsum([0, *(len(block) for block in blocks)]).tolist()
        problems = {
            first + position: text
            for first, block in zip(firsts, blocks, strict=False)
            for position, text in block.problems.items()
        }
        scores, classes, tail, views = (np.concatenate([getattr(block, name) for block in blocks]) for name in _ARRAYS)
        return LabelBlock(scores, classes, tail, views, problems)

    def __repr__(self) -> str:
        _, height, width, k = self.scores.shape
        return f"LabelBlock({len(self)} maps, {height}x{width} cells, k={k}, {len(self.problems)} problems)"


class LabelJoin:
    """The label shards of some image shards.

    Args:
        store: the label set; it may hold more shards, in another order.
        stems: stems of the image shards, in the order in which windows number them.
        paths: the image shards, for messages.

    Raises:
        LabelStoreError: image shards have no label shard; says how many, and the first of them.
    """

    def __init__(self, store: LabelStore, stems: Sequence[str], paths: Sequence[str]) -> None:
        present = {shard.stem: shard for shard in store.shards}
        missing = [number for number, stem in enumerate(stems) if stem not in present]
        if missing:
            stem, path = stems[missing[0]], paths[missing[0]]
            awaited = stem in {stem_of(tar) for tar in store.missing}
            known = "not annotated yet; run tokenlabels annotate again"
            unknown = f"its label set knows no shard {stem!r}; annotate these images, or give their own labels"
            raise LabelStoreError(
                f"{store.path}: {len(missing)} of {len(stems)} image shards have no labels. The first is {path}: "
                f"{known if awaited else unknown}"
            )
        self._store = store
        self._shards = tuple(present[stem] for stem in stems)
        self._paths = tuple(paths)

    def check_counts(self, lengths: Sequence[int]) -> None:
        """Compare the number of samples of every image shard with what its labels were made from.

        Raises:
            LabelStoreError: a number differs, so these are labels of other images.
        """
        for shard, path, length in zip(self._shards, self._paths, lengths, strict=True):
            rows, num_skipped = shard.manifest.rows, len(shard.manifest.skipped)
            if rows + num_skipped != length:
                raise LabelStoreError(
                    f"{path} has {length} samples, but {shard.path} was made from {rows + num_skipped} ({rows} with "
                    f"labels, {num_skipped} skipped): labels of other images. Annotate these into another folder."
                )

    def other_sizes(self, sizes_bytes: Sequence[int | None]) -> list[str]:
        """The image shards that had another size when their labels were made; None and a record of 0 are not known."""
        return [
            path
            for shard, path, size in zip(self._shards, self._paths, sizes_bytes, strict=True)
            if size is not None and shard.manifest.source.size_bytes not in (0, size)
        ]

    def agreement(self) -> float | None:
        """Share of the labelled images whose teacher's best class is the data set's own label, 0..1.

        None if the images have no labels of their own. Near 0 the two number their classes differently.
        """
        records = [shard.manifest.image_level for shard in self._shards]
        num_labelled = sum(record.num_labelled for record in records)
        return sum(record.num_agreeing for record in records) / num_labelled if num_labelled else None

    def read(self, window: Window, keys_of: Callable[[int], tuple[str, ...]]) -> LabelBlock:
        """The labels of a window's samples, in its order.

        Args:
            keys_of: gives the keys of all samples of an image shard, by its number.

        Raises:
            LabelStoreError: a label shard is damaged, or was made from other images: it has none of the keys. A key
                here and there without labels is a problem of that sample, see `LabelBlock.problems`.
        """
        block = _zeros(len(window), self._store.info)
        order = np.argsort(window.samples[:, 0], kind="stable")
        numbers, firsts = np.unique(window.samples[order, 0], return_index=True)
        for number, positions in zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True):
            self._fill(block, positions, window.samples[positions, 1], number, keys_of(number))
        return block

    def _fill(
        self,
        block: LabelBlock,
        positions: NDArray[np.int64],
        image_rows: NDArray[np.int64],
        number: int,
        keys: tuple[str, ...],
    ) -> None:
        # A reader keeps its keys and open arrays; on a copy they go with it, else those of all shards pile up.
        shard, path = copy(self._shards[number]), self._paths[number]
        label_rows = _join(shard, path, keys)[image_rows]
        reasons = {record.key: record.reason for record in shard.manifest.skipped}
        for index in np.flatnonzero(label_rows < 0).tolist():
            key = keys[image_rows[index]]
            reason = reasons.get(key, f"{shard.path} does not know it; is it another version of the images?")
            block.problems[int(positions[index])] = f"{path}: no labels of {key!r}: {reason}"
        first = 0
        for part in shard.stream(_rows_in_bulk(shard.info)):
            here = np.flatnonzero((label_rows >= first) & (label_rows < first + len(part)))
            values = _rows_of(part, label_rows[here] - first)
            for index, wrong in _wrong_values(values, shard.info.num_classes):
                key = keys[image_rows[here[index]]]
                advice = f"tokenlabels verify {self._store.path} lists all such"
                block.problems[int(positions[here[index]])] = f"{path}: labels of {key!r}: {wrong}; {advice}"
                for part_of_values in values:
                    part_of_values[index] = 0
            for name, array in zip(_ARRAYS, values, strict=True):
                getattr(block, name)[positions[here]] = array
            first += len(part)


def _join(shard: ShardReader, path: str, keys: tuple[str, ...]) -> NDArray[np.int64]:
    """The row of labels of each sample of an image shard, -1 where it has none."""
    skipped = {record.key for record in shard.manifest.skipped}
    labelled = np.array([key not in skipped for key in keys], bool)
    expected = tuple(key for key in keys if key not in skipped)
    if keys_sha256(expected) == shard.manifest.keys_sha256:
        # What the checksum proves need not be read: the keys are a fifth of the time of a bulk read.
        shard.keys = expected
        return np.where(labelled, np.cumsum(labelled) - 1, -1)
    places = {key: row for row, key in enumerate(shard.keys)}
    if keys and places.keys().isdisjoint(keys):
        raise LabelStoreError(
            f"{path}: labels of other images: {shard.path} has rows for none of its keys, such as {keys[0]!r}. "
            "Annotate these images into another folder."
        )
    return np.array([places.get(key, -1) for key in keys], np.int64)


def _rows_in_bulk(info: LabelSet) -> int:
    """Rows of up to `BULK_BYTES` together, in whole chunks."""
    height, width = info.grid
    row_bytes = height * width * (info.k * (2 + class_dtype(info.num_classes).itemsize) + 2) + 16
    return max(1, BULK_BYTES // (row_bytes * ROWS_PER_CHUNK)) * ROWS_PER_CHUNK


def _zeros(num_samples: int, info: LabelSet) -> LabelBlock:
    cells = (num_samples, *info.grid)
    return LabelBlock(
        scores=np.zeros((*cells, info.k), np.float16),
        classes=np.zeros((*cells, info.k), class_dtype(info.num_classes)),
        tail=np.zeros(cells, np.float16),
        views=np.zeros((num_samples, 4), np.float32),
        problems={},
    )


def _rows_of(maps: ScoreMaps, rows: NDArray[np.int64]) -> _Values:
    return maps.scores[rows], maps.classes[rows], maps.tail[rows], maps.views[rows]


def _wrong_values(values: _Values, num_classes: int) -> Iterator[tuple[int, str]]:
    """Samples whose values no target can be made of, such as the fill values of rows that nobody wrote."""
    scores, classes, tail, views = values
    score_bits, tail_bits = scores.view(np.uint16), tail.view(np.uint16)
    checks = (
        ("scores are not finite", (score_bits & ~np.uint16(_FLOAT16_SIGN)) >= _FLOAT16_INFINITY),
        (f"class ids are not below {num_classes}", classes >= num_classes),
        ("a class is listed twice in a cell", _is_repeated(classes)),
        ("tails are not in 0..1", (tail_bits > _FLOAT16_ONE) & (tail_bits != _FLOAT16_SIGN)),
        ("the view is not finite, or not x0 < x1 and y0 < y1", ~_good_views(views)),
    )
    wrong = [(text, np.asarray(bad.any(axis=tuple(range(1, bad.ndim))))) for text, bad in checks]
    for index in np.flatnonzero(np.logical_or.reduce([bad for _, bad in wrong])).tolist():
        yield index, ", ".join(text for text, bad in wrong if bad[index])


def _is_repeated(classes: ClassIds) -> NDArray[np.bool_]:
    """Where a class of a cell is one of those before it, bool [m, H, W]."""
    repeated = np.zeros(classes.shape[:-1], np.bool_)
    for apart in range(1, classes.shape[-1]):
        repeated |= (classes[..., apart:] == classes[..., :-apart]).any(axis=-1)
    return repeated


def _good_views(views: NDArray[np.float32]) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(views).all(axis=1) & (views[:, :2] < views[:, 2:]).all(axis=1))
