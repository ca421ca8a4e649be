"""Ranking against twins in float64 that sort everything."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from annotate.topk import ProbabilityMean, TopK, top_k

shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
few = settings(max_examples=30, deadline=None)


def _logits(shape: tuple[int, ...], seed: int, *, ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-2, 3, shape, generator=generator).float()
    return 4 * torch.randn(shape, generator=generator)


def _slow_order(values: Tensor) -> list[int]:
    """All ids by descending value, then by ascending id."""
    return sorted(range(len(values)), key=lambda index: (-float(values[index]), index))


def _assert_matches(best: TopK, logits: Tensor, probabilities: Tensor, k: int, *, same_order: bool = True) -> None:
    """`logits` and `probabilities` are what the scores and the tail must come from, float64 [B, h, w, K]."""
    cells = zip(
        best.scores.flatten(0, 2),
        best.classes.flatten(0, 2),
        best.tail.flatten(),
        logits.flatten(0, 2),
        probabilities.flatten(0, 2),
        strict=True,
    )
    for scores, classes, tail, cell_logits, cell_probabilities in cells:
        kept = _slow_order(cell_logits)[:k]
        if same_order:
            assert classes.tolist() == kept
        torch.testing.assert_close(scores.double(), cell_logits[classes], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(tail.double(), 1 - cell_probabilities[kept].sum(), rtol=1e-3, atol=1e-5)


@few
@given(shape=shapes, seed=st.integers(0, 99), ties=st.booleans(), data=st.data())
def test_one_model_keeps_its_own_logits(shape: tuple[int, ...], seed: int, ties: bool, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, shape[-1]))
    logits = _logits(shape, seed, ties=ties)
    best = top_k(logits, k)
    _assert_matches(best, logits.double(), logits.double().softmax(-1), k)
    assert (best.scores.diff(dim=-1) <= 0).all()


@few
@given(shape=shapes, seed=st.integers(0, 99), num_members=st.integers(2, 4), data=st.data())
def test_several_members_average_probabilities_and_keep_the_offset(
    shape: tuple[int, ...], seed: int, num_members: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, shape[-1]))
    members = [_logits(shape, seed + member) + 3 * member for member in range(num_members)]
    mean = ProbabilityMean()
    for member in members:
        mean.add(member)
    stacked = torch.stack(members).double()
    probabilities = stacked.softmax(-1).mean(0)
    offset = stacked.logsumexp(-1, keepdim=True).mean(0)
    _assert_matches(mean.top_k(k), probabilities.log() + offset, probabilities, k, same_order=False)


def test_scores_of_an_average_softmax_to_the_averaged_probabilities() -> None:
    members = [_logits((2, 3, 3, 6), seed) for seed in range(3)]
    mean = ProbabilityMean()
    for member in members:
        mean.add(member)
    best = mean.top_k(6)
    found = torch.zeros(2, 3, 3, 6).scatter(-1, best.classes, best.scores.float().softmax(-1))
    expected = torch.stack([member.softmax(-1) for member in members]).mean(0)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)


def test_an_average_of_one_model_with_itself_is_that_model() -> None:
    logits = _logits((2, 3, 3, 50), seed=0)
    mean = ProbabilityMean()
    mean.add(logits)
    mean.add(logits)
    alone, averaged = top_k(logits, 5), mean.top_k(5)
    assert torch.equal(alone.classes, averaged.classes)
    torch.testing.assert_close(averaged.scores, alone.scores, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(averaged.tail, alone.tail, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        pytest.param([1.0, 1, 1, 1, 1, 1], [0, 1, 2], id="all-equal"),
        pytest.param([0.0, 5, 1, 5, 1, 1], [1, 3, 2], id="tie-at-the-cut"),
        pytest.param([2.0, 5, 9, 5, 1, 0], [2, 1, 3], id="tie-inside"),
        pytest.param([-0.0, 0, -1, 0, -0.0, 0], [0, 1, 3], id="signed-zeros"),
    ],
)
def test_equal_logits_come_in_order_of_class(logits: list[float], expected: list[int]) -> None:
    assert top_k(torch.tensor(logits).reshape(1, 1, 1, -1), 3).classes.flatten().tolist() == expected


def test_tail_is_exactly_zero_when_every_class_is_kept() -> None:
    logits = _logits((2, 2, 2, 7), seed=1)
    assert (top_k(logits, 7).tail == 0).all()
    assert (top_k(logits, 6).tail > 0).all()


def test_tail_stays_within_0_and_1() -> None:
    certain = torch.full((1, 1, 1, 9), -60.0)
    certain[..., 4] = 60
    assert top_k(certain, 1).tail.item() == 0
    assert top_k(torch.zeros(1, 1, 1, 4096), 1).tail.item() == pytest.approx(1 - 1 / 4096, abs=1e-3)


def test_a_probability_that_vanishes_in_float32_keeps_a_finite_score() -> None:
    mean = ProbabilityMean()
    for _ in range(2):
        mean.add(torch.tensor([200.0, 0.0]).reshape(1, 1, 1, 2))
    scores = mean.top_k(2).scores.flatten()
    assert scores.isfinite().all()
    assert scores[0].item() == pytest.approx(200)


def test_ranking_leaves_the_logits_as_they_were() -> None:
    logits = _logits((1, 2, 2, 5), seed=2)
    before = logits.clone()
    top_k(logits, 2)
    mean = ProbabilityMean()
    mean.add(logits)
    mean.add(logits)
    mean.top_k(2)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("special", [math.nan, -math.nan, math.inf], ids=["nan", "negative-nan", "inf"])
def test_values_that_are_not_finite_stay_visible(special: float) -> None:
    logits = torch.zeros(1, 1, 1, 8)
    logits[..., 3] = special
    best = top_k(logits, 2)
    assert not (best.scores.isfinite().all() and best.tail.isfinite().all())


def test_batches_join_in_order() -> None:
    logits = _logits((5, 2, 3, 6), seed=3)
    joined = TopK.cat([top_k(part, 2) for part in logits.split(2)])
    whole = top_k(logits, 2)
    assert torch.equal(joined.scores, whole.scores)
    assert torch.equal(joined.classes, whole.classes)
    assert torch.equal(joined.tail, whole.tail)
    assert len(joined) == 5
    assert repr(joined) == "TopK(5 images, 2x3 cells, k=2, cpu)"


@pytest.mark.parametrize(
    ("scores", "classes", "tail", "message"),
    [
        pytest.param(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2), "scores must be", id="axes"),
        pytest.param(
            torch.zeros(1, 2, 2, 3),
            torch.zeros(1, 2, 2, 3).long(),
            torch.zeros(1, 2, 2).half(),
            "float16",
            id="float32",
        ),
        pytest.param(
            torch.zeros(1, 2, 2, 3).half(),
            torch.zeros(1, 2, 2, 2).long(),
            torch.zeros(1, 2, 2).half(),
            "classes must",
            id="k",
        ),
        pytest.param(
            torch.zeros(1, 2, 2, 3).half(),
            torch.zeros(1, 2, 2, 3).long(),
            torch.zeros(1, 2).half(),
            "tail must",
            id="tail",
        ),
    ],
)
def test_malformed_values_are_refused(scores: Tensor, classes: Tensor, tail: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopK(scores, classes, tail)
