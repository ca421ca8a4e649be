"""From the plan of an epoch to batches that threads can fill: open shards, labels, random numbers."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loaders.batch import HostBatch
from loaders.crops import NUM_CROP_UNIFORMS
from loaders.dataset import ImageDataset
from loaders.erasing import NUM_UNIFORMS as NUM_ERASING_UNIFORMS
from loaders.erasing import draw_boxes
from loaders.label_windows import LabelBlock, LabelJoin
from loaders.plan import EpochPlan, SequentialPlan, Window
from loaders.rand_augment import RandAugment
from loaders.randomness import hash_of, sample_hashes, uniforms
from loaders.rows import PreparedBatch, sample_error
from loaders.shard_files import ShardFile

Draw = Callable[[PreparedBatch], None]
"""Fills in what is random about a batch."""


@dataclass(frozen=True)
class Randomness:
    """What is random about the samples of an epoch: a function of (seed, epoch, name of the shard, key) alone.

    Attributes:
        seed, epoch: of the run.
        image_size: (S_h, S_w) in pixels.
        rand_augment: RandAugment, or None.
        erase_prob: probability that a box of an image is erased.
        augment_before_crop: see `RandomCrop`.
    """

    seed: int
    epoch: int
    image_size: tuple[int, int]
    rand_augment: RandAugment | None
    erase_prob: float
    augment_before_crop: bool

    def __call__(self, batch: PreparedBatch) -> None:
        """Draw everything that needs no pixels."""
        host = batch.host
        host.hash = hash_of(self.seed, self.epoch, "batch", *batch.names)
        # One number more than the crop takes, for the flip.
        batch.uniforms = self._uniforms(batch, "crop", NUM_CROP_UNIFORMS + 1)
        if self.rand_augment is not None:
            numbers = torch.from_numpy(self._uniforms(batch, "augment", self.rand_augment.num_uniforms))
            host.augment = self.rand_augment.draw(numbers)
            host.is_warped = host.augment.is_geometric.numpy()
            if not self.augment_before_crop and host.is_warped.any():
                host.warp = host.augment.affine(self.image_size).double().numpy()
        if self.erase_prob > 0:
            numbers = torch.from_numpy(self._uniforms(batch, "erase", NUM_ERASING_UNIFORMS))
            host.erased = draw_boxes(numbers, self.erase_prob, self.image_size)

    def _uniforms(self, batch: PreparedBatch, purpose: str, num: int) -> NDArray[np.float64]:
        return uniforms(sample_hashes(batch.names, self.seed, self.epoch, purpose), num)


class OpenWindow:
    """The shards and labels of a window, held until the last batch with samples of it is finished.

    Labels are read apart and waited for only when a batch is full: decoding can begin without them.

    Attributes:
        samples: as in `Window`.
        num_batches: how many batches with samples of it are still to be finished.
        files, stems: its shards, open, and their names, by their number.
    """

    def __init__(self, dataset: ImageDataset, window: Window, join: LabelJoin | None) -> None:
        self.samples = window.samples
        self.num_batches = 0
        self.files: dict[int, ShardFile] = {}
        self.stems: dict[int, str] = {}
        self._window, self._join = window, join
        self._maps: Future[LabelBlock | None] = Future()
        try:
            for shard in np.unique(window.samples[:, 0]).tolist():
                self.files[shard] = dataset.shards[shard].open()
                self.stems[shard] = dataset.shards[shard].stem
        except BaseException:
            self.close()
            raise
        self._keys = {shard: file.index.keys for shard, file in self.files.items()}

    def read_labels(self) -> None:
        """Read the labels of all samples, for those who wait in `maps`; what goes wrong is raised there."""
        try:
            self._maps.set_result(None if self._join is None else self._join.read(self._window, self._keys.__getitem__))
        except BaseException as error:
            self._maps.set_exception(error)

    def give_up_labels(self) -> None:
        """Let nobody wait for labels that will not be read."""
        self._maps.cancel()

    def maps(self) -> LabelBlock | None:
        """Labels of all samples, or None without labels; waits for them.

        Raises:
            Exception: what kept them from being read.
        """
        return self._maps.result()

    def close(self) -> None:
        """Close the files; the labels go when nobody holds them."""
        for file in self.files.values():
            file.close()
        self.files.clear()


@dataclass(eq=False)
class WindowedBatch:
    """A prepared batch.

    Attributes:
        batch: its rows.
        windows: where its samples are from.
        spans: the samples (start, stop) of each window.
    """

    batch: PreparedBatch
    windows: tuple[OpenWindow, ...]
    spans: tuple[tuple[int, int], ...]

    def attach_labels(self) -> None:
        """Give every row its map; waits until the labels are there.

        Raises:
            Exception: what kept them from being read.
        """
        parts = [(window.maps(), span) for window, span in zip(self.windows, self.spans, strict=True)]
        blocks = [maps.slice(*span) for maps, span in parts if maps is not None]
        if not blocks:
            return
        host = self.batch.host
        host.maps = blocks[0] if len(blocks) == 1 else LabelBlock.concatenate(blocks)
        for row, reason in host.maps.problems.items():
            host.problems[row] = sample_error(self.batch.files[row].path, host.keys[row], "labels", reason)


def prepare_batches(
    dataset: ImageDataset,
    plan: EpochPlan | SequentialPlan,
    join: LabelJoin | None,
    draw: Draw | None,
    *,
    num_labels: int | None,
    first_batch: int,
    on_open: Callable[[OpenWindow], None],
) -> Iterator[list[WindowedBatch]]:
    """The batches of an epoch, window by window: with every window those that it completes.

    Args:
        plan: the order.
        join: where labels come from, or None.
        draw: what is random, or None.
        num_labels: classes of the data set's own labels where the targets are made of them, or None.
        first_batch: where to begin.
        on_open: told of every window, before its batches come.
    """
    sizes = plan.batch_sizes[first_batch:]
    parts: list[tuple[OpenWindow, int, int]] = []
    number = pending = 0
    for window in plan.windows(first_batch):
        opened = OpenWindow(dataset, window, join)
        on_open(opened)
        ready: list[WindowedBatch] = []
        start = 0
        while start < len(opened.samples):
            taken = min(sizes[number] - pending, len(opened.samples) - start)
            parts.append((opened, start, start + taken))
            opened.num_batches += 1
            start, pending = start + taken, pending + taken
            if pending == sizes[number]:
                ready.append(_batch_of(parts, first_batch + number, num_labels, draw))
                number, pending, parts = number + 1, 0, []
        yield ready
    assert not parts, "plans end with whole batches"


def _batch_of(
    parts: list[tuple[OpenWindow, int, int]], number: int, num_labels: int | None, draw: Draw | None
) -> WindowedBatch:
    keys: list[str] = []
    labels: list[int] = []
    files: list[ShardFile] = []
    rows: list[int] = []
    names: list[str] = []
    for window, start, stop in parts:
        for shard, row in window.samples[start:stop].tolist():
            file = window.files[shard]
            keys.append(file.index.keys[row])
            labels.append(int(file.index.labels[row]))
            files.append(file)
            rows.append(row)
            names.append(f"{window.stems[shard]}/{keys[-1]}")
    num = len(keys)
    host = HostBatch(
        number=number,
        keys=tuple(keys),
        labels=np.array(labels, np.int64),
        boxes=np.zeros((num, 4)),
        flip=np.zeros(num, np.bool_),
        warp=np.tile(np.eye(2, 3), (num, 1, 1)),
        is_warped=np.zeros(num, np.bool_),
        hash=0,
    )
    batch = PreparedBatch(host, files, rows, names, np.zeros((num, 0)))
    for row, label in enumerate(labels):
        if num_labels is not None and not 0 <= label < num_labels:
            what = "no class index in its cls or json" if label < 0 else f"class {label}"
            reason = f"{what}, but targets are made of classes 0..{num_labels - 1}"
            host.problems[row] = sample_error(files[row].path, keys[row], "label", reason)
    if draw is not None:
        draw(batch)
    windows, spans = tuple(window for window, _, _ in parts), tuple((start, stop) for _, start, stop in parts)
    return WindowedBatch(batch, windows, spans)
