"""Going on in the middle of an epoch: bit for bit the undisturbed run, and with other ranks every sample once."""

import io
import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch

from loaders import TokenLabelBatch, TokenLabelLoader
from tests.loaders.batches import RAND_AUGMENT, assert_same_batches, keys_of, loader_of
from tests.loaders.photos import Photos

State = dict[str, Any]
FULL = {"mix": "cutmix", "rand_augment": RAND_AUGMENT, "erase_prob": 0.5, "ignore_erased": True}
PLAIN: dict[str, Any] = {"mix": "mixtoken"}


def through_json(state: State) -> State:
    loaded: State = json.loads(json.dumps(state))
    return loaded


def through_torch(state: State) -> State:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: State = torch.load(buffer, weights_only=True)
    return loaded


def run(loader: TokenLabelLoader, num_batches: int) -> tuple[list[TokenLabelBatch], State]:
    """The first batches of a pass, and the state after them, taken while the pass is going on."""
    batches: list[TokenLabelBatch] = []
    if num_batches == 0:
        return batches, loader.state_dict()
    for batch in loader:
        batches.append(batch)
        if len(batches) == num_batches:
            return batches, loader.state_dict()
    raise AssertionError(f"the pass has {len(batches)} batches only")


def resumed(photos: Photos, state: State, **options: Any) -> TokenLabelLoader:
    loader = loader_of(photos, **options)
    loader.load_state_dict(state)
    return loader


@pytest.mark.parametrize(("options", "save"), [(FULL, through_json), (PLAIN, through_torch)], ids=["full", "plain"])
def test_every_batch_is_a_place_to_go_on(
    photos: Photos, options: dict[str, Any], save: Callable[[State], State]
) -> None:
    undisturbed = loader_of(photos, **options)
    epochs = [list(undisturbed), list(undisturbed)]
    for num_batches in range(9):
        batches, state = run(loader_of(photos, **options), num_batches)
        assert_same_batches(batches, epochs[0][:num_batches])
        loader = resumed(photos, save(state), threads=1 + num_batches % 3, prefetch=1 + num_batches % 4, **options)
        assert_same_batches(loader, epochs[0][num_batches:])
        if num_batches % 4 == 0:
            assert_same_batches(loader, epochs[1])


def test_going_on_in_the_same_loader(photos: Photos) -> None:
    expected = list(loader_of(photos, **FULL))
    loader = loader_of(photos, **FULL)
    state = run(loader, 3)[1]
    run(loader, 6)
    loader.load_state_dict(state)
    assert_same_batches(loader, expected[3:])


def test_a_state_taken_after_a_break(photos: Photos) -> None:
    loader = loader_of(photos)
    for _ in islice(loader, 3):
        pass
    expected = list(loader_of(photos))
    assert_same_batches(resumed(photos, loader.state_dict()), expected[3:])


def test_a_state_between_epochs(photos: Photos) -> None:
    loader = loader_of(photos)
    list(loader)
    state = loader.state_dict()
    expected = list(loader)
    assert_same_batches(resumed(photos, state), expected)


def test_nothing_is_left_after_the_last_batch(photos: Photos) -> None:
    """A checkpoint of the loop's last round belongs to its epoch: going on, that ends at once, and the next begins."""
    undisturbed = loader_of(photos)
    state = run(undisturbed, 8)[1]
    loader = resumed(photos, state)
    assert list(loader) == []
    assert loader.state_dict()["epoch"] == 1
    assert_same_batches(loader, list(undisturbed))


def test_going_on_again_and_again(photos: Photos) -> None:
    """A new process for every batch."""
    expected = list(loader_of(photos, **PLAIN))
    state = loader_of(photos, **PLAIN).state_dict()
    for batch in expected:
        batches, state = run(resumed(photos, state, **PLAIN), 1)
        assert_same_batches(batches, [batch])
    assert list(resumed(photos, state, **PLAIN)) == []


@pytest.mark.parametrize("last", ["drop", "repeat"])
def test_every_rank_goes_on_with_its_own(photos: Photos, last: str) -> None:
    for rank in range(3):
        options = {"rank": rank, "world_size": 3, "last": last, "batch_size": 3, "mix": "mixup"}
        expected = list(loader_of(photos, **options))
        state = run(loader_of(photos, **options), 2)[1]
        assert_same_batches(resumed(photos, state, **options), expected[2:])


def test_the_state_of_any_rank_is_that_of_all(photos: Photos) -> None:
    """One checkpoint, written by rank 0, is enough."""
    states = [run(loader_of(photos, rank=rank, world_size=2), 2)[1] for rank in range(2)]
    assert states[0] == states[1]


def together(
    photos: Photos, state: State | None, world_size: int, num_batches: int | None, **options: Any
) -> tuple[list[str], State]:
    """Keys that all ranks see in some batches, or in all that are left, and the state after them."""
    keys: list[str] = []
    num_steps = set()
    for rank in range(world_size):
        loader = loader_of(photos, rank=rank, world_size=world_size, **options)
        if state is not None:
            loader.load_state_dict(state)
        num_steps.add(len(loader))
        batches, after = run(loader, len(loader) if num_batches is None else num_batches)
        assert all(len(batch) == options["batch_size"] for batch in batches)
        keys += keys_of(batches)
    assert len(num_steps) == 1, "ranks take equally many steps"
    return keys, after


@pytest.mark.parametrize("last", ["drop", "repeat"])
@pytest.mark.parametrize("worlds", [(1, 2), (2, 3), (3, 1), (5, 2), (1, 2, 3), (3, 1, 2)], ids=str)
def test_other_ranks_see_what_is_left_once(photos: Photos, worlds: tuple[int, ...], last: str) -> None:
    options = {"batch_size": 2, "last": last}
    keys: list[str] = []
    state: State | None = None
    for world_size in worlds[:-1]:
        some, state = together(photos, state, world_size, 2, **options)
        keys += some
    assert len(keys) == len(set(keys)) == 2 * 2 * sum(worlds[:-1])
    rest, _ = together(photos, state, worlds[-1], None, **options)
    counts = Counter(keys + rest)
    num_left, span = 32 - len(keys), 2 * worlds[-1]
    if last == "drop":
        assert max(counts.values()) == 1
        assert len(rest) == num_left // span * span
    else:
        assert len(counts) == 32, "all samples of the epoch"
        assert len(rest) == -(-num_left // span) * span
        assert sum(counts.values()) - 32 == -num_left % span, "no more are repeated than fill the last batch"


def test_other_ranks_begin_the_next_epoch_as_always(photos: Photos) -> None:
    state = run(loader_of(photos, batch_size=2), 3)[1]
    ranks = [resumed(photos, state, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert [len(list(loader)) for loader in ranks] == [6, 6]
    for rank, loader in enumerate(ranks):
        expected = loader_of(photos, batch_size=2, rank=rank, world_size=2)
        expected.set_epoch(1)
        assert len(loader) == 8
        assert_same_batches(loader, list(expected))


def test_a_sample_stays_the_same_with_other_ranks(photos: Photos) -> None:
    """Crops and flips are those of the epoch and the key, also of samples that another rank now reads."""
    state = run(loader_of(photos, batch_size=2, rand_augment=RAND_AUGMENT), 5)[1]
    images = {
        key: image
        for batch in loader_of(photos, rand_augment=RAND_AUGMENT)
        for key, image in zip(batch.keys, batch.images, strict=True)
    }
    for batch in resumed(photos, state, batch_size=2, rank=1, world_size=2, rand_augment=RAND_AUGMENT):
        for key, image in zip(batch.keys, batch.images, strict=True):
            assert torch.equal(image, images[key])
