import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annotate.fit import ImageSpec, fit
from tokenlabels.geometry import ResizeMode
from tokenlabels.images.decode import decode_rgb


def spec_of(resize: ResizeMode, side: int = 48, interpolation: str = "bilinear", crop_pct: float = 0.8) -> ImageSpec:
    return ImageSpec((side, side), interpolation, resize, crop_pct, (0, 0, 255))


def coordinates(width: int, height: int) -> Image.Image:
    """Red is 255 x and green 255 y at the centre of every pixel, with x and y in 0..1 of the image."""
    rgb = np.zeros((height, width, 3))
    rgb[..., 0] = 255 * (np.arange(width) + 0.5) / width
    rgb[..., 1] = 255 * (np.arange(height) + 0.5)[:, None] / height
    return Image.fromarray(np.rint(rgb).astype(np.uint8))


SIZES = [(97, 61), (61, 97), (100, 100), (33, 200), (500, 375), (40, 31), (49, 48)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("resize", ["squash", "center", "letterbox"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_every_pixel_shows_what_the_view_says(size: tuple[int, int], resize: ResizeMode, interpolation: str) -> None:
    """One pixel of the input is 4 to 255 / 48 = 5.3 of 255 (squash): half a pixel off would be seen."""
    side = 48
    fitted, view = fit(coordinates(*size), spec_of(resize, side, interpolation))
    assert (fitted.shape, str(fitted.dtype)) == ((side, side, 3), "uint8")
    assert (view.shape, str(view.dtype)) == ((4,), "float32")
    x = view[0] + (view[2] - view[0]) * (np.arange(side) + 0.5) / side
    y = view[1] + (view[3] - view[1]) * (np.arange(side) + 0.5) / side
    # At the border of the image the filters see one side only.
    inner_x, inner_y = (np.abs(centres - 0.5) < 0.4 for centres in (x, y))
    # Rounding of source and result; two of the filters do not reproduce a ramp exactly either.
    ripple_px = {"box": 0.5, "hamming": 0.15}.get(interpolation, 0)
    reach_x, reach_y = (1.25 + 255 * ripple_px / length for length in size)
    red, green = fitted[..., 0].astype(float), fitted[..., 1].astype(float)
    assert min(inner_x.sum(), inner_y.sum()) >= 4
    assert np.abs(red - 255 * x)[np.ix_(inner_y, inner_x)].max() <= reach_x
    assert np.abs(green - 255 * y[:, None])[np.ix_(inner_y, inner_x)].max() <= reach_y


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_letterbox_padding_is_exactly_outside_the_view(size: tuple[int, int]) -> None:
    fitted, view = fit(Image.new("RGB", size, (255, 0, 0)), spec_of("letterbox"))
    x = view[0] + (view[2] - view[0]) * (np.arange(48) + 0.5) / 48
    y = view[1] + (view[3] - view[1]) * (np.arange(48) + 0.5) / 48
    outside = ((x < 0) | (x > 1))[None, :] | ((y < 0) | (y > 1))[:, None]
    np.testing.assert_array_equal(fitted[outside], np.broadcast_to([0, 0, 255], (outside.sum(), 3)))
    np.testing.assert_array_equal(fitted[~outside], np.broadcast_to([255, 0, 0], ((~outside).sum(), 3)))


def test_center_is_timms_evaluation_crop_up_to_its_rounding() -> None:
    """timm resizes to whole pixels and crops at whole pixels; on a smooth picture that is nearly the same."""
    from timm.data.transforms_factory import create_transform

    image = coordinates(200, 140)
    transform = create_transform(96, interpolation="bicubic", crop_pct=0.875, crop_mode="center")
    theirs = np.asarray(transform.transforms[1](transform.transforms[0](image))).astype(float)
    ours, _ = fit(image, spec_of("center", 96, "bicubic", 0.875))
    assert np.abs(ours - theirs).max() <= 3


def test_fit_resizes_in_one_step_from_the_source(imagenet_sample: Path) -> None:
    with tarfile.open(imagenet_sample / "imagenet1k-train-0003.tar") as archive:
        file = archive.extractfile(archive.getnames()[0])
        assert file is not None
        image = decode_rgb(file.read())
    fitted, view = fit(image, spec_of("squash", 224, "bicubic"))
    np.testing.assert_array_equal(fitted, np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)))
    assert view.tolist() == [0, 0, 1, 1]


def test_fit_makes_arrays_that_torch_can_own() -> None:
    fitted, _ = fit(coordinates(37, 23), spec_of("squash"))
    assert fitted.flags.writeable
    assert fitted.flags.c_contiguous


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1)], ids=str)
@pytest.mark.parametrize("resize", ["squash", "center", "letterbox"])
def test_fit_of_the_thinnest_images(size: tuple[int, int], resize: ResizeMode) -> None:
    fitted, view = fit(Image.new("RGB", size, (9, 9, 9)), spec_of(resize))
    assert fitted.shape == (48, 48, 3)
    assert np.isfinite(view).all()


def test_fit_wants_rgb() -> None:
    with pytest.raises(ValueError, match="mode RGB as decode_rgb makes them, got L"):
        fit(coordinates(5, 5).convert("L"), spec_of("squash"))


BAD_SPECS: dict[str, tuple[Callable[[], ImageSpec], str]] = {
    "size": (lambda: ImageSpec((0, 5), "box", "squash", 1.0, (0, 0, 0)), "size must be"),
    "interpolation": (lambda: spec_of("squash", interpolation="random"), "interpolation must be one of nearest"),
    "resize": (lambda: spec_of("stretch"), "resize must be squash"),  # type: ignore[arg-type]
    "not-square": (lambda: ImageSpec((5, 6), "box", "center", 1.0, (0, 0, 0)), "'center' cuts squares"),
    "crop_pct": (lambda: spec_of("center", crop_pct=1.2), "crop_pct must be above 0"),
    "fill": (lambda: ImageSpec((5, 5), "box", "letterbox", 1.0, (0, 256, 0)), "fill_rgb must be three"),
}


@pytest.mark.parametrize(("make", "message"), BAD_SPECS.values(), ids=BAD_SPECS.keys())
def test_bad_specs_are_refused(make: Callable[[], ImageSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_spec_is_a_key() -> None:
    assert {spec_of("squash"): 1}[spec_of("squash")] == 1
