"""Small photographs with labels, and a configuration that trains on them in seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.config import RunConfig
from jobs.overrides import apply_overrides
from jobs.recipes import get_recipe
from tests.loaders.photos import Photos, write_photos

SETTINGS = (
    "model.image_size=32",
    "model.args.depth=2",
    "model.args.embed_dim=24",
    "model.args.num_heads=2",
    "data.batch_size=4",
    "data.min_agreement=0",
    "data.threads=2",
    "data.rand_augment=none",
    "trainer.schedule.epochs=3",
    "trainer.schedule.warmup_epochs=1",
    "trainer.precision=fp32",
    "trainer.log_every=1",
)
"""Of a run on `photos`, whose labels are random: hence no agreement is asked for."""


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """Two tars of 13 and 8 images, 20 classes."""
    return write_photos(tmp_path_factory.mktemp("photos"), (13, 8))


@pytest.fixture
def make_run(photos: Photos, tmp_path: Path) -> Callable[..., RunConfig]:
    """A function of a recipe's name and settings: a configuration of a short run on `photos`."""

    def make(recipe: str = "lvvit_t", *settings: str) -> RunConfig:
        data = (
            f"data.images={','.join(photos.tars)}",
            f"data.labels={photos.labels}",
            f"data.val={photos.tars[1]}",
            f"data.index_dir={tmp_path / 'index'}",
        )
        return apply_overrides(get_recipe(recipe)(), [*SETTINGS, *data, *settings])

    return make
