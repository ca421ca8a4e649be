"""Batches of the training loader: the same whatever the threads, every sample once, with its own labels."""

import io
import pickle
from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from loaders import TokenLabelBatch
from loaders.device import Mix
from loaders.options import Supervision
from loaders.plan import EpochPlan
from tests.loaders.batches import (
    RAND_AUGMENT,
    assert_same,
    assert_same_batches,
    keys_of,
    loader_of,
)
from tests.loaders.photos import NUM_CLASSES, Photos

MIXES = (None, *get_args(Mix))
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "augmented": {"rand_augment": RAND_AUGMENT, "erase_prob": 0.5, "ignore_erased": True},
    "before crop": {"rand_augment": RAND_AUGMENT, "augment_order": "before crop"},
}

each_mix = pytest.mark.parametrize("mix", MIXES, ids=str)
each_augmentation = pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)


def by_key(batches: list[TokenLabelBatch], name: str) -> dict[str, Tensor]:
    """One field of all samples."""
    return {key: getattr(batch, name)[row] for batch in batches for row, key in enumerate(batch.keys)}


def all_keys(photos: Photos) -> list[str]:
    return [key for keys in photos.keys for key in keys]


@each_augmentation
@each_mix
def test_threads_and_prefetch_change_nothing(photos: Photos, mix: Mix | None, augmentation: dict[str, Any]) -> None:
    expected = list(loader_of(photos, mix=mix, threads=1, prefetch=1, **augmentation))
    assert len(expected) == 8
    for threads, prefetch in ((2, 2), (3, 1), (8, 5)):
        assert_same_batches(loader_of(photos, mix=mix, threads=threads, prefetch=prefetch, **augmentation), expected)


@each_augmentation
def test_the_same_epoch_is_the_same_and_others_differ(photos: Photos, augmentation: dict[str, Any]) -> None:
    loader = loader_of(photos, mix="mixtoken", **augmentation)
    first, second = list(loader), list(loader)
    loader.set_epoch(0)
    assert_same_batches(loader, first)
    other_seed = list(loader_of(photos, mix="mixtoken", seed=1, **augmentation))
    for other in (second, other_seed):
        assert keys_of(other) != keys_of(first)
        ours, theirs = by_key(first, "images"), by_key(other, "images")
        assert ours.keys() == theirs.keys()
        assert not any(torch.equal(ours[key], theirs[key]) for key in ours)


def test_every_finished_pass_goes_on_with_the_next_epoch(photos: Photos) -> None:
    loader, told = loader_of(photos), loader_of(photos)
    for epoch in range(3):
        told.set_epoch(epoch)
        assert_same_batches(loader, list(told))


def test_an_epoch_that_was_broken_off_begins_anew(photos: Photos) -> None:
    loader = loader_of(photos)
    expected = list(loader)
    loader.set_epoch(0)
    assert_same_batches(islice(loader, 3), expected[:3])
    assert_same_batches(loader, expected)


def test_a_pass_without_its_end_is_a_pass(photos: Photos) -> None:
    """Trainers that count batches never ask for the one after the last."""
    loader = loader_of(photos)
    epochs = [list(loader_of(photos)), list(islice(loader, len(loader))), list(islice(loader, len(loader)))]
    assert_same_batches(epochs[1], epochs[0])
    assert keys_of(epochs[2]) != keys_of(epochs[1])


def test_set_epoch_in_the_middle_is_for_the_next_pass(photos: Photos) -> None:
    loader, other = loader_of(photos), loader_of(photos)
    other.set_epoch(5)
    expected = list(loader_of(photos))
    got = []
    for batch in loader:
        got.append(batch)
        loader.set_epoch(5)
    assert_same_batches(got, expected)
    assert_same_batches(loader, list(other))


