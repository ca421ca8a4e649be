"""The evaluation loader: every image once, whatever the number of ranks, with nothing drawn at random."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from timm.data.constants import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import IterableDataset

from loaders.batch import TokenLabelBatch
from loaders.dataset import ImageDataset
from loaders.decode import DecoderName, Interpolation, get_decoder
from loaders.device import DeviceStage
from loaders.finish import FinishBatch, OnError
from loaders.options import choose_device, num_threads, ranks, refuse_worker_processes
from loaders.passes import run_pass
from loaders.plan import SequentialPlan
from loaders.prepare import prepare_batches
from loaders.rows import EvaluationCrop
from loaders.stats import LoaderStats
from loaders.stream import StreamConfig
from tokenlabels.checks import check_grid


class EvaluationLoader(IterableDataset[TokenLabelBatch]):
    """Batches of centre crops in the order of the shards; `batch.targets` and `batch.plan` are None.

    No sample is dropped or repeated: over all ranks each comes exactly once. Ranks take equally many steps (see
    `SequentialPlan`), in batches that can be some samples short of batch_size.

    Args:
        images: WebDataset tars or ImageFolder trees, as for `TokenLabelLoader`.
        crop_pct: the shorter side is resized to image_size / crop_pct before the centre is cut out.
        on_error: what becomes of a sample that cannot be used: "raise", or "skip", which logs it and makes its batch
            shorter; `stats().num_skipped` counts them. A batch of nothing else does not come at all, and its rank is a
            step short.

    The other arguments and the errors are those of `TokenLabelLoader`.
    """

    def __init__(
        self,
        images: str | Path | Sequence[str | Path],
        *,
        image_size: int | tuple[int, int] = 224,
        batch_size: int = 128,
        crop_pct: float = DEFAULT_CROP_PCT,
        rank: int | None = None,
        world_size: int | None = None,
        interpolation: Interpolation = "bicubic",
        decoder: DecoderName = "torchvision",
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        prefetch: int = 2,
        on_error: OnError = "raise",
        index_dir: str | Path | None = None,
    ) -> None:
        size = check_grid((image_size, image_size) if isinstance(image_size, int) else image_size, "image_size")
        self.device = choose_device(device)
        self.batch_size = batch_size
        self._rank, self._world_size = rank, world_size
        self._stream = StreamConfig(
            batch_size=batch_size,
            image_size=size,
            num_threads=num_threads(threads),
            prefetch=prefetch,
            pin_memory=self.device.type == "cuda",
            decoder=get_decoder(decoder),
            crop=EvaluationCrop(crop_pct, interpolation),
            finish=FinishBatch(on_error, keeps_size=False, num_classes=None),
        )
        self._stage = DeviceStage(self.device, mean, std)
        self.dataset = ImageDataset.find(images, None if index_dir is None else Path(index_dir))
        self._stats = LoaderStats()
        self._plan()  # refuses what does not fit before hours are spent

    def __iter__(self) -> Iterator[TokenLabelBatch]:
        """All batches of this rank, from the first."""
        refuse_worker_processes()
        self._stats = LoaderStats()
        source = partial(prepare_batches, self.dataset, self._plan(), None, None, num_labels=None, first_batch=0)
        for _, batch in run_pass(source, self._stream, self._stage, self._stats):
            yield batch

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._plan())

    def stats(self) -> LoaderStats:
        """Speed of the pass that began last, and where the time went."""
        return self._stats

    def _plan(self) -> SequentialPlan:
        rank, world_size = ranks(self._rank, self._world_size)
        return SequentialPlan(self.dataset.lengths, batch_size=self.batch_size, rank=rank, world_size=world_size)

    def __repr__(self) -> str:
        rank, world_size = ranks(self._rank, self._world_size)
        return f"EvaluationLoader({len(self.dataset)} images, {len(self)} batches on rank {rank} of {world_size})"
