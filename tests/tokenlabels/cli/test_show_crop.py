"""Crops and their targets, against what the loader hands to the training loop."""

from pathlib import Path

import numpy as np
import pytest
import torch

from loaders import TokenLabelLoader
from tests.loaders.photos import NUM_CLASSES, random_maps, write_label_set, write_photos
from tokenlabels.cli.show_crop import student_crop
from tokenlabels.images.decode import decode_rgb
from tokenlabels.store import open_store


@pytest.mark.parametrize("view", [(0, 0, 1, 1), (0.3, 0.2, 0.8, 0.9)], ids=["whole", "crops beyond the map"])
def test_pixels_and_targets_are_those_of_the_loader(tmp_path: Path, view: tuple[float, ...]) -> None:
    photos = write_photos(tmp_path, (6,), side=60)
    maps = random_maps(np.random.default_rng(1), photos.keys[0])
    maps.views[:] = view
    labels = write_label_set(tmp_path / "others", {"train-00": maps})
    mean, std = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    loader = TokenLabelLoader(
        photos.tars,
        labels,
        batch_size=6,
        threads=1,
        seed=3,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        index_dir=photos.index_dir,
    )
    (batch,) = loader
    store = open_store(labels)
    assert len(set(batch.flip.tolist())) == 2
    targets = batch.targets.dense()
    for row, key in enumerate(batch.keys):
        box = tuple(batch.boxes[row].tolist())
        crop = student_crop(decode_rgb(photos.images[key]), store[key], box, bool(batch.flip[row]), NUM_CLASSES)
        assert crop.box == pytest.approx(box)
        np.testing.assert_array_equal(crop.pixels, (255 * batch.images[row]).round().byte().permute(1, 2, 0).numpy())
        np.testing.assert_allclose(crop.image_target, targets[row, 0].numpy(), atol=1e-6)
        np.testing.assert_allclose(crop.targets.reshape(196, -1), targets[row, 1:].numpy(), atol=1e-6)
        np.testing.assert_array_equal(crop.valid.ravel(), batch.targets.valid[row, 1:].numpy())


@pytest.mark.parametrize(
    ("box", "shown"),
    [
        ((0.001, 0.0, 0.002, 1.0), (0.0, 0.0, 0.1, 1.0)),
        ((0.999, 0.99, 1.0, 1.0), (0.9, 0.8, 1.0, 1.0)),
        ((0.26, 0.0, 0.74, 0.5), (0.3, 0.0, 0.7, 0.4)),
    ],
)
def test_a_crop_is_whole_pixels_and_at_least_one(box: tuple[float, ...], shown: tuple[float, ...]) -> None:
    from PIL import Image

    maps = random_maps(np.random.default_rng(0), ["one"])
    crop = student_crop(Image.new("RGB", (10, 5)), maps[0], box, False, NUM_CLASSES)  # type: ignore[arg-type]
    assert crop.box == pytest.approx(shown)
