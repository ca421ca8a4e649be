"""The distinct classes of maps, against numpy's unique."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tokenlabels.vocabulary import Vocabulary, find_vocabulary, padded_size


@pytest.mark.parametrize(
    ("shape", "num_mentioned", "num_classes"),
    [
        pytest.param((4, 18, 18, 5), 60, 1000, id="usual"),
        pytest.param((1, 3, 2, 1), 1, 1000, id="one class"),
        pytest.param((2, 18, 18, 5), 1000, 1000, id="all over the classes"),
        pytest.param((2, 5, 5, 3), 3, 3, id="few classes"),
        pytest.param((2, 4, 4, 2), 9, 40_000, id="many classes"),
    ],
)
def test_every_stored_class_is_found_in_its_slot(
    shape: tuple[int, int, int, int], num_mentioned: int, num_classes: int
) -> None:
    rng = np.random.default_rng(0)
    mentioned = rng.choice(num_classes, size=num_mentioned, replace=False)
    classes = mentioned[rng.random((*shape[:3], num_mentioned)).argsort(axis=-1)[..., : shape[3]]]
    vocabulary = find_vocabulary(torch.from_numpy(classes), num_classes)
    for image in range(len(classes)):
        unique = np.unique(classes[image])
        listed = vocabulary.classes[image][vocabulary.is_listed()[image]]
        assert np.array_equal(listed.numpy(), unique)
        assert vocabulary.num_distinct[image] == len(unique)
        assert np.array_equal(listed[vocabulary.slots[image].long()].numpy(), classes[image])
    assert vocabulary.num_listed == padded_size(int(vocabulary.num_distinct.max()), num_classes)
    assert vocabulary.classes.max() < num_classes


def test_more_classes_than_int16_counts() -> None:
    classes = torch.arange(40_000).view(1, 200, 200, 1)
    vocabulary = find_vocabulary(classes, 40_000)
    assert vocabulary.slots.dtype == torch.int32
    assert torch.equal(vocabulary.slots, classes.int())


def test_sizes_are_few_and_never_above_the_number_of_classes() -> None:
    sizes = {padded_size(number, 1000) for number in range(1, 1001)}
    assert sizes == {16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000}
    assert all(number <= padded_size(number, 1000) <= max(16, number * 3 // 2) for number in range(1, 1001))


def test_lists_move_together() -> None:
    moved = find_vocabulary(torch.zeros(2, 3, 3, 1, dtype=torch.int64), 10).to("meta")
    assert {moved.classes.device.type, moved.num_distinct.device.type, moved.slots.device.type} == {"meta"}
    assert repr(moved) == "Vocabulary(2 maps, 10 of 10 classes listed)"


@pytest.mark.parametrize(
    ("classes", "num_classes", "message"),
    [
        pytest.param(torch.zeros(2, 3, 3, dtype=torch.int64), 10, r"classes must be integer \[B, H, W, k\]", id="3-D"),
        pytest.param(torch.zeros(2, 3, 3, 1), 10, "got float32", id="floating"),
        pytest.param(torch.zeros(2, 3, 3, 1, dtype=torch.bool), 10, "got bool", id="booleans"),
        pytest.param(torch.zeros(0, 3, 3, 1, dtype=torch.int64), 10, "without empty sides", id="empty batch"),
        pytest.param(torch.full((2, 3, 3, 1), 65_535), 1000, r"0\.\.999, got 65535\.\.65535", id="never written"),
        pytest.param(torch.full((2, 3, 3, 1), -1), 1000, r"got -1\.\.-1", id="negative"),
        pytest.param(torch.zeros(2, 3, 3, 1, dtype=torch.int64), 0, "at least 1", id="no classes"),
        pytest.param(torch.zeros(2, 3, 3, 1, dtype=torch.int64), 10.0, "num_classes must be an integer", id="float K"),
        pytest.param(torch.zeros(2, 3, 3, 4, dtype=torch.int64), 3, "cannot store 4 of 3 classes", id="k above K"),
        pytest.param(
            torch.tensor([1, 2, 1]).expand(1, 1, 1, 3), 9, r"distinct within a cell, got \[1, 2, 1\]", id="twice"
        ),
        pytest.param([[[[1]]]], 10, r"classes must be a torch\.Tensor, got builtins\.list", id="list"),
    ],
)
def test_bad_input_is_refused(classes: torch.Tensor, num_classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_vocabulary(classes, num_classes)


def test_lists_of_other_maps_are_refused() -> None:
    classes: Any = torch.zeros(2, 3, 3, 1, dtype=torch.int64)
    vocabulary = find_vocabulary(classes, 10)
    assert isinstance(vocabulary, Vocabulary)
    vocabulary.check(classes, 10)
    with pytest.raises(ValueError, match="slots must be below 10, got 10"):
        replace(vocabulary, slots=vocabulary.slots + 10).check(classes, 10)
    for other, num_classes, message in (
        (classes[:1], 10, "find it from these maps"),
        (classes, 11, "of 11; find it"),
        (classes.to("meta"), 10, "move it there"),
        (classes + 1, 10, "lists other classes than the maps hold"),
    ):
        with pytest.raises(ValueError, match=message):
            vocabulary.check(other, num_classes)
