"""What the loaders' arguments mean together, refused before hours are spent where they do not fit."""

import logging
import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import distributed
from torch.utils.data import get_worker_info

from loaders.dataset import ImageDataset
from loaders.label_windows import LabelJoin
from tokenlabels.checks import Grid, check_choice, check_count, check_grid
from tokenlabels.store import LabelStore

logger = logging.getLogger(__name__)

Supervision = Literal["token", "relabel", "hard"]

PATCH_SIZE_PX = 16

# A teacher that agrees with the data set this rarely has other classes, or the same in another order.
SUSPICIOUS_AGREEMENT = 0.05


def token_grid(grid: int | Sequence[int] | None, image_size: Grid) -> Grid:
    """Rows and columns of tokens; None means patches of 16 pixels.

    Raises:
        ValueError: tokens would not be whole pixels.
    """
    if grid is None:
        rows, columns = (side // PATCH_SIZE_PX for side in image_size)
        if rows * PATCH_SIZE_PX != image_size[0] or columns * PATCH_SIZE_PX != image_size[1]:
            raise ValueError(f"images of {image_size} pixels have no whole patches of {PATCH_SIZE_PX}; give grid=")
        return rows, columns
    rows, columns = check_grid((grid, grid) if isinstance(grid, int) else grid)
    if image_size[0] % rows or image_size[1] % columns:
        raise ValueError(
            f"grid {(rows, columns)} does not fit images of {image_size} pixels: tokens must be whole pixels; "
            "give the grid of the model's tokens at this size"
        )
    return rows, columns


def choose_device(device: str | torch.device) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: it is neither the CPU nor a CUDA device of this machine.
    """
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:<number>', got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or a CUDA device, got {device!r}; move batches elsewhere from the CPU")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}, but torch sees {torch.cuda.device_count()} CUDA devices here")
    return chosen


def choose_supervision(
    supervision: Supervision | None, store: LabelStore | None, num_classes: int | None
) -> tuple[Supervision | None, int | None]:
    """What targets are made of, and how many classes they have. None makes none."""
    if num_classes is not None:
        check_count("num_classes", num_classes)
    if supervision is None:
        supervision = "token" if store is not None else None if num_classes is None else "hard"
    if supervision is None:
        return None, None
    check_choice("supervision", supervision, Supervision)
    if store is None:
        if supervision != "hard":
            raise ValueError(f"supervision {supervision!r} needs labels; give the folder of a label set")
        if num_classes is None:
            raise ValueError("supervision 'hard' without labels needs num_classes")
        return supervision, num_classes
    if num_classes not in (None, store.info.num_classes):
        raise ValueError(
            f"num_classes is {num_classes}, but {store.path} has labels of {store.info.num_classes} classes; "
            "leave it out"
        )
    return supervision, store.info.num_classes


def join_labels(store: LabelStore, dataset: ImageDataset) -> LabelJoin:
    """Pair image shards with their labels.

    Raises:
        LabelStoreError: labels are missing, or of other images.
    """
    shards = dataset.shards
    join = LabelJoin(store, [shard.stem for shard in shards], [shard.path for shard in shards])
    join.check_counts(dataset.lengths)
    others = join.other_sizes([shard.size_bytes if shard.path.endswith(".tar") else None for shard in shards])
    if others:
        logger.warning(
            "%s: %d of %d tars have another size than when their labels were made (the first is %s); "
            "have the images in them changed?",
            store.path,
            len(others),
            len(shards),
            others[0],
        )
    agreement = join.agreement()
    if agreement is not None and agreement < SUSPICIOUS_AGREEMENT:
        logger.warning(
            "%s: the teacher's best class is the image's own class in %.1f %% of the images only; "
            "are its classes those of the data set, in the same order?",
            store.path,
            100 * agreement,
        )
    return join


def check_epoch(epoch: object) -> None:
    """Refuse what is no number of an epoch, counted from 0."""
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise ValueError(f"epoch must be an integer of at least 0, got {epoch!r}")


def ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process among those that train together: as given, or as torch.distributed says, or alone."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"give both rank and world_size, or none; got {rank} and {world_size}")
    if rank is not None and world_size is not None:
        return rank, world_size
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def num_threads(threads: int | None) -> int:
    """Threads that decode: as given, or one per core that this process may use."""
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    check_count("threads", threads)
    return threads


def refuse_worker_processes() -> None:
    """Every worker process of a `torch.utils.data.DataLoader` would read all samples; one at the most makes sense."""
    info = get_worker_info()
    if info is not None and info.num_workers > 1:
        raise ValueError(
            f"the DataLoader has {info.num_workers} worker processes, and each would read every sample; the loader has "
            "threads of its own: use DataLoader(loader, batch_size=None, num_workers=0)"
        )
