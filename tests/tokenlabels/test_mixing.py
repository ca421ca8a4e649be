"""Applying plans: against plain loops in float64, in compiled code, and to what cannot be mixed."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tokenlabels.mixing import MixPlan
from tokenlabels.sparse_targets import TokenTargets

CONSTRUCTORS: dict[str, Callable[..., MixPlan]] = {
    "mixtoken": MixPlan.mixtoken,
    "cutmix": lambda batch_size, **options: MixPlan.cutmix(batch_size, image_size=32, **options),
    "cutmix or mixup": lambda batch_size, **options: MixPlan.cutmix(
        batch_size, image_size=(24, 32), mixup_alpha=0.8, **options
    ),
    "mixup": MixPlan.mixup,
    "random patches": MixPlan.random_patches,
    "blockwise": MixPlan.blockwise,
}
every_constructor = pytest.mark.parametrize("make", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())

NUM_CLASSES = 10
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_plan(batch_size: int = 4, grid: tuple[int, int] = (3, 5), seed: int = 0) -> MixPlan:
    """Fractional shares everywhere, with some rows of 0 and of 1."""
    partner = MixPlan.mixup(batch_size, generator=seeded(seed)).partner
    own = torch.rand(batch_size, *grid, generator=seeded(seed))
    own[0, 0], own[1, 0] = 0, 1
    return MixPlan(partner, own)


def random_targets(batch_size: int = 4, grid: tuple[int, int] | None = (3, 5), seed: int = 0) -> TokenTargets:
    """Three listed classes per image on a background, where the first token of the last image has no target."""
    rows = 1 if grid is None else 1 + grid[0] * grid[1]
    shares = torch.rand(batch_size, rows, 4, generator=seeded(seed)).softmax(dim=2)
    classes = torch.rand(batch_size, NUM_CLASSES, generator=seeded(seed)).argsort(dim=1)[:, :3]
    valid = torch.ones(batch_size, rows, dtype=torch.bool)
    valid[-1, min(1, rows - 1)] = False
    keep = valid[..., None]
    return TokenTargets(classes, shares[..., :3] * keep, shares[..., 3] / NUM_CLASSES * valid, valid, grid, NUM_CLASSES)


def coverage_twin(own: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of own in every token: the overlap of every cell with every token, one by one, in float64."""

    def overlap(token: int, num_tokens: int, cell: int, num_cells: int) -> float:
        start, end = max(token / num_tokens, cell / num_cells), min((token + 1) / num_tokens, (cell + 1) / num_cells)
        return max(end - start, 0) * num_tokens

    (height, width), (rows, columns) = own.shape, grid
    covered = torch.zeros(grid, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            for y in range(height):
                for x in range(width):
                    area = overlap(row, rows, y, height) * overlap(column, columns, x, width)
                    covered[row, column] += area * float(own[y, x])
    return covered


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_mixed_by_equation_5(dtype: torch.dtype) -> None:
    plan = random_plan()
    tokens = torch.randn(4, 15, 6, generator=seeded()).to(dtype)
    expected = torch.empty(4, 15, 6, dtype=torch.float64)
    for sample in range(4):
        mine, theirs = tokens[sample].double(), tokens[int(plan.partner[sample])].double()
        for token, own in enumerate(plan.own[sample].flatten().tolist()):
            expected[sample, token] = mine[token] * own + theirs[token] * (1 - own)
    mixed = plan.mix(tokens)
    assert mixed.dtype == dtype
    # Rounded once: half of the last place, and a little for the arithmetic in float32.
    torch.testing.assert_close(mixed.double(), expected, atol=1e-6, rtol=0.51 * torch.finfo(dtype).eps)


@every_constructor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_of_0_and_1_move_values_untouched(make: Callable[..., MixPlan], dtype: torch.dtype) -> None:
    plan = make(6, per="sample", generator=seeded())
    plan = MixPlan(plan.partner, plan.own.round())
    _, height, width = plan.own.shape
    images = torch.randn(6, 3, height * 2, width * 3, generator=seeded()).to(dtype)
    own = plan.own.repeat_interleave(2, dim=1).repeat_interleave(3, dim=2)[:, None]
    assert torch.equal(plan.mix(images), torch.where(own == 1, images, images[plan.partner]))


def test_a_cell_of_the_plan_covers_a_block_of_pixels() -> None:
    plan, images = random_plan(), torch.randn(4, 2, 6, 20, generator=seeded())
    own = plan.own.repeat_interleave(2, dim=1).repeat_interleave(4, dim=2)[:, None]
    expected = images * own + images[plan.partner] * (1 - own)
    torch.testing.assert_close(plan.mix(images), expected)
    channels_last = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(plan.mix(channels_last), expected)
    assert plan.mix(channels_last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plan.mix(images.transpose(2, 3).contiguous().transpose(2, 3)), expected)


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (3, 7, 2)], ids=["images", "tokens with a class token"])
def test_mixup_fits_every_size(shape: tuple[int, ...]) -> None:
    plan, x = MixPlan.mixup(3, generator=seeded()), torch.randn(shape, generator=seeded())
    lam = plan.share().view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(plan.mix(x), x * lam + x[plan.partner] * (1 - lam))


