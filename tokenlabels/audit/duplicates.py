"""What a label set holds twice: keys, maps, and images.

Things are compared by 64-bit hashes (BLAKE2b): a chance match among ten million has a probability of 3 in a million.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tokenlabels.audit.images import Images
from tokenlabels.store import ShardReader
from tokenlabels.types import ScoreMaps

Hashes = NDArray[np.uint64]


def hashes_of(contents: Iterable[bytes]) -> Hashes:
    """A hash of each, uint64 [n]."""
    digests = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(digests, np.uint64)


def map_hashes(maps: ScoreMaps) -> Hashes:
    """A hash of every map, bit for bit and without its key, uint64 [n]."""
    columns = (maps.scores, maps.classes, maps.tail, maps.views)
    return hashes_of(b"".join(column[row].tobytes() for column in columns) for row in range(len(maps)))


def copies(hashes: Hashes, rows: NDArray[np.int64]) -> dict[int, int]:
    """Those of the `rows` that repeat an earlier one, and the first row of each.

    Args:
        hashes: uint64 [m], of the rows.
        rows: int64 [m], rising.

    Returns:
        {copy: first}, rising.
    """
    _, first, where = np.unique(hashes, return_index=True, return_inverse=True)
    first = first[where]
    later = np.flatnonzero(first != np.arange(len(rows)))
    return dict(zip(rows[later].tolist(), rows[first[later]].tolist(), strict=True))


def identical_images(
    shards: Sequence[ShardReader],
    predicted: NDArray[np.int64],
    images: Images,
    on_shard: Callable[[str], None] = lambda _: None,
) -> dict[int, int]:
    """Images that are, byte for byte, an earlier image of the set.

    Only candidates are read: images of equal size in bytes and equal `predicted`. So a copy is missed whose labels
    differ in their leading class, as after a change of teacher between two shards; so is one that was encoded anew,
    and one whose tar is not given.

    Args:
        shards: of the set, in the order of `predicted`.
        predicted: int64 [n], image-level class of every row of all shards.
        images: of the set.
        on_shard: called with the stem before the images of a shard are read.

    Returns:
        {copy: first}, rows of all shards, rising.
    """
    starts = np.cumsum([0, *map(len, shards)])
    sizes = np.concatenate(
        [images.sizes(shard) if shard in images else np.zeros(len(shard), np.int64) for shard in shards]
    )
    kinds = sizes * (predicted.max(initial=0) + 1) + predicted  # one number for every pair of both
    _, where, counts = np.unique(kinds, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero((counts[where] > 1) & (sizes > 0))
    hashes = []
    for shard, start in zip(shards, starts[:-1].tolist(), strict=True):
        on_shard(shard.stem)
        rows = candidates[(candidates >= start) & (candidates < start + len(shard))] - start
        if rows.size:
            hashes.append(hashes_of(images.read(shard, rows.tolist())))
    return copies(np.concatenate(hashes), candidates) if hashes else {}
