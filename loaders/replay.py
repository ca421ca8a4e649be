"""A batch of some epoch again, exactly as training got it: the crop of an image, who it was mixed with, its targets.

The loader goes on at that batch as it does after a checkpoint, and reads no other. What is drawn for an image before
any mixing (crop, flip, RandAugment, erasing) does not depend on the mixing, so that both images are known unmixed too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from loaders.batch import HostBatch, TokenLabelBatch
from loaders.dataset import ImageDataset
from loaders.device import DeviceStage
from loaders.loader import TokenLabelLoader
from loaders.options import check_epoch
from loaders.plan import EpochPlan
from loaders.prepare import OpenWindow, WindowedBatch
from loaders.state import Position
from loaders.stats import LoaderStats
from loaders.stream import BatchStream, Source
from tokenlabels.mixing import MixPlan
from tokenlabels.nearest import nearest_keys

Sample = tuple[int, int]
"""Number of the shard, and row in it."""


@dataclass(frozen=True)
class Place:
    """Where a sample comes in an epoch.

    Attributes:
        rank: of the process that gets it.
        batch: number of the batch in the epoch of that rank, from 0.
        row: of the sample in the batch.
    """

    rank: int
    batch: int
    row: int


@dataclass(frozen=True, eq=False)
class Replay:
    """A batch of an epoch, seen from one of its samples.

    Attributes:
        sample: its shard and its row in there, see `find_sample`.
        place: where it comes in the epoch.
        loader: that the batch is of.
        batch: as training gets it, bit for bit.
        unmixed: the same batch before mixing; its targets are those of every image itself.
        mixup: the plan of the MixUp that comes before MixToken (`mixup_alpha`), or None.
    """

    sample: Sample
    place: Place
    loader: TokenLabelLoader
    batch: TokenLabelBatch
    unmixed: TokenLabelBatch
    mixup: MixPlan | None

    @property
    def partner(self) -> int | None:
        """Row of the sample that this one is mixed with; None where it is not mixed."""
        return partner_of(self.batch.plan, self.place.row)

    def mixed_image(self) -> Tensor:
        """float32 [3, S_h, S_w], normalised: what the model gets.

        MixToken mixes behind the patch embedding; here the pixels are put together in the same way.
        """
        row, partner = self.place.row, self.partner
        if self.batch.plan is None or self.batch.is_mixed or partner is None:
            return self.batch.images[row]
        pair = [row, partner]
        swapped = torch.tensor([1, 0], device=self.batch.images.device)
        return MixPlan(swapped, self.batch.plan.own[pair]).mix(self.batch.images[pair])[0]


def partner_of(plan: MixPlan | None, row: int) -> int | None:
    """The row that a plan mixes this one with; None where it keeps all of itself."""
    return None if plan is None or bool((plan.own[row] == 1).all()) else int(plan.partner[row])


def replay(make_loader: Callable[..., TokenLabelLoader], key: str, epoch: int, *, world_size: int = 1) -> Replay:
    """The first batch of an epoch that has the sample in it.

    It is that of a run that went through the whole epoch with this number of ranks. A run that was taken up in the
    middle of it with another number shared the rest out anew, which is not replayed.

    Args:
        make_loader: called with `rank` and `world_size`; makes the loader of the run, such as
            ``partial(TokenLabelLoader, images, labels, seed=0)``. Noise of erasing and mixing come from the generator
            of its device: a run on CUDA is replayed on CUDA.
        key: WebDataset key.
        epoch: from 0.
        world_size: number of ranks of the run.

    Raises:
        ValueError: see `find_sample` and `find_in_epoch`; the sample, or another one of its batch, cannot be used.
    """
    loader = make_loader(rank=0, world_size=world_size)
    sample = find_sample(loader.dataset, key)
    place = find_in_epoch(loader, sample, epoch)
    if place.rank:
        loader = make_loader(rank=place.rank, world_size=world_size)
    loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batch": place.batch, "start": 0})
    host = _next_host_batch(loader)
    if host.keys[place.row] != key:
        problems = "; ".join(map(str, host.skipped))
        raise ValueError(f"{key!r} cannot be used, and another sample takes its place: {problems}")
    batch = loader.stage(host)
    unmixed = batch if batch.plan is None else replace(loader.stage, mixing=None, mix_targets=True)(host)
    return Replay(sample, place, loader, batch, unmixed, _mixup_before_tokens(loader.stage, host))


def find_in_epoch(loader: TokenLabelLoader, sample: Sample, epoch: int) -> Place:
    """Where a sample comes in an epoch of all ranks together; with last="repeat", for the first time.

    Raises:
        ValueError: the epoch leaves the sample out, or is none.
    """
    check_epoch(epoch)
    run = Position.from_state(loader.state_dict())
    # One rank that takes the batches of all ranks together sees the epoch in its whole order.
    plan = EpochPlan(
        loader.dataset.lengths,
        seed=run.seed,
        epoch=epoch,
        shuffle_shards=run.shuffle_shards,
        batch_size=run.world_size * run.batch_size,
        last=loader.last,
    )
    num_before = 0
    for window in plan.windows():
        found = np.flatnonzero((window.samples == sample).all(axis=1))
        if found.size:
            batch, position = divmod(num_before + int(found[0]), plan.batch_size)
            rank, row = divmod(position, run.batch_size)
            return Place(rank, batch, row)
        num_before += len(window)
    shard, index = sample
    key = loader.dataset.shards[shard].index().keys[index]
    raise ValueError(
        f"epoch {epoch} leaves {key!r} out: its {len(plan)} batches of {plan.batch_size} are {num_before} of "
        f"{plan.num_samples} samples, others in every epoch; choose another epoch"
    )


def find_sample(dataset: ImageDataset, key: str) -> Sample:
    """The shard that has a sample, and its row in there. Reads the indexes of all shards.

    Raises:
        ValueError: no sample has the key, or samples of two shards have it.
    """
    found: Sample | None = None
    for number, shard in enumerate(dataset.shards):
        keys = shard.index().keys
        if key in keys:
            if found is not None:
                raise ValueError(
                    f"{key!r} is in {dataset.shards[found[0]].path} and in {shard.path}; rename it in one of them"
                )
            found = number, keys.index(key)
    if found is None:
        nearest = nearest_keys(key, (other for shard in dataset.shards for other in shard.index().keys))
        raise ValueError(f"the images have no key {key!r}; near it are {', '.join(nearest) or 'none'}")
    return found


def _next_host_batch(loader: TokenLabelLoader) -> HostBatch:
    source = loader.source()

    def only_first(*, on_open: Callable[[OpenWindow], None]) -> Iterator[list[WindowedBatch]]:
        for batches in source(on_open=on_open):
            yield batches[:1]
            if batches:
                return

    only: Source = only_first
    stream = BatchStream(only, loader.stream_config, LoaderStats())
    try:
        host = next(stream)
    finally:
        stream.close()
    if host.problems:
        raise host.problems[min(host.problems)]
    return host


def _mixup_before_tokens(stage: DeviceStage, host: HostBatch) -> MixPlan | None:
    """MixUp that is drawn before MixToken draws the same when it is alone."""
    mixing = stage.mixing
    if mixing is None or mixing.kind != "mixtoken" or mixing.mixup_alpha == 0:
        return None
    alone = replace(mixing, kind="mixup", alpha=mixing.mixup_alpha, mixup_alpha=0.0)
    return replace(stage, mixing=alone)(host).plan
