"""The training loader: crops, labels and mixing together, in an order that is known before it begins."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import IterableDataset

from loaders.batch import TokenLabelBatch
from loaders.crop_targets import CropTargets
from loaders.dataset import ImageDataset
from loaders.decode import DecoderName, Interpolation, get_decoder
from loaders.device import DeviceStage, Mix, choose_mixing
from loaders.erasing import EraseMode
from loaders.finish import FinishBatch, OnError
from loaders.options import (
    Supervision,
    check_epoch,
    choose_device,
    choose_supervision,
    join_labels,
    num_threads,
    ranks,
    refuse_worker_processes,
    token_grid,
)
from loaders.passes import run_pass
from loaders.plan import EpochPlan, Last
from loaders.prepare import Randomness, prepare_batches
from loaders.rand_augment import RandAugment
from loaders.rows import RandomCrop
from loaders.state import Position
from loaders.stats import LoaderStats
from loaders.stream import Source, StreamConfig
from tokenlabels.checks import check_choice, check_count, check_grid, check_share
from tokenlabels.store import LabelStore, open_store
from tokenlabels.target_inputs import InterpolationRule

logger = logging.getLogger(__name__)

AugmentOrder = Literal["after crop", "before crop"]


class TokenLabelLoader(IterableDataset[TokenLabelBatch]):
    """Batches of images with their targets, one epoch per pass.

    The order is a function of (seed, epoch), what happens to an image of (seed, epoch, key), mixing of these and the
    keys of the batch: neither threads nor timing change anything. All ranks get equally many equal batches.

    Args:
        images: WebDataset tars or ImageFolder trees, by name, glob, braces or URL (`tokenlabels.images.find_shards`).
        labels: label set made of these images; None loads images alone.
        image_size: side in pixels, or (height, width).
        batch_size: samples per batch and rank.
        grid: (rows, columns) of the model's tokens, or the side of a square; None means patches of 16 pixels.
        supervision: "token", a target for every token and for the image; "relabel", the image-level target of the
            crop alone; "hard", the class of the data set, for which a label set tells the number of classes and nothing
            else. None is "token" with labels, and without them "hard" if num_classes is given.
        num_classes: for "hard" without labels; otherwise the label set knows.
        interpolate: rule from maps to targets, see `tokenlabels.token_targets`.
        seed: of order, augmentation and mixing.
        rank, world_size: None takes those of torch.distributed, where it is initialised.
        shuffle_shards: shards that are shuffled together. Labels of two such windows are held in memory.
        last: what becomes of samples that do not fill the last batch of all ranks: "drop", others in every epoch, or
            "repeat" some of the epoch's first.
        scale, ratio: ranges of RandomResizedCrop.
        hflip: probability of mirroring left-right.
        interpolation: of resizing.
        decoder: "torchvision" or "pillow".
        rand_augment: timm's string ("rand-m9-mstd0.5-inc1"), or None.
        augment_order: where its geometry acts, "after crop" (timm), or "before crop" on the whole image (published
            Token Labeling). Colours are those of the crop either way.
        erase_prob, erase_mode: Random Erasing.
        ignore_erased: leave erased tokens out of the dense loss.
        mix: "mixtoken" hands a plan to the model, which mixes its patch embedding; "cutmix", "mixup", "random" and
            "blockwise" mix the pixels here. Targets, where there are any, are mixed to match: do not give the plan to
            the loss again.
        mix_alpha, mix_prob: of the Beta distribution, and the probability that a sample is mixed.
        mixup_alpha: above 0 adds MixUp, with shares of Beta(mixup_alpha, mixup_alpha): with "cutmix" each sample is
            mixed by one of the two, with equal chance, as in timm; with "mixtoken" pixels and targets are mixed by
            MixUp, with the same mix_prob, before the plan of the batch (Token Labeling, Table 3). Not for other kinds.
        mix_targets: False leaves targets as they are, for models that find out the shares (`tokenlabels.align`).
        mean, std: of the normalisation.
        device: where batches go.
        threads: that read and decode; None means one per core.
        prefetch: batches ahead, at least 1.
        on_error: what becomes of a sample that cannot be used: "raise", or "skip", which logs it and puts another
            sample of the batch into its place.
        index_dir: where indexes of tars are cached; None means beside the tars, or in the user's cache directory.

    Raises:
        ValueError: arguments that are not allowed or do not fit each other, no images, labels of other images.
    """

    def __init__(
        self,
        images: str | Path | Sequence[str | Path],
        labels: str | Path | LabelStore | None = None,
        *,
        image_size: int | tuple[int, int] = 224,
        batch_size: int = 128,
        grid: int | tuple[int, int] | None = None,
        supervision: Supervision | None = None,
        num_classes: int | None = None,
        interpolate: InterpolationRule = "logits",
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle_shards: int = 8,
        last: Last = "drop",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        interpolation: Interpolation = "bicubic",
        decoder: DecoderName = "torchvision",
        rand_augment: str | None = None,
        augment_order: AugmentOrder = "after crop",
        erase_prob: float = 0.0,
        erase_mode: EraseMode = "pixel",
        ignore_erased: bool = False,
        mix: Mix | None = None,
        mix_alpha: float = 1.0,
        mix_prob: float = 1.0,
        mixup_alpha: float = 0.0,
        mix_targets: bool = True,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        prefetch: int = 2,
        on_error: OnError = "raise",
        index_dir: str | Path | None = None,
    ) -> None:
        size = check_grid((image_size, image_size) if isinstance(image_size, int) else image_size, "image_size")
        self.grid = token_grid(grid, size)
        self.device = choose_device(device)
        check_share("erase_prob", erase_prob)
        check_choice("augment_order", augment_order, AugmentOrder)
        check_choice("last", last, Last)
        check_count("shuffle_shards", shuffle_shards)
        ranks(rank, world_size)
        store = labels if isinstance(labels, LabelStore) or labels is None else open_store(labels)
        self.supervision, self.num_classes = choose_supervision(supervision, store, num_classes)
        has_maps = store is not None and self.supervision != "hard"
        self.batch_size, self.seed, self.shuffle_shards, self.last = batch_size, seed, shuffle_shards, last
        self._rank, self._world_size = rank, world_size
        before_crop = augment_order == "before crop"
        augment = None if rand_augment is None else RandAugment.parse(rand_augment)
        self._randomness = partial(
            Randomness,
            seed=seed,
            image_size=size,
            rand_augment=augment,
            erase_prob=erase_prob,
            augment_before_crop=before_crop,
        )
        self.stream_config = StreamConfig(
            batch_size=batch_size,
            image_size=size,
            num_threads=num_threads(threads),
            prefetch=prefetch,
            pin_memory=self.device.type == "cuda",
            decoder=get_decoder(decoder),
            crop=RandomCrop(scale, ratio, hflip, interpolation, before_crop),
            finish=FinishBatch(on_error, keeps_size=True, num_classes=self.num_classes if has_maps else None),
        )
        crop_targets = None
        if has_maps and self.num_classes is not None:
            rows = self.grid if self.supervision == "token" else None
            crop_targets = CropTargets(self.num_classes, rows, interpolate, not before_crop, self.device)
        self.stage = DeviceStage(
            device=self.device,
            mean=mean,
            std=std,
            crop_targets=crop_targets,
            num_classes=self.num_classes,
            mixing=choose_mixing(mix, self.grid, size, mix_alpha, mix_prob, batch_size, mixup_alpha),
            mix_targets=mix_targets,
            erase_mode=erase_mode,
            ignore_erased=ignore_erased,
        )
        # What follows reads files: all that can be refused without them has been.
        self.dataset = ImageDataset.find(images, None if index_dir is None else Path(index_dir))
        self._join = join_labels(store, self.dataset) if store is not None and has_maps else None
        self._stats = LoaderStats()
        self._epoch = self._batch = self._start = 0
        self._resumed = False
        self._pass: object = None  # the newest, which the position follows
        self._plan()  # refuses what does not fit before hours are spent

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass. The epoch that the loader is in already stays where it is.

        After `load_state_dict` another epoch gives the loaded place up, which is logged: begin the loop over epochs at
        ``state_dict()["epoch"]``.

        Without calls of this, every finished pass goes on with the next epoch.
        """
        check_epoch(epoch)
        if epoch != self._epoch and self._resumed and self._batch < len(self._plan()):
            logger.warning(
                "epoch %d is begun, and the loaded place in epoch %d, batch %d, given up; to go on from there, begin "
                "the loop over epochs at state_dict()['epoch']",
                epoch,
                self._epoch,
                self._batch,
            )
        if epoch != self._epoch or self._is_handed_out():
            self._epoch, self._batch, self._start, self._resumed = epoch, 0, 0, False
            self._pass = None

    def __iter__(self) -> Iterator[TokenLabelBatch]:
        """The batches of the epoch; after `load_state_dict` those that are left of it."""
        refuse_worker_processes()
        if self._is_handed_out():
            self.set_epoch(self._epoch + 1)
        if not self._resumed:
            self._batch = self._start = 0
        self._resumed = False
        epoch, self._stats = self._epoch, LoaderStats()
        this_pass = self._pass = object()
        for number, batch in run_pass(self.source(), self.stream_config, self.stage, self._stats):
            if self._pass is this_pass:
                self._batch = number + 1
            yield batch
        if self._pass is this_pass:
            self.set_epoch(epoch + 1)

    def source(self) -> Source:
        """What the threads of a pass work on, from the next batch of the epoch on."""
        return partial(
            prepare_batches,
            self.dataset,
            self._plan(),
            self._join,
            self._randomness(epoch=self._epoch),
            num_labels=self.num_classes if self._join is None else None,
            first_batch=self._batch,
        )

    def __len__(self) -> int:
        """Batches of this rank in the whole epoch; in what is left of it after resuming with other ranks."""
        return len(self._plan())

    def state_dict(self) -> dict[str, Any]:
        """Where the run is: the batch after the one that was handed out last. For `torch.save` or JSON."""
        return self._position().state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the very next batch.

        With another number of ranks than before, what is left of the epoch is shared out among them anew.

        Raises:
            ValueError: the state is of other images, another batch size or another way of shuffling.
        """
        saved = Position.from_state(state)
        present = self._position()
        saved.refuse_others(present)
        before = self._plan(saved)
        if saved.batch > len(before):
            raise ValueError(
                f"the state is of batch {saved.batch}, but with last={self.last!r} {saved.world_size} ranks have "
                f"{len(before)} batches; use the same `last`, or begin an epoch anew with set_epoch"
            )
        self.seed, self._epoch, self._batch, self._start = saved.seed, saved.epoch, saved.batch, saved.start
        self._randomness.keywords["seed"] = saved.seed
        if saved.world_size != present.world_size:
            self._start, self._batch = before.consumed(saved.batch), 0
        self._resumed, self._pass = True, None

    def stats(self) -> LoaderStats:
        """Speed of the pass that began last, and where the time went."""
        return self._stats

    def _is_handed_out(self) -> bool:
        """Whether the pass gave its last batch. Frameworks that count batches do not ask for the end behind it."""
        return not self._resumed and 0 < self._batch == len(self._plan())

    def _ranks(self) -> tuple[int, int]:
        return ranks(self._rank, self._world_size)

    def _plan(self, position: Position | None = None) -> EpochPlan:
        """The plan of this rank from here, or of all that a position says, of its first rank."""
        rank, here = (self._ranks()[0], self._position()) if position is None else (0, position)
        return EpochPlan(
            self.dataset.lengths,
            seed=here.seed,
            epoch=here.epoch,
            shuffle_shards=here.shuffle_shards,
            batch_size=here.batch_size,
            rank=rank,
            world_size=here.world_size,
            start=here.start,
            last=self.last,
        )

    def _position(self) -> Position:
        return Position(
            seed=self.seed,
            epoch=self._epoch,
            batch=self._batch,
            start=self._start,
            batch_size=self.batch_size,
            world_size=self._ranks()[1],
            shuffle_shards=self.shuffle_shards,
            dataset=self.dataset.digest,
        )

    def __repr__(self) -> str:
        rank, world_size = self._ranks()
        return (
            f"TokenLabelLoader({len(self.dataset)} images in {len(self.dataset.shards)} shards, "
            f"{len(self)} batches of {self.batch_size} on rank {rank} of {world_size}, supervision {self.supervision}, "
            f"epoch {self._epoch}, next batch {self._batch})"
        )