@pytest.mark.parametrize("last", ["drop", "repeat"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_cover_an_epoch_in_equal_steps(photos: Photos, world_size: int, last: str) -> None:
    ranks = [loader_of(photos, batch_size=3, rank=rank, world_size=world_size, last=last) for rank in range(world_size)]
    num_batches = len(ranks[0])
    assert num_batches == (32 // (3 * world_size) if last == "drop" else -(-32 // (3 * world_size)))
    passes = [list(loader) for loader in ranks]
    assert all(len(batches) == len(loader) == num_batches for batches, loader in zip(passes, ranks, strict=True))
    assert all(len(batch) == len(batch.images) == 3 for batches in passes for batch in batches)
    # Step by step over all ranks, the order of the epoch.
    seen = [key for step in zip(*passes, strict=True) for batch in step for key in batch.keys]
    order = epoch_order(photos)
    if last == "drop":
        assert seen == order[: len(seen)]
        assert len(order) - len(seen) < 3 * world_size
    else:
        assert seen == (order + order)[: len(seen)]
        assert set(Counter(seen)) == set(order)


def epoch_order(photos: Photos) -> list[str]:
    """All keys in the order of epoch 0, from the plan of one rank with batches of one sample."""
    lengths = tuple(map(len, photos.keys))
    plan = EpochPlan(lengths, seed=0, epoch=0, shuffle_shards=2, batch_size=1)
    order = [photos.keys[shard][row] for window in plan.windows() for shard, row in window.samples.tolist()]
    assert sorted(order) == sorted(all_keys(photos))
    return order


@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_keys_labels_and_pixels_belong_together(photos: Photos, decoder: str) -> None:
    whole = {"scale": (1.0, 1.0), "ratio": (0.01, 100.0), "hflip": 0.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    batches = list(loader_of(photos, decoder=decoder, seed=1, **whole))
    assert sorted(keys_of(batches)) == sorted(all_keys(photos))
    assert {key: int(label) for key, label in by_key(batches, "labels").items()} == photos.classes
    # A random aspect of the whole area fits no image: the box is the largest there is, all of it.
    assert all(torch.equal(box, torch.tensor([0.0, 0, 1, 1])) for box in by_key(batches, "boxes").values())
    for key, image in by_key(batches, "images").items():
        with Image.open(io.BytesIO(photos.images[key])) as photo:
            expected = np.asarray(photo.resize((32, photo.height)).resize((32, 32)), np.float32)
        distance = np.abs(255 * image.permute(1, 2, 0).numpy() - expected).max()
        assert distance < (1e-3 if decoder == "pillow" else 2.1)


@pytest.mark.parametrize(
    ("options", "supervision", "has_targets"),
    [
        ({"labels": None}, None, False),
        ({"labels": None, "num_classes": NUM_CLASSES}, "hard", True),
        ({"labels": None, "num_classes": 50, "supervision": "hard"}, "hard", True),
        ({}, "token", True),
        ({"num_classes": NUM_CLASSES}, "token", True),
        ({"supervision": "relabel"}, "relabel", True),
        ({"supervision": "hard"}, "hard", True),
    ],
    ids=str,
)
def test_supervision(photos: Photos, options: dict[str, Any], supervision: str | None, has_targets: bool) -> None:
    loader = loader_of(photos, **options)
    assert loader.supervision == supervision
    for batch in loader:
        assert (batch.targets is not None) == has_targets
        if batch.targets is not None:
            assert batch.targets.grid == ((2, 2) if supervision == "token" else None)
            assert batch.targets.num_classes == options.get("num_classes", NUM_CLASSES)
            assert torch.allclose(batch.targets.dense().sum(dim=2), batch.targets.valid.float(), atol=1e-5)


@each_augmentation
def test_relabel_is_the_image_row_of_token(photos: Photos, augmentation: dict[str, Any]) -> None:
    token = loader_of(photos, supervision="token", **augmentation)
    relabel = loader_of(photos, supervision="relabel", **augmentation)
    for rows, row in zip(token, relabel, strict=True):
        assert rows.targets is not None
        assert row.targets is not None
        assert row.targets.dense().shape == (4, 1, NUM_CLASSES)
        assert torch.allclose(row.targets.dense()[:, 0], rows.targets.dense()[:, 0], atol=2e-6)
        assert torch.equal(row.targets.valid[:, 0], rows.targets.valid[:, 0])
        assert torch.equal(row.images, rows.images)


def test_hard_targets_are_the_labels(photos: Photos) -> None:
    for batch in loader_of(photos, supervision="hard"):
        assert batch.targets is not None
        expected = torch.nn.functional.one_hot(batch.labels, NUM_CLASSES).float()
        assert torch.equal(batch.targets.dense()[:, 0], expected)


@pytest.mark.parametrize("mix", get_args(Mix))
def test_hard_targets_are_mixed_by_share(photos: Photos, mix: Mix) -> None:
    for batch in loader_of(photos, supervision="hard", mix=mix):
        assert batch.targets is not None
        assert batch.plan is not None
        own = torch.nn.functional.one_hot(batch.labels, NUM_CLASSES).float()
        share = batch.plan.share()[:, None]
        expected = share * own + (1 - share) * own[batch.plan.partner]
        assert torch.allclose(batch.targets.dense()[:, 0], expected, atol=1e-6)
        assert not torch.equal(expected, own), "nothing was mixed"


@pytest.mark.parametrize("augmented", [True, False], ids=["augmented", "plain"])
@pytest.mark.parametrize("mix", get_args(Mix))
def test_mixing_is_the_plan_on_what_was_not_mixed(photos: Photos, mix: Mix, augmented: bool) -> None:
    options = {"erase_mode": "const", **AUGMENTATIONS["augmented"]} if augmented else {"supervision": "relabel"}
    unmixed = loader_of(photos, mix=None, **options)
    for batch, plain in zip(loader_of(photos, mix=mix, **options), unmixed, strict=True):
        assert batch.plan is not None
        assert plain.plan is None
        assert batch.targets is not None
        assert plain.targets is not None
        assert_same(batch.targets, batch.plan.mix_targets(plain.targets))
        expected = plain.images if mix == "mixtoken" else batch.plan.mix(plain.images)
        changed = {"images": expected, "plan": batch.plan, "targets": batch.targets, "is_mixed": mix != "mixtoken"}
        assert_same(batch, replace(plain, **changed))


@pytest.mark.parametrize("supervision", ["token", "hard"])
@pytest.mark.parametrize("mix", ["cutmix", "mixup", "random", "blockwise"])
def test_targets_are_left_to_the_model(photos: Photos, mix: Mix, supervision: Supervision) -> None:
    mixed = loader_of(photos, mix=mix, supervision=supervision)
    unmixed = loader_of(photos, mix=mix, supervision=supervision, mix_targets=False)
    for batch, expected in zip(unmixed, mixed, strict=True):
        assert (batch.is_mixed, batch.has_mixed_targets, expected.has_mixed_targets) == (True, False, True)
        assert batch.plan is not None
        assert batch.targets is not None
        targets = batch.plan.mix_targets(batch.targets)
        assert_same(replace(batch, targets=targets, has_mixed_targets=True), expected)


@pytest.mark.parametrize("mix", [None, "mixtoken"])
def test_no_model_finds_shares_without_mixed_pixels(photos: Photos, mix: Mix | None) -> None:
    with pytest.raises(ValueError, match=f"mix_targets=False .* needs images that are mixed here.*got {mix!r}"):
        loader_of(photos, mix=mix, mix_targets=False)


def test_no_sample_is_mixed_with_probability_0(photos: Photos) -> None:
    for batch, plain in zip(loader_of(photos, mix="cutmix", mix_prob=0.0), loader_of(photos), strict=True):
        assert batch.plan is not None
        assert bool((batch.plan.own == 1).all())
        assert torch.equal(batch.images, plain.images)


@each_augmentation
def test_a_sample_does_not_depend_on_its_batch(photos: Photos, augmentation: dict[str, Any]) -> None:
    options = {**augmentation, "erase_mode": "const"}
    expected = list(loader_of(photos, **options))
    others = [
        list(loader_of(photos, batch_size=1, **options)),
        list(loader_of(photos, batch_size=16, shuffle_shards=5, **options)),
        [batch for rank in range(2) for batch in loader_of(photos, batch_size=8, rank=rank, world_size=2, **options)],
    ]
    for other in others:
        for name in ("images", "boxes", "flip", "labels"):
            ours, theirs = by_key(expected, name), by_key(other, name)
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                assert torch.equal(theirs[key], value), f"{name} of {key}"


def test_draws_vary_over_the_samples(photos: Photos) -> None:
    batches = list(loader_of(photos))
    boxes, flips = by_key(batches, "boxes"), by_key(batches, "flip")
    assert len({tuple(box.tolist()) for box in boxes.values()}) > 25
    assert 6 <= sum(map(bool, flips.values())) <= 26
    sizes = torch.stack(list(boxes.values()))
    assert bool((sizes[:, :2] >= 0).all() & (sizes[:, 2:] <= 1).all() & (sizes[:, :2] < sizes[:, 2:]).all())


def test_a_pickled_loader_is_the_same_loader(photos: Photos) -> None:
    loader = loader_of(photos, mix="cutmix", **AUGMENTATIONS["augmented"])
    expected = list(pickle.loads(pickle.dumps(loader)))
    assert_same_batches(loader, expected)
    for _ in islice(loader, 2):
        pass
    copy = pickle.loads(pickle.dumps(loader))
    assert copy.state_dict() == loader.state_dict()
    assert repr(copy) == repr(loader)
    assert_same_batches(copy, list(loader))


def test_repr_and_length(photos: Photos) -> None:
    loader = loader_of(photos, rank=1, world_size=2)
    next(iter(loader))
    assert len(loader) == 4
    assert repr(loader) == (
        "TokenLabelLoader(32 images in 5 shards, 4 batches of 4 on rank 1 of 2, supervision token, epoch 0, "
        "next batch 1)"
    )
    assert len(loader_of(photos, batch_size=5, last="repeat")) == 7


def test_stats_count_the_newest_pass(photos: Photos) -> None:
    loader = loader_of(photos)
    list(loader)
    for _ in islice(loader, 3):
        pass
    assert (loader.stats().num_images, loader.stats().num_batches, loader.stats().num_skipped) == (12, 3, 0)
    assert loader.stats().decode_seconds > 0
