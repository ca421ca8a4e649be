"""Sparse targets against their dense form."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenlabels.sparse_targets import TokenTargets


def draw_targets(num_images: int = 3, grid: tuple[int, int] | None = (2, 3), num_classes: int = 20) -> TokenTargets:
    """Rows that sum to 1, with a class listed twice, weights below 0 and a padding slot."""
    generator = torch.Generator().manual_seed(0)
    num_rows = 1 if grid is None else 1 + grid[0] * grid[1]
    classes = torch.rand(num_images, num_classes, generator=generator).argsort(dim=1)[:, :5]
    classes[:, 3] = classes[:, 0]
    weights = torch.rand(num_images, num_rows, 5, generator=generator) / 5 - 0.01
    weights[..., 4] = 0
    background = (1 - weights.sum(-1)) / num_classes
    return TokenTargets(classes, weights, background, torch.ones(num_images, num_rows) > 0, grid, num_classes)


def dense_twin(targets: TokenTargets) -> Tensor:
    """Class by class, in float64."""
    num_images, num_rows, num_listed = targets.weights.shape
    dense = targets.background.double()[..., None].repeat(1, 1, targets.num_classes)
    for image in range(num_images):
        for row in range(num_rows):
            for slot in range(num_listed):
                dense[image, row, targets.classes[image, slot]] += targets.weights[image, row, slot].double()
    return dense


def mark_invalid(targets: TokenTargets, image: int, row: int) -> TokenTargets:
    valid, weights, background = targets.valid.clone(), targets.weights.clone(), targets.background.clone()
    valid[image, row], weights[image, row], background[image, row] = False, 0, 0
    return replace(targets, valid=valid, weights=weights, background=background)


def test_dense_adds_up_what_is_listed() -> None:
    targets = draw_targets()
    torch.testing.assert_close(targets.dense().double(), dense_twin(targets), rtol=0, atol=1e-7)
    assert targets.dense().dtype == torch.float32
    assert targets.dense().shape == (3, 7, 20)


@pytest.mark.parametrize("grid", [(2, 3), None], ids=str)
def test_from_dense_gives_back_the_same(grid: tuple[int, int] | None) -> None:
    targets = draw_targets(grid=grid)
    again = TokenTargets.from_dense(targets.dense(), grid=grid)
    torch.testing.assert_close(again.dense(), targets.dense(), rtol=0, atol=1e-7)
    assert again.grid == grid
    assert again.classes.shape[1] == 3, "three classes differ from the background"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), num_classes=st.integers(1, 12), decimals=st.integers(0, 4))
def test_from_dense_takes_any_rows(seed: int, num_classes: int, decimals: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(2, 5, num_classes, generator=generator).round(decimals=decimals)
    targets = TokenTargets.from_dense(dense)
    assert targets.grid == (2, 2)
    torch.testing.assert_close(targets.dense(), dense, rtol=0, atol=1e-7)


def test_from_dense_asks_for_a_grid_that_is_no_square() -> None:
    with pytest.raises(ValueError, match=r"6 tokens are no square grid; give grid=\(h, w\)"):
        TokenTargets.from_dense(draw_targets().dense())


def test_hard_labels() -> None:
    targets = TokenTargets.from_labels(torch.tensor([2, 0, 2]), 4)
    assert targets.dense()[:, 0].tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
    assert targets.grid is None
    assert targets.num_tokens == 0
    assert targets.valid.all()


def test_rows_of_zeros_are_rows_without_target() -> None:
    targets = mark_invalid(draw_targets(), 1, 2)
    again = TokenTargets.from_dense(targets.dense(), grid=(2, 3))
    assert torch.equal(again.valid, targets.valid)
    torch.testing.assert_close(again.dense(), targets.dense(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32], ids=str)
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    targets = TokenTargets.from_labels(torch.tensor([2, 0]).to(dtype), 4)
    assert targets.dense()[:, 0].argmax(-1).tolist() == [2, 0]
    assert draw_targets(2).blend_labels(torch.tensor([2, 0]).to(dtype)).valid.all()


@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
def test_smoothing_keeps_rows_that_sum_to_one(eps: float) -> None:
    targets = mark_invalid(draw_targets(), 1, 2)
    smooth = targets.smooth(eps).dense()
    expected = dense_twin(targets) * (1 - eps) + eps / 20
    expected[1, 2] = 0
    torch.testing.assert_close(smooth.double(), expected, rtol=0, atol=1e-7)
    sums = torch.ones(3, 7)
    sums[1, 2] = 0
    torch.testing.assert_close(smooth.sum(-1), sums, rtol=0, atol=1e-6)


def test_smoothing_beside_that_of_the_published_code(golden: Path) -> None:
    """Its hard labels are smoothed as ours; its soft rows sum to 1 + eps / K, which is where we differ."""
    data = np.load(golden / "smoothing_0p1.npz")
    published = torch.from_numpy(data["target"])
    num_classes = published.shape[2]
    labels = TokenTargets.from_labels(torch.from_numpy(data["ground_truth"]), num_classes)
    torch.testing.assert_close(labels.smooth(0.1).dense()[:, 0], published[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(published[:, 1:].sum(-1), torch.full((2, 19), 1 + 0.1 / num_classes), rtol=0, atol=2e-5)
    ours = TokenTargets.from_dense(published[:, 1:], grid=(3, 6)).smooth(0.1)
    torch.testing.assert_close(ours.dense().sum(-1), published[:, 1:].sum(-1) * 0.9 + 0.1, rtol=0, atol=1e-6)


def test_labels_are_blended_as_the_published_loss_does() -> None:
    targets = draw_targets()
    top = targets.dense()[:, 0].argmax(-1)
    labels = torch.stack([top[0], (top[1] + 1) % 20, top[2]])
    blended = targets.blend_labels(labels).dense()
    weight = torch.tensor([0.5, 0.1, 0.5])[:, None]
    one_hot = torch.nn.functional.one_hot(labels, 20)
    expected = targets.dense()
    expected[:, 0] = expected[:, 0] * (1 - weight) + one_hot * weight
    torch.testing.assert_close(blended, expected, rtol=0, atol=1e-7)


def test_a_label_stands_in_for_a_row_without_target() -> None:
    targets = mark_invalid(draw_targets(), 1, 0)
    blended = targets.blend_labels(torch.tensor([3, 4, 5]))
    assert blended.valid.all()
    assert blended.dense()[1, 0].tolist() == [float(number == 4) for number in range(20)]


def test_a_class_that_is_not_listed_can_be_the_most_probable() -> None:
    """Every listed class below the background: only a listed label can disagree."""
    targets = TokenTargets(
        torch.tensor([[1, 2]] * 2),
        torch.full((2, 1, 2), -0.1),
        torch.full((2, 1), 0.3),
        torch.ones(2, 1) > 0,
        None,
        4,
    )
    blended = targets.blend_labels(torch.tensor([0, 1]), agree=1.0, disagree=0.0).dense()[:, 0]
    assert blended[0].tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(blended[1], targets.dense()[1, 0], rtol=0, atol=1e-7)


def test_to_moves_all_tensors_and_bytes_are_counted() -> None:
    targets = draw_targets()
    assert targets.num_bytes == 3 * 5 * 8 + 3 * 7 * 5 * 4 + 3 * 7 * 4 + 3 * 7
    moved = targets.to("meta")
    assert moved.device.type == "meta"
    assert len(moved) == 3
    assert repr(targets) == "TokenTargets(3 images, 1 + 2x3 rows, 5 listed of 20 classes, 0.0 MB on cpu)"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(
            {"classes": torch.zeros(3, 5)},
            r"without empty sides, got float32",
            id="float ids",
        ),
        pytest.param({"classes": torch.zeros(3, 4, dtype=torch.int64)}, r"weights must be float32 \[3, 7, 4\]", id="U"),
        pytest.param({"weights": torch.zeros(3, 6, 5)}, r"weights must be float32 \[3, 7, 5\]", id="rows"),
        pytest.param({"weights": torch.zeros(3, 7, 5).double()}, "got float64", id="double weights"),
        pytest.param({"background": torch.zeros(3, 6)}, r"background must be float32 \[3, 7\]", id="background"),
        pytest.param({"valid": torch.ones(3, 7)}, r"valid must be bool \[3, 7\]", id="floating valid"),
        pytest.param({"classes": torch.full((3, 5), 20)}, r"classes must be in 0\.\.19, got 20", id="id too large"),
        pytest.param({"classes": [[1]]}, r"classes must be a torch\.Tensor, got builtins\.list", id="list"),
        pytest.param({"num_classes": 20.0}, "num_classes must be an integer", id="floating number of classes"),
        pytest.param({"grid": (-2, -3)}, "grid must be two positive integers", id="negative grid"),
        pytest.param({"grid": (2, 2)}, r"weights must be float32 \[3, 5, 5\]", id="another grid"),
        pytest.param({"weights": torch.zeros(3, 7, 5, device="meta")}, "on cpu, got", id="two devices"),
    ],
)
def test_parts_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(draw_targets(), **values)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        pytest.param(torch.tensor([1, 2]), r"labels must be integer \[3\], got int64 \[2\]", id="another batch"),
        pytest.param(torch.tensor([1.0, 2.0, 3.0]), "labels must be integer", id="floating"),
        pytest.param(torch.tensor([1, 2, 20]), r"labels must be in 0\.\.19, got 1\.\.20", id="too large"),
        pytest.param(torch.tensor([1, 2, -1]), r"got -1\.\.2", id="no label"),
        pytest.param(torch.tensor([1, 2, 3]).to("meta"), "labels must be on cpu", id="elsewhere"),
    ],
)
def test_bad_labels_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_targets().blend_labels(labels)


def test_bad_weights_are_refused() -> None:
    targets = draw_targets()
    for eps in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"eps must be a number in 0\.\.1"):
            targets.smooth(eps)
    with pytest.raises(ValueError, match=r"disagree must be a number in 0\.\.1, got 2"):
        targets.blend_labels(torch.tensor([1, 2, 3]), disagree=2)
    with pytest.raises(ValueError, match=r"labels must be integer \[B\] with B above 0"):
        TokenTargets.from_labels(torch.zeros(0, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="target must be floating"):
        TokenTargets.from_dense(torch.zeros(2, 5, 4, dtype=torch.int64))
