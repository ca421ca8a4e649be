"""What surrounds a loader in a program, torch's modes and defaults and other tars, changes nothing in its batches."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loaders import EvaluationLoader, TokenLabelBatch, TokenLabelLoader
from tests.loaders.batches import assert_same_batches, loader_of
from tests.loaders.photos import Photos, encode, smooth_image, write_tar

ALL = {"mix": "cutmix", "rand_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.5}


@pytest.fixture
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_inference_mode(photos: Photos) -> None:
    expected = list(loader_of(photos, **ALL))
    loader = loader_of(photos, **ALL)
    with torch.inference_mode():
        inside = list(loader)
    assert_same_batches(inside, expected)
    loader.set_epoch(0)
    assert_same_batches(list(loader), expected)
    evaluation = EvaluationLoader(photos.tars, image_size=32, batch_size=8, index_dir=photos.index_dir)
    with torch.inference_mode():
        pixels = [batch.images for batch in evaluation]
    for batch, seen in zip(evaluation, pixels, strict=True):
        assert torch.equal(batch.images, seen)


def test_another_default_dtype(photos: Photos, request: pytest.FixtureRequest) -> None:
    expected = list(loader_of(photos, **ALL, augment_order="before crop"))
    request.getfixturevalue("default_dtype")
    assert_same_batches(list(loader_of(photos, **ALL, augment_order="before crop")), expected)


def test_samples_with_the_same_key_in_other_tars_get_other_crops(tmp_path: Path) -> None:
    image = encode(smooth_image(np.random.default_rng(0), 60, 50))
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", {f"{row:06d}": {"jpg": image, "cls": b"0"} for row in range(4)})
    loader = TokenLabelLoader(tmp_path / "*.tar", image_size=32, batch_size=16, index_dir=tmp_path)
    (batch,) = loader
    assert len(set(batch.keys)) == 4
    assert len({tuple(box) for box in batch.boxes.tolist()}) == 16
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in range(4):
        (tmp_path / f"{number}.tar").rename(copies / f"{number}.tar")
    (again,) = TokenLabelLoader(copies / "*.tar", image_size=32, batch_size=16, index_dir=tmp_path)
    assert torch.equal(again.images, batch.images), "wherever the tars are"


@pytest.mark.parametrize("order", ["after crop", "before crop"])
def test_the_crop_and_the_flip_that_were_drawn_travel_with_the_image(photos: Photos, order: Any) -> None:
    def batches(**options: Any) -> list[TokenLabelBatch]:
        return list(loader_of(photos, mix=None, hflip=0.5, **options))

    plain = batches()
    turned = batches(rand_augment="rand-m9-n2", augment_order=order)
    for batch, other in zip(plain, turned, strict=True):
        assert torch.equal(batch.boxes, other.boxes)
        assert torch.equal(batch.flip, other.flip)


def test_giving_up_a_loaded_place_is_logged(photos: Photos, caplog: pytest.LogCaptureFixture) -> None:
    loader = loader_of(photos)
    batches = iter(loader)
    next(batches)
    state = {**loader.state_dict(), "epoch": 3}
    other = loader_of(photos)
    other.load_state_dict(state)
    with caplog.at_level(logging.WARNING, logger="loaders.loader"):
        other.set_epoch(3)
        assert not caplog.records
        other.set_epoch(0)
    (record,) = caplog.records
    assert "epoch 0 is begun, and the loaded place in epoch 3, batch 1, given up" in record.getMessage()
