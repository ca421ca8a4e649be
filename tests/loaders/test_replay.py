"""Batches that are found again: the same as a whole epoch has them, and what they are made of."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loaders import TokenLabelBatch, TokenLabelLoader
from loaders.batch import SampleError
from loaders.replay import Place, Replay, find_in_epoch, find_sample, partner_of, replay
from tests.loaders.batches import RAND_AUGMENT, assert_same, loader_of
from tests.loaders.photos import Photos, encode, smooth_image, write_photos, write_tar
from tokenlabels.mixing import MixPlan

AUGMENTED = {"rand_augment": RAND_AUGMENT, "erase_prob": 0.5, "ignore_erased": True}
KEYS = ("train-00/img_003", "train-02/img_007", "train-03/img_000")
MIXES: list[dict[str, Any]] = [
    {"mix": None},
    {"mix": "mixtoken"},
    {"mix": "mixtoken", "mixup_alpha": 0.8},
    {"mix": "cutmix"},
    {"mix": "cutmix", "mixup_alpha": 0.8},
    {"mix": "mixup", "mix_prob": 0.5},
    {"mix": "random", "mix_targets": False},
    {"mix": "blockwise"},
]


def epoch_of(photos: Photos, epoch: int, world_size: int = 1, **options: Any) -> Iterator[tuple[Place, str]]:
    """All samples of an epoch and where they come, by iterating the loaders of all ranks."""
    for place, batch in batches_of(photos, epoch, world_size, **options):
        for row, key in enumerate(batch.keys):
            yield Place(place.rank, place.batch, row), key


def batches_of(
    photos: Photos, epoch: int, world_size: int = 1, **options: Any
) -> Iterator[tuple[Place, TokenLabelBatch]]:
    for rank in range(world_size):
        loader = loader_of(photos, rank=rank, world_size=world_size, **options)
        loader.set_epoch(epoch)
        for number, batch in enumerate(loader):
            yield Place(rank, number, 0), batch


def replay_of(photos: Photos, key: str, epoch: int, world_size: int = 1, **options: Any) -> Replay:
    return replay(partial(loader_of, photos, **options), key, epoch, world_size=world_size)


@pytest.mark.parametrize("mixing", MIXES, ids=lambda mixing: "-".join(map(str, mixing.values())))
@pytest.mark.parametrize("augment_order", ["after crop", "before crop"])
def test_the_batch_is_that_of_training(photos: Photos, mixing: dict[str, Any], augment_order: str) -> None:
    """Bit for bit: images, targets, plan, boxes; two epochs, one and two ranks."""
    options = {**AUGMENTED, **mixing, "augment_order": augment_order, "last": "repeat"}
    for epoch, world_size in ((0, 2), (3, 1)):
        expected = {
            (place.rank, place.batch): batch for place, batch in batches_of(photos, epoch, world_size, **options)
        }
        for key in KEYS:
            found = replay_of(photos, key, epoch, world_size, **options)
            batch = expected[found.place.rank, found.place.batch]
            assert batch.keys[found.place.row] == key
            shard, row = found.sample
            assert photos.keys[shard][row] == key
            assert_same(found.batch, batch)


@pytest.mark.parametrize("augment_order", ["after crop", "before crop"])
@pytest.mark.parametrize("mixing", MIXES, ids=lambda mixing: "-".join(map(str, mixing.values())))
def test_what_is_drawn_before_mixing_does_not_depend_on_it(
    photos: Photos, mixing: dict[str, Any], augment_order: str
) -> None:
    """Unmixed, the batch is that of a loader that mixes nothing: noise of erasing is drawn first."""
    options = {**AUGMENTED, "augment_order": augment_order, "last": "repeat"}
    plain = {(place.rank, place.batch): batch for place, batch in batches_of(photos, 2, 2, **options)}
    found = replay_of(photos, KEYS[1], 2, 2, **options, **mixing)
    assert_same(found.unmixed, plain[found.place.rank, found.place.batch])


@pytest.mark.parametrize("mixing", MIXES, ids=lambda mixing: "-".join(map(str, mixing.values())))
def test_the_parts_make_the_whole(photos: Photos, mixing: dict[str, Any]) -> None:
    """Mixing what is unmixed by the plans gives the images and targets of training."""
    found = replay_of(photos, KEYS[0], 1, **AUGMENTED, **mixing)
    batch, images, targets = found.batch, found.unmixed.images, found.unmixed.targets
    assert (found.mixup is not None) == (mixing == {"mix": "mixtoken", "mixup_alpha": 0.8})
    assert targets is not None
    plans = [plan for plan in (found.mixup, batch.plan) if plan is not None]
    for plan in plans:
        images = plan.mix(images)
        targets = plan.mix_targets(targets) if batch.has_mixed_targets else targets
    torch.testing.assert_close(found.mixed_image(), images[found.place.row], rtol=0, atol=0)
    assert_same(batch.targets, targets)


def test_partners() -> None:
    own = torch.ones(3, 2, 2)
    own[0, 0, 1] = 0.5
    plan = MixPlan(torch.tensor([2, 0, 1]), own)
    assert [partner_of(plan, row) for row in range(3)] == [2, None, None]
    assert partner_of(None, 0) is None


def test_a_sample_that_is_left_unmixed(photos: Photos) -> None:
    found = replay_of(photos, KEYS[0], 0, mix="cutmix", mix_prob=0.0)
    assert found.partner is None
    assert torch.equal(found.mixed_image(), found.unmixed.images[found.place.row])


@pytest.mark.parametrize(("last", "world_size"), list(product(["drop", "repeat"], [1, 3])))
def test_every_sample_of_an_epoch_is_found_where_it_comes_first(photos: Photos, last: str, world_size: int) -> None:
    """32 images in batches of 5 to each rank: 2 are left out, or up to 13 come twice."""
    options: dict[str, Any] = {"batch_size": 5, "last": last, "labels": None}
    loader = loader_of(photos, rank=0, world_size=world_size, **options)
    first: dict[str, Place] = {}
    in_order = sorted(
        epoch_of(photos, 4, world_size, **options), key=lambda item: (item[0].batch, item[0].rank, item[0].row)
    )
    for place, key in in_order:
        first.setdefault(key, place)
    keys = [key for tar in photos.keys for key in tar]
    assert (len(first) < len(in_order)) == (last == "repeat")
    for key in keys:
        sample = find_sample(loader.dataset, key)
        if key in first:
            assert find_in_epoch(loader, sample, 4) == first[key]
        else:
            assert last == "drop"
            with pytest.raises(
                ValueError, match=r"epoch 4 leaves 'train.*' out: its . batches of .* are 30 of 32 samp"
            ):
                find_in_epoch(loader, sample, 4)


def test_a_loader_in_the_middle_of_an_epoch(photos: Photos) -> None:
    """Where it is makes no difference."""
    loader = loader_of(photos)
    place = find_in_epoch(loader, (2, 5), 2)
    next(iter(loader))
    assert find_in_epoch(loader, (2, 5), 2) == place


def test_no_other_batch_is_read(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    from loaders import stream

    filled: list[str] = []
    fill_row = stream.fill_row

    def record(batch: Any, row: int, *others: Any) -> tuple[float, float]:
        filled.append(batch.host.keys[row])
        return fill_row(batch, row, *others)

    monkeypatch.setattr(stream, "fill_row", record)
    found = replay_of(photos, KEYS[0], 0, mix="cutmix")
    assert sorted(filled) == sorted(found.batch.keys)


class TestRefused:
    @pytest.mark.parametrize("epoch", [-1, 1.5, True])
    def test_no_epoch(self, photos: Photos, epoch: Any) -> None:
        with pytest.raises(ValueError, match="epoch must be an integer of at least 0"):
            replay_of(photos, KEYS[0], epoch)

    @pytest.mark.parametrize(
        ("key", "nearest"), [("train-02/img_0071", "train-02/img_007"), ("", "train"), ("z", "train")]
    )
    def test_a_key_that_is_not_there(self, photos: Photos, key: str, nearest: str) -> None:
        with pytest.raises(ValueError, match=f"the images have no key '{key}'; near it are {nearest}.*"):
            replay_of(photos, key, 0)

    def test_a_key_in_two_tars(self, tmp_path: Path) -> None:
        image = encode(smooth_image(np.random.default_rng(0), 20, 20))
        for name in ("a", "b"):
            write_tar(tmp_path / f"{name}.tar", {"same": {"jpg": image}, name: {"jpg": image}})
        make = partial(TokenLabelLoader, str(tmp_path / "*.tar"), image_size=32, batch_size=2, threads=1)
        with pytest.raises(ValueError, match=r"'same' is in .*a\.tar and in .*b\.tar"):
            replay(make, "same", 0)
        assert replay(make, "b", 0).batch.targets is None

    @pytest.fixture
    def damaged(self, tmp_path: Path) -> Photos:
        """Two tars of 4 and 3 images, of which the first image is none."""
        photos = write_photos(tmp_path, (4, 3))
        first = photos.keys[0][0]
        contents = {
            key: {"jpg": b"no image" if key == first else photos.images[key], "cls": b"1"} for key in photos.keys[0]
        }
        write_tar(Path(photos.tars[0]), contents)
        return photos

    def test_a_damaged_image_of_the_batch_is_one_in_training_too(self, damaged: Photos) -> None:
        with pytest.raises(SampleError, match=r"img_000'.*decode"):
            replay_of(damaged, damaged.keys[0][1], 0, batch_size=7)

    def test_a_damaged_image_that_was_skipped(self, damaged: Photos) -> None:
        options = {"batch_size": 7, "on_error": "skip"}
        with pytest.raises(ValueError, match="'train-00/img_000' cannot be used, and another sample takes its place"):
            replay_of(damaged, damaged.keys[0][0], 0, **options)
        found = replay_of(damaged, damaged.keys[0][1], 0, **options)
        assert_same(found.batch, next(iter(loader_of(damaged, **options))))


@pytest.mark.gpu
def test_on_a_gpu(photos: Photos, cuda: torch.device) -> None:
    options = {**AUGMENTED, "mix": "mixtoken", "mixup_alpha": 0.8, "device": str(cuda)}
    expected = [batch for _, batch in batches_of(photos, 1, **options)]
    found = replay_of(photos, KEYS[0], 1, **options)
    assert_same(found.batch, expected[found.place.batch])
    assert found.mixed_image().device.type == "cuda"
