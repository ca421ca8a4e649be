import io
import random
import struct
import tarfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tokenlabels.images import decode
from tokenlabels.images.decode import UndecodableImageError, decode_rgb

WIDTH, HEIGHT = 37, 23


def picture(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """A smooth picture that no flip or rotation leaves as it is."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    rgb = np.stack([200 * x + 30, 200 * y + 20, 120 * x * y + 60], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> NDArray[np.int16]:
    return np.asarray(image).astype(np.int16)


def default_loader(data: bytes) -> NDArray[np.int16]:
    """The slow twin: what torchvision's datasets do, with orientation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


IMAGES = {
    "png": encoded(picture(), "PNG"),
    "png-interlaced-grey": encoded(picture("L"), "PNG"),
    "png-bilevel": encoded(picture("1"), "PNG"),
    "bmp": encoded(picture(), "BMP"),
    "tiff": encoded(picture(), "TIFF"),
    "tiff-deflate": encoded(picture(), "TIFF", compression="tiff_deflate"),
    "tiff-cmyk": encoded(picture("CMYK"), "TIFF"),
    "tiff-lab": encoded(picture("LAB"), "TIFF"),
    "webp-lossless": encoded(picture(), "WEBP", lossless=True),
    "gif": encoded(picture("P"), "GIF"),
    "ppm": encoded(picture(), "PPM"),
    "pgm": encoded(picture("L"), "PPM"),
    "jpeg": encoded(picture(), "JPEG"),
    "jpeg-progressive": encoded(picture(), "JPEG", progressive=True),
    "jpeg-grey": encoded(picture("L"), "JPEG"),
    "jpeg-cmyk": encoded(picture("CMYK"), "JPEG"),
    "jpeg-subsampled": encoded(picture(), "JPEG", subsampling=2),
    "webp": encoded(picture(), "WEBP"),
    "palette": encoded(picture("P"), "PNG"),
    "rgba": encoded(picture("RGBA"), "PNG"),
    "grey-alpha": encoded(picture("LA"), "PNG"),
}


@pytest.mark.parametrize("data", IMAGES.values(), ids=IMAGES.keys())
def test_decodes_as_the_usual_loader_does(data: bytes) -> None:
    image = decode_rgb(data)
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    np.testing.assert_array_equal(pixels(image), default_loader(data))
    assert np.corrcoef(pixels(image).ravel(), pixels(picture()).ravel())[0, 1] > 0.2, "inverted or displaced"


def test_ycck_is_decoded_and_not_inverted() -> None:
    """As Adobe's programs write red, CMYK (0, 255, 255, 0): C, M, Y taken for RGB turned into YCbCr, K inverted."""
    ycc = np.asarray(Image.new("RGB", (1, 1), (0, 255, 255)).convert("YCbCr"))[0, 0].tolist()
    # Pillow inverts all four when it writes.
    data = bytearray(encoded(Image.new("CMYK", (16, 16), (*(255 - value for value in ycc), 0)), "JPEG"))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0, "Pillow writes CMYK without the transformation"
    data[transform] = 2
    np.testing.assert_allclose(pixels(decode_rgb(bytes(data))).mean(axis=(0, 1)), [255, 0, 0], atol=4)


TRANSPARENT = {
    "rgba": ("RGBA", {}),
    "grey-alpha": ("LA", {}),
    "palette-bytes": ("P", {"transparency": bytes(range(256))}),
    "palette-index": ("P", {"transparency": 3}),
    "rgb-colour-key": ("RGB", {"transparency": (30, 20, 60)}),
    "grey-key": ("L", {"transparency": 40}),
}


@pytest.mark.parametrize(("mode", "options"), TRANSPARENT.values(), ids=TRANSPARENT.keys())
def test_transparency_is_dropped_and_colours_stay(mode: str, options: dict[str, Any]) -> None:
    image = picture(mode)
    if mode.endswith("A"):
        image.putalpha(Image.new("L", image.size, 7))
    data = encoded(image, "PNG", **options)
    decoded = decode_rgb(data)
    np.testing.assert_array_equal(pixels(decoded), default_loader(data))
    opaque = picture(mode).convert("RGB")
    np.testing.assert_array_equal(pixels(decoded), pixels(opaque))
    assert "transparency" not in decoded.info


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_byte(file_format: str) -> None:
    values = np.arange(256 * 4, dtype=np.uint16).reshape(32, 32) * 64
    decoded = pixels(decode_rgb(encoded(Image.fromarray(values), file_format)))
    np.testing.assert_array_equal(decoded, np.repeat((values >> 8)[..., None], 3, axis=2))


def png_16_bit_rgb(values: NDArray[np.uint16]) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    size = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_grey_and_16_bit_colour_are_reduced_alike() -> None:
    values = np.random.default_rng(0).integers(0, 65_536, (9, 7), np.uint16)
    grey = decode_rgb(encoded(Image.fromarray(values), "PNG"))
    colour = decode_rgb(png_16_bit_rgb(np.repeat(values[..., None], 3, axis=2)))
    np.testing.assert_array_equal(pixels(grey), pixels(colour))


def f32(*row: float) -> NDArray[np.float32]:
    return np.array([row], np.float32)


def i32(*row: int) -> NDArray[np.int32]:
    return np.array([row], np.int32)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param(f32(0, 0.5, 1), [0, 128, 255], id="float-to-1"),
        pytest.param(f32(0, 2, 255), [0, 2, 255], id="float-to-255"),
        pytest.param(f32(-3, np.nan, np.inf, 1), [0, 0, 0, 255], id="float-not-finite"),
        pytest.param(i32(0, 2, 255), [0, 2, 255], id="int-to-255"),
        pytest.param(i32(-5, 32_768, 65_535), [0, 128, 255], id="int-to-65535"),
        pytest.param(i32(0, 2**29, 2**30), [0, 128, 255], id="int-above"),
        pytest.param(i32(-9, -5, 0), [0, 0, 0], id="int-nothing-positive"),
    ],
)
def test_32_bit_grey_is_scaled_and_not_clipped(values: NDArray[Any], expected: list[int]) -> None:
    decoded = pixels(decode_rgb(encoded(Image.fromarray(values), "TIFF")))
    assert decoded[0, :, 0].tolist() == expected
    assert (decoded == decoded[..., :1]).all()


