"""Warped images against Pillow, against a loop over pixels, and against their own maps."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from loaders.augment_ops import Op
from loaders.rand_augment import AugmentDraw
from loaders.warp import warp
from tokenlabels.affine import affine_from_boxes, compose_affine

FILL = torch.tensor([124.0, 116.0, 104.0])
HEIGHT, WIDTH = 60, 84


def smooth_image(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """uint8 [3, height, width] without fine detail, so that resampling twice is nearly resampling once."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = [torch.sin(5 * x + 2 * y), torch.cos(4 * y - 3 * x), torch.sin(6 * x * y + 1)]
    return ((torch.stack(waves) + 1) * 127).to(torch.uint8)


def noise_image(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def affine_of(*layers: tuple[Op, float]) -> Tensor:
    """float32 [1, 2, 3]."""
    ops, arguments = torch.tensor([[op for op, _ in layers]]), torch.tensor([[argument for _, argument in layers]])
    return AugmentDraw.from_ops(ops, arguments).affine((HEIGHT, WIDTH))


def coefficients(op: Op, argument: float) -> tuple[float, ...]:
    """As timm gives them to `PIL.Image.transform`."""
    return {
        Op.SHEAR_X: (1, argument, 0, 0, 1, 0),
        Op.SHEAR_Y: (1, 0, 0, argument, 1, 0),
        Op.TRANSLATE_X: (1, 0, argument * WIDTH, 0, 1, 0),
        Op.TRANSLATE_Y: (1, 0, 0, 0, 1, argument * HEIGHT),
    }[op]


def by_pillow(image: Tensor, op: Op, argument: float) -> Tensor:
    options: dict[str, Any] = {"resample": Image.Resampling.BILINEAR, "fillcolor": tuple(FILL.int().tolist())}
    if op == Op.ROTATE:
        turned = picture(image).rotate(argument, **options)
    else:
        turned = picture(image).transform(
            (WIDTH, HEIGHT), Image.Transform.AFFINE, coefficients(op, argument), **options
        )
    return torch.from_numpy(np.array(turned)).permute(2, 0, 1).float()


@pytest.mark.parametrize("make", [noise_image, smooth_image], ids=["noise", "smooth"])
@pytest.mark.parametrize(
    ("op", "argument"),
    [
        *((Op.ROTATE, degrees) for degrees in (-30.0, -7.3, 0.4, 17.0, 27.1)),
        *((op, share) for op in (Op.SHEAR_X, Op.SHEAR_Y) for share in (-0.29, -0.013, 0.07, 0.3)),
        *((op, share) for op in (Op.TRANSLATE_X, Op.TRANSLATE_Y) for share in (-0.443, -0.02, 0.011, 0.401)),
    ],
)
def test_single_operations_are_those_of_pillow(op: Op, argument: float, make: Callable[[], Tensor]) -> None:
    """All pixels, also along the border of the fill colour, up to the fraction that Pillow cuts off."""
    image = make()
    ours = warp(image.float()[None], affine_of((op, argument)), FILL)[0]
    excess = ours - by_pillow(image, op, argument)
    assert excess.min() > -0.05
    assert excess.max() < 1.05


@pytest.mark.parametrize(("op", "cells"), [(Op.TRANSLATE_X, WIDTH), (Op.TRANSLATE_Y, HEIGHT)])
@pytest.mark.parametrize("pixels", [-11, 0, 1, 20])
def test_whole_pixels_are_moved_untouched(op: Op, cells: int, pixels: int) -> None:
    image = noise_image().float()
    expected = FILL[:, None, None].expand_as(image).clone()
    for row in range(HEIGHT):
        for column in range(WIDTH):
            y, x = row + pixels * (op == Op.TRANSLATE_Y), column + pixels * (op == Op.TRANSLATE_X)
            if 0 <= y < HEIGHT and 0 <= x < WIDTH:
                expected[:, row, column] = image[:, y, x]
    actual = warp(image[None], affine_of((op, pixels / cells)), FILL)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.01)


