"""The pure functions behind the plans: against timm, against plain loops, and in their limits."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.mixup import rand_bbox
from torch import Tensor

from tokenlabels.masks import (
    BLOCK_ROUNDS,
    MIN_ASPECT,
    MIN_BLOCK_CELLS,
    blockwise_masks,
    box_masks,
    cutmix_boxes,
    random_patch_masks,
    symmetric_beta,
)

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
seeds = st.integers(0, 2**31 - 1)


def uniform(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lams(num: int, seed: int = 1) -> Tensor:
    """Shares over the whole range, both ends included."""
    return torch.cat([torch.tensor([0.0, 1.0], dtype=torch.float64), uniform(num - 2, seed=seed)])


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.8, 1.0, 3.0, 50.0])
def test_beta_has_the_quantiles_of_numpys(alpha: float) -> None:
    """The share of our values below numpy's deciles is a tenth each, within five standard errors of the two samples."""
    num = 100_000
    ours = symmetric_beta(alpha, uniform(num, 2)).numpy()
    theirs = np.random.default_rng(0).beta(alpha, alpha, num)
    for share in np.arange(1, 10) / 10:
        error = 5 * math.sqrt(2 * share * (1 - share) / num)
        assert abs((ours <= np.quantile(theirs, share)).mean() - share) < error, share


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 3.0, 50.0])
def test_beta_has_its_mean_and_variance(alpha: float) -> None:
    values = symmetric_beta(alpha, uniform(200_000, 2))
    assert float(values.mean()) == pytest.approx(0.5, abs=0.006)
    assert float(values.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1.0, 1e6, 1e300])