@pytest.mark.parametrize("shape", [(4, 15, 2), (4, 1, 3, 10)], ids=["tokens", "images"])
def test_gradients_reach_both_samples(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=seeded(), requires_grad=True)
    assert torch.autograd.gradcheck(random_plan().mix, x)


@given(cells=grids, tokens=grids)
@settings(max_examples=40, deadline=None)
def test_coverage_is_the_area_of_overlap(cells: tuple[int, int], tokens: tuple[int, int]) -> None:
    plan = random_plan(2, cells)
    coverage = plan.coverage(tokens)
    assert coverage.dtype == torch.float32
    expected = torch.stack([coverage_twin(own, tokens) for own in plan.own])
    torch.testing.assert_close(coverage.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(coverage.mean(dim=(1, 2)), plan.share(), atol=1e-6, rtol=0)


@given(cells=grids, times=grids)
@settings(max_examples=30, deadline=None)
def test_coverage_of_same_and_finer_grids_repeats(cells: tuple[int, int], times: tuple[int, int]) -> None:
    plan = random_plan(2, cells)
    assert torch.equal(plan.coverage(cells), plan.own)
    finer = plan.coverage((cells[0] * times[0], cells[1] * times[1]))
    assert torch.equal(finer, plan.own.repeat_interleave(times[0], dim=1).repeat_interleave(times[1], dim=2))


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (56, 28)], ids=str)
def test_coverage_of_pixels_is_the_mean_of_each_patch(grid: tuple[int, int]) -> None:
    plan = MixPlan.cutmix(4, generator=seeded())
    pooled = torch.nn.functional.adaptive_avg_pool2d(plan.own[:, None].double(), grid)[:, 0]
    torch.testing.assert_close(plan.coverage(grid).double(), pooled, atol=1e-7, rtol=0)


@pytest.mark.parametrize("grid", [(14, 14), (9, 24)], ids=["whole patches", "straddling patches"])
def test_coverage_keeps_its_precision_when_products_may_be_rounded(grid: tuple[int, int]) -> None:
    plan = MixPlan.cutmix(4, mixup_alpha=0.8, generator=seeded())
    expected = plan.coverage(grid)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            coverage, share = plan.coverage(grid), plan.share()
    finally:
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(coverage, expected)
    assert torch.equal(share, plan.share())


@pytest.mark.parametrize(
    ("plan", "grid"),
    [
        pytest.param(random_plan(), (3, 5), id="on the grid of the tokens"),
        pytest.param(random_plan(4, (6, 5)), (3, 5), id="pixels"),
        pytest.param(random_plan(4, (4, 7)), (3, 5), id="straddling"),
        pytest.param(random_plan(4, (1, 1)), (3, 5), id="mixup"),
        pytest.param(random_plan(4, (4, 7)), None, id="image-level row alone"),
        pytest.param(MixPlan.mixtoken(4, grid=(3, 5), per="pair", generator=seeded()), (3, 5), id="mixtoken"),
    ],
)
def test_targets_are_mixed_by_equations_6_and_7(plan: MixPlan, grid: tuple[int, int] | None) -> None:
    targets = random_targets(grid=grid)
    dense = targets.dense().double()
    expected, valid = torch.zeros_like(dense), torch.zeros_like(targets.valid)
    for sample in range(4):
        other = int(plan.partner[sample])
        shares = [plan.own[sample].double().mean()]
        shares += [] if grid is None else coverage_twin(plan.own[sample], grid).flatten()
        for row, share in enumerate(shares):
            own_has, other_has = bool(targets.valid[sample, row]), bool(targets.valid[other, row])
            valid[sample, row] = (own_has or share == 0) and (other_has or share == 1)
            if valid[sample, row]:
                expected[sample, row] = share * dense[sample, row] + (1 - share) * dense[other, row]
    mixed = plan.mix_targets(targets)
    assert mixed.classes.shape == (4, 6)
    assert torch.equal(mixed.valid, valid)
    assert int(valid.sum()) < valid.numel()
    torch.testing.assert_close(mixed.dense().double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed.dense().sum(dim=2), mixed.valid.float(), atol=1e-5, rtol=0)


