import io
import tarfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from loaders import decode
from loaders.crops import PixelBox, center_crop, random_resized_crop
from loaders.decode import Decoder, DecoderName, Interpolation, get_decoder
from tokenlabels.images.decode import decode_rgb

NAMES: tuple[DecoderName, ...] = get_args(DecoderName)
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
WIDTH, HEIGHT = 61, 45


def picture(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """A smooth picture that no flip or rotation leaves as it is."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    rgb = np.stack([200 * x + 30, 200 * y + 20, 120 * x * y + 60], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8)).convert(mode)


def noise(size: tuple[int, int], *, levels: int = 256) -> Image.Image:
    values = np.random.default_rng(0).integers(0, levels, (size[1], size[0], 3)) * (255 // (levels - 1))
    return Image.fromarray(values.astype(np.uint8))


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def turned() -> bytes:
    """A JPEG that stands upright only after its EXIF block was looked at."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise((HEIGHT, WIDTH)), "JPEG", exif=exif)


JPEG = encoded(noise((WIDTH, HEIGHT)), "JPEG")


def pixels(image: Tensor | Image.Image) -> NDArray[np.int16]:
    return np.asarray(image).astype(np.int16)


@pytest.fixture(scope="module")
def photographs(imagenet_sample: Path) -> list[bytes]:
    return read_photographs(imagenet_sample, every=13)


def read_photographs(folder: Path, every: int = 1) -> list[bytes]:
    photographs = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in [member for member in archive if member.name.endswith(".jpg")][::every]:
                file = archive.extractfile(member)
                assert file is not None
                photographs.append(file.read())
    return photographs


@pytest.fixture(params=NAMES)
def decoder(request: pytest.FixtureRequest) -> Decoder[Any]:
    return get_decoder(request.param)


def images_of(data: bytes) -> list[tuple[Decoder[Any], Any]]:
    """The image of each backend."""
    return [(decoder, decoder.decode(data)) for decoder in map(get_decoder, NAMES)]


def resized(
    data: bytes, box: PixelBox, size_hw: tuple[int, int], flip: bool, interpolation: Interpolation
) -> list[NDArray[np.int16]]:
    """A crop by each backend."""
    outs = []
    for decoder, image in images_of(data):
        out = torch.empty(*size_hw, 3, dtype=torch.uint8)
        decoder.resize_into(image, box, out, flip, interpolation)
        outs.append(pixels(out))
    return outs


def boxes_in(width: int, height: int, num: int = 3) -> list[PixelBox]:
    """The whole image, a pixel in its corner, a column, and random crops."""
    generator = np.random.default_rng(0)
    drawn = [random_resized_crop(width, height, generator.random(22).tolist()) for _ in range(num)]
    corner, column = PixelBox(width - 1, height - 1, 1, 1), PixelBox(width // 2, 0, 1, height)
    return [PixelBox(0, 0, width, height), corner, column, *drawn]


CROPS = {
    "down": ((500, 375), (64, 64)),
    "slightly-down": ((130, 130), (128, 128)),
    "up": ((20, 30), (64, 64)),
    "wide-to-tall": ((300, 40), (90, 30)),
    "tall-to-wide": ((40, 300), (30, 90)),
    "pixel": ((1, 1), (7, 5)),
    "to-a-pixel": ((70, 50), (1, 1)),
}


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("make", [noise, lambda size: noise(size, levels=2), lambda size: picture(size=size)])
@pytest.mark.parametrize(("size", "out_hw"), CROPS.values(), ids=CROPS)
def test_backends_agree_within_2_grey_levels(
    size: tuple[int, int], out_hw: tuple[int, int], make: Any, interpolation: Interpolation
) -> None:
    """Black-and-white noise is where bicubic overshoots most: what is not clamped would be off by 200."""
    data = encoded(make(size))
    for i, box in enumerate(boxes_in(*size)):
        ours, pillows = resized(data, box, out_hw, bool(i % 2), interpolation)
        assert np.abs(ours - pillows).max() <= 2


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_backends_agree_on_photographs(photographs: list[bytes], interpolation: Interpolation) -> None:
    generator = np.random.default_rng(0)
    for i, data in enumerate(photographs):
        box = random_resized_crop(*decode_rgb(data).size, generator.random(22).tolist())
        ours, pillows = resized(data, box, (224, 224), bool(i % 2), interpolation)
        assert np.abs(ours - pillows).max() <= 2
        assert np.abs(ours - pillows).mean() < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_backends_agree_on_all_photographs(imagenet_sample: Path, interpolation: Interpolation) -> None:
    test_backends_agree_on_photographs(read_photographs(imagenet_sample), interpolation)


@pytest.mark.parametrize("flip", [False, True], ids=["as-is", "flipped"])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("name", [name for name in CROPS if name != "to-a-pixel"])
def test_torchvision_crops_as_its_transform_does(name: str, interpolation: Interpolation, flip: bool) -> None:
    """But for an output of one pixel, where the transform trips over an assertion of torch 2.15."""
    size, out_hw = CROPS[name]
    image = noise(size)
    chw = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    mode = InterpolationMode(interpolation)
    for box in boxes_in(*size):
        twin = functional.resized_crop(chw, box.top, box.left, box.height, box.width, list(out_hw), mode)
        twin = functional.horizontal_flip(twin) if flip else twin
        ours, _ = resized(encoded(image), box, out_hw, flip, interpolation)
        np.testing.assert_array_equal(ours, pixels(twin.permute(1, 2, 0)))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_pillow_crops_as_pillow_does(interpolation: Interpolation) -> None:
    """Wide crops, where rows come first in every version of Pillow."""
    image, box = noise((200, 90)), PixelBox(13, 5, 160, 70)
    _, got = resized(encoded(image), box, (32, 40), True, interpolation)
    cut = image.crop((13, 5, 173, 75)).resize((40, 32), Image.Resampling[interpolation.upper()])
    np.testing.assert_array_equal(got, pixels(cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_flip_mirrors_the_resized_crop(decoder: Decoder[Any], interpolation: Interpolation) -> None:
    image, box = decoder.decode(JPEG), PixelBox(3, 5, 40, 30)
    as_is, flipped = torch.empty(2, 20, 25, 3, dtype=torch.uint8)
    decoder.resize_into(image, box, as_is, False, interpolation)
    decoder.resize_into(image, box, flipped, True, interpolation)
    assert torch.equal(flipped, as_is.flip(1))
    assert not torch.equal(flipped, as_is)


def test_a_crop_shows_nothing_but_itself(decoder: Decoder[Any]) -> None:
    box = PixelBox(3, 5, 40, 30)
    values = np.array(noise((WIDTH, HEIGHT)))
    crops = []
    for around in (0, 255):
        surrounded = np.full_like(values, around)
        rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        surrounded[rows, columns] = values[rows, columns]
        out = torch.empty(16, 16, 3, dtype=torch.uint8)
        image = decoder.decode(encoded(Image.fromarray(surrounded)))
        decoder.resize_into(image, box, out, False, "bicubic")
        crops.append(out)
    assert torch.equal(*crops)


def test_only_its_row_of_the_batch_is_written_and_the_image_stays(decoder: Decoder[Any]) -> None:
    for data in (JPEG, turned(), encoded(noise((WIDTH, HEIGHT)))):
        image = decoder.decode(data)
        before = pixels(image).copy()
        for flip in (False, True):
            batch = torch.full((3, 16, 24, 3), 77, dtype=torch.uint8)
            decoder.resize_into(image, PixelBox(1, 2, 30, 40), batch[1], flip, "bilinear")
            assert (batch[0] == 77).all()
            assert (batch[2] == 77).all()
            alone = torch.zeros(16, 24, 3, dtype=torch.uint8)
            decoder.resize_into(image, PixelBox(1, 2, 30, 40), alone, flip, "bilinear")
            assert torch.equal(batch[1], alone)
        decoder.center_into(image, batch[1], 0.9, "bilinear")
        assert (batch[::2] == 77).all()
        np.testing.assert_array_equal(pixels(image), before)


def test_boxes_outside_of_the_image_and_other_outputs_are_our_mistakes(decoder: Decoder[Any]) -> None:
    image, whole = decoder.decode(JPEG), PixelBox(0, 0, WIDTH, HEIGHT)
    out = torch.empty(8, 8, 3, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="PixelBox"):
        decoder.resize_into(image, PixelBox(1, 0, WIDTH, HEIGHT), out, False, "bilinear")
    for wrong in (out.float(), out[:, :, :1], out[:, ::2], out.permute(1, 0, 2), out[0]):
        with pytest.raises(AssertionError):
            decoder.resize_into(image, whole, wrong, False, "bilinear")


CENTERS = {
    "wide": (130, 90),
    "tall": (90, 130),
    "square": (70, 70),
    "as-large-as-it-gets": (36, 36),
    "small": (9, 5),
    "pixel": (1, 1),
    "row": (60, 1),
    "column": (1, 60),
    "panorama": (700, 12),
}


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", CENTERS.values(), ids=CENTERS)
def test_evaluation_crops_are_those_of_torchvision(
    size: tuple[int, int], crop_pct: float, interpolation: Interpolation
) -> None:
    """Of its transforms for uint8 tensors, exactly but for panoramas; Pillow within its 2 grey levels."""
    image, out_hw = noise(size), (32, 32)
    chw, mode = torch.from_numpy(np.array(image)).permute(2, 0, 1), InterpolationMode(interpolation)
    shorter = int(32 / crop_pct)
    twin = functional.center_crop(functional.resize(chw, [shorter], mode), [32]).permute(1, 2, 0)
    for (decoder, decoded), tolerance in zip(images_of(encoded(image)), (1, 2), strict=True):
        out = torch.empty(*out_hw, 3, dtype=torch.uint8)
        box = decoder.center_into(decoded, out, crop_pct, interpolation)
        assert np.abs(pixels(out) - pixels(twin)).max() <= tolerance
        assert box == center_crop(*size, out_hw, crop_pct).normalised()


def test_evaluation_crops_need_not_be_square(decoder: Decoder[Any]) -> None:
    image, out = noise((100, 80)), torch.empty(20, 40, 3, dtype=torch.uint8)
    box = decoder.center_into(decoder.decode(encoded(image)), out, 0.8, "bilinear")
    crop = center_crop(100, 80, (20, 40), 0.8)
    assert (crop.resized_width_px, crop.resized_height_px) == (50, 40)
    left, top = crop.box.left, crop.box.top
    twin = pixels(image.resize((50, 40), Image.Resampling.BILINEAR))[top : top + 20, left : left + 40]
    assert np.abs(pixels(out) - twin).max() <= 2
    assert box == crop.normalised()


def test_a_row_of_pixels_is_not_resized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would become 256 x 5,120,000 pixels, 4 GB."""
    monkeypatch.setattr(decode, "_resize", lambda *_: pytest.fail("resized as a whole"))
    row = torch.from_numpy(np.array(noise((20_000, 1))))
    out = torch.empty(224, 224, 3, dtype=torch.uint8)
    get_decoder("torchvision").center_into(row, out, 0.875, "bilinear")
    assert (out[0] == out[-1]).all()


def test_evaluation_crops_of_photographs_agree(photographs: list[bytes]) -> None:
    for data in photographs[:8]:
        outs = torch.empty(2, 224, 224, 3, dtype=torch.uint8)
        for (decoder, image), out in zip(images_of(data), outs, strict=True):
            decoder.center_into(image, out, 0.875, "bicubic")
        assert np.abs(pixels(outs[0]) - pixels(outs[1])).max() <= 2
