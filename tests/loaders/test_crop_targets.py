"""Targets of a batch whose rows take different paths: crops by RoIAlign, what was warped by sample points."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from loaders.batch import HostBatch
from loaders.crop_targets import CropTargets
from tests.loaders.hosts import make_host, only, vocabulary_of
from tests.loaders.photos import NUM_CLASSES
from tokenlabels import targets as target_module
from tokenlabels.affine import affine_from_boxes, apply_affine, compose_affine, token_centres
from tokenlabels.sparse_targets import TokenTargets
from tokenlabels.target_inputs import InterpolationRule

GRID = (4, 3)
CPU = torch.device("cpu")
TOLERANCE = 2e-6

NAMED_ROWS = {
    "none": (),
    "one": (2,),
    "several": (0, 3, 4),
    "first": (0,),
    "last": (6,),
    "all": tuple(range(7)),
}


def crop_targets(
    rule: InterpolationRule = "logits", grid: tuple[int, int] | None = GRID, *, fills: bool = True
) -> CropTargets:
    return CropTargets(NUM_CLASSES, grid, rule, fills, CPU)


def assert_rows_are_those_alone(together: TokenTargets, host: HostBatch, targets: CropTargets) -> None:
    assert len(together) == len(host)
    for row in range(len(host)):
        alone = targets(only(host, row, targets.num_classes))
        torch.testing.assert_close(together.dense()[row], alone.dense()[0], rtol=0, atol=TOLERANCE)
        assert torch.equal(together.valid[row], alone.valid[0]), row
        assert together.grid == alone.grid


@pytest.mark.parametrize("fills", [True, False], ids=["after crop", "before crop"])
@pytest.mark.parametrize("grid", [GRID, None], ids=["tokens", "image row"])
@pytest.mark.parametrize("rule", ["logits", "probs"])
@pytest.mark.parametrize("warped", NAMED_ROWS.values(), ids=NAMED_ROWS)
def test_rows_do_not_depend_on_the_others(
    warped: tuple[int, ...], rule: InterpolationRule, grid: tuple[int, int] | None, fills: bool
) -> None:
    host = make_host(7, warped=warped)
    targets = crop_targets(rule, grid, fills=fills)
    together = targets(host)
    assert together.weights.shape[1] == (1 if grid is None else 1 + GRID[0] * GRID[1])
    torch.testing.assert_close(together.dense().sum(dim=2), together.valid.float(), rtol=0, atol=1e-5)
    assert_rows_are_those_alone(together, host, targets)


@pytest.mark.parametrize("warped", NAMED_ROWS.values(), ids=NAMED_ROWS)
def test_each_row_takes_its_path(warped: tuple[int, ...]) -> None:
    host = make_host(7, warped=warped)
    num_affine, num_straight = [], []

    def count_affine(scores: Tensor, *args: object, **options: object) -> TokenTargets:
        num_affine.append(len(scores))
        return target_module.affine_token_targets(scores, *args, **options)  # type: ignore[arg-type]

    def count_straight(scores: Tensor, *args: object, **options: object) -> TokenTargets:
        num_straight.append(len(scores))
        return target_module.token_targets(scores, *args, **options)  # type: ignore[arg-type]

    with (
        patch("loaders.crop_targets.affine_token_targets", count_affine),
        patch("loaders.crop_targets.token_targets", count_straight),
    ):
        crop_targets()(host)
    assert num_affine == ([len(warped)] if warped else [])
    assert num_straight == ([7 - len(warped)] if len(warped) < 7 else [])


@pytest.mark.parametrize("row", [(), (0,)], ids=["straight", "warped"])
def test_a_batch_of_one(row: tuple[int, ...]) -> None:
    host = make_host(1, warped=row)
    together = crop_targets()(host)
    assert_rows_are_those_alone(together, make_host(1, warped=row), crop_targets())


def test_short_lists_are_padded_to_those_of_the_batch() -> None:
    """Some maps mention few classes, others many: the lists of both paths have room for all."""
    num_classes, targets = 60, CropTargets(60, GRID, "logits", True, CPU)
    host = make_host(6, warped=(1, 4), num_classes=num_classes)
    assert host.maps is not None
    host.maps.classes[:2] = np.arange(host.maps.classes.shape[3], dtype=np.uint16)
    host.vocabulary = vocabulary_of(host.maps, num_classes)
    together = targets(host)
    assert together.classes.shape[1] > targets(only(host, 1, num_classes)).classes.shape[1]
    assert_rows_are_those_alone(together, host, targets)


@pytest.mark.parametrize("grid", [GRID, None], ids=["tokens", "image row"])
def test_crops_that_leave_their_map(grid: tuple[int, int] | None) -> None:
    """They are no business of RoIAlign; tokens beyond the map have no target, the image-level row keeps its own."""
    host = make_host(5, reaching=(1, 3), warped=(3,))
    targets = crop_targets(grid=grid)(host)
    assert_rows_are_those_alone(targets, host, crop_targets(grid=grid))
    assert targets.valid[:, 0].all()
    if grid is not None:
        assert not targets.valid[1].all()
        assert targets.valid[[0, 2, 4]].all()


@pytest.mark.parametrize("fills", [True, False], ids=["after crop", "before crop"])
def test_valid_tokens_are_those_whose_centre_is_shown(fills: bool) -> None:
    """After the crop fill begins at the border of the crop, before the crop at the border of the image."""
    host = make_host(8, warped=range(8), seed=3)
    valid = crop_targets(fills=fills)(host).valid[:, 1:]
    boxes = torch.from_numpy(host.boxes)
    to_image = compose_affine(
        output_to_middle=torch.from_numpy(host.warp),
        middle_to_source=affine_from_boxes(boxes, torch.from_numpy(host.flip)),
    )
    points = apply_affine(to_image, token_centres(GRID, dtype=torch.float64))
    low, high = (boxes[:, None, :2], boxes[:, None, 2:]) if fills else (0.0, 1.0)
    expected = ((points >= low) & (points <= high)).all(dim=2)
    assert torch.equal(valid, expected)
    assert 0 < valid.float().mean() < 1


def test_the_two_orders_differ_where_the_image_goes_on() -> None:
    host = make_host(8, warped=range(8), seed=3)
    after, before = crop_targets()(host), crop_targets(fills=False)(host)
    assert after.valid.sum() < before.valid.sum()
    both = (after.valid & before.valid)[:, 1:]
    assert both.any()
    assert not (after.valid & ~before.valid).any()


def test_the_affine_path_of_a_plain_crop_is_the_straight_one() -> None:
    """Rows that are called warped, but by the identity."""
    host, plain = make_host(6), make_host(6)
    host.is_warped[[1, 2, 5]] = True
    torch.testing.assert_close(crop_targets()(host).dense(), crop_targets()(plain).dense(), rtol=0, atol=TOLERANCE)


def test_boxes_are_looked_up_in_the_view_of_the_map() -> None:
    """A map that reaches beyond the image, and the same map with the boxes moved into it by hand."""
    host, moved = make_host(4, warped=(2,)), make_host(4, warped=(2,))
    assert host.maps is not None
    # Away from the padding, whose cells are not read.
    host.boxes[:, ::2] = [[0.2, 0.8], [0.15, 0.4], [0.3, 0.7], [0.5, 0.85]]
    view = torch.tensor([[-0.25, 0.0, 1.25, 1.0]], dtype=torch.float64).expand(4, 4)
    host.maps.views[:] = view.float().numpy()
    moved.boxes = (host.boxes + np.array([0.25, 0, 0.25, 0])) / [1.5, 1, 1.5, 1]
    here, there = crop_targets()(host), crop_targets()(moved)
    assert torch.equal(here.valid, there.valid)
    torch.testing.assert_close(here.dense(), there.dense(), rtol=0, atol=TOLERANCE)


def test_a_rule_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="interpolate must be one of 'logits', 'probs'"):
        crop_targets("other")  # type: ignore[arg-type]
