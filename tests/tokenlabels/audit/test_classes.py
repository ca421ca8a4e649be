"""Teacher and data set class by class, against a twin that counts image by image."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenlabels.audit.maps import maps_of
from tokenlabels.audit.boxes import BoxMeasures
from tokenlabels.audit.classes import audit_classes, confusions
from tokenlabels.audit.measures import measure

K = 4
NAMES = ("cat", "dog", "cow", "owl")


@given(seed=st.integers(0, 2**32 - 1))
def test_counts_of_every_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps = maps_of(30, seed=seed, grid=(2, 2), k=2, num_classes=K)
    maps.scores[rng.integers(30), 0, 0, 0] = np.nan
    measures = measure(maps, rng.integers(-1, K - 1, 30), K)
    boxes = BoxMeasures(
        rng.random(30) < 0.7,
        rng.random(30) < 0.5,
        np.where(rng.random(30) < 0.8, rng.random(30), np.nan).astype(np.float32),
        rng.random(30).astype(np.float32),
    )
    classes = audit_classes(measures, NAMES, boxes)
    usable = [row for row in range(30) if not measures.is_broken[row]]
    for class_id, known in enumerate(classes):
        own = [row for row in usable if measures.label[row] == class_id]
        # whatever an image with a box is, its map is usable: this is what `measure_boxes` gives
        boxed = [row for row in range(30) if measures.label[row] == class_id and boxes.is_boxed[row]]
        inside = [boxes.mass_inside[row] for row in boxed if not np.isnan(boxes.mass_inside[row])]
        assert (known.class_id, known.name) == (class_id, NAMES[class_id])
        assert known.num_images == len(own)
        assert known.num_agreeing == sum(measures.predicted[row] == class_id for row in own)
        assert known.num_predicted == sum(measures.predicted[row] == class_id for row in usable)
        assert known.own_mass == (pytest.approx(np.mean(measures.own_mass[own])) if own else None)
        assert known.agreement == (known.num_agreeing / len(own) if own else None)
        assert (known.num_boxed, known.pointing_hits) == (len(boxed), boxes.is_hit[boxed].sum())
        assert known.mass_inside == (pytest.approx(np.mean(inside)) if inside else None)

    pairs = Counter(
        (int(measures.label[row]), int(measures.predicted[row])) for row in usable if measures.label[row] >= 0
    )
    found = confusions(measures, K)
    assert {(pair.label, pair.predicted): pair.count for pair in found} == {
        pair: count for pair, count in pairs.items() if pair[0] != pair[1]
    }
    assert [pair.count for pair in found] == sorted((pair.count for pair in found), reverse=True)


def test_without_boxes() -> None:
    (known, *_) = audit_classes(measure(maps_of(3, num_classes=K, k=2), np.zeros(3, np.int64), K), NAMES, None)
    assert (known.num_boxed, known.pointing_hits, known.mass_inside) == (None, None, None)