def with_orientation(file_format: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), file_format, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(file_format: str, orientation: int) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {"quality": 95} if file_format == "JPEG" else {}
    data = with_orientation(file_format, orientation, **options)
    decoded = decode_rgb(data)
    np.testing.assert_array_equal(pixels(decoded), default_loader(data))
    row, column = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}[
        orientation
    ]
    assert pixels(decoded)[row, column].sum() < 140, "the dark corner, top left in the file, has moved"
    assert decoded.size == ((WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH))


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_unknown_orientations_are_upright(orientation: int) -> None:
    np.testing.assert_array_equal(pixels(decode_rgb(with_orientation("PNG", orientation))), pixels(picture()))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0garbage!", b"Exif\0\0II*\0\xff\xff\xff\xff", b"x"])
def test_a_broken_exif_block_is_upright(exif: bytes) -> None:
    data = encoded(picture(), "JPEG", exif=exif)
    np.testing.assert_array_equal(pixels(decode_rgb(data)), pixels(decode_rgb(encoded(picture(), "JPEG"))))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first(file_format: str) -> None:
    options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    data = encoded(red, file_format, save_all=True, append_images=[blue], **options)
    np.testing.assert_allclose(pixels(decode_rgb(data)), pixels(red), atol=2)


def test_the_name_of_a_format_does_not_matter_and_others_are_refused() -> None:
    with pytest.raises(UndecodableImageError, match=r"broken header, or not one of JPEG.*starts with b'<html>'"):
        decode_rgb(b"<html>")
    with pytest.raises(UndecodableImageError, match="not one of"):
        decode_rgb(encoded(picture(), "ICO"))
    with pytest.raises(UndecodableImageError, match=r"^empty file$"):
        decode_rgb(b"")


TRUNCATABLE = ["png", "webp", "webp-lossless", "bmp", "tiff", "tiff-deflate", "ppm", "gif"]


@pytest.mark.parametrize("share", [0.9, 0.6])
@pytest.mark.parametrize("name", [name for name in IMAGES if name.startswith("jpeg")] + TRUNCATABLE)
def test_truncated_pixels_are_undecodable(name: str, share: float) -> None:
    data = IMAGES[name]
    with pytest.raises(UndecodableImageError) as caught:
        decode_rgb(data[: int(len(data) * share)])
    reason = str(caught.value)
    assert len(reason) < 250
    assert "\n" not in reason
    assert " at 0x" not in reason
    if name.startswith(("jpeg", "png", "bmp")):
        assert reason.startswith("truncated ")


