"""Images and labels read together, for training. Two doors: `TokenLabelLoader`, and WebDataset `stages`.

The main path, in the order of the data:

dataset.py, index.py, shard_files.py  which shards there are, what is in them, and the bytes of a sample
plan.py, randomness.py                the order of an epoch, and all random numbers, from (seed, epoch, key)
label_windows.py                      the labels of the shards that are being read
prepare.py                            windows of open shards -> batches that wait to be filled
stream.py, rows.py                    threads fill a ring of uint8 buffers, row by row
decode.py, crops.py                   encoded bytes -> cropped pixels, and the box that was cut out
finish.py                             a full batch: rows that cannot be used, the classes of its maps
device.py, crop_targets.py, upload.py normalise, mix; targets of the crops; copies that wait for nothing
rand_augment.py, augment_ops.py       RandAugment, drawn on the CPU from timm's strings
color_ops.py, warp.py, erasing.py     augmentation, applied on the device
passes.py                             all of this as one pass over the data

loader.py, evaluation.py              the two loaders; options.py, state.py, stats.py, batch.py belong to them
replay.py                             a batch of some epoch again, seen from one of its samples
stages.py                             the same as stages of a WebDataset pipeline
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders.batch import SampleError, TokenLabelBatch
    from loaders.evaluation import EvaluationLoader
    from loaders.loader import TokenLabelLoader
    from loaders.stats import LoaderStats

__all__ = ["EvaluationLoader", "LoaderStats", "SampleError", "TokenLabelBatch", "TokenLabelLoader"]

_HOMES = {
    "EvaluationLoader": "evaluation",
    "LoaderStats": "stats",
    "SampleError": "batch",
    "TokenLabelBatch": "batch",
    "TokenLabelLoader": "loader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loaders' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"loaders.{_HOMES[name]}"), name)