def slow_warp(image: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel by pixel in float64, and which pixels come from within 0.001 pixels of the border."""
    height, width = image.shape[1:]
    out, is_doubtful = torch.empty(image.shape, dtype=torch.float64), torch.zeros(height, width, dtype=torch.bool)
    for row in range(height):
        for column in range(width):
            point = torch.tensor([(column + 0.5) / width, (row + 0.5) / height, 1], dtype=torch.float64)
            x, y = (affine.double() @ point * torch.tensor([width, height])).tolist()
            is_doubtful[row, column] = min(abs(x), abs(x - width), abs(y), abs(y - height)) < 1e-3
            if not (0 <= x < width and 0 <= y < height):
                out[:, row, column] = FILL
                continue
            left, above = math.floor(x - 0.5), math.floor(y - 0.5)
            out[:, row, column] = 0
            for j, i in ((left, above), (left + 1, above), (left, above + 1), (left + 1, above + 1)):
                weight = (1 - abs(x - 0.5 - j)) * (1 - abs(y - 0.5 - i))
                pixel = image[:, min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
                out[:, row, column] += weight * pixel.double()
    return out, is_doubtful


@settings(deadline=None, max_examples=25)
@given(
    affine=st.lists(st.floats(-1.5, 1.5, width=32), min_size=6, max_size=6),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_any_map_equals_a_loop_over_pixels(affine: list[float], size: tuple[int, int]) -> None:
    image = noise_image()[:, : size[0], : size[1]].float()
    to_source = torch.tensor(affine).reshape(2, 3)
    expected, is_doubtful = slow_warp(image, to_source)
    actual = warp(image[None], to_source[None], FILL)[0].double()
    torch.testing.assert_close(actual[:, ~is_doubtful], expected[:, ~is_doubtful], rtol=0, atol=0.01)


def test_crop_and_flip_are_maps_too() -> None:
    image = noise_image().float()[None]
    box = torch.tensor([[0.25, 0.5, 0.75, 1.0]])
    mirrored = warp(image, affine_from_boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([True])), FILL)
    torch.testing.assert_close(mirrored, image.flip(3), rtol=0, atol=0.01)
    enlarged = warp(image, affine_from_boxes(box), FILL)
    part = image[:, :, HEIGHT // 2 :, WIDTH // 4 : -WIDTH // 4]
    inner = torch.nn.functional.interpolate(part, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarged[..., 2:-2, 2:-2], inner[..., 2:-2, 2:-2], rtol=0, atol=0.01)


def test_two_operations_are_one_warp() -> None:
    image = smooth_image().float()[None]
    first, second = affine_of((Op.ROTATE, 12.0)), affine_of((Op.SHEAR_X, -0.2))
    twice = warp(warp(image, first, FILL), second, FILL)
    folded = affine_of((Op.ROTATE, 12.0), (Op.SHEAR_X, -0.2))
    torch.testing.assert_close(folded, compose_affine(output_to_middle=second, middle_to_source=first))
    once = warp(image, folded, FILL)
    middle = (..., slice(15, -15), slice(20, -20))
    assert (once[middle] - twice[middle]).abs().max() < 1
    swapped = warp(image, affine_of((Op.SHEAR_X, -0.2), (Op.ROTATE, 12.0)), FILL)
    assert (swapped[middle] - twice[middle]).abs().max() > 2


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("rows", [None, [], [2], [0, 3]], ids=str)
def test_only_the_named_samples_change(rows: list[int] | None, inplace: bool) -> None:
    images = torch.stack([noise_image(seed) for seed in range(4)]).float()
    before = images.clone()
    affine = affine_of((Op.ROTATE, 20.0)).repeat(4, 1, 1)
    everything = warp(before, affine, FILL)
    index = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    warped = warp(images, affine, FILL, index, inplace=inplace)
    for sample in range(4):
        changes = rows is None or sample in rows
        assert torch.equal(warped[sample], (everything if changes else before)[sample])
    assert torch.equal(images, warped if inplace else before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": noise_image()[None]}, "images must be float32"),
        ({"affine": torch.eye(2, 3)}, r"affine must be float32 \[1, 2, 3\]"),
        ({"affine": torch.eye(2, 3, dtype=torch.float64)[None]}, "affine must be float32"),
        ({"affine": torch.full((1, 2, 3), torch.nan)}, "affine must be finite"),
        ({"fill": torch.zeros(1)}, r"fill must be float32 \[3\]"),
        ({"rows": torch.tensor([True])}, "rows must be int64"),
    ],
    ids=["bytes", "one map", "float64", "not a number", "grey", "mask"],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": noise_image().float()[None], "affine": torch.eye(2, 3)[None], "fill": FILL}
    with pytest.raises(ValueError, match=message):
        warp(**(arguments | changes))


@pytest.mark.gpu
def test_cuda_gives_the_same_images(cuda: torch.device) -> None:
    images = torch.stack([smooth_image()] * 4).float()
    affine = torch.cat([affine_of((Op.ROTATE, 20.3)), affine_of((Op.SHEAR_X, 0.21), (Op.TRANSLATE_Y, 0.1))]).repeat(
        2, 1, 1
    )
    rows = torch.tensor([1, 2])
    on_cuda = [tensor.to(cuda) for tensor in (images, affine, FILL, rows)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = warp(*on_cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (actual.cpu() - warp(images, affine, FILL, rows)).abs().amax(dim=1)
    assert (difference > 0.05).float().mean() < 1e-3
