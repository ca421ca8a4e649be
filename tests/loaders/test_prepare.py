"""From a plan to batches with open shards, labels and random numbers."""

from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from loaders.dataset import ImageDataset
from loaders.label_windows import LabelJoin
from loaders.options import join_labels
from loaders.plan import EpochPlan, SequentialPlan
from loaders.prepare import OpenWindow, Randomness, WindowedBatch, prepare_batches
from loaders.rand_augment import RandAugment
from tests.loaders.photos import Photos
from tokenlabels.store import open_store


@pytest.fixture(scope="module")
def dataset(photos: Photos) -> ImageDataset:
    return ImageDataset.find(photos.tars, photos.index_dir)


@pytest.fixture(scope="module")
def join(photos: Photos, dataset: ImageDataset) -> LabelJoin:
    return join_labels(open_store(photos.labels), dataset)


def plan_of(dataset: ImageDataset, *, shuffle_shards: int = 2, batch_size: int = 4, epoch: int = 0) -> EpochPlan:
    return EpochPlan(
        dataset.lengths, seed=0, epoch=epoch, shuffle_shards=shuffle_shards, batch_size=batch_size, last="repeat"
    )


def randomness(epoch: int = 0, *, augment: str | None = "rand-m9-mstd0.5", before_crop: bool = False) -> Randomness:
    parsed = None if augment is None else RandAugment.parse(augment)
    return Randomness(0, epoch, (32, 32), parsed, 0.5, before_crop)


def prepared(
    dataset: ImageDataset,
    plan: EpochPlan | SequentialPlan,
    join: LabelJoin | None = None,
    draw: Randomness | None = None,
    *,
    num_labels: int | None = None,
    first_batch: int = 0,
) -> tuple[list[list[WindowedBatch]], list[OpenWindow]]:
    """What comes with every window, and the windows, closed."""
    windows: list[OpenWindow] = []
    source = prepare_batches(
        dataset, plan, join, draw, num_labels=num_labels, first_batch=first_batch, on_open=windows.append
    )
    by_window = []
    for batches in source:
        windows[-1].read_labels()
        for batch in batches:
            batch.attach_labels()
        by_window.append(batches)
    for window in windows:
        window.close()
    return by_window, windows


def sample_rows(windows: list[OpenWindow]) -> NDArray[np.int64]:
    return np.concatenate([window.samples for window in windows])


@pytest.mark.parametrize("batch_size", [1, 4, 7, 32])
@pytest.mark.parametrize("shuffle_shards", [1, 2, 5])
def test_batches_are_runs_of_the_samples_of_the_windows(
    shuffle_shards: int, batch_size: int, photos: Photos, dataset: ImageDataset
) -> None:
    plan = plan_of(dataset, shuffle_shards=shuffle_shards, batch_size=batch_size)
    by_window, windows = prepared(dataset, plan)
    batches = [batch for part in by_window for batch in part]
    assert [batch.batch.host.number for batch in batches] == list(range(len(plan)))
    keys = [photos.keys[shard][row] for shard, row in sample_rows(windows).tolist()]
    assert [key for batch in batches for key in batch.batch.host.keys] == keys
    assert {len(batch.batch.host) for batch in batches} == {batch_size}
    for window in windows:
        assert window.num_batches == sum(window in batch.windows for batch in batches)
    for batch in batches:
        assert batch.batch.host.labels.tolist() == [photos.classes[key] for key in batch.batch.host.keys]


def test_every_batch_comes_with_the_window_that_completes_it(dataset: ImageDataset) -> None:
    by_window, windows = prepared(dataset, plan_of(dataset, shuffle_shards=1))
    for batches, window in zip(by_window, windows, strict=True):
        assert all(batch.windows[-1] is window for batch in batches)
    assert any(len(batch.windows) > 1 for batches in by_window for batch in batches)


def test_beginning_later_gives_the_same_batches(dataset: ImageDataset, join: LabelJoin) -> None:
    plan, draw = plan_of(dataset, shuffle_shards=1), randomness()
    whole = [batch.batch for part in prepared(dataset, plan, join, draw)[0] for batch in part]
    for first in range(len(plan) + 1):
        rest = [batch.batch for part in prepared(dataset, plan, join, draw, first_batch=first)[0] for batch in part]
        assert len(rest) == len(plan) - first
        for late, early in zip(rest, whole[first:], strict=True):
            assert (late.host.number, late.host.keys, late.host.hash) == (
                early.host.number,
                early.host.keys,
                early.host.hash,
            )
            assert np.array_equal(late.uniforms, early.uniforms)
            assert np.array_equal(late.host.warp, early.host.warp)
            assert late.host.maps is not None
            assert early.host.maps is not None
            assert np.array_equal(late.host.maps.scores, early.host.maps.scores)


