"""Random numbers that are functions of names: published values, pinned values, and whether they look random."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.randomness import bits, hash_of, permutation, sample_hashes, uniforms

WORDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("seed", "published"),
    [
        pytest.param(0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4], id="seed 0"),
        pytest.param(
            1234567,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423,
                4593380528125082431,
                16408922859458223821,
            ],
            id="seed 1234567",
        ),
    ],
)
def test_words_are_those_of_splitmix64(seed: int, published: list[int]) -> None:
    assert bits(np.array(seed, np.uint64), len(published)).tolist() == published


def splitmix64(seed: int, num: int) -> list[int]:
    """The generator as it is published, in Python's own integers."""
    mask, words = 2**64 - 1, []
    for _ in range(num):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        word = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        words.append(word ^ (word >> 31))
    return words


@settings(max_examples=30, deadline=None)
@given(hashes=st.lists(WORDS, max_size=4), num=st.integers(0, 5))
def test_every_hash_has_its_own_words(hashes: list[int], num: int) -> None:
    words = bits(np.array(hashes, np.uint64), num)
    assert words.dtype == np.uint64
    assert words.shape == (len(hashes), num)
    assert words.tolist() == [splitmix64(one, num) for one in hashes]


# These may only change with a new major version: resumed runs would see other samples and other crops.
def test_pinned_values() -> None:
    assert hash_of(0, 0, "shards") == 1881946224102161202
    assert hash_of(0, 7, "n01440764_10026") == 682710368434255902
    assert hash_of("é") == 3394012004367669963
    assert permutation(0, 10).tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]
    assert uniforms(np.array(hash_of(0), np.uint64), 3).tolist() == [
        0.4586484713125917,
        0.5109848343528343,
        0.5814552928481679,
    ]


@settings(max_examples=30, deadline=None)
@given(
    keys=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=5),
    parts=st.lists(st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=3),
)
def test_hashes_of_samples_are_those_of_each(keys: list[str], parts: list[int | str]) -> None:
    hashes = sample_hashes(keys, *parts)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [hash_of(*parts, key) for key in keys]


def test_parts_and_their_order_count() -> None:
    names: list[tuple[int | str, ...]] = [(), (0,), (1,), (0, 1), (1, 0), (0, "window", 1), ("window", 0, 1), (0, "11")]
    assert len({hash_of(*parts) for parts in names}) == len(names)


def test_uniform_numbers_are_uniform() -> None:
    """Over neighbouring names, as they come: epochs 0..19 of 500 keys, three numbers each."""
    keys = [f"n01440764_{number}" for number in range(500)]
    drawn = np.concatenate([uniforms(sample_hashes(keys, 0, epoch), 3) for epoch in range(20)])
    assert drawn.dtype == np.float64
    assert drawn.shape == (10_000, 3)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for column in drawn.T:
        counts = np.histogram(column, bins=20, range=(0, 1))[0]
        # chi-squared with 19 degrees of freedom stays below 43.8 in 999 of 1,000 cases
        assert ((counts - 500) ** 2 / 500).sum() < 43.8


def test_uniform_numbers_are_independent() -> None:
    """Of each other, from key to key and from epoch to epoch: correlations of 10,000 pairs stay below 4 sigma."""
    keys = [str(number) for number in range(10_001)]
    this, following = (uniforms(sample_hashes(keys, 0, epoch), 2) for epoch in (0, 1))
    pairs = {
        "first and second": (this[:-1, 0], this[:-1, 1]),
        "key to key": (this[:-1, 0], this[1:, 0]),
        "epoch to epoch": (this[:-1, 0], following[:-1, 0]),
    }
    for name, (one, other) in pairs.items():
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.04, name


@settings(max_examples=30, deadline=None)
@given(hash_=WORDS, num=st.integers(0, 300))
def test_a_permutation_holds_everything_once(hash_: int, num: int) -> None:
    order = permutation(hash_, num)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num))


def test_permutations_are_fair() -> None:
    """Each of the 24 orders of four comes up about as often."""
    orders = [tuple(permutation(hash_of(seed), 4).tolist()) for seed in range(4800)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    # chi-squared with 23 degrees of freedom stays below 49.7 in 999 of 1,000 cases
    assert ((counts - 200) ** 2 / 200).sum() < 49.7
