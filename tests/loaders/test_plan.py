"""Plans of an epoch, against a twin that writes the whole order down, and over any shards, ranks and batches."""

import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import loaders.plan
from loaders.plan import EpochPlan, SequentialPlan, Window
from loaders.randomness import hash_of, permutation

Sample = tuple[int, int]
LENGTHS = (3, 0, 4, 2, 5)

few_examples = settings(max_examples=60, deadline=None)
some_lengths = st.lists(st.integers(0, 9), min_size=1, max_size=7).map(tuple).filter(sum)
some_world = st.sampled_from([1, 2, 3, 5])
some_last = st.sampled_from(["drop", "repeat"])


def plan_of(lengths: tuple[int, ...] = LENGTHS, **changes: Any) -> EpochPlan:
    return EpochPlan(lengths, **{"seed": 0, "epoch": 0, "shuffle_shards": 2, "batch_size": 1, **changes})


@st.composite
def epoch_plans(draw: st.DrawFn) -> EpochPlan:
    """Plans of rank 0, of which the other ranks' are made with `replace`."""
    lengths, world_size, batch_size, last = (
        draw(some_lengths),
        draw(some_world),
        draw(st.integers(1, 4)),
        draw(some_last),
    )
    assume(last == "repeat" or sum(lengths) >= world_size * batch_size)
    return plan_of(
        lengths,
        seed=draw(st.integers(0, 3)),
        epoch=draw(st.integers(0, 3)),
        shuffle_shards=draw(st.integers(1, 8)),
        batch_size=batch_size,
        world_size=world_size,
        start=draw(st.integers(0, sum(lengths))),
        last=last,
    )


def samples_of(plan: EpochPlan | SequentialPlan, first_batch: int = 0) -> list[Sample]:
    windows = list(plan.windows(first_batch))
    assert all(len(window) == len(window.samples) > 0 and window.samples.dtype == np.int64 for window in windows)
    return [(shard, row) for window in windows for shard, row in window.samples.tolist()]


def ranks_of(plan: EpochPlan) -> list[EpochPlan]:
    return [replace(plan, rank=rank) for rank in range(plan.world_size)]


def whole_order(plan: EpochPlan) -> list[Sample]:
    """The order of an epoch, slowly: every sample of it in one list."""
    shards = permutation(hash_of(plan.seed, plan.epoch, "shards"), len(plan.lengths)).tolist()
    order: list[Sample] = []
    for number, first in enumerate(range(0, len(shards), plan.shuffle_shards)):
        window = [
            (shard, row) for shard in shards[first : first + plan.shuffle_shards] for row in range(plan.lengths[shard])
        ]
        places = permutation(hash_of(plan.seed, plan.epoch, "window", number), len(window))
        order += [window[place] for place in places]
    return order