def test_a_token_without_a_target_spoils_only_those_who_take_from_it() -> None:
    targets = random_targets(2, (1, 3))
    assert targets.valid.tolist() == [[True] * 4, [True, False, True, True]]
    plan = MixPlan(torch.tensor([1, 0]), torch.tensor([[[1.0, 0.5, 0.0]], [[0.0, 0.5, 1.0]]]))
    assert plan.mix_targets(targets).valid.tolist() == [[True] * 4, [True] * 4]
    swapped = MixPlan(plan.partner, plan.own.flip(0))
    mixed = swapped.mix_targets(targets)
    assert mixed.valid.tolist() == [[True, False, True, True]] * 2
    assert float(mixed.weights[:, 1].abs().max()) == float(mixed.background[:, 1].abs().max()) == 0


def test_an_unmixed_sample_keeps_its_targets() -> None:
    targets = random_targets()
    mixed = MixPlan.mixtoken(4, prob=0.0, generator=seeded()).mix_targets(targets)
    assert torch.equal(mixed.dense(), targets.dense())
    assert torch.equal(mixed.valid, targets.valid)


def everything(plan: MixPlan, tokens: Tensor, targets: TokenTargets) -> tuple[Tensor, ...]:
    mixed = plan.mix_targets(targets)
    applied = plan.mix(tokens), plan.share(), plan.coverage((2, 2))
    return *applied, mixed.classes, mixed.weights, mixed.background, mixed.valid


