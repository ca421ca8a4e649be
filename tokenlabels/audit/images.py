"""What the audit asks of the images of a label set."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokenlabels.images import ImageShard
from tokenlabels.store import ShardReader


class Images(Protocol):
    """The images of a label set, row by row of its shards."""

    def __contains__(self, shard: ShardReader) -> bool:
        """Whether the images of a shard are at hand; all else is asked for such shards only."""

    def source(self, shard: ShardReader) -> ImageShard:
        """Where they are."""

    def labels(self, shard: ShardReader) -> NDArray[np.int64]:
        """The data set's own class of every row, int64 [n]; -1 where there is none."""

    def sizes(self, shard: ShardReader) -> NDArray[np.int64]:
        """Bytes of every row's encoded image, int64 [n]."""

    def read(self, shard: ShardReader, rows: Sequence[int]) -> Iterator[bytes]:
        """The encoded images of these rows, in this order."""
