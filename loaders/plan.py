"""Which samples every rank reads, in which order, in which batches: known before anything is read.

The order of an epoch is a function of (seed, epoch) alone. The shards are shuffled, `shuffle_shards` of them at a time
form a window, and the samples of a window are shuffled: reads stay within a few shards. The order depends on neither
ranks nor batches nor threads, so a place in an epoch is one number, the samples seen so far by all ranks together, and
an epoch goes on from there with any number of ranks. It is made a window at a time, never as a whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import count
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from loaders.randomness import hash_of, permutation
from tokenlabels.lazy import cached_property

Last = Literal["drop", "repeat"]
"""What becomes of the samples at the end of an epoch that do not fill a global batch. See `EpochPlan`."""

# Bounds the samples of an evaluation's window, whose labels are in memory together, to this and one shard more.
SEQUENTIAL_WINDOW_SAMPLES = 4096


@dataclass(frozen=True, eq=False)
class Window:
    """Samples of a few shards that one rank reads together.

    Attributes:
        samples: int64 [m, 2], m above 0, (shard, row in the shard) of every sample, in the order of the batches.
    """

    samples: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert self.samples.ndim == 2, f"samples must be [m, 2], got {self.samples.shape}"
        assert self.samples.shape[1] == 2, f"samples must be [m, 2], got {self.samples.shape}"
        assert len(self.samples), "a window has samples"

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return f"Window({len(self)} samples of {len(np.unique(self.samples[:, 0]))} shards)"


@dataclass(frozen=True)
class EpochPlan:
    """One rank's share of one training epoch, in batches of one size; every rank has equally many.

    The epoch's order without its first `start` samples is cut into global batches of `world_size * batch_size`, and
    rank r takes the r-th run of `batch_size` samples of each.

    Attributes:
        lengths: number of samples of every shard; zeros are allowed.
        seed, epoch: what the order depends on, besides `lengths` and `shuffle_shards`.
        shuffle_shards: shards per window. All shards of a window are being read at the same time; as many as there
            are shards shuffles the whole data set.
        batch_size: samples of this rank per batch.
        rank, world_size: this process among those that train together.
        start: samples of this epoch that all ranks together have seen before, see `consumed`.
        last: "drop" leaves out what does not fill the last global batch, other samples in every epoch. "repeat" fills
            it with the first samples of the epoch's order, several times over if there are that few.

    Raises:
        ValueError: a value is out of range, or there are fewer samples than one global batch with last="drop".
    """

    lengths: tuple[int, ...] = field(repr=False)
    _: KW_ONLY
    seed: int
    epoch: int
    shuffle_shards: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    start: int = 0
    last: Last = "drop"

    def __post_init__(self) -> None:
        _check_common(self.lengths, self.batch_size, self.rank, self.world_size)
        _check_at_least("shuffle_shards", self.shuffle_shards, 1)
        _check_at_least("epoch", self.epoch, 0)
        _check_integer("seed", self.seed)
        if self.last not in get_args(Last):
            raise ValueError(f"last must be one of {get_args(Last)}, got {self.last!r}")
        if not 0 <= self.start <= self.num_samples:
            raise ValueError(
                f"start must be in 0..{self.num_samples}, the number of samples of an epoch, got {self.start}; "
                "EpochPlan.consumed gives the number to go on with"
            )
        if self.last == "drop" and self.num_samples < self._span:
            raise ValueError(
                f"{self.num_samples} samples do not fill one global batch of {self.world_size} ranks x "
                f"{self.batch_size}; lower batch_size, or fill it up with last='repeat'"
            )

    @cached_property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return sum(self.lengths)

    def __len__(self) -> int:
        """Number of batches; 0 where the epoch had ended at `start`."""
        rest = self.num_samples - self.start
        return rest // self._span if self.last == "drop" else -(-rest // self._span)

    @cached_property
    def batch_sizes(self) -> Sequence[int]:
        """Samples of each of this rank's batches: all alike."""
        return (self.batch_size,) * len(self)

    def consumed(self, num_batches: int) -> int:
        """Samples of the epoch that all ranks have seen after this many batches: `start` of the plan that goes on."""
        _check_batch("num_batches", num_batches, len(self))
        return min(self.num_samples, self.start + num_batches * self._span)

    def windows(self, first_batch: int = 0) -> Iterator[Window]:
        """The samples of this rank's batches from `first_batch` on, a window at a time.

        Windows before that are skipped by their lengths, and each is made when it is asked for.

        Raises:
            ValueError: there is no such batch; the number of batches itself is allowed, and gives nothing.
        """
        _check_batch("first_batch", first_batch, len(self))
        return self._windows(self.start + first_batch * self._span, self.start + len(self) * self._span)

    def _windows(self, first: int, stop: int) -> Iterator[Window]:
        for number, (begin, end) in self._window_ends():
            if begin >= stop:
                return
            positions = np.arange(max(begin, first), min(end, stop))
            mine = positions[(positions - self.start) % self._span // self.batch_size == self.rank]
            if mine.size:
                yield Window(self._shuffled(number)[mine - begin])

    def _window_ends(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Number of each window, its first position in the order and the one behind its last, again and again."""
        ends = np.cumsum([sum(self.lengths[shard] for shard in self._shards(w)) for w in range(self._num_windows)])
        begins = [0, *ends[:-1].tolist()]
        for cycle in count():
            passed = cycle * self.num_samples
            for number, (begin, end) in enumerate(zip(begins, ends.tolist(), strict=True)):
                yield number, (passed + begin, passed + end)

    def _shuffled(self, number: int) -> NDArray[np.int64]:
        """All samples of a window, int64 [m, 2], whoever reads them."""
        samples = _samples_of(self._shards(number), self.lengths)
        return samples[permutation(hash_of(self.seed, self.epoch, "window", number), len(samples))]

    def _shards(self, number: int) -> Sequence[int]:
        return self._shard_order[number * self.shuffle_shards : (number + 1) * self.shuffle_shards]

    @cached_property
    def _shard_order(self) -> Sequence[int]:
        order: list[int] = permutation(hash_of(self.seed, self.epoch, "shards"), len(self.lengths)).tolist()
        return order

    @property
    def _num_windows(self) -> int:
        return -(-len(self.lengths) // self.shuffle_shards)

    @property
    def _span(self) -> int:
        return self.world_size * self.batch_size


@dataclass(frozen=True)
class SequentialPlan:
    """One rank's share of an evaluation: every sample once over all ranks, as stored, nothing dropped or repeated.

    Each rank reads a run of consecutive samples; the lengths of the runs differ by one at most. A rank's samples are
    spread over as many batches as the longest run needs, so that all ranks take equally many steps, in sizes that
    differ by one at most. No batch is empty, and so a rank can be one batch short where there are fewer samples than
    ranks, or with a batch size of 1.

    Attributes:
        lengths: number of samples of every shard; zeros are allowed.
        batch_size: samples of a batch at most.
        rank, world_size: this process among those that evaluate together.

    Raises:
        ValueError: a value is out of range.
    """

    lengths: tuple[int, ...] = field(repr=False)
    _: KW_ONLY
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        _check_common(self.lengths, self.batch_size, self.rank, self.world_size)

    @cached_property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return sum(self.lengths)

    def __len__(self) -> int:
        """Number of batches of this rank."""
        return len(self.batch_sizes)

    @cached_property
    def batch_sizes(self) -> Sequence[int]:
        """Samples of each of this rank's batches."""
        begin, end = self._run
        longest = -(-self.num_samples // self.world_size)
        num_batches = -(-longest // self.batch_size)
        size, num_larger = divmod(end - begin, num_batches)
        return (size + 1,) * num_larger + ((size,) * (num_batches - num_larger) if size else ())

    def windows(self, first_batch: int = 0) -> Iterator[Window]:
        """The samples of this rank's batches from `first_batch` on, whole shards at a time.

        A window takes in shards until the next one would make it longer than `SEQUENTIAL_WINDOW_SAMPLES`.

        Raises:
            ValueError: there is no such batch; the number of batches itself is allowed, and gives nothing.
        """
        _check_batch("first_batch", first_batch, len(self))
        begin, end = self._run
        return self._windows(begin + sum(self.batch_sizes[:first_batch]), end)

    def _windows(self, first: int, stop: int) -> Iterator[Window]:
        begin = 0
        for shards in self._groups():
            end = begin + sum(self.lengths[shard] for shard in shards)
            if max(begin, first) < min(end, stop):
                yield Window(_samples_of(shards, self.lengths)[max(0, first - begin) : stop - begin])
            begin = end

    def _groups(self) -> Iterator[Sequence[int]]:
        first, num_samples = 0, 0
        for shard, length in enumerate(self.lengths):
            if shard > first and num_samples + length > SEQUENTIAL_WINDOW_SAMPLES:
                yield range(first, shard)
                first, num_samples = shard, 0
            num_samples += length
        yield range(first, len(self.lengths))

    @property
    def _run(self) -> tuple[int, int]:
        """First position of this rank, and the one behind its last."""
        size, num_longer = divmod(self.num_samples, self.world_size)
        begin, end = (rank * size + min(rank, num_longer) for rank in (self.rank, self.rank + 1))
        return begin, end


def _samples_of(shards: Sequence[int], lengths: tuple[int, ...]) -> NDArray[np.int64]:
    """(shard, row) of all samples of some shards, int64 [m, 2], shard by shard."""
    chosen = np.array(shards, np.int64)
    sizes = np.array([lengths[shard] for shard in shards], np.int64)
    ends = np.cumsum(sizes)
    rows = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
    return np.stack([np.repeat(chosen, sizes), rows], axis=1)


def _check_common(lengths: tuple[int, ...], batch_size: int, rank: int, world_size: int) -> None:
    if sum(lengths) < 1 or min(lengths) < 0:
        raise ValueError(
            f"lengths must hold at least one sample and no negative number, got {_shortened(lengths)}; "
            "are the image shards empty?"
        )
    _check_at_least("batch_size", batch_size, 1)
    _check_at_least("world_size", world_size, 1)
    _check_at_least("rank", rank, 0)
    if rank >= world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, as world_size is {world_size}, got {rank}")


def _check_at_least(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def _check_batch(name: str, value: int, num_batches: int) -> None:
    if not 0 <= value <= num_batches:
        raise ValueError(f"{name} must be in 0..{num_batches}, as the plan has {num_batches} batches, got {value}")


def _shortened(lengths: tuple[int, ...]) -> str:
    return str(lengths) if len(lengths) <= 8 else f"{str(lengths[:8])[:-1]}, ... ({len(lengths)} shards)"
