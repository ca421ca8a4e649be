"""Score maps for the tests of pictures."""

import numpy as np
from numpy.typing import NDArray

from tokenlabels.types import ScoreMap

WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)
LONG_NAME = "a name that goes on and on, as the synonyms of a taxonomy do, until nobody reads it " * 3


def score_map(
    classes_top1: NDArray[np.integer],
    *,
    view: tuple[float, ...] = WHOLE_IMAGE,
    logit: float = 12.0,
    tail: float = 0.0,
    key: str = "key",
) -> ScoreMap:
    """A map with k=2: a leading class `logit` above class 999."""
    shape = classes_top1.shape
    classes = np.stack([classes_top1, np.full_like(classes_top1, 999)], axis=-1).astype(np.uint16)
    scores = np.stack([np.full(shape, logit), np.zeros(shape)], axis=-1).astype(np.float16)
    return ScoreMap(key, scores, classes, np.full(shape, tail, np.float16), np.array(view, np.float32))
