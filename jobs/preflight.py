"""Labels and images that do not belong together train to nothing, silently and for days. Looked at before.

Three things are compared: the names of classes where both sides have names, what the labels say of some images with
the classes of those images, and the classes of the validation images with those of the model.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from jobs.build import Run
from jobs.config import RunConfig
from loaders.dataset import DataShard, FolderDataShard, ImageDataset
from tokenlabels.store import LabelStore, ShardReader
from tokenlabels.summary import image_level_class
from tokenlabels.trainer.evaluation import RealLabels

Item = TypeVar("Item")

NUM_SAMPLES, MAX_SHARDS = 2000, 16
_WAY_TO_ALL = 0.1


def check_run(run: Run, config: RunConfig) -> None:
    """Refuse data that do not belong together.

    Raises:
        ValueError: the reason, and what to do.
    """
    images, val = run.train.dataset, None if run.val is None else run.val.dataset
    if run.store is not None:
        _check_names(run.store, images)
        if config.data.supervision != "hard":
            _check_agreement(run.store, images, config.data.min_agreement)
    num_classes = run.train.num_classes
    assert num_classes is not None, "a run has targets"
    _check_highest("training", _spread(images.shards), num_classes)
    if val is None:
        if config.data.real is not None:
            raise ValueError("ReaL labels (--real) are of validation images; name them (--val)")
        return
    _check_val(images, val, num_classes)
    if config.data.real is not None:
        RealLabels(config.data.real).of(val.shards[0].index().keys[0])


def agreement(store: LabelStore, images: ImageDataset) -> tuple[float, int]:
    """Share of images whose label map, as a whole, names the image's own class, and the number of images.

    Up to 2,000 images are looked at, from the beginnings of shards that are spread over the data set: trees come class
    by class. Images without a class do not count.
    """
    label_shards = {shard.stem: shard for shard in store.shards}
    pairs = [(shard, label_shards[shard.stem]) for shard in images.shards if shard.stem in label_shards]
    looked_at = _spread(pairs)
    num_each = -(-NUM_SAMPLES // max(len(looked_at), 1))
    agrees = [_agrees(images_of, labels_of, num_each) for images_of, labels_of in looked_at]
    together = np.concatenate(agrees) if agrees else np.zeros(0, np.bool_)
    return float(together.mean()) if len(together) else 1.0, len(together)


def _spread(items: Sequence[Item]) -> list[Item]:
    """Up to 16 of them, evenly from the first to the last."""
    places = np.linspace(0, len(items) - 1, min(len(items), MAX_SHARDS)).round().astype(int)
    return [items[place] for place in np.unique(places).tolist()]


def _agrees(images: DataShard, labels: ShardReader, num_samples: int) -> NDArray[np.bool_]:
    maps = next(iter(labels.stream(num_samples)), None)
    if maps is None:
        return np.zeros(0, np.bool_)
    index = images.index()
    class_of = dict(zip(index.keys, index.labels.tolist(), strict=True))
    own = np.array([class_of.get(key, -1) for key in maps.keys])
    return np.asarray((image_level_class(maps) == own)[own >= 0])


def _check_agreement(store: LabelStore, images: ImageDataset, least: float | None) -> None:
    share, num_images = agreement(store, images)
    chance = 1 / store.info.num_classes
    least = chance + _WAY_TO_ALL * (1 - chance) if least is None else least
    if num_images and share < least:
        raise ValueError(
            f"{store.path}: of {num_images} images {share:.1%} have labels that name their own class, at least "
            f"{least:.1%} are expected: the labels number the classes differently, or are of other images, and "
            "training would end at 0 %. Annotate with a teacher of these classes, in this order "
            "(data.min_agreement=0 trains all the same)"
        )


def _check_names(store: LabelStore, images: ImageDataset) -> None:
    """The folders of a tree against the names in the label set. Other names for the same classes cannot be told."""
    folders, names = class_folders(images), store.info.class_names
    if folders is None or names is None or not set(folders) & set(names):
        return
    if tuple(folders) != names:
        pairs = enumerate(zip_longest(folders, names))
        place, (folder, name) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        raise ValueError(
            f"{store.path} has other classes than the images, or the same in another order: class {place} is "
            f"{name!r} in the labels and {folder!r} in the tree; annotate these images anew"
        )


def _check_val(images: ImageDataset, val: ImageDataset, num_classes: int) -> None:
    train_folders, val_folders = class_folders(images), class_folders(val)
    if train_folders is not None and val_folders is not None and train_folders != val_folders:
        others = sorted(set(train_folders) ^ set(val_folders))
        raise ValueError(
            f"training has {len(train_folders)} class folders and validation {len(val_folders)}, so that their numbers "
            f"differ: {', '.join(others[:5])} {'is' if len(others) == 1 else 'are'} in one of them only; give both all"
        )
    if _check_highest("validation", val.shards, num_classes) < 0:
        raise ValueError(f"{val.shards[0].path}: the validation images have no classes, so there is no accuracy")


def _check_highest(what: str, shards: Sequence[DataShard], num_classes: int) -> int:
    highest = max((int(shard.index().labels.max(initial=-1)) for shard in shards), default=-1)
    if highest >= num_classes:
        raise ValueError(
            f"the {what} images have class {highest}, but the model has the classes 0..{num_classes - 1}: another data "
            "set, or another number of classes?"
        )
    return highest


def class_folders(images: ImageDataset) -> list[str] | None:
    """Names of the class folders of a tree, in the order of their numbers; None for tars."""
    if not all(isinstance(shard, FolderDataShard) for shard in images.shards):
        return None
    names: dict[int, str] = {}
    for shard in images.shards:
        assert isinstance(shard, FolderDataShard)
        name = shard.path.rpartition("/")[2]
        first = names.setdefault(shard.shard.label, name)
        if first != name:
            raise ValueError(
                f"{shard.path}: class {shard.shard.label} is {name!r} here and {first!r} in another tree; trees that "
                "are used together need the same class folders"
            )
    return [names[label] for label in sorted(names)]
