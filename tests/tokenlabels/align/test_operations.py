"""What moves labels besides attention, against loops over tokens."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tokenlabels.align.twins import patch_labels
from tokenlabels.align.operations import first_labels, merge, mix_dense, mix_depthwise, pool, residual
from tokenlabels.mixing import MixPlan

sides = st.integers(1, 9)
grids = st.tuples(sides, sides)
seeds = st.integers(0, 1000)


def maps(grid: tuple[int, int], columns: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(2, *grid, columns, generator=torch.Generator().manual_seed(seed))


def conv(kernel: tuple[int, int], stride: int = 1, padding: tuple[int, int] = (0, 0), dilation: int = 1) -> nn.Conv2d:
    """Four channels, depthwise, with weights of both signs."""
    made = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups=4)
    nn.init.normal_(made.weight)
    return made


@settings(deadline=None, max_examples=60)
@given(grids, st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(1, 3), st.booleans(), seeds)
def test_pool(grid: tuple[int, int], kernel: tuple[int, int], stride: int, padded: bool, seed: int) -> None:
    """The mean of what each window reads; windows may overlap, and the last tokens may be read by none."""
    padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
    if any(side + 2 * pad < width for side, pad, width in zip(grid, padding, kernel, strict=True)):
        return
    labels = maps(grid, seed=seed)
    pooled = pool(labels, conv(kernel, stride, padding))
    rows, columns = ((grid[d] + 2 * padding[d] - kernel[d]) // stride + 1 for d in range(2))
    assert pooled.shape == (2, rows, columns, 2)
    for i, j in product(range(rows), range(columns)):
        places = product(range(i * stride, i * stride + kernel[0]), range(j * stride, j * stride + kernel[1]))
        inside = [(y - padding[0], x - padding[1]) for y, x in places]
        read = [labels[:, y, x] for y, x in inside if 0 <= y < grid[0] and 0 <= x < grid[1]]
        torch.testing.assert_close(pooled[:, i, j], torch.stack(read).mean(dim=0))


@settings(deadline=None, max_examples=60)
@given(grids, seeds)
def test_merge(grid: tuple[int, int], seed: int) -> None:
    labels = maps(grid, seed=seed)
    merged = merge(labels)
    assert merged.shape == (2, math.ceil(grid[0] / 2), math.ceil(grid[1] / 2), 2)
    for i, j in product(*map(range, merged.shape[1:3])):
        expected = labels[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean(dim=(1, 2))
        torch.testing.assert_close(merged[:, i, j], expected)


@settings(deadline=None, max_examples=60)
@given(grids, st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 3]), st.integers(1, 2), seeds)
def test_mix_depthwise(grid: tuple[int, int], height: int, width: int, dilation: int, seed: int) -> None:
    """At the borders the weights within the map share out those beyond."""
    torch.manual_seed(seed)
    labels = maps(grid, seed=seed)
    layer = conv((height, width), padding=(dilation * (height // 2), dilation * (width // 2)), dilation=dilation)
    weights = layer.weight.detach().abs().mean(dim=(0, 1)).double()
    mixed = mix_depthwise(labels, layer)
    assert (mixed.shape, mixed.requires_grad) == (labels.shape, False)
    for y, x in product(*map(range, grid)):
        total, expected = 0.0, torch.zeros(2, 2, dtype=torch.float64)
        for i, j in product(range(height), range(width)):
            row, column = y + dilation * (i - height // 2), x + dilation * (j - width // 2)
            if 0 <= row < grid[0] and 0 <= column < grid[1]:
                total += float(weights[i, j])
                expected += weights[i, j] * labels[:, row, column]
        torch.testing.assert_close(mixed[:, y, x].double(), expected / total, rtol=0, atol=1e-5)


def test_a_kernel_beside_its_centre_shifts_labels() -> None:
    """A kernel with one place left of the centre brings the label of that neighbour, and the border has none."""
    layer = conv((3, 3), padding=(1, 1))
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, :, 1, 0] = -0.5
        layer.weight[:, :, 1, 1] = 1e-6
    labels = maps((4, 5))
    mixed = mix_depthwise(labels, layer)
    torch.testing.assert_close(mixed[:, :, 1:], labels[:, :, :-1], rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed[:, :, 0], labels[:, :, 0], rtol=0, atol=1e-4)


def test_kernels_of_zeros_take_the_mean() -> None:
    layer = conv((3, 3), padding=(1, 1))
    nn.init.zeros_(layer.weight)
    labels = maps((3, 3))
    torch.testing.assert_close(mix_depthwise(labels, layer)[:, 1, 1], labels.mean(dim=(1, 2)))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), seeds)
def test_mix_dense(num_in: int, num_out: int, seed: int) -> None:
    """Rows of absolute weights that sum to one; a row of zeros is the mean of all tokens."""
    torch.manual_seed(seed)
    labels = maps((1, num_in), seed=seed)[:, 0]
    linear = nn.Linear(num_in, num_out)
    with torch.no_grad():
        linear.weight[-1] = 0
    mixed = mix_dense(labels, linear)
    assert (mixed.shape, mixed.requires_grad) == ((2, num_out, 2), False)
    for row, weights in enumerate(linear.weight.detach().abs().tolist()):
        if row == num_out - 1:
            weights = [1.0] * num_in
        expected = sum(weight * labels[:, token].double() for token, weight in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(mixed[:, row].double(), expected, rtol=0, atol=1e-5)


def test_a_residual_is_a_plain_average() -> None:
    labels, moved = maps((2, 3)), maps((2, 3), seed=1)
    assert torch.equal(residual(labels, moved), 0.5 * labels + 0.5 * moved)


@pytest.mark.parametrize("autocast", [False, True])
def test_labels_stay_in_full_precision(autocast: bool) -> None:
    labels = maps((4, 4))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        moved = (
            mix_depthwise(labels, conv((3, 3), padding=(1, 1))),
            mix_dense(labels.flatten(1, 2), nn.Linear(16, 5)),
            pool(labels, conv((2, 2), 2)),
            merge(labels),
        )
    constant = [torch.full_like(part, 0.3) for part in moved]
    assert [part.dtype for part in moved] == 4 * [torch.float32]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        of_constant = mix_dense(torch.full((2, 16, 2), 0.3), nn.Linear(16, 5))
    torch.testing.assert_close(of_constant, constant[1])


@settings(deadline=None, max_examples=40)
@given(grids, st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), seeds)
def test_first_labels(grid: tuple[int, int], rows: int, columns: int, num_prefix: int, seed: int) -> None:
    """Exact fractions of pixels, in patches of any size; class and other tokens have that of the image."""
    size = (grid[0] * rows, grid[1] * columns)
    generator = torch.Generator().manual_seed(seed)
    plan = MixPlan(torch.tensor([1, 2, 0]), torch.rand(3, *size, generator=generator))
    labels = first_labels(plan, grid, num_prefix)
    assert labels.shape == (3, num_prefix + grid[0] * grid[1], 1)
    of_patches = patch_labels(plan.own, plan.partner, torch.eye(3).double(), size, grid)
    own = torch.stack([of_patches[b, :, b] for b in range(3)])
    torch.testing.assert_close(labels[:, num_prefix:, 0].double(), own, rtol=0, atol=1e-6)
    expected = plan.own.double().mean(dim=(1, 2))[:, None].expand(3, num_prefix)
    torch.testing.assert_close(labels[:, :num_prefix, 0].double(), expected, rtol=0, atol=1e-6)


def test_first_labels_of_a_box_that_straddles_patches() -> None:
    own = torch.ones(2, 8, 8)
    own[0, 2:7, 3:] = 0  # pixels; patches are 4 x 4
    labels = first_labels(MixPlan(torch.tensor([1, 0]), own), (2, 2), 1)[0, :, 0]
    assert labels.tolist() == [1 - 25 / 64, 1 - 2 / 16, 1 - 8 / 16, 1 - 3 / 16, 1 - 12 / 16]