def test_everything_compiles_whole_and_once() -> None:
    counter = CompileCounter()
    compiled = torch.compile(everything, fullgraph=True, backend=counter)
    for seed in range(3):
        plan, targets = random_plan(seed=seed), random_targets(seed=seed)
        tokens = torch.randn(4, 15, 2, generator=seeded(seed))
        for ours, expected in zip(compiled(plan, tokens, targets), everything(plan, tokens, targets), strict=True):
            torch.testing.assert_close(ours, expected)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_generated_code_agrees() -> None:
    plan, tokens, targets = random_plan(), torch.randn(4, 15, 2, generator=seeded()), random_targets()
    compiled = torch.compile(everything, fullgraph=True)
    for ours, expected in zip(compiled(plan, tokens, targets), everything(plan, tokens, targets), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_plan_can_be_made_and_applied_in_compiled_code() -> None:
    def mix(partner: Tensor, own: Tensor, x: Tensor) -> Tensor:
        return MixPlan(partner, own).mix(x)

    plan, images = random_plan(), torch.randn(4, 1, 6, 5, generator=seeded())
    compiled = torch.compile(mix, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(plan.partner, plan.own, images), plan.mix(images))


def test_moving_a_plan() -> None:
    plan = random_plan()
    assert torch.equal(plan.to("cpu").own, plan.own)
    assert plan.to("meta").own.device.type == "meta"
    assert MixPlan.mixtoken(4, device="meta").partner.device.type == "meta"


@pytest.mark.gpu
def test_cuda_applies_as_the_cpu_does(cuda: torch.device) -> None:
    plan, tokens, targets = random_plan(), torch.randn(4, 15, 2, generator=seeded()), random_targets()
    on_cuda = everything(plan.to(cuda), tokens.to(cuda), targets.to(cuda))
    for ours, expected in zip(on_cuda, everything(plan, tokens, targets), strict=True):
        torch.testing.assert_close(ours.cpu(), expected)


PARTNER, OWN = torch.tensor([1, 0]), torch.ones(2, 3, 3)


@pytest.mark.parametrize(
    ("partner", "own", "message"),
    [
        pytest.param(PARTNER.int(), OWN, "partner must be int64", id="int32 partner"),
        pytest.param(PARTNER[None], OWN, "partner must be int64", id="partner of two dimensions"),
        pytest.param(PARTNER[:0], OWN[:0], "B above 0", id="empty"),
        pytest.param(PARTNER, OWN.double(), "own must be float32", id="float64 own"),
        pytest.param(PARTNER, OWN[0], "own must be float32", id="one own for all"),
        pytest.param(PARTNER, torch.ones(3, 3, 3), "own must be float32", id="own of three samples"),
        pytest.param(PARTNER, OWN[:, :0], "h, w above 0", id="empty own"),
        pytest.param(PARTNER, OWN.to("meta"), "own must be on cpu", id="two devices"),
        pytest.param(PARTNER + 1, OWN, r"partner must be in 0\.\.1, got 1\.\.2", id="partner too large"),
        pytest.param(PARTNER - 1, OWN, r"partner must be in 0\.\.1, got -1\.\.0", id="negative partner"),
        pytest.param(PARTNER.flip(0), OWN / 2, r"samples \[0, 1\] are mixed with themselves", id="own partner"),
        pytest.param(PARTNER, OWN * 1.5, r"own must be in 0\.\.1 .*got 1\.5\.\.1\.5", id="own above 1"),
        pytest.param(PARTNER, -OWN, r"own must be in 0\.\.1", id="own below 0"),
        pytest.param(PARTNER, OWN * float("nan"), r"own must be in 0\.\.1", id="own nan"),
    ],
)
def test_bad_plans(partner: Tensor, own: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixPlan(partner, own)


def test_who_stays_unmixed_may_be_named_as_the_own_partner() -> None:
    plan = MixPlan(torch.tensor([0]), torch.ones(1, 2, 2))
    images = torch.randn(1, 3, 4, 4)
    assert torch.equal(plan.mix(images), images)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        pytest.param(torch.zeros(4, 16, 2), "mixes 15 tokens.*before the class token is added", id="class token"),
        pytest.param(torch.zeros(4, 30, 2), "mixes 15 tokens.*draw the plan on the grid", id="other tokens"),
        pytest.param(torch.zeros(3, 15, 2), r"mixes images \[4, C, H, W\] or tokens \[4, N, D\]", id="other batch"),
        pytest.param(torch.zeros(4, 15), r"or tokens \[4, N, D\]", id="two dimensions"),
        pytest.param(torch.zeros(4, 0, 3, 5), "without empty sides", id="no channels"),
        pytest.param(torch.zeros(4, 3, 6, 6), "whole multiples of 3 and 5", id="no whole multiple"),
        pytest.param(torch.zeros(4, 3, 5, 30), "looks like channels last", id="channels last"),
        pytest.param(torch.zeros(4, 3, 2, 5), "whole multiples of 3 and 5", id="smaller than the plan"),
        pytest.param(np.zeros((4, 3, 3, 5)), r"x must be a torch\.Tensor, got numpy\.ndarray", id="numpy"),
        pytest.param(torch.zeros(4, 3, 3, 5, dtype=torch.uint8), "only floating values can be mixed", id="uint8"),
        pytest.param(torch.zeros(4, 3, 3, 5, dtype=torch.complex64), "only floating values", id="complex"),
        pytest.param(torch.zeros(4, 3, 3, 5, device="meta"), "the plan is on cpu", id="other device"),
    ],
)
def test_what_cannot_be_mixed(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_plan().mix(x)


def test_only_targets_are_mixed_as_targets() -> None:
    with pytest.raises(ValueError, match="targets must be TokenTargets, got Tensor"):
        random_plan().mix_targets(torch.zeros(4, 16, 9))  # type: ignore[arg-type]


def test_a_plan_shows_itself_on_any_device() -> None:
    plan = MixPlan(torch.tensor([1, 0]), torch.ones(2, 3, 5) / 2)
    assert repr(plan) == "MixPlan(2 samples, own 3x5, mean share 0.500, on cpu)"
    assert repr(plan.to("meta")) == "MixPlan(2 samples, own 3x5, on meta)"


def test_targets_of_another_batch_or_device_are_refused() -> None:
    with pytest.raises(ValueError, match="the plan mixes 4 samples on cpu, got targets of 3 on cpu"):
        random_plan().mix_targets(random_targets(3))
    with pytest.raises(ValueError, match="got targets of 4 on meta"):
        random_plan().mix_targets(random_targets().to("meta"))


def test_coverage_of_no_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="grid must be two positive integers"):
        random_plan().coverage((2, 0))
