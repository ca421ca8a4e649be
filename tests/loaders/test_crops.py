import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision.transforms import functional

from loaders.crops import (
    NUM_CROP_UNIFORMS,
    RATIO,
    SCALE,
    PixelBox,
    center_crop,
    check_crop_pct,
    check_crop_range,
    random_resized_crop,
)
from tokenlabels.geometry import view_center

ALMOST_1 = 1 - 2.0**-53

sides = st.integers(1, 3000)
seeds = st.integers(0, 2**32 - 1)
ranges = st.sampled_from(
    [(SCALE, RATIO), ((0.5, 0.5), (1.0, 1.0)), ((0.001, 0.01), (0.2, 5.0)), ((0.9, 1.0), (2.0, 3.0))]
)


def uniforms_of(seed: int) -> list[float]:
    return [float(number) for number in np.random.default_rng(seed).random(NUM_CROP_UNIFORMS)]


def torchvision_box(
    width: int, height: int, uniforms: Sequence[float], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """left, top, width, height of torchvision's own code, whose calls of its generator get our numbers, in float64."""
    image, as_tensor = torch.empty(1).expand(3, height, width), torch.tensor
    draws, positions = iter(uniforms[:20]), iter(uniforms[20:])

    def uniform(low: Any, high: Any) -> torch.Tensor:
        return as_tensor(float(low) + next(draws) * (float(high) - float(low)), dtype=torch.float64)

    def randint(low: int, high: int, size: tuple[int]) -> torch.Tensor:
        assert (low, size) == (0, (1,))
        return as_tensor([math.floor(next(positions) * high)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", lambda values: as_tensor(values, dtype=torch.float64))
        patch.setattr(torch, "empty", lambda _: SimpleNamespace(uniform_=uniform))
        patch.setattr(torch, "randint", randint)
        top, left, box_height, box_width = torchvision.transforms.RandomResizedCrop.get_params(
            image, list(scale), list(ratio)
        )
    return left, top, box_width, box_height


def as_tuple(box: PixelBox) -> tuple[int, int, int, int]:
    return box.left, box.top, box.width, box.height


@given(sides, sides, seeds, ranges)
@settings(max_examples=150, deadline=None)
def test_boxes_are_torchvisions(width: int, height: int, seed: int, limits: Any) -> None:
    uniforms = uniforms_of(seed)
    expected = torchvision_box(width, height, uniforms, *limits)
    hypothesis.assume(0 not in expected[2:])  # ours are never empty
    assert as_tuple(random_resized_crop(width, height, uniforms, *limits)) == expected


@pytest.mark.parametrize(
    ("width", "height"), [(4000, 10), (10, 4000), (3000, 1), (1, 3000)], ids=lambda side: f"{side}px"
)
def test_extreme_images_get_the_largest_central_box_as_torchvisions_do(width: int, height: int) -> None:
    uniforms = [0.9, 0.5] * 10 + [0.1, 0.1]
    box = random_resized_crop(width, height, uniforms)
    assert as_tuple(box) == torchvision_box(width, height, uniforms, SCALE, RATIO)
    assert min(width, height) in (box.width, box.height)
    assert abs((box.left + box.width / 2) - width / 2) <= 0.5
    assert abs((box.top + box.height / 2) - height / 2) <= 0.5


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.lists(st.sampled_from([0.0, 0.25, 0.5, ALMOST_1]), min_size=NUM_CROP_UNIFORMS, max_size=NUM_CROP_UNIFORMS),
    ranges,
)
@settings(max_examples=150, deadline=None)
def test_boxes_are_inside_and_never_empty(width: int, height: int, uniforms: list[float], limits: Any) -> None:
    box = random_resized_crop(width, height, uniforms, *limits)
    assert box.fits_in(width, height)
    x0, y0, x1, y1 = box.normalised(width, height)
    assert 0 <= x0 < x1 <= 1
    assert 0 <= y0 < y1 <= 1


def test_an_empty_box_of_torchvision_has_a_pixel_here() -> None:
    limits = (0.9, 0.9), (0.2, 0.4)
    assert torchvision_box(30, 1, uniforms_of(0), *limits)[2] == 0
    assert as_tuple(random_resized_crop(30, 1, uniforms_of(0), *limits)) == (14, 0, 1, 1)


def test_what_a_number_is_for_does_not_depend_on_the_attempts() -> None:
    """The position comes from numbers 20 and 21 after one attempt and after three; others have no influence."""
    fits, does_not_fit = [0.2, 0.5], [ALMOST_1, 0.0]
    rest = [0.25, 0.75]
    first = random_resized_crop(500, 375, fits + does_not_fit * 9 + rest)
    third = random_resized_crop(500, 375, does_not_fit * 2 + fits + does_not_fit * 7 + rest)
    assert first == third
    side = round(math.sqrt(500 * 375 * (0.08 + 0.2 * 0.92)))
    assert as_tuple(first) == (int(0.75 * (500 - side + 1)), int(0.25 * (375 - side + 1)), side, side)
    assert random_resized_crop(500, 375, fits + [0.6] * 18 + rest) == first
    assert random_resized_crop(500, 375, fits + [0.6] * 18 + rest + [0.9]) == first, "a number of somebody else"


def test_the_ends_of_the_numbers_reach_the_ends_of_the_ranges() -> None:
    position = [0.0, 0.0]
    whole = random_resized_crop(300, 300, [ALMOST_1, 0.5] * 10 + position)
    smallest = random_resized_crop(300, 300, [0.0, 0.5] * 10 + position)
    assert as_tuple(whole) == (0, 0, 300, 300)
    assert as_tuple(smallest) == (0, 0, round(300 * math.sqrt(0.08)), round(300 * math.sqrt(0.08)))
    last = random_resized_crop(300, 300, [0.0, 0.5] * 10 + [ALMOST_1, ALMOST_1])
    assert (last.left + last.width, last.top + last.height) == (300, 300)
    narrow, wide = (random_resized_crop(300, 300, [0.0, u] * 10 + position) for u in (0.0, ALMOST_1))
    assert (narrow.width, narrow.height) == (wide.height, wide.width)
    assert wide.width / wide.height == pytest.approx(4 / 3, rel=0.02)


def test_normalised_is_xyxy_of_the_image() -> None:
    assert PixelBox(left=10, top=30, width=20, height=40).normalised(40, 80) == (0.25, 0.375, 0.75, 0.875)


@pytest.mark.parametrize("fields", [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0)], ids=str)
def test_boxes_that_are_none_are_refused(fields: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least one pixel, got PixelBox"):
        PixelBox(*fields)


@pytest.mark.parametrize(
    ("scale", "ratio", "message"),
    [
        pytest.param((0.0, 1.0), RATIO, "scale", id="scale-0"),
        pytest.param((0.5, 0.4), RATIO, "scale", id="scale-swapped"),
        pytest.param((0.5, 1.1), RATIO, "scale", id="scale-above-1"),
        pytest.param((0.5, math.nan), RATIO, "scale", id="scale-nan"),
        pytest.param((0.5,), RATIO, "scale", id="scale-alone"),
        pytest.param(SCALE, (0.0, 1.0), "ratio", id="ratio-0"),
        pytest.param(SCALE, (2.0, 1.0), "ratio", id="ratio-swapped"),
        pytest.param(SCALE, (1.0, math.inf), "ratio", id="ratio-infinite"),
        pytest.param(SCALE, (1.0, 1.0, 1.0), "ratio", id="ratio-of-three"),
    ],
)
def test_ranges_are_checked(scale: tuple[float, ...], ratio: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message} must be \(lowest, highest\).*got \("):
        check_crop_range(scale, ratio)


def test_good_ranges_pass() -> None:
    check_crop_range(SCALE, RATIO)
    check_crop_range((1.0, 1.0), [1.0, 1.0])


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.one_of(st.integers(1, 24), st.tuples(st.integers(1, 24), st.integers(1, 24))),
    st.sampled_from([1.0, 0.875, 0.9, 0.5, 0.32]),
)
@settings(max_examples=100, deadline=None)
def test_center_crops_are_timms(width: int, height: int, size: int | tuple[int, int], crop_pct: float) -> None:
    """Noise resized to the size that we say and cut where we say is what timm's transforms make of it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    transform = transforms_imagenet_eval(size, crop_pct=crop_pct, interpolation="bilinear", normalize=False)
    crop_height, crop_width = (size, size) if isinstance(size, int) else size
    crop = center_crop(width, height, (crop_height, crop_width), crop_pct)
    resized = functional.resize(noise, [crop.resized_height_px, crop.resized_width_px])
    cut = functional.crop(resized, crop.box.top, crop.box.left, crop_height, crop_width)
    assert crop.box.fits_in(crop.resized_width_px, crop.resized_height_px), "nothing is padded"
    np.testing.assert_array_equal(np.asarray(cut), transform(noise).permute(1, 2, 0).numpy())


@given(sides, sides, st.integers(8, 400), st.floats(0.3, 1.0))
@settings(max_examples=100, deadline=None)
def test_the_box_of_a_center_crop_is_the_view_of_a_centred_map(
    width: int, height: int, size: int, crop_pct: float
) -> None:
    """Up to the pixels of the resized image that both stages round to."""
    crop = center_crop(width, height, (size, size), crop_pct)
    difference = np.abs(np.subtract(crop.normalised(), view_center(width, height, crop_pct)))
    allowed = 2 / np.array([crop.resized_width_px, crop.resized_height_px] * 2)
    assert (difference <= allowed).all()


def test_a_usual_center_crop() -> None:
    crop = center_crop(500, 375, (224, 224), 0.875)
    assert (crop.resized_width_px, crop.resized_height_px) == (341, 256)
    assert as_tuple(crop.box) == (58, 16, 224, 224), "58.5 is rounded to the even neighbour"
    assert crop.normalised() == (58 / 341, 16 / 256, 282 / 341, 240 / 256)


@pytest.mark.parametrize("crop_pct", [0.0, -0.5, 1.01, math.nan])
def test_crop_pct_is_checked(crop_pct: float) -> None:
    check_crop_pct(1.0)
    with pytest.raises(ValueError, match=r"^crop_pct must be above 0 and at most 1, got"):
        check_crop_pct(crop_pct)