@pytest.mark.parametrize("shuffle_shards", [1, 5])
def test_maps_are_those_of_the_keys(
    shuffle_shards: int, photos: Photos, dataset: ImageDataset, join: LabelJoin
) -> None:
    store = open_store(photos.labels)
    for part in prepared(dataset, plan_of(dataset, shuffle_shards=shuffle_shards), join)[0]:
        for host in (batch.batch.host for batch in part):
            assert host.maps is not None
            for row, key in enumerate(host.keys):
                stored = store[key]
                assert np.array_equal(host.maps.scores[row], stored.scores)
                assert np.array_equal(host.maps.classes[row], stored.classes)


def test_what_is_random_is_of_the_key_and_the_epoch_not_of_the_batch(dataset: ImageDataset) -> None:
    def of_keys(batch_size: int, epoch: int) -> dict[str, list[float]]:
        plan = plan_of(dataset, batch_size=batch_size)
        hosts = [batch.batch for part in prepared(dataset, plan, None, randomness(epoch))[0] for batch in part]
        return {
            key: [*batch.uniforms[row], *batch.host.warp[row].ravel(), *(batch.host.erased[row].tolist())]  # type: ignore[index]
            for batch in hosts
            for row, key in enumerate(batch.host.keys)
        }

    assert of_keys(4, 0) == of_keys(8, 0)
    assert all(of_keys(4, 0)[key] != numbers for key, numbers in of_keys(4, 1).items())


def test_the_hash_of_a_batch_is_of_seed_epoch_and_keys(dataset: ImageDataset) -> None:
    hashes = [
        batch.batch.host.hash
        for epoch in (0, 1)
        for part in prepared(dataset, plan_of(dataset), None, randomness(epoch))[0]
        for batch in part
    ]
    assert len(set(hashes)) == len(hashes)


def test_geometry_before_the_crop_waits_for_the_pixels(dataset: ImageDataset) -> None:
    for before_crop in (False, True):
        (first, *_), *_ = prepared(dataset, plan_of(dataset), None, randomness(before_crop=before_crop))[0]
        host = first.batch.host
        rows = np.flatnonzero(host.is_warped)
        assert rows.size
        is_identity = (host.warp[rows] == np.eye(2, 3)).all(axis=(1, 2))
        assert is_identity.all() if before_crop else not is_identity.any()


def test_without_randomness_nothing_is_drawn(dataset: ImageDataset) -> None:
    (first, *_), *_ = prepared(dataset, SequentialPlan(dataset.lengths, batch_size=4))[0]
    host = first.batch.host
    assert (host.augment, host.erased, host.maps, host.vocabulary, host.hash) == (None, None, None, None, 0)
    assert not host.is_warped.any()


@pytest.mark.parametrize("num_labels", [None, 20, 5, 1])
def test_labels_that_no_target_can_be_made_of_are_problems(
    num_labels: int | None, photos: Photos, dataset: ImageDataset
) -> None:
    for part in prepared(dataset, plan_of(dataset), num_labels=num_labels)[0]:
        for host in (batch.batch.host for batch in part):
            wrong = [row for row, key in enumerate(host.keys) if num_labels and photos.classes[key] >= num_labels]
            assert sorted(host.problems) == wrong
            assert all(repr(host.keys[row]) in str(host.problems[row]) for row in wrong)


def test_a_window_that_fails_to_open_leaves_no_file_open(make_photos: Callable[..., Photos], tmp_path: Path) -> None:
    photos = make_photos(tmp_path, (2, 2))
    dataset = ImageDataset.find(photos.tars, photos.index_dir)
    Path(photos.tars[1]).unlink()
    plan = EpochPlan(dataset.lengths, seed=0, epoch=0, shuffle_shards=2, batch_size=4)
    windows: list[OpenWindow] = []
    source = prepare_batches(dataset, plan, None, None, num_labels=None, first_batch=0, on_open=windows.append)
    with pytest.raises(OSError, match=r"train-01\.tar"):
        next(source)
    assert windows == []
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert Path(photos.tars[0]) not in links


def test_labels_that_nobody_will_read_are_given_up(dataset: ImageDataset, join: LabelJoin) -> None:
    windows: list[OpenWindow] = []
    source = prepare_batches(
        dataset, plan_of(dataset), join, None, num_labels=None, first_batch=0, on_open=windows.append
    )
    (batch, *_) = next(source)
    windows[0].give_up_labels()
    with pytest.raises(CancelledError):
        batch.attach_labels()
    windows[0].close()