JPEG_KINDS = [{}, {"progressive": True}, {"subsampling": 2}, {"restart_marker_blocks": 2}]


def random_jpeg(seed: int, **options: Any) -> bytes:
    generator = np.random.default_rng(seed)
    height, width = generator.integers(8, 70, 2)
    coarse = Image.fromarray(generator.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8))
    return encoded(coarse.resize((int(width), int(height))), "JPEG", **options)


@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
@pytest.mark.parametrize("tail", [b"", b"\xff", bytes(5000)], ids=["cut", "half-marker", "zeros"])
def test_a_jpeg_that_lacks_only_its_end_marker_is_whole(options: dict[str, Any], tail: bytes) -> None:
    for seed in range(10):
        data = random_jpeg(seed, **options)
        assert data.endswith(b"\xff\xd9")
        if data[-3] == 0:  # cannot be told from the zeros of an unfinished file, and so is refused
            continue
        np.testing.assert_array_equal(pixels(decode_rgb(data[:-2] + tail)), pixels(decode_rgb(data)))


@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
@pytest.mark.parametrize("tail", [b"", bytes(5000)], ids=["cut", "zeros"])
def test_a_jpeg_that_lacks_pixels_is_truncated(options: dict[str, Any], tail: bytes) -> None:
    for seed in range(10):
        data = random_jpeg(seed, **options)
        for num_lost in (6, 20, 100, len(data) // 2):
            with pytest.raises(UndecodableImageError, match=r"^truncated image data"):
                decode_rgb(data[:-num_lost] + tail)


def test_bytes_after_the_end_do_not_matter() -> None:
    for name in ("jpeg", "png", "webp"):
        np.testing.assert_array_equal(pixels(decode_rgb(IMAGES[name] + b"more")), pixels(decode_rgb(IMAGES[name])))


def test_large_images_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(UndecodableImageError, match="37 x 23 pixels, more than 850"):
        decode_rgb(IMAGES["png"])


@pytest.mark.parametrize("side", [10_000, 20_000, 60_000], ids=["above-limit", "above-pillows", "far-above"])
def test_decompression_bombs_are_refused(side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(UndecodableImageError, match=r"pixels, more than|decompression bomb"):
        decode_rgb(bomb)


@pytest.mark.parametrize(
    "failure",
    [
        OSError("a\nb"),
        SyntaxError("x"),
        struct.error("x"),
        zlib.error("x"),
        MemoryError(),
        KeyError(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_becomes_a_reason(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UndecodableImageError, match=rf"^{type(failure).__name__}") as caught:
        decode_rgb(b"data")
    assert "\n" not in str(caught.value)


def test_pillows_warnings_do_not_escape() -> None:
    """Neither recorded nor, as errors, taken for a reason; others' warnings still arrive."""
    data = bytearray(encoded(picture(), "TIFF"))
    exif_tag = struct.pack("<HHI", 0x0131, 2, 2**30)
    data = data.replace(struct.pack("<HHI", 0x011C, 3, 1), exif_tag)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(data)).load()
    assert caught, "the file makes Pillow warn"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(pixels(decode_rgb(bytes(data))), pixels(picture()))
        with pytest.raises(UserWarning, match="ours"):
            warnings.warn("ours", stacklevel=1)


def test_threads_decode_alike() -> None:
    data = list(IMAGES.values()) * 4
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(decode_rgb, data))
    for image, alone in zip(images, map(decode_rgb, data), strict=True):
        np.testing.assert_array_equal(pixels(image), pixels(alone))


def test_all_real_photographs_decode_as_the_usual_loader_does(imagenet_sample: Path) -> None:
    generator = random.Random(0)
    for path in sorted(imagenet_sample.glob("*.tar")):
        with tarfile.open(path) as archive:
            names = [name for name in archive.getnames() if name.endswith(".jpg")]
            for name in generator.sample(names, 5):
                file = archive.extractfile(name)
                assert file is not None
                data = file.read()
                np.testing.assert_array_equal(pixels(decode_rgb(data)), default_loader(data))
