"""Small tars with labels, shared by the tests of the loaders; `photos.py` writes them."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.loaders.photos import (
    NUM_CLASSES,
    TOPK,
    Photos,
    encode,
    random_maps,
    smooth_image,
    write_label_set,
    write_photos,
    write_tar,
)

__all__ = ["NUM_CLASSES", "TOPK", "encode", "random_maps", "smooth_image", "write_label_set", "write_tar"]


@pytest.fixture(scope="session")
def make_photos() -> Callable[..., Photos]:
    """A function that writes tars of the given lengths, and their labels."""
    return write_photos


@pytest.fixture(scope="session")
def photos(make_photos: Callable[..., Photos], tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """Five tars of 9, 4, 11, 1 and 7 images."""
    return make_photos(tmp_path_factory.mktemp("photos"), (9, 4, 11, 1, 7))


@pytest.fixture(scope="session")
def decoded() -> Callable[[bytes], NDArray[np.uint8]]:
    """A function that decodes with Pillow, uint8 [H, W, 3]."""
    return lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