def slow_batches(plan: EpochPlan) -> list[list[Sample]]:
    """This rank's batches, cut from the whole order."""
    order, span = whole_order(plan), plan.batch_size * plan.world_size
    rest = order[plan.start :]
    if plan.last == "drop":
        rest = rest[: len(rest) // span * span]
    position = 0
    while len(rest) % span:
        rest.append(order[position % len(order)])
        position += 1
    skip = plan.rank * plan.batch_size
    return [rest[first + skip : first + skip + plan.batch_size] for first in range(0, len(rest), span)]


@few_examples
@given(plan=epoch_plans())
def test_plans_are_those_of_the_slow_twin(plan: EpochPlan) -> None:
    for rank in ranks_of(plan):
        batches = slow_batches(rank)
        assert len(rank) == len(rank.batch_sizes) == len(batches)
        assert [len(batch) for batch in batches] == list(rank.batch_sizes)
        assert samples_of(rank) == [sample for batch in batches for sample in batch]


@few_examples
@given(plan=epoch_plans())
def test_ranks_cover_an_epoch_once_in_equal_batches(plan: EpochPlan) -> None:
    plan = replace(plan, start=0)
    ranks = ranks_of(plan)
    assert len({tuple(rank.batch_sizes) for rank in ranks}) == 1
    assert set(plan.batch_sizes) == {plan.batch_size}
    seen = Counter(sample for rank in ranks for sample in samples_of(rank))
    span = plan.batch_size * plan.world_size
    remainder = plan.num_samples % span
    if plan.last == "drop":
        assert set(seen.values()) == {1}
        assert len(seen) == plan.num_samples - remainder
    else:
        assert len(seen) == plan.num_samples
        assert sum(seen.values()) == plan.num_samples + -plan.num_samples % span
        repeated = Counter(whole_order(plan)[n % plan.num_samples] for n in range(-plan.num_samples % span))
        assert seen - repeated == Counter(whole_order(plan))


@few_examples
@given(plan=epoch_plans(), data=st.data())
def test_another_number_of_ranks_goes_on_with_what_is_unseen(plan: EpochPlan, data: st.DataObject) -> None:
    plan = replace(plan, start=0)
    num_batches = data.draw(st.integers(0, len(plan)), label="batches before")
    world_size, batch_size = (
        data.draw(some_world, label="ranks after"),
        data.draw(st.integers(1, 4), label="their batch"),
    )
    assume(plan.last == "repeat" or plan.num_samples >= world_size * batch_size)
    seen = [sample for rank in ranks_of(plan) for sample in samples_of(rank)[: num_batches * plan.batch_size]]
    rest = replace(plan, start=plan.consumed(num_batches), world_size=world_size, batch_size=batch_size)
    unseen = [sample for rank in ranks_of(rest) for sample in samples_of(rank)]
    if plan.last == "drop":
        assert max(Counter(seen + unseen).values(), default=1) == 1
        assert plan.num_samples - len(seen + unseen) == (plan.num_samples - len(seen)) % (world_size * batch_size)
    else:
        assert set(seen + unseen) == set(whole_order(plan))
        assert set(unseen) >= set(whole_order(plan)) - set(seen)
        assert len(unseen) < plan.num_samples - plan.consumed(num_batches) + world_size * batch_size


@few_examples
@given(plan=epoch_plans(), data=st.data())
def test_batches_are_skipped_as_if_they_had_been_read(plan: EpochPlan, data: st.DataObject) -> None:
    first_batch = data.draw(st.integers(0, len(plan)))
    for rank in ranks_of(plan):
        assert samples_of(rank, first_batch) == samples_of(rank)[first_batch * plan.batch_size :]
    later = replace(plan, start=plan.consumed(first_batch))
    if plan.last == "drop" or plan.consumed(first_batch) < plan.num_samples:
        assert samples_of(later) == samples_of(plan, first_batch)
    assert plan.consumed(len(plan)) <= plan.num_samples


@few_examples
@given(plan=epoch_plans())
def test_windows_keep_to_their_shards(plan: EpochPlan) -> None:
    """Reads are near-sequential: at most `shuffle_shards` shards at a time, and each is done with once and for all."""
    windows = [
        set(window.samples[:, 0].tolist()) for window in replace(plan, start=0, batch_size=1, world_size=1).windows()
    ]
    assert all(len(shards) <= plan.shuffle_shards for shards in windows)
    assert sum(map(len, windows)) == len(set().union(*windows))


@few_examples
@given(plan=epoch_plans(), world_size=some_world, batch_size=st.integers(1, 4))
def test_the_order_depends_on_neither_ranks_nor_batches(plan: EpochPlan, world_size: int, batch_size: int) -> None:
    def order(ranked: EpochPlan) -> list[Sample]:
        parts = [samples_of(rank) for rank in ranks_of(replace(ranked, start=0, last="repeat"))]
        size = ranked.batch_size
        runs = (part[first : first + size] for first in range(0, len(parts[0]), size) for part in parts)
        return [sample for run in runs for sample in run][: plan.num_samples]

    assert order(plan) == order(replace(plan, last="repeat", world_size=world_size, batch_size=batch_size))


def test_seed_and_epoch_change_the_order() -> None:
    orders = {tuple(samples_of(plan_of(seed=seed, epoch=epoch))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_every_epoch_drops_other_samples() -> None:
    def dropped(epoch: int) -> set[Sample]:
        plan = plan_of(epoch=epoch, batch_size=3)
        return set(whole_order(plan)) - set(samples_of(plan))

    assert [len(dropped(epoch)) for epoch in range(5)] == [2] * 5
    assert len({frozenset(dropped(epoch)) for epoch in range(5)}) > 1


@pytest.mark.parametrize(
    ("epoch", "order"),
    [
        pytest.param(0, "2.2 2.1 2.3 2.0 4.0 4.3 0.1 4.4 0.2 4.1 0.0 4.2 3.0 3.1", id="epoch 0"),
        pytest.param(1, "4.3 2.0 4.2 4.4 4.0 2.3 2.1 4.1 2.2 3.0 3.1 0.2 0.0 0.1", id="epoch 1"),
    ],
)
def test_the_order_is_pinned(epoch: int, order: str) -> None:
    """May only change with a new major version: resumed runs would see samples twice, and others never."""
    assert " ".join(f"{shard}.{row}" for shard, row in samples_of(plan_of(epoch=epoch))) == order


def test_fewer_samples_than_a_batch_are_repeated() -> None:
    plan = plan_of((2, 1), batch_size=7, last="repeat")
    order = whole_order(plan)
    assert samples_of(plan) == [*order, *order, order[0]]
    assert plan.consumed(1) == 3


def test_an_epoch_that_had_ended_has_no_batches() -> None:
    for last in ("drop", "repeat"):
        plan = plan_of(batch_size=4, last=last, start=14)
        assert (len(plan), plan.batch_sizes, samples_of(plan)) == (0, (), [])


def test_an_epoch_of_imagenet() -> None:
    """1,024 shards of 1,251 images, 8 ranks of 128; windows late in the epoch are reached without those before."""
    ranks = [plan_of((1251,) * 1024, shuffle_shards=16, batch_size=128, world_size=8, rank=rank) for rank in range(8)]
    assert {len(rank) for rank in ranks} == {1251}
    seen = np.concatenate([window.samples for rank in ranks for window in rank.windows()])
    assert len(np.unique(seen @ [1251, 1])) == len(seen) == 1024 * 1251
    [window] = ranks[3].windows(1250)
    assert repr(window) == "Window(128 samples of 16 shards)"
    assert len(pickle.dumps(ranks[0])) < 20_000


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no shards": ({"lengths": ()}, r"at least one sample .* got \(\); are the image shards empty"),
    "only empty shards": ({"lengths": (0,) * 9}, r"got \(0, 0, 0, 0, 0, 0, 0, 0, \.\.\. \(9 shards\)"),
    "a negative length": ({"lengths": (3, -1)}, r"no negative number, got \(3, -1\)"),
    "no batch": ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    "half a batch": ({"batch_size": 1.5}, "batch_size must be an integer of at least 1, got 1.5"),
    "no ranks": ({"world_size": 0}, "world_size must be an integer of at least 1, got 0"),
    "a rank too many": ({"rank": 2, "world_size": 2}, r"rank must be in 0\.\.1, as world_size is 2, got 2"),
    "no shards to shuffle": ({"shuffle_shards": 0}, "shuffle_shards must be an integer of at least 1, got 0"),
    "epoch before the first": ({"epoch": -1}, "epoch must be an integer of at least 0, got -1"),
    "start after the end": ({"start": 15}, r"start must be in 0\.\.14, .* got 15; EpochPlan.consumed gives"),
    "unknown last": ({"last": "keep"}, r"last must be one of \('drop', 'repeat'\), got 'keep'"),
    "less than one global batch": (
        {"batch_size": 5, "world_size": 3},
        "14 samples do not fill one global batch of 3 ranks x 5; lower batch_size, or fill it up with last='repeat'",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_plan_can_be_made_of(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(**changes)


@pytest.mark.parametrize("batch", [-1, 5])
def test_batches_outside_of_the_plan_are_refused(batch: int) -> None:
    message = rf"must be in 0\.\.4, as the plan has 4 batches, got {batch}"
    for plan in (plan_of(batch_size=3), SequentialPlan((13,), batch_size=4)):
        with pytest.raises(ValueError, match=f"first_batch {message}"):
            plan.windows(batch)
    with pytest.raises(ValueError, match=f"num_batches {message}"):
        plan_of(batch_size=3).consumed(batch)


@pytest.mark.parametrize("shape", [(3,), (3, 3), (0, 2)])
def test_windows_hold_pairs(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        Window(np.zeros(shape, np.int64))


@few_examples
@given(lengths=some_lengths, world_size=some_world, batch_size=st.integers(1, 5), window_samples=st.integers(1, 12))
def test_an_evaluation_reads_every_sample_once(
    lengths: tuple[int, ...], world_size: int, batch_size: int, window_samples: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders.plan, "SEQUENTIAL_WINDOW_SAMPLES", window_samples)
        ranks = [
            SequentialPlan(lengths, batch_size=batch_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        read = [samples_of(rank) for rank in ranks]
        everything = [(shard, row) for shard, length in enumerate(lengths) for row in range(length)]
        assert [sample for part in read for sample in part] == everything
        counts = [len(part) for part in read]
        assert max(counts) - min(counts) <= 1
        for rank, part in zip(ranks, read, strict=True):
            sizes = list(rank.batch_sizes)
            assert len(rank) == len(sizes)
            assert sum(sizes) == len(part)
            assert all(1 <= size <= batch_size for size in sizes)
            assert max(sizes, default=0) - min(sizes, default=0) <= 1
            for first_batch in range(len(rank) + 1):
                assert samples_of(rank, first_batch) == part[sum(sizes[:first_batch]) :]
            for window in rank.windows():
                assert len(window) <= window_samples or len(np.unique(window.samples[:, 0])) == 1
        num_batches = {len(rank) for rank in ranks}
        if batch_size > 1 and sum(lengths) >= world_size:
            assert num_batches == {-(-max(counts) // batch_size)}
        else:
            assert max(num_batches) - min(num_batches) <= 1


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "world_size", "sizes"),
    [
        pytest.param(10, 4, 1, [(4, 3, 3)], id="no batch is much smaller"),
        pytest.param(9, 4, 2, [(3, 2), (2, 2)], id="a rank with one sample less"),
        pytest.param(2, 4, 3, [(1,), (1,), ()], id="fewer samples than ranks"),
        pytest.param(3, 1, 2, [(1, 1), (1,)], id="batches of one"),
    ],
)
def test_batches_of_an_evaluation(
    num_samples: int, batch_size: int, world_size: int, sizes: list[tuple[int, ...]]
) -> None:
    plans = [
        SequentialPlan((num_samples,), batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    assert [plan.batch_sizes for plan in plans] == sizes


def test_an_evaluation_of_imagenet() -> None:
    """50,000 images in 64 shards: a window is at most 4,096 of them."""
    plan = SequentialPlan((782,) * 63 + (734,), batch_size=256)
    windows = list(plan.windows())
    assert (len(plan), sum(map(len, windows))) == (196, 50_000)
    assert {len(window) for window in windows[:-1]} == {5 * 782}


@pytest.mark.parametrize(
    "changes",
    [{"lengths": (0,)}, {"batch_size": 0}, {"world_size": 0}, {"rank": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_no_evaluation_can_be_made_of(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        SequentialPlan(**{"lengths": LENGTHS, "batch_size": 1, **changes})
