"""A label set looked at as a whole: one pass over its maps, then what stands out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenlabels.audit.box_files import Boxes
from tokenlabels.audit.boxes import BoxMeasures, Localisation, measure_boxes
from tokenlabels.audit.classes import ClassAudit, Confusion, audit_classes, confusions
from tokenlabels.audit.duplicates import Hashes, copies, hashes_of, identical_images, map_hashes
from tokenlabels.audit.findings import (
    DUPLICATE_KEY,
    IDENTICAL_IMAGES,
    IDENTICAL_MAPS,
    KINDS,
    NEED_CLASSES,
    UNUSABLE,
    Finding,
    ImageFindings,
    about_classes,
    about_copies,
    about_maps,
)
from tokenlabels.audit.images import Images
from tokenlabels.audit.measures import ImageMeasures, measure
from tokenlabels.store import LabelStore, ShardReader


@dataclass(frozen=True, eq=False)
class Audit:
    """What was found in a label set.

    Attributes:
        shards: of the set, in its order.
        starts: int64 [number of shards], first row of each in `measures`.
        measures: of all images, in the order of the set.
        counts: number of findings by kind, of all `KINDS` in their order; None for one that was not looked for, as
            the data set's own classes or the images were not given.
        findings: in the same order; of every kind no more than were asked for, so `counts` tells what is left out.
        classes: all classes of the teacher, by id.
        confusions: pairs of different classes, the most frequent first.
        boxes: of all images, in the order of the set; None where boxes were not asked for, as `localisation`.
        localisation: over all images.
    """

    shards: tuple[ShardReader, ...]
    starts: NDArray[np.int64]
    measures: ImageMeasures
    counts: Mapping[str, int | None]
    findings: tuple[Finding, ...]
    classes: tuple[ClassAudit, ...]
    confusions: tuple[Confusion, ...]
    boxes: BoxMeasures | None
    localisation: Localisation | None

    def locate(self, row: int) -> tuple[ShardReader, int]:
        """The shard of a row of `measures`, and the row in it."""
        return _locate(self.shards, self.starts, row)

    def key(self, row: int) -> str:
        """The key of a row of `measures`."""
        shard, row_in_shard = self.locate(row)
        return shard.keys[row_in_shard]

    @property
    def agreement(self) -> float | None:
        """Share of the images with a class whose most probable class it is; None without such images."""
        num_labelled = int(self.measures.is_labelled.sum())
        return int(self.measures.agrees.sum()) / num_labelled if num_labelled else None

    @property
    def is_usable(self) -> bool:
        """Whether nothing was found that makes the labels unfit to train with, see `UNUSABLE`."""
        return not any(self.counts[kind] for kind in UNUSABLE)


def audit_store(
    store: LabelStore,
    labels_of: Callable[[ShardReader], NDArray[np.int64]],
    names: Sequence[str],
    *,
    images: Images | None = None,
    boxes_of: Callable[[ShardReader], Sequence[Boxes]] | None = None,
    num_listed: int | None = None,
    on_shard: Callable[[str], None] = lambda _: None,
) -> Audit:
    """Audit a label set. Reads 256 maps at a time.

    Args:
        store: the set, not empty.
        labels_of: the data set's own class of every row of a shard, int64 [n]; -1 where there is none.
        names: of the classes, by id.
        images: to find copies among them, see `identical_images`; None to look at the maps alone.
        boxes_of: boxes of the own class of every row of a shard, see `boxes_from_file`; None without.
        num_listed: how many findings of every kind are kept; None keeps all.
        on_shard: called with the stem before a shard is read, and once more before its `images` are.

    Raises:
        ValueError: the set is empty, or no box belongs to any of its images.
        LabelStoreError: a shard is damaged.
    """
    if not len(store):
        raise ValueError(f"{store.path} has no labels yet: nothing to audit")
    readings = [_read(shard, labels_of, boxes_of, on_shard) for shard in store.shards]
    measures = ImageMeasures.concatenate([part for reading in readings for part in reading.measures])
    boxes = None if boxes_of is None else BoxMeasures.concatenate([part for r in readings for part in r.boxes])
    if boxes is not None and not boxes.is_boxed.any():
        raise ValueError(f"none of the boxes is of an image of {store.path} that has a class; give its own boxes")
    classes = audit_classes(measures, names, boxes)
    found = [*about_maps(measures, names), *_copies(store.shards, readings, measures, images, on_shard)]
    by_kind = {kind: [finding for finding in about_classes(classes) if finding.kind == kind] for kind in KINDS}
    starts = _starts(store.shards)
    for of_images in found:
        rows = of_images.rows[:num_listed].tolist()
        by_kind[of_images.kind] = [_finding(store.shards, starts, of_images, row) for row in rows]
    counts: dict[str, int | None] = {kind: len(findings) for kind, findings in by_kind.items()}
    counts |= {of_images.kind: len(of_images.rows) for of_images in found}
    counts |= dict.fromkeys(() if measures.is_labelled.any() else NEED_CLASSES)
    counts |= dict.fromkeys(() if images is not None else (IDENTICAL_IMAGES,))
    return Audit(
        store.shards,
        starts,
        measures,
        counts,
        tuple(finding for findings in by_kind.values() for finding in findings[:num_listed]),
        classes,
        confusions(measures, len(names)),
        boxes,
        None if boxes is None else Localisation.of(boxes, np.ones(len(measures), np.bool_)),
    )


@dataclass(frozen=True)
class _Reading:
    """What one pass over a shard leaves, 256 rows a part; `boxes` is empty without boxes."""

    measures: list[ImageMeasures]
    boxes: list[BoxMeasures]
    keys: Hashes
    maps: Hashes


def _read(
    shard: ShardReader,
    labels_of: Callable[[ShardReader], NDArray[np.int64]],
    boxes_of: Callable[[ShardReader], Sequence[Boxes]] | None,
    on_shard: Callable[[str], None],
) -> _Reading:
    on_shard(shard.stem)
    labels, boxes = labels_of(shard), boxes_of(shard) if boxes_of is not None else None
    measures: list[ImageMeasures] = []
    measured_boxes: list[BoxMeasures] = []
    hashes = [np.zeros(0, np.uint64)]
    start = 0
    for maps in shard.stream():
        rows = slice(start, start + len(maps))
        measures.append(measure(maps, labels[rows], shard.info.num_classes))
        if boxes is not None:
            measured_boxes.append(measure_boxes(maps, measures[-1], boxes[rows]))
        hashes.append(map_hashes(maps))
        start = rows.stop
    return _Reading(measures, measured_boxes, hashes_of(key.encode() for key in shard.keys), np.concatenate(hashes))


def _copies(
    shards: Sequence[ShardReader],
    readings: Sequence[_Reading],
    measures: ImageMeasures,
    images: Images | None,
    on_shard: Callable[[str], None],
) -> Iterator[ImageFindings]:
    """Keys, images and maps that are there twice. Of maps those alone that nothing else explains."""
    starts = _starts(shards)

    def place(row: int) -> str:
        shard, row_in_shard = _locate(shards, starts, row)
        return f"{shard.keys[row_in_shard]} of {shard.stem}"

    keys = np.concatenate([reading.keys for reading in readings])
    yield about_copies(DUPLICATE_KEY, copies(keys, np.arange(len(keys))), place)
    same_images = {} if images is None else identical_images(shards, measures.predicted, images, on_shard)
    yield about_copies(IDENTICAL_IMAGES, same_images, place)
    maps = np.concatenate([reading.maps for reading in readings])
    telling = np.flatnonzero(~measures.is_broken & ~measures.is_constant)
    same_maps = copies(maps[telling], telling)
    unexplained = {copy: first for copy, first in same_maps.items() if copy not in same_images}
    yield about_copies(IDENTICAL_MAPS, unexplained, place)


def _finding(shards: Sequence[ShardReader], starts: NDArray[np.int64], found: ImageFindings, row: int) -> Finding:
    shard, row_in_shard = _locate(shards, starts, row)
    return Finding(found.kind, shard.keys[row_in_shard], shard.stem, found.detail(row))


def _starts(shards: Sequence[ShardReader]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, shards)])[:-1]


def _locate(shards: Sequence[ShardReader], starts: NDArray[np.int64], row: int) -> tuple[ShardReader, int]:
    number = int(np.searchsorted(starts, row, side="right")) - 1
    return shards[number], row - int(starts[number])
