"""Dense token labels for vision transformers: the values, the maths and the store.

A convolutional teacher is run once over a training set and its k best classes are kept at every position of its
last feature map. This package holds what everybody shares:

types.py           ScoreMap and ScoreMaps, the values that travel
geometry.py        the conventions; which part of an image a map covers (with boxes.py and affine.py)
targets.py         from maps to the targets of crops (with target_inputs.py, vocabulary.py, resample.py and rules.py)
sparse_targets.py  TokenTargets, the value that comes out
mixing.py          MixPlan: MixToken, CutMix, MixUp and patches, for images and targets (with masks.py)
losses.py          the token-labelling loss (with cross_entropy.py)
checks.py          what the maths asks of tensors; precision.py keeps it in full precision
models/            LV-ViT, and token classifiers for any timm model
trainer/           the training loop
tars.py            WebDataset tars: one header scan into keys, offsets and sizes
images/            image shards, tars and ImageFolder trees alike, and decoding them
store/             label sets on disk: schema, writer, reader, verification
summary.py         what `tokenlabels inspect` prints
views/             pictures of labels, for files and terminals
audit/             what stands out in a label set, and where two sets differ
report/            a label set as one page of HTML
class_names.py     names of classes, from whatever file people have them in
files.py           durable steps on a file system
differences.py     what two records differ in; nearest.py, which keys look like one that is not there
doctor.py          what `tokenlabels doctor` prints
measure.py         how the benchmarks measure
cli/               the command line

`annotate` writes label sets, `loaders` reads them beside the images; neither is imported from here.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tokenlabels.types import ScoreMap, ScoreMaps

if TYPE_CHECKING:
    from tokenlabels.losses import chunked_token_label_loss, token_label_loss
    from tokenlabels.mixing import MixPlan
    from tokenlabels.sparse_targets import TokenTargets
    from tokenlabels.store import LabelStore, open_store
    from tokenlabels.targets import affine_token_targets, token_targets
    from tokenlabels.vocabulary import Vocabulary, find_vocabulary

__version__ = version("tokenlabels")
__all__ = [
    "LabelStore",
    "MixPlan",
    "ScoreMap",
    "ScoreMaps",
    "TokenTargets",
    "Vocabulary",
    "affine_token_targets",
    "chunked_token_label_loss",
    "find_vocabulary",
    "open_store",
    "token_label_loss",
    "token_targets",
]

# Imported on first use: the maths must work where zarr is not installed, and the command line starts without torch.
_MODULES = {
    "LabelStore": "store",
    "MixPlan": "mixing",
    "TokenTargets": "sparse_targets",
    "Vocabulary": "vocabulary",
    "affine_token_targets": "targets",
    "chunked_token_label_loss": "losses",
    "find_vocabulary": "vocabulary",
    "open_store": "store",
    "token_label_loss": "losses",
    "token_targets": "targets",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"tokenlabels.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'tokenlabels' has no attribute {name!r}")
