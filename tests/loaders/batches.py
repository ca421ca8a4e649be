"""Loaders of small batches, and what it means that two batches are the same, for the tests of the loaders."""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from loaders import TokenLabelBatch, TokenLabelLoader
from tests.loaders.photos import Photos

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


def loader_of(photos: Photos, **changes: Any) -> TokenLabelLoader:
    """A loader with labels; 32 images make 8 batches of 4, whose images have 2 x 2 tokens."""
    options = {
        "labels": photos.labels,
        "image_size": 32,
        "batch_size": 4,
        "shuffle_shards": 2,
        "threads": 2,
        "index_dir": photos.index_dir,
    }
    return TokenLabelLoader(photos.tars, **{**options, **changes})


def items_of(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All that a batch, its plan and its targets hold, by name."""
    for field in fields(value):
        item, inner = getattr(value, field.name), f"{name}.{field.name}".removeprefix(".")
        if hasattr(item, "__dataclass_fields__"):
            yield from items_of(item, inner)
        else:
            yield inner, item


def assert_same(got: Any, expected: Any) -> None:
    """Batches, plans or targets that are the same bit for bit."""
    got_items, expected_items = dict(items_of(got)), dict(items_of(expected))
    assert got_items.keys() == expected_items.keys()
    for name, item in expected_items.items():
        if isinstance(item, Tensor):
            assert got_items[name].dtype == item.dtype, name
            assert torch.equal(got_items[name], item), f"{name} differs"
        else:
            assert got_items[name] == item, f"{name} differs"


def assert_same_batches(got: Iterable[TokenLabelBatch], expected: Iterable[TokenLabelBatch]) -> None:
    """As many, in the same order, bit for bit."""
    for one, other in zip(got, expected, strict=True):
        assert_same(one, other)


def keys_of(batches: Iterable[TokenLabelBatch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]
