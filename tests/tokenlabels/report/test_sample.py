"""Which images are chosen, against an obvious twin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenlabels.audit.maps import maps_of
from tokenlabels.audit.measures import ImageMeasures, measure
from tokenlabels.report.sample import (
    CONFIDENT,
    DISAGREES,
    OBJECTS,
    RANDOM,
    REASONS,
    UNCERTAIN,
    Choice,
    choose,
    disagreement,
    rankings,
)

NUM, NUM_CLASSES = 60, 20


def measures_of(seed: int = 0, num: int = NUM) -> ImageMeasures:
    """Labels that are right, wrong, or not there; one broken map in five."""
    rng = np.random.default_rng(seed)
    maps = maps_of(num, seed=seed, num_classes=NUM_CLASSES)
    maps.scores[rng.random(num) < 0.2] = np.nan
    labels = np.where(rng.random(num) < 0.6, maps.classes[:, 2, 2, 0].astype(np.int64), -1)
    return measure(maps, labels, NUM_CLASSES)


ALL = np.ones(NUM, np.bool_)


def twin(measures: ImageMeasures, at_hand: list[bool], number: int) -> dict[str, list[int]]:
    """Rows of every reason but the random one."""
    usable = [row for row in range(len(measures)) if at_hand[row] and not measures.is_broken[row]]
    wrong = [row for row in usable if measures.label[row] >= 0 and measures.label[row] != measures.predicted[row]]
    several = [row for row in usable if measures.num_objects[row] >= 2]
    return {
        CONFIDENT: sorted(usable, key=lambda row: -measures.top1[row])[: number // 5],
        UNCERTAIN: sorted(usable, key=lambda row: -measures.entropy[row])[: number // 5],
        DISAGREES: sorted(wrong, key=lambda row: -(measures.top1[row] - measures.own_mass[row]))[: number // 5],
        OBJECTS: sorted(several, key=lambda row: (-measures.num_objects[row], -measures.top1[row]))[: number // 5],
    }


def rows_of(chosen: tuple[Choice, ...], reason: str) -> list[int]:
    return [choice.row for choice in chosen if reason in choice.reasons]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 50), number=st.integers(1, 80), left_out=st.sets(st.integers(0, NUM - 1), max_size=50))
def test_choices_have_their_reasons(seed: int, number: int, left_out: set[int]) -> None:
    measures = measures_of(seed)
    at_hand = np.array([row not in left_out for row in range(NUM)])
    chosen = choose(measures, at_hand, number, seed)
    expected = twin(measures, at_hand.tolist(), number)
    for reason, rows in expected.items():
        assert rows_of(chosen, reason) == sorted(rows), reason
    others = {row for rows in expected.values() for row in rows}
    assert not others & {*rows_of(chosen, RANDOM)}
    usable = at_hand & ~measures.is_broken
    assert len(chosen) == min(number, usable.sum())
    assert all(usable[choice.row] for choice in chosen)
    assert [choice.row for choice in chosen] == sorted({choice.row for choice in chosen})
    assert all(list(choice.reasons) == [reason for reason in REASONS if reason in choice.reasons] for choice in chosen)


def test_the_seed_moves_the_random_ones_alone() -> None:
    measures = measures_of()
    first, again, other = (choose(measures, ALL, 20, seed) for seed in (0, 0, 1))
    assert first == again
    assert rows_of(first, RANDOM) != rows_of(other, RANDOM)
    assert all(rows_of(first, reason) == rows_of(other, reason) for reason in REASONS if reason != RANDOM)


@pytest.mark.parametrize("reason", REASONS)
def test_one_that_is_missing_is_replaced_and_the_others_stay(reason: str) -> None:
    measures = measures_of()
    before = choose(measures, ALL, 20, 0)
    gone = rows_of(before, reason)[0]
    after = choose(measures, np.arange(NUM) != gone, 20, 0)
    assert len(rows_of(after, reason)) == len(rows_of(before, reason))
    assert {*rows_of(before, reason)} - {*rows_of(after, reason)} == {gone}


def test_without_classes_nothing_disagrees_and_more_is_random() -> None:
    maps = maps_of(NUM, num_classes=NUM_CLASSES)
    unlabelled = measure(maps, np.full(NUM, -1), NUM_CLASSES)
    chosen = choose(unlabelled, ALL, 20, 0)
    assert rows_of(chosen, DISAGREES) == []
    assert len(rows_of(chosen, RANDOM)) >= 8
    assert len(chosen) == 20


def test_a_small_gallery_is_random() -> None:
    assert [choice.reasons for choice in choose(measures_of(), ALL, 4, 0)] == [(RANDOM,)] * 4


def test_disagreement_is_how_far_the_own_class_is_behind() -> None:
    measures = measures_of()
    behind = disagreement(measures)
    for row in range(NUM):
        if measures.label[row] < 0 or measures.is_broken[row]:
            assert np.isnan(behind[row])
        elif measures.label[row] == measures.predicted[row]:
            assert behind[row] == 0
        else:
            assert behind[row] == measures.top1[row] - measures.own_mass[row]


def test_rankings_hold_only_images_that_have_the_reason() -> None:
    measures = measures_of()
    ranked = rankings(measures)
    assert {*ranked} == {*REASONS} - {RANDOM}
    assert (measures.num_objects[ranked[OBJECTS]] >= 2).all()
    assert (measures.label[ranked[DISAGREES]] != measures.predicted[ranked[DISAGREES]]).all()
