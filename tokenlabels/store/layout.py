"""The five arrays of a shard: names, types, chunks and codecs of format 1.

256 rows per inner chunk and one zarr shard per array: a bulk read touches five files, a random row decodes 256.
blosc-zstd-1 with byte shuffle is close to the smallest of the fast codecs on score maps, and crc32c behind it
finds any flipped bit at reading time.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from tokenlabels.store.schema import LabelSet
from tokenlabels.types import ScoreMaps, class_dtype

ROWS_PER_CHUNK = 256


@dataclass(frozen=True)
class ArraySpec:
    """One array of a shard. `row_shape` is its shape without the leading axis of n rows."""

    name: str
    row_shape: tuple[int, ...]
    dtype: Any
    fill_value: Any

    def create(self, group: zarr.Group, num_rows: int) -> zarr.Array[Any]:
        """Make the empty array in a group. Chunks are written even where they equal the fill value."""
        num_chunks = max(1, -(-num_rows // ROWS_PER_CHUNK))
        return group.create_array(
            self.name,
            shape=(num_rows, *self.row_shape),
            dtype=self.dtype,
            chunks=(ROWS_PER_CHUNK, *self.row_shape),
            shards=(ROWS_PER_CHUNK * num_chunks, *self.row_shape),
            compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()],
            fill_value=self.fill_value,
            config={"write_empty_chunks": True},
        )


def array_specs(info: LabelSet) -> tuple[ArraySpec, ...]:
    """The arrays of every shard of a label set."""
    grid, ids = info.grid, class_dtype(info.num_classes)
    return (
        ArraySpec("scores", (*grid, info.k), np.dtype(np.float16), float("nan")),
        ArraySpec("classes", (*grid, info.k), ids, int(np.iinfo(ids).max)),
        ArraySpec("tail", grid, np.dtype(np.float16), float("nan")),
        ArraySpec("views", (4,), np.dtype(np.float32), float("nan")),
        ArraySpec("keys", (), str, ""),
    )


def values_of(maps: ScoreMaps, name: str) -> NDArray[Any]:
    """What is written into the array `name`."""
    return np.array(maps.keys, dtype=object) if name == "keys" else np.asarray(getattr(maps, name))
