"""Dense token labels for vision transformers: the values, the maths and the store.

A convolutional teacher is run once over a training set and its k best classes are kept at every position of its
last feature map. This package holds what everybody shares:

types.py     ScoreMap and ScoreMaps, the values that travel
geometry.py  which part of an image a map covers
tars.py      WebDataset tars: one header scan into keys, offsets and sizes
store/       label sets on disk: schema, writer, reader, verification
summary.py   what `tokenlabels inspect` prints
views.py     pictures of labels, for files and terminals
doctor.py    what `tokenlabels doctor` prints
cli/         the command line

`annotate` writes label sets, `loaders` reads them beside the images; neither is imported from here.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tokenlabels.types import ScoreMap, ScoreMaps

if TYPE_CHECKING:
    from tokenlabels.store import LabelStore, open_store

__version__ = version("tokenlabels")
__all__ = ["LabelStore", "ScoreMap", "ScoreMaps", "open_store"]


def __getattr__(name: str) -> Any:
    """Import the store on first use: the maths must work where zarr is not installed."""
    if name in ("LabelStore", "open_store"):
        from tokenlabels import store

        return getattr(store, name)
    raise AttributeError(f"module 'tokenlabels' has no attribute {name!r}")
