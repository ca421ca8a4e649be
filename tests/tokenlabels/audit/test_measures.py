"""What is measured of every image, against a twin that looks at one cell after the other."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenlabels.audit.maps import VIEWS, WHOLE, WIDE, cells_of_image, maps_of, probability
from tokenlabels.audit.measures import ImageMeasures, broken_maps, cell_entropy, measure
from tokenlabels.types import ScoreMap, ScoreMaps

K = 20


def slow_measures(score_map: ScoreMap, label: int) -> dict[str, float]:
    """The columns of `ImageMeasures` of one map that is not broken."""
    cells = [*cells_of_image(score_map)]
    mass: Counter[int] = Counter()
    leading: Counter[int] = Counter()
    top1 = entropy = tail = 0.0
    for row, column, _, _ in cells:
        shares = probability(score_map, row, column)
        rest = float(score_map.tail[row, column])
        everything = [*shares.values(), *[rest / (K - len(shares))] * (K - len(shares))]
        mass.update(shares)
        leading[int(score_map.classes[row, column, 0])] += 1
        top1 += max(shares.values())
        entropy += sum(-share * math.log(share) for share in everything if share) / math.log(K)
        tail += rest
    n = len(cells)
    return {
        "predicted": max(mass, key=lambda class_id: mass[class_id]),
        "label": label,
        "top1": top1 / n,
        "entropy": entropy / n,
        "tail": tail / n,
        "own_mass": mass[label] / n if label >= 0 else math.nan,
        "num_distinct": len(set(score_map.classes.ravel().tolist())),
        "num_objects": sum(count >= 0.05 * n for count in leading.values()),
        "is_broken": False,
        "is_constant": False,
    }


def columns_of(measures: ImageMeasures, row: int) -> dict[str, float]:
    return {name: column[row].item() for name, column in vars(measures).items()}


@given(
    seed=st.integers(0, 2**32 - 1),
    grid=st.sampled_from([(5, 6), (1, 7), (8, 3)]),
    k=st.sampled_from([1, 3, 5]),
)
def test_measures_of_every_image(seed: int, grid: tuple[int, int], k: int) -> None:
    maps = maps_of(len(VIEWS) + 1, seed=seed, grid=grid, k=k, num_classes=K)
    labels = np.random.default_rng(seed).integers(-1, K, len(maps))
    measures = measure(maps, labels, K)
    for row, score_map in enumerate(maps):
        expected = slow_measures(score_map, int(labels[row]))
        assert columns_of(measures, row) == pytest.approx(expected, abs=2e-5, nan_ok=True)


def spoiled(maps: ScoreMaps, what: str, row: int) -> ScoreMaps:
    """The maps with one of them broken."""
    scores, classes, tail, views = (x.copy() for x in (maps.scores, maps.classes, maps.tail, maps.views))
    match what:
        case "NaN score":
            scores[row, 1, 2, 0] = np.nan
        case "infinite score":
            scores[row, 0, 0, 0] = np.inf
        case "unknown class":
            classes[row, 4, 5, 2] = K
        case "NaN tail":
            tail[row, 2, 2] = np.nan
        case "negative tail":
            tail[row, 0, 0] = -0.1
        case "tail above 1":
            tail[row, 0, 0] = 1.1
        case "NaN view":
            views[row, 0] = np.nan
        case "empty view":
            views[row, 2] = views[row, 0]
    return ScoreMaps(maps.keys, scores, classes, tail, views)


@pytest.mark.parametrize(
    "what",
    [
        *("NaN score", "infinite score", "unknown class", "NaN tail", "negative tail", "tail above 1"),
        *("NaN view", "empty view"),
    ],
)
def test_a_broken_map_is_found_and_spoils_no_other(what: str) -> None:
    maps, labels = maps_of(5), np.arange(5)
    measures = measure(spoiled(maps, what, 3), labels, K)
    assert measures.is_broken.tolist() == [False, False, False, True, False]
    assert measures.is_labelled.tolist() == [True, True, True, False, True]
    assert not measures.agrees[3]
    whole = measure(maps, labels, K)
    for row in (0, 1, 2, 4):
        assert columns_of(measures, row) == columns_of(whole, row)


def test_whole_maps_are_not_broken() -> None:
    assert not broken_maps(maps_of(8), K).any()


@pytest.mark.parametrize("column", ["scores", "classes"])
def test_constant_maps(column: str) -> None:
    maps = maps_of(3, views=(WHOLE,))
    maps.scores[1], maps.classes[1] = maps.scores[1, 0, 0], maps.classes[1, 0, 0]
    assert measure(maps, np.full(3, -1), K).is_constant.tolist() == [False, True, False]
    vars(maps)[column][1, 4, 5] -= vars(maps)[column].dtype.type(1)
    assert measure(maps, np.full(3, -1), K).is_constant.tolist() == [False, False, False]


def test_padding_is_no_part_of_a_constant_map() -> None:
    maps = maps_of(2, views=(WIDE,))
    padding = np.ones(maps.grid, np.bool_)
    for row, column, _, _ in cells_of_image(maps[0]):
        padding[row, column] = False
    assert padding[0, 0]
    maps.scores[0, ~padding], maps.classes[0, ~padding] = maps.scores[0, 2, 2], maps.classes[0, 2, 2]
    assert measure(maps, np.full(2, -1), K).is_constant.tolist() == [True, False]


def test_a_single_cell_is_not_constant() -> None:
    assert not measure(maps_of(3, grid=(1, 1), views=(WHOLE,)), np.full(3, -1), K).is_constant.any()


def test_entropy_of_nothing_and_of_everything() -> None:
    even = np.full((1, 4), 0.1, np.float32)
    assert cell_entropy(even, np.array([0.6], np.float32), 10) == pytest.approx(1)
    sure = np.array([[1, 0]], np.float32)
    assert cell_entropy(sure, np.zeros(1, np.float32), 10) == pytest.approx(0)
    assert cell_entropy(np.full((1, 2), 0.5, np.float32), np.zeros(1, np.float32), 2) == pytest.approx(1)


def test_parts_are_the_whole() -> None:
    maps, labels = maps_of(8), np.arange(8)
    parts = [
        ScoreMaps(maps.keys[s], maps.scores[s], maps.classes[s], maps.tail[s], maps.views[s])
        for s in (slice(0, 3), slice(3, 8))
    ]
    joined = ImageMeasures.concatenate([measure(parts[0], labels[:3], K), measure(parts[1], labels[3:], K)])
    whole = measure(maps, labels, K)
    assert len(joined) == 8
    for name, column in vars(whole).items():
        np.testing.assert_array_equal(getattr(joined, name), column)
