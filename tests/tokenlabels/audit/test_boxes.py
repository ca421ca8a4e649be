"""Pointing game and mass inside of boxes, against a twin that looks at one cell after the other."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenlabels.audit.maps import CENTRE, VIEWS, WHOLE, cells_of_image, maps_of, probability
from tokenlabels.audit.boxes import (
    NO_BOXES,
    BoxMeasures,
    Localisation,
    cells_of_boxes,
    centres_inside,
    measure_boxes,
)
from tokenlabels.audit.measures import measure
from tokenlabels.types import ScoreMap, ScoreMaps

K = 20


def slow_cells(score_map: ScoreMap, box: Sequence[float]) -> set[tuple[int, int]]:
    """The cells of a box: those with their centre inside, or else the one nearest to the centre of what is seen."""
    cells = [*cells_of_image(score_map)]
    inside = {(row, column) for row, column, x, y in cells if box[0] <= x < box[2] and box[1] <= y < box[3]}
    if inside:
        return inside
    x0, y0, x1, y1 = score_map.view.tolist()
    left, top, right, bottom = max(box[0], x0, 0), max(box[1], y0, 0), min(box[2], x1, 1), min(box[3], y1, 1)
    if left >= right or top >= bottom:
        return set()
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    row, column, _, _ = min(cells, key=lambda cell: abs(cell[2] - middle_x) + abs(cell[3] - middle_y))
    return {(row, column)}


def slow_measures(score_map: ScoreMap, label: int, boxes: Sequence[Sequence[float]]) -> tuple[bool, bool, float, float]:
    inside = {cell for box in boxes for cell in slow_cells(score_map, box)}
    cells = [(row, column) for row, column, _, _ in cells_of_image(score_map)]
    mass = {cell: probability(score_map, *cell).get(label, 0.0) for cell in cells}
    total = sum(mass.values())
    best = max(cells, key=lambda cell: mass[cell])
    share = sum(mass[cell] for cell in inside) / total if total else math.nan
    return bool(inside), bool(total) and best in inside, share, len(inside) / len(cells)


# Odd 64ths are no centres and no borders of cells of these grids and views, where rounding would decide.
corners = st.integers(0, 31).map(lambda number: (2 * number + 1) / 64)
boxes = st.tuples(corners, corners, corners, corners).map(
    lambda box: (min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]) + 1e-3, max(box[1], box[3]) + 1e-3)
)


@given(seed=st.integers(0, 2**32 - 1), annotated=st.lists(st.lists(boxes, max_size=3), min_size=6, max_size=6))
def test_boxes_of_every_image(seed: int, annotated: list[list[tuple[float, ...]]]) -> None:
    # odd, so that the middle of a view lies in a cell and not between two
    maps = maps_of(6, seed=seed, grid=(5, 7))
    labels = maps.classes[np.arange(6), 2, 2, seed % 3].astype(np.int64)
    measured = measure_boxes(maps, measure(maps, labels, K), [np.array(own).reshape(-1, 4) for own in annotated])
    for row, score_map in enumerate(maps):
        is_boxed, is_hit, mass, cells = slow_measures(score_map, int(labels[row]), annotated[row])
        assert measured.is_boxed[row] == is_boxed
        if is_boxed:
            assert measured.is_hit[row] == is_hit
            assert measured.mass_inside[row] == pytest.approx(mass, abs=1e-5, nan_ok=True)
            assert measured.cells_inside[row] == pytest.approx(cells, abs=1e-6)


def test_a_centre_on_an_edge() -> None:
    view, box = np.array([WHOLE], np.float32), np.array([[0.25, 0.25, 0.75, 0.75]])
    inside = centres_inside(view, box, (2, 2))[0]
    assert inside.tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize(
    ("view", "box", "cell"),
    [
        pytest.param(WHOLE, (0.01, 0.01, 0.05, 0.05), (0, 0), id="in a corner"),
        pytest.param(WHOLE, (0.99, 0.3, 1.0, 0.35), (1, 3), id="on the edge"),
        pytest.param(CENTRE, (0.0, 0.4, 0.2, 0.42), (1, 0), id="half of it seen"),
        pytest.param(CENTRE, (0.0, 0.4, 0.1, 0.42), None, id="not seen"),
        pytest.param((0.0, -0.5, 1.0, 1.5), (0.3, 0.01, 0.4, 0.03), (1, 1), id="letterboxed"),
    ],
)
def test_a_box_without_a_centre(view: tuple[float, ...], box: tuple[float, ...], cell: tuple[int, int] | None) -> None:
    (found,) = cells_of_boxes(np.array([view], np.float32), np.array([box]), (4, 4))
    assert [tuple(place) for place in np.argwhere(found)] == ([] if cell is None else [cell])


def test_a_box_whose_cell_is_padding_has_the_next_one() -> None:
    (found,) = cells_of_boxes(np.array([(0, -0.5, 1, 1.5)], np.float32), np.array([(0.3, 0, 0.4, 0.06)]), (7, 7))
    assert np.argwhere(found).tolist() == [[2, 2]]


def test_labels_that_know_the_place() -> None:
    annotated = np.array([[0.2, 0.3, 0.7, 0.9]])
    maps = maps_of(4, seed=1, grid=(8, 8), num_classes=K)
    inside = np.stack([cells_of_boxes(view[None], annotated, (8, 8))[0] for view in maps.views])
    scores = np.tile(np.array([20, 0, 0], np.float16), (4, 8, 8, 1))
    classes = np.where(inside[..., None], np.array([7, 1, 2]), np.array([3, 1, 2])).astype(np.uint16)
    knowing = ScoreMaps(maps.keys, scores, classes, np.zeros_like(maps.tail), maps.views)
    own = measure(knowing, np.full(4, 7), K)
    found = Localisation.of(measure_boxes(knowing, own, [annotated] * 4), np.ones(4, np.bool_))
    assert (found.num_boxed, found.num_hits, found.hit_share) == (4, 4, 1)
    assert found.mass_inside == pytest.approx(1)
    others = measure(knowing, np.full(4, 3), K)
    missed = Localisation.of(measure_boxes(knowing, others, [annotated] * 4), np.ones(4, np.bool_))
    assert (missed.num_boxed, missed.num_hits) == (4, 0)
    assert missed.mass_inside == pytest.approx(0)


def test_a_class_that_is_not_stored_misses() -> None:
    maps = maps_of(1, views=(WHOLE,), num_classes=15)
    found = Localisation.of(
        measure_boxes(maps, measure(maps, np.array([19]), K), [np.array([[0.0, 0.0, 1.0, 1.0]])]), np.ones(1, np.bool_)
    )
    assert found == Localisation(num_boxed=1, num_hits=0, mass_inside=None, cells_inside=1)


def test_images_that_do_not_count() -> None:
    maps = maps_of(len(VIEWS))
    maps.scores[2, 0, 0, 0] = np.nan
    everywhere = np.array([[0.0, 0.0, 1.0, 1.0]])
    labels = np.array([-1, 0, 0, 0])
    measured = measure_boxes(maps, measure(maps, labels, K), [everywhere, NO_BOXES, everywhere, everywhere])
    assert measured.is_boxed.tolist() == [False, False, False, True]
    nothing = Localisation.of(measured, np.array([True, True, True, False]))
    assert nothing == Localisation(0, 0, None, None)
    assert nothing.hit_share is None


def test_parts_are_the_whole() -> None:
    maps = maps_of(4)
    measured = measure_boxes(maps, measure(maps, np.zeros(4, np.int64), K), [np.array([[0.1, 0.1, 0.6, 0.6]])] * 4)
    twice = BoxMeasures.concatenate([measured, measured])
    for name, column in vars(measured).items():
        np.testing.assert_array_equal(getattr(twice, name), np.concatenate([column, column]))
