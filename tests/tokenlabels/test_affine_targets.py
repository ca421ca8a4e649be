"""Targets of rotated, sheared and translated images, against RoIAlign where it applies and a loop where it does not."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenlabels.affine import affine_from_boxes, affine_in_map, compose_affine, rotation, shear, translation
from tokenlabels.geometry import view_center
from tokenlabels.targets import InterpolationRule, affine_token_targets, token_targets
from tokenlabels.vocabulary import find_vocabulary

RULES: tuple[InterpolationRule, ...] = ("logits", "probs")
TOLERANCE = 2e-6
NUM_CLASSES = 30


def draw_maps(num_images: int = 2, cells: tuple[int, int] = (9, 12)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, *cells, 3)
    classes = torch.rand(*shape[:-1], NUM_CLASSES, generator=generator).argsort(dim=-1)[..., :3]
    return {
        "scores": (torch.randn(shape, generator=generator) * 2 + 4).half(),
        "classes": classes,
        "tail": torch.rand(shape[:-1], generator=generator).half(),
    }


def dense_maps(maps: dict[str, Tensor], rule: InterpolationRule) -> Tensor:
    """All classes of every cell, float64 [B, H, W, K]: logits, or probabilities."""
    scores, classes, tail = maps["scores"].double(), maps["classes"], maps["tail"].double()
    if rule == "logits":
        return torch.zeros(*tail.shape, NUM_CLASSES, dtype=torch.float64).scatter(3, classes, scores)
    rest = (tail / (NUM_CLASSES - 3))[..., None].expand(*tail.shape, NUM_CLASSES)
    return rest.scatter(3, classes, scores.softmax(-1) * (1 - tail)[..., None])


def read_point(field_HWK: Tensor, x: float, y: float) -> Tensor:
    """Bilinear interpolation between cell centres, the outermost ones continued to the border."""
    height, width, _ = field_HWK.shape
    column, row = (min(max(p * size - 0.5, 0), size - 1) for p, size in ((x, width), (y, height)))
    left, top = min(int(column), width - 2), min(int(row), height - 2)
    a, b = column - left, row - top
    upper = field_HWK[top, left] * (1 - a) + field_HWK[top, left + 1] * a
    lower = field_HWK[top + 1, left] * (1 - a) + field_HWK[top + 1, left + 1] * a
    return upper * (1 - b) + lower * b


def sample_twin(field_HWK: Tensor, affine: Tensor, grid: tuple[int, int]) -> list[Tensor | None]:
    """Every token of one image by a loop over its sample points; None where none of them is inside."""
    height, width, _ = field_HWK.shape
    m = affine.double().tolist()
    numbers = []  # samples per token along y, along x
    for axis, cells in ((1, height), (0, width)):
        extent = math.hypot(m[0][axis] * width, m[1][axis] * height) / grid[1 - axis]
        numbers.append(min(max(1, math.ceil(extent)), math.ceil(cells / grid[1 - axis])))
    rows: list[Tensor | None] = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            found = []
            for s in range(numbers[0]):
                for t in range(numbers[1]):
                    x, y = (j + (t + 0.5) / numbers[1]) / grid[1], (i + (s + 0.5) / numbers[0]) / grid[0]
                    u, v = (m[r][0] * x + m[r][1] * y + m[r][2] for r in range(2))
                    if 0 <= u <= 1 and 0 <= v <= 1:
                        found.append(read_point(field_HWK, u, v))
            rows.append(torch.stack(found).mean(0) if found else None)
    return rows


def augmented(num_images: int) -> Tensor:
    """Crops that were rotated, sheared and moved, so that their corners lie outside the image."""
    index = torch.arange(num_images, dtype=torch.float64)
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9]], dtype=torch.float64).expand(num_images, 4)
    steps = (
        rotation(25 + 40 * index, (224, 224)),
        shear(0.2 * index, -0.1 * index, (224, 224)),
        translation(0.2 + 0 * index, -0.1 + 0 * index),
        affine_from_boxes(boxes),
    )
    affine = steps[0]
    for step in steps[1:]:
        affine = compose_affine(output_to_middle=affine, middle_to_source=step)
    return affine


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", [(5, 4), (14, 14), (1, 1)], ids=str)
def test_equals_a_loop_over_points(grid: tuple[int, int], rule: InterpolationRule) -> None:
    maps, affine = draw_maps(), augmented(2)
    targets = affine_token_targets(
        maps["scores"],
        maps["classes"],
        affine,
        grid=grid,
        num_classes=NUM_CLASSES,
        interpolate=rule,
        tail=maps["tail"],
    )
    dense = targets.dense().double()
    for image, field in enumerate(dense_maps(maps, rule)):
        twin = sample_twin(field, affine[image], (1, 1)) + sample_twin(field, affine[image], grid)
        for row, value in enumerate(twin):
            if targets.valid[image, row]:
                assert value is not None
                expected = value.softmax(0) if rule == "logits" else value
                assert float((dense[image, row] - expected).abs().max()) < TOLERANCE
            else:
                assert dense[image, row].abs().max() == 0
    assert targets.valid[:, 0].all()


@settings(max_examples=30, deadline=None)
@given(
    corners=st.lists(st.floats(0, 1), min_size=4, max_size=4, unique=True),
    flip=st.booleans(),
    grid=st.tuples(st.integers(1, 14), st.integers(1, 14)),
)
def test_crop_and_flip_alone_equal_roi_align(corners: list[float], flip: bool, grid: tuple[int, int]) -> None:
    maps = draw_maps(1)
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    boxes, flips = torch.tensor([[x0, y0, x1, y1]], dtype=torch.float64), torch.tensor([flip])
    samples = (boxes[:, 2:] - boxes[:, :2]) * torch.tensor([12, 9]) / torch.tensor(grid[::-1])
    # On the edge between two numbers of samples any rounding is right.
    assume((samples > 0).all() and ((samples % 1) > 1e-9).all() and ((samples % 1) < 1 - 1e-9).all())
    options: dict[str, Any] = {"grid": grid, "num_classes": NUM_CLASSES, "tail": maps["tail"]}
    for rule in RULES:
        options["interpolate"] = rule
        ours = affine_token_targets(maps["scores"], maps["classes"], affine_from_boxes(boxes, flips), **options)
        theirs = token_targets(maps["scores"], maps["classes"], boxes, flip=flips, **options)
        assert ours.valid.all()
        torch.testing.assert_close(ours.dense(), theirs.dense(), rtol=0, atol=TOLERANCE)


def test_a_quarter_turn_turns_the_targets() -> None:
    maps = draw_maps(1, cells=(12, 12))
    whole = affine_from_boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    turn = rotation(torch.tensor([90.0]), (224, 224))
    upright, turned = (
        affine_token_targets(maps["scores"], maps["classes"], affine, grid=(6, 6), num_classes=NUM_CLASSES)
        for affine in (whole, turn)
    )
    tokens = upright.dense()[:, 1:].unflatten(1, (6, 6))
    torch.testing.assert_close(
        turned.dense()[:, 1:].unflatten(1, (6, 6)), tokens.rot90(1, (1, 2)), rtol=0, atol=TOLERANCE
    )
    assert turned.valid.all()


def test_tokens_outside_the_map_are_marked() -> None:
    maps = draw_maps(2)
    affine = translation(torch.tensor([0.5, 2.0]), torch.tensor([0.0, 0.0]))
    targets = affine_token_targets(maps["scores"], maps["classes"], affine, grid=(4, 4), num_classes=NUM_CLASSES)
    expected = torch.tensor([[True, True, False, False]] * 4).flatten()
    assert torch.equal(targets.valid[0, 1:], expected)
    assert targets.valid[0, 0]
    assert not targets.valid[1].any()
    assert targets.dense()[1].abs().max() == 0
    kept = token_targets(
        maps["scores"][:1],
        maps["classes"][:1],
        torch.tensor([[0.5, 0, 1, 1]]),
        grid=(4, 2),
        num_classes=NUM_CLASSES,
    )
    torch.testing.assert_close(targets.dense()[0, 1:][expected], kept.dense()[0, 1:], rtol=0, atol=TOLERANCE)


def test_crops_beyond_a_map_of_the_centre() -> None:
    """A crop at the left of a wide image, whose map covers the middle: half of its tokens have no label."""
    maps = draw_maps(1, cells=(8, 8))
    crop = torch.tensor([[-0.5, 0.0, 0.5, 1.0]])
    targets = affine_token_targets(
        maps["scores"], maps["classes"], affine_from_boxes(crop), grid=(2, 4), num_classes=NUM_CLASSES
    )
    assert targets.valid[0].tolist() == [True, *[False, False, True, True] * 2]
    inside = token_targets(
        maps["scores"], maps["classes"], torch.tensor([[0.0, 0.0, 0.5, 1.0]]), grid=(2, 2), num_classes=NUM_CLASSES
    )
    torch.testing.assert_close(
        targets.dense()[0, 1:][targets.valid[0, 1:]], inside.dense()[0, 1:], rtol=0, atol=TOLERANCE
    )


def test_tokens_outside_the_region_are_marked() -> None:
    """A crop that was cut out and then moved shows a fill colour where the image would go on."""
    maps = draw_maps(1, cells=(8, 8))
    crop = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
    moved = compose_affine(
        output_to_middle=translation(torch.tensor([0.5]), torch.tensor([0.0])), middle_to_source=affine_from_boxes(crop)
    )
    options: dict[str, Any] = {"grid": (2, 4), "num_classes": NUM_CLASSES}
    whole = affine_token_targets(maps["scores"], maps["classes"], moved, **options)
    within = affine_token_targets(maps["scores"], maps["classes"], moved, region=crop, **options)
    assert whole.valid.all()
    assert within.valid[0].tolist() == [True, *[True, True, False, False] * 2]
    kept = within.valid[0, 1:]
    torch.testing.assert_close(within.dense()[0, 1:][kept], whole.dense()[0, 1:][kept], rtol=0, atol=TOLERANCE)
    away = affine_token_targets(
        maps["scores"], maps["classes"], moved, region=torch.tensor([[0.0, 0.0, 0.1, 0.1]]), **options
    )
    assert not away.valid.any()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda m: m[:1], r"output_to_map must be float32 \[2, 2, 3\]", id="another batch"),
        pytest.param(lambda m: m[:, :, :2], r"output_to_map must be", id="no translation"),
        pytest.param(lambda m: m.half(), r"got float16", id="half precision"),
        pytest.param(lambda m: m.to("meta"), r"must be on cpu", id="another device"),
        pytest.param(lambda m: m * torch.nan, r"must be finite .* got nan at \[0, 0, 0\]", id="NaN"),
        pytest.param(lambda m: m * 224, "divide pixels by its sides", id="pixels"),
        pytest.param(lambda m: m.numpy(), r"must be a torch\.Tensor, got numpy\.ndarray", id="numpy"),
    ],
)
def test_bad_input_is_refused(spoil: Callable[[Tensor], Tensor], message: str) -> None:
    maps = draw_maps(2)
    with pytest.raises(ValueError, match=message):
        affine_token_targets(maps["scores"], maps["classes"], spoil(augmented(2)), num_classes=NUM_CLASSES)


def test_a_bad_region_is_refused() -> None:
    maps = draw_maps(2)
    for region, message in (
        (torch.rand(1, 4), r"region must be float32 \[2, 4\]"),
        (torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 0.2, 1.0]]), "region must be finite with x0 < x1"),
        (torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 224.0, 224.0]]), "divide pixels by its sides"),
    ):
        with pytest.raises(ValueError, match=message):
            affine_token_targets(maps["scores"], maps["classes"], augmented(2), region=region, num_classes=NUM_CLASSES)


def test_maps_that_only_a_device_would_take_give_no_number() -> None:
    """Compiled code cannot refuse values, as on an accelerator; leaving such images out would hide them."""
    maps, affine = draw_maps(), augmented(2)
    vocabulary = find_vocabulary(maps["classes"], NUM_CLASSES)
    compiled: Callable[..., Any] = torch.compile(affine_token_targets, backend="eager", fullgraph=True)
    for bad in (224.0, torch.nan):
        spoiled = affine.clone()
        spoiled[1] *= bad
        targets = compiled(maps["scores"], maps["classes"], spoiled, num_classes=NUM_CLASSES, vocabulary=vocabulary)
        assert targets.valid[1].all()
        assert targets.dense()[1].isnan().all()
        assert targets.dense()[0].isfinite().all()


def test_maps_of_a_small_part_of_a_wide_image() -> None:
    """A panorama of 5000 x 37 pixels reaches far beyond the map of its centre, and there is nothing wrong with it."""
    maps = draw_maps(1)
    views = torch.tensor([view_center(5000, 37, 0.875)])
    whole = affine_in_map(affine_from_boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]])), views)
    targets = affine_token_targets(
        maps["scores"], maps["classes"], whole, grid=(3, 401), num_classes=NUM_CLASSES, views=views
    )
    assert 0 < targets.valid[0, 1:].sum() < 10


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, affine = draw_maps(7), augmented(7)
    whole = affine_token_targets(maps["scores"], maps["classes"], affine, num_classes=NUM_CLASSES)
    monkeypatch.setattr("tokenlabels.targets.CPU_OPERATOR_BYTES", 3 * 8 * 196 * 108)
    parts = affine_token_targets(maps["scores"], maps["classes"], affine, num_classes=NUM_CLASSES)
    torch.testing.assert_close(parts.dense(), whole.dense(), rtol=0, atol=1e-7)


def test_compiles_without_graph_breaks() -> None:
    maps, affine = draw_maps(), augmented(2)
    options = {"num_classes": NUM_CLASSES, "vocabulary": find_vocabulary(maps["classes"], NUM_CLASSES)}
    compiled: Callable[..., Any] = torch.compile(affine_token_targets, backend="eager", fullgraph=True)
    ours = compiled(maps["scores"], maps["classes"], affine, **options)
    theirs = affine_token_targets(maps["scores"], maps["classes"], affine, **options)
    torch.testing.assert_close(ours.dense(), theirs.dense(), rtol=0, atol=TOLERANCE)
