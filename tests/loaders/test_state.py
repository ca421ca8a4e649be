"""What a loader's state holds, what it means when a pass is begun, and which states are refused."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders import TokenLabelLoader
from loaders.state import Position
from tests.loaders.batches import assert_same_batches, keys_of, loader_of
from tests.loaders.photos import Photos

STATE = {
    "seed": 3,
    "epoch": 2,
    "batch": 5,
    "start": 0,
    "batch_size": 4,
    "world_size": 1,
    "shuffle_shards": 2,
    "dataset": "abc",
}


def advanced(loader: TokenLabelLoader, num_batches: int) -> TokenLabelLoader:
    """The loader after some batches of a pass that is broken off."""
    for _ in islice(loader, num_batches):
        pass
    return loader


def test_a_position_comes_back_from_its_state() -> None:
    position = Position.from_state(STATE)
    assert position == Position.from_state(json.loads(json.dumps(position.state())))
    assert position.state() == STATE


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, "NoneType"),
        ([1, 2], "list"),
        ({}, r"got \[\]"),
        ({"model": 1, "optimizer": 2}, r"\['model', 'optimizer'\]"),
        ({**STATE, "more": 1}, "more"),
        ({name: value for name, value in STATE.items() if name != "start"}, "start"),
        ({**STATE, "batch": "5"}, "its batch is '5'"),
        ({**STATE, "batch": -1}, "its batch is -1"),
        ({**STATE, "epoch": 1.5}, "its epoch is 1.5"),
        ({**STATE, "world_size": True}, "its world_size is True"),
        ({**STATE, "world_size": 0}, "its world_size is 0"),
        ({**STATE, "seed": None}, "its seed is None"),
    ],
    ids=str,
)
def test_what_is_no_state_is_refused(photos: Photos, state: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"not the state of a TokenLabelLoader.*{words}"):
        Position.from_state(state)
    with pytest.raises(ValueError, match="not the state of a TokenLabelLoader"):
        loader_of(photos).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 2}, "another batch size: 4, this loader has 2; use that one"),
        ({"shuffle_shards": 3}, "another shuffle_shards: 2, this loader has 3; use that one"),
    ],
    ids=["batch size", "shuffle_shards"],
)
def test_the_state_of_another_loader_is_refused(photos: Photos, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loader_of(photos, **options).load_state_dict(advanced(loader_of(photos), 2).state_dict())


def test_the_state_of_another_data_set_is_refused(
    photos: Photos, make_photos: Callable[..., Photos], tmp_path: Path
) -> None:
    state = advanced(loader_of(photos), 2).state_dict()
    fewer = TokenLabelLoader(photos.tars[:4], image_size=32, batch_size=4, shuffle_shards=2, index_dir=photos.index_dir)
    other_order = [*photos.tars[1:], photos.tars[0]]
    shuffled = TokenLabelLoader(other_order, image_size=32, batch_size=4, shuffle_shards=2, index_dir=photos.index_dir)
    others = loader_of(make_photos(tmp_path, (9, 4, 11, 1, 7), side=200))
    for loader in (fewer, shuffled, others):
        with pytest.raises(ValueError, match=r"another data set: .*; give the same shards in the same order"):
            loader.load_state_dict(state)


def test_a_batch_that_the_epoch_does_not_have_is_refused(photos: Photos) -> None:
    """The 7th batch of 5 is filled up with repeated samples; without them there are 6."""
    state = advanced(loader_of(photos, batch_size=5, last="repeat"), 7).state_dict()
    loader_of(photos, batch_size=5, last="repeat").load_state_dict(state)
    with pytest.raises(ValueError, match=r"batch 7, but with last='drop' 1 ranks have 6 batches; use the same `last`"):
        loader_of(photos, batch_size=5).load_state_dict(state)


def test_a_refused_state_changes_nothing(photos: Photos) -> None:
    loader = advanced(loader_of(photos), 3)
    before = loader.state_dict()
    for wrong in ({"batch_size": 2}, {"seed": 9, "batch": 100}, {"dataset": ""}, {"seed": 9, "epoch": -1}):
        with pytest.raises(ValueError, match="state"):
            loader.load_state_dict({**before, **wrong})
    assert loader.state_dict() == before


def test_a_state_follows_the_batches_that_are_handed_out(photos: Photos) -> None:
    loader = loader_of(photos, seed=7)
    digest = loader.dataset.digest
    assert loader.state_dict() == {**STATE, "seed": 7, "epoch": 0, "batch": 0, "dataset": digest}
    for number, _ in enumerate(loader):
        assert loader.state_dict() == {**STATE, "seed": 7, "epoch": 0, "batch": number + 1, "dataset": digest}
    assert loader.state_dict() == {**STATE, "seed": 7, "epoch": 1, "batch": 0, "dataset": digest}


def test_the_seed_is_that_of_the_state(photos: Photos) -> None:
    first = loader_of(photos, seed=7, mix="cutmix")
    expected = list(first)
    state = advanced(loader_of(photos, seed=7, mix="cutmix"), 2).state_dict()
    loader = loader_of(photos, seed=8, mix="cutmix")
    loader.load_state_dict(state)
    assert_same_batches(loader, expected[2:])
    assert_same_batches(loader, list(first))


def test_a_loaded_state_holds_for_one_pass(photos: Photos) -> None:
    """Begun anew, the epoch is whole: what was loaded says where to go on, not where epochs begin."""
    expected = list(loader_of(photos))
    loader = loader_of(photos)
    loader.load_state_dict(advanced(loader_of(photos), 5).state_dict())
    assert_same_batches(islice(loader, 2), expected[5:7])
    assert_same_batches(loader, expected)


def test_the_loaded_state_is_the_state(photos: Photos) -> None:
    state = advanced(loader_of(photos), 5).state_dict()
    loader = loader_of(photos)
    loader.load_state_dict(state)
    assert loader.state_dict() == state
    other = loader_of(photos)
    other.load_state_dict(loader.state_dict())
    assert_same_batches(other, list(loader))


@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_set_epoch_after_a_loaded_state(photos: Photos, epoch: int) -> None:
    """The usual loop says set_epoch before every pass: the loaded epoch goes on, any other is whole."""
    told = loader_of(photos)
    told.set_epoch(epoch)
    expected = list(told)
    told.set_epoch(1)
    state = advanced(told, 3).state_dict()
    loader = loader_of(photos)
    loader.load_state_dict(state)
    loader.set_epoch(epoch)
    assert_same_batches(loader, expected[3:] if epoch == 1 else expected)


def test_the_state_is_of_the_newest_pass(photos: Photos) -> None:
    """An iterator that somebody still holds does not move it."""
    loader = loader_of(photos)
    old = iter(loader)
    next(old)
    newest = iter(loader)
    next(newest)
    next(old)
    next(old)
    assert loader.state_dict()["batch"] == 1
    loader.load_state_dict({**loader.state_dict(), "batch": 6})
    next(newest)
    assert keys_of(old) == keys_of(list(loader_of(photos))[3:])
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (0, 6)


def test_a_state_of_the_next_epoch_after_set_epoch(photos: Photos) -> None:
    loader = loader_of(photos)
    for number, _ in enumerate(loader):
        if number == 2:
            loader.set_epoch(6)
        if number >= 2:
            assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (6, 0)


@pytest.mark.parametrize("epoch", [-1, 1.0, "1", None, True, np.int64(1)], ids=repr)
def test_epochs_are_counted_from_0(photos: Photos, epoch: Any) -> None:
    with pytest.raises(ValueError, match="epoch must be an integer of at least 0, got"):
        loader_of(photos).set_epoch(epoch)
