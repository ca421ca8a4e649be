"""The images of the gallery, read from the set and its images."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tokenlabels.audit.audit import Audit
from tokenlabels.audit.images import Images
from tokenlabels.images.decode import UndecodableImageError
from tokenlabels.report.items import Item, item_of
from tokenlabels.report.sample import Choice, choose
from tokenlabels.report.thumbnails import Thumbnail, thumbnail
from tokenlabels.store import ShardReader


@dataclass(frozen=True)
class Unreadable:
    """An image that was chosen and could not be decoded; another one has its place."""

    key: str
    shard: str
    reason: str


@dataclass(frozen=True)
class Gallery:
    """Images worth a look.

    Attributes:
        items: in the order of the set.
        num_at_hand: images of which the photographs were given.
        unreadable: those that were chosen and are not shown.
    """

    items: tuple[Item, ...]
    num_at_hand: int
    unreadable: tuple[Unreadable, ...]


def read_gallery(
    audit: Audit, images: Images, *, number: int, seed: int, on_image: Callable[[], None] = lambda: None
) -> Gallery:
    """Choose images and read their photographs and maps. In the place of an image that cannot be decoded comes the next
    one of the same reason.

    Args:
        audit: of the set.
        images: of the set.
        number: of images, see `choose`.
        seed: of the random ones.
        on_image: called after every photograph.

    Raises:
        ValueError: a tar is damaged.
    """
    at_hand = np.concatenate([np.full(len(shard), shard in images) for shard in audit.shards])
    num_at_hand = int(at_hand.sum())
    photographs: dict[int, Thumbnail] = {}
    unreadable: list[Unreadable] = []
    chosen = choose(audit.measures, at_hand, number, seed)
    while missing := [choice.row for choice in chosen if choice.row not in photographs]:
        for row, data in _photographs(audit, images, missing):
            try:
                photographs[row] = thumbnail(data)
            except UndecodableImageError as error:
                at_hand[row] = False
                unreadable.append(Unreadable(audit.key(row), audit.locate(row)[0].stem, str(error)))
            on_image()
        chosen = choose(audit.measures, at_hand, number, seed)
    return Gallery(
        tuple(_item(audit, choice, photographs[choice.row]) for choice in chosen), num_at_hand, tuple(unreadable)
    )


def _item(audit: Audit, choice: Choice, photograph: Thumbnail) -> Item:
    shard, row = audit.locate(choice.row)
    return item_of(choice, shard.stem, shard.row(row), audit.measures, photograph)


def _photographs(audit: Audit, images: Images, rows: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """The encoded images of some rows of the set, with their rows; every shard is opened once."""
    rows_of: dict[ShardReader, list[tuple[int, int]]] = defaultdict(list)
    for row in rows:
        shard, row_in_shard = audit.locate(row)
        rows_of[shard].append((row, row_in_shard))
    for shard, places in rows_of.items():
        in_shard = [row_in_shard for _, row_in_shard in places]
        for (row, _), data in zip(places, images.read(shard, in_shard), strict=True):
            yield row, data
