"""The benchmark compares two ways to the same gradients. No test looks at how fast anything is."""

import math
from typing import Any

import pytest
import torch

from jobs.bench.targets import bench_targets, draw_inputs


@pytest.mark.parametrize("num_distinct", [5, 60])
def test_maps_mention_the_classes_that_are_asked_for(num_distinct: int) -> None:
    inputs = draw_inputs(2, num_distinct)
    assert [len(image.unique()) for image in inputs.classes] == [num_distinct] * 2
    assert all(len(cell.unique()) == 5 for cell in inputs.classes[0].flatten(0, 1))
    assert (inputs.boxes[:, 2:] > inputs.boxes[:, :2]).all()


def test_both_sides_do_the_same_work() -> None:
    inputs: Any = draw_inputs(2, 12)
    for ours, theirs in zip(inputs.sparse(), inputs.dense(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_figures() -> None:
    figures = bench_targets(2, 12, rounds=2)
    assert 0 < figures.targets.ratio < math.inf
    assert 0 < figures.loss.ratio < math.inf
    assert figures.target_bytes[1] == 2 * 197 * 1000 * 4
    assert figures.target_bytes[0] < figures.target_bytes[1] / 10
    assert all(num_bytes > 0 for num_bytes in figures.peak_bytes)
    assert str(figures).startswith("2 maps of 12 distinct classes\n  maps to targets, sparse / dense: ")