def test_beta_is_a_share_whatever_the_numbers(alpha: float) -> None:
    corners = torch.tensor([0.0, 5e-324, 1e-30, 0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    values = symmetric_beta(alpha, torch.cartesian_prod(corners, corners))
    assert bool(((values >= 0) & (values <= 1)).all())


def test_a_tiny_alpha_keeps_all_or_nothing() -> None:
    values = symmetric_beta(1e-6, uniform(1000, 2))
    assert set(values.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(size=sizes, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_cutmix_boxes_are_timms(size: tuple[int, int], seed: int, dtype: str) -> None:
    """timm draws the centre itself: the same numpy state gives it to both."""
    lam = np.random.default_rng(seed).random(1).astype(dtype)
    np.random.seed(seed)  # noqa: NPY002
    y0, y1, x0, x1 = rand_bbox((3, *size), lam[0])
    same = np.random.RandomState(seed)
    center_y, center_x = (torch.tensor([same.randint(0, side)]) for side in size)
    boxes = cutmix_boxes(torch.from_numpy(lam), center_y, center_x, size)
    assert boxes.tolist() == [[x0, y0, x1, y1]]


def test_nothing_is_cut_at_lam_1_and_everything_around_the_centre_at_lam_0() -> None:
    boxes = cutmix_boxes(torch.tensor([1.0, 0.0]), torch.tensor([3, 3]), torch.tensor([5, 5]), (6, 10))
    assert box_masks(boxes, (6, 10)).mean(dim=(1, 2)).tolist() == [1, 0]


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 4), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_box_masks_are_0_between_the_corners(boxes: list[tuple[int, ...]]) -> None:
    expected = torch.ones(len(boxes), 7, 9)
    for mask, (x0, y0, x1, y1) in zip(expected, boxes, strict=True):
        mask[y0 : max(y0, y1), x0 : max(x0, x1)] = 0
    masks = box_masks(torch.tensor(boxes), (7, 9))
    assert masks.dtype == torch.float32
    assert torch.equal(masks, expected)


@given(grid=sizes, seed=seeds)
@settings(max_examples=40, deadline=None)
def test_random_patches_take_exactly_their_share(grid: tuple[int, int], seed: int) -> None:
    num_cells = grid[0] * grid[1]
    lam = lams(6, seed)
    masks = random_patch_masks(lam, uniform(6, num_cells, seed=seed), grid)
    assert masks.shape == (6, *grid)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert (masks == 0).sum(dim=(1, 2)).tolist() == [round((1 - share) * num_cells) for share in lam.tolist()]


def test_random_patches_are_those_of_the_smallest_numbers() -> None:
    numbers = torch.tensor([[0.9, 0.1, 0.5, 0.3, 0.7, 0.2]])
    mask = random_patch_masks(torch.tensor([0.5]), numbers, (2, 3))
    assert mask.tolist() == [[[1, 0, 1], [0, 1, 0]]]


def test_random_patches_take_every_place_alike() -> None:
    num = 4000
    masks = random_patch_masks(torch.full((num,), 0.75), uniform(num, 16), (4, 4))
    assert float((masks.mean(dim=0) - 0.75).abs().max()) < 5 * math.sqrt(0.75 * 0.25 / num)


def blockwise_twin(lam: float, numbers: list[list[float]], grid: tuple[int, int]) -> Tensor:
    """One mask, one block after the other."""
    height, width = grid
    mask = torch.ones(grid)
    budget = round((1 - lam) * height * width)
    for area, aspect, row, column in numbers:
        left = budget - int((mask == 0).sum())
        smallest, largest = min(MIN_BLOCK_CELLS, left), left / max(float(mask.mean()), 1 / (height * width))
        cells = smallest + area * (largest - smallest)
        ratio = math.exp((2 * aspect - 1) * math.log(1 / MIN_ASPECT))
        block_h = min(max(round(math.sqrt(cells * ratio)), 1), height)
        block_w = min(max(round(math.sqrt(cells / ratio)), 1), width)
        y, x = int(row * (height - block_h + 1)), int(column * (width - block_w + 1))
        tried = mask.clone()
        tried[y : y + block_h, x : x + block_w] = 0
        if int((tried == 0).sum()) <= budget:
            mask = tried
    return mask


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (9, 16), (1, 12), (1, 1)])
def test_blocks_are_those_of_a_plain_loop(grid: tuple[int, int]) -> None:
    lam, numbers = lams(40), uniform(40, BLOCK_ROUNDS, 4)
    expected = [
        blockwise_twin(share, rounds, grid) for share, rounds in zip(lam.tolist(), numbers.tolist(), strict=True)
    ]
    assert torch.equal(blockwise_masks(lam, numbers, grid), torch.stack(expected))


@given(grid=sizes, seed=seeds)
@settings(max_examples=40, deadline=None)
def test_blocks_never_take_more_than_their_share(grid: tuple[int, int], seed: int) -> None:
    lam = lams(8, seed)
    masks = blockwise_masks(lam, uniform(8, BLOCK_ROUNDS, 4, seed=seed), grid)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    budget = ((1 - lam) * (grid[0] * grid[1])).round()
    assert bool(((masks == 0).sum(dim=(1, 2)) <= budget).all())
    assert float(masks[1].min()) == 1


def test_blocks_fill_their_share_but_for_a_fraction_of_a_cell() -> None:
    lam = uniform(2000)
    masks = blockwise_masks(lam, uniform(2000, BLOCK_ROUNDS, 4, seed=1), (14, 14))
    missing = ((1 - lam) * 196).round() - (masks == 0).sum(dim=(1, 2))
    assert float(missing.mean()) < 0.3
    assert float((missing == 0).double().mean()) > 0.85


def test_blocks_are_large() -> None:
    """Of the neighbours of taken cells far more are taken than in patches at random."""
    lam = torch.full((500,), 0.7)

    def neighbours(masks: Tensor) -> float:
        taken = masks == 0
        return float((taken[:, 1:] & taken[:, :-1]).sum() / taken[:, 1:].sum())

    assert neighbours(random_patch_masks(lam, uniform(500, 196), (14, 14))) < 0.35
    assert neighbours(blockwise_masks(lam, uniform(500, BLOCK_ROUNDS, 4), (14, 14))) > 0.7


@pytest.mark.gpu
@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(
            lambda lam, to: box_masks(cutmix_boxes(lam, to(CENTERS), to(CENTERS), (14, 14)), (14, 14)), id="box"
        ),
        pytest.param(lambda lam, to: random_patch_masks(lam, to(uniform(64, 196)), (14, 14)), id="patches"),
        pytest.param(lambda lam, to: blockwise_masks(lam, to(uniform(64, BLOCK_ROUNDS, 4)), (14, 14)), id="blocks"),
        pytest.param(lambda _, to: symmetric_beta(0.8, to(uniform(64, 2))), id="beta"),
    ],
)
def test_cuda_draws_as_the_cpu_does(draw: Callable[..., Tensor], cuda: torch.device) -> None:
    lam = lams(64)
    on_cuda = draw(lam.to(cuda), lambda tensor: tensor.to(cuda))
    torch.testing.assert_close(on_cuda.cpu(), draw(lam, lambda tensor: tensor), atol=1e-12, rtol=0)


CENTERS = torch.randint(14, (64,), generator=torch.Generator().manual_seed(3))
