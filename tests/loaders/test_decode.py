import io
import pickle
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from loaders import decode
from loaders.crops import PixelBox
from loaders.decode import Decoder, DecoderName, get_decoder
from tokenlabels.images.decode import UndecodableImageError, decode_rgb

NAMES: tuple[DecoderName, ...] = get_args(DecoderName)
WIDTH, HEIGHT = 61, 45


def picture(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """A smooth picture that no flip or rotation leaves as it is."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    rgb = np.stack([200 * x + 30, 200 * y + 20, 120 * x * y + 60], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8)).convert(mode)


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))


def encoded(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif_block(orientation: int, *, endian: str = "II", kind: int = 3) -> bytes:
    """An EXIF block with nothing but an orientation, of type SHORT (3) or LONG (4)."""
    order, value = ("<" if endian == "II" else ">"), ("HH" if kind == 3 else "I")
    values = (orientation, 0) if kind == 3 else (orientation,)
    return b"Exif\0\0" + endian.encode() + struct.pack(f"{order}HIHHHI{value}I", 42, 8, 1, 0x0112, kind, 1, *values, 0)


def app1(body: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def after_start(jpeg: bytes, segment: bytes) -> bytes:
    return jpeg[:2] + segment + jpeg[2:]


JPEG = encoded(noise((WIDTH, HEIGHT)))
XMP = app1(b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>")
SIXTEEN_BITS = Image.fromarray(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64)

USUAL_JPEGS = {
    "jpeg": JPEG,
    "jpeg-progressive": encoded(noise((WIDTH, HEIGHT)), progressive=True),
    "jpeg-grey": encoded(picture("L")),
    "jpeg-cmyk": encoded(picture("CMYK")),
    "jpeg-420": encoded(noise((WIDTH, HEIGHT)), subsampling=2, quality=60),
    "jpeg-stored-as-rgb": encoded(picture(), keep_rgb=True),
    "jpeg-and-more": JPEG + b"more",
    "jpeg-with-restarts": encoded(picture(), restart_marker_blocks=2),
    **{f"exif-{i}": encoded(picture(), exif=exif_block(i)) for i in range(10)},
    **{f"exif-grey-{i}": encoded(picture("L"), exif=exif_block(i, endian="MM")) for i in (3, 6)},
    "exif-after-xmp": after_start(encoded(picture(), exif=exif_block(6)), XMP),
    "exif-twice": after_start(encoded(picture(), exif=exif_block(6)), app1(exif_block(3))),
    "exif-long-big-endian": encoded(picture(), exif=exif_block(8, endian="MM", kind=4)),
    "exif-empty": encoded(picture(), exif=b"Exif\0\0"),
    "exif-broken": encoded(picture(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "exif-that-makes-pillow-warn": encoded(picture(), exif=exif_block(6)[:-16]),
    "xmp-alone": after_start(JPEG, XMP),
    "mpo": encoded(picture(), "MPO", save_all=True, append_images=[picture()]),
    "pixel": encoded(Image.new("RGB", (1, 1), (9, 99, 199))),
}
OTHERS = {
    "jpeg-without-end": JPEG[:-2],
    "jpeg-with-fill-bytes": after_start(JPEG, b"\xff\xff\xff" + XMP[1:]),
    "png": encoded(picture(), "PNG"),
    "png-16-bits": encoded(SIXTEEN_BITS, "PNG"),
    "png-palette": encoded(picture("P"), "PNG"),
    "png-rgba": encoded(picture("RGBA"), "PNG"),
    "png-exif": encoded(picture(), "PNG", exif=exif_block(6)),
    "webp": encoded(picture(), "WEBP"),
    "gif": encoded(picture("P"), "GIF"),
    "bmp": encoded(picture(), "BMP"),
    "tiff-cmyk": encoded(picture("CMYK"), "TIFF"),
}
FRAME = JPEG.index(b"\xff\xc0")
UNDECODABLE = {
    "empty": b"",
    "start-alone": b"\xff\xd8\xff",
    "html": b"<html>",
    "jpeg-third-byte": b"\xff\xd8\x00" + JPEG[3:],
    "jpeg-header-cut": JPEG[:100],
    "jpeg-half": JPEG[: len(JPEG) // 2],
    "jpeg-almost": JPEG[:-20],
    "jpeg-zeros": JPEG[:-20] + bytes(3000),
    "jpeg-progressive-half": encoded(noise((WIDTH, HEIGHT)), progressive=True)[:-900],
    "jpeg-no-height": JPEG[: FRAME + 5] + b"\0\0" + JPEG[FRAME + 7 :],
    "jpeg-huge": JPEG[: FRAME + 5] + b"\xff\xff\xff\xff" + JPEG[FRAME + 9 :],
    "png-half": encoded(picture(), "PNG")[:300],
    "webp-half": encoded(noise((WIDTH, HEIGHT)), "WEBP")[:500],
}


def pixels(image: Tensor | Image.Image) -> NDArray[np.int16]:
    return np.asarray(image).astype(np.int16)


@pytest.fixture(scope="module")
def photographs(imagenet_sample: Path) -> list[bytes]:
    photographs = []
    for path in sorted(imagenet_sample.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in [member for member in archive if member.name.endswith(".jpg")]:
                file = archive.extractfile(member)
                assert file is not None
                photographs.append(file.read())
    return photographs


@pytest.fixture(params=NAMES)
def decoder(request: pytest.FixtureRequest) -> Decoder[Any]:
    return get_decoder(request.param)


@pytest.mark.parametrize("data", [*USUAL_JPEGS.values(), *OTHERS.values()], ids=[*USUAL_JPEGS, *OTHERS])
def test_decodes_to_the_pixels_that_the_annotator_sees(data: bytes, decoder: Decoder[Any]) -> None:
    image, expected = decoder.decode(data), decode_rgb(data)
    assert decoder.size(image) == expected.size
    np.testing.assert_array_equal(pixels(image), pixels(expected))


@pytest.mark.parametrize("data", USUAL_JPEGS.values(), ids=USUAL_JPEGS)
def test_usual_jpegs_are_decoded_by_torchvision(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "decode_rgb", lambda _: pytest.fail("went to Pillow"))
    get_decoder("torchvision").decode(data)


@pytest.mark.parametrize("data", UNDECODABLE.values(), ids=UNDECODABLE)
def test_undecodable_images_have_the_annotators_reason(data: bytes, decoder: Decoder[Any]) -> None:
    with pytest.raises(UndecodableImageError) as expected:
        decode_rgb(data)
    with pytest.raises(UndecodableImageError) as caught:
        decoder.decode(data)
    assert str(caught.value) == str(expected.value)


def outcome(decode_one: Any, data: bytes) -> Any:
    try:
        return pixels(decode_one(data))
    except UndecodableImageError as error:
        return str(error)


def test_damaged_jpegs_decode_alike_or_not_at_all() -> None:
    """Bytes changed in header and pixels, pieces lost: the annotator's pixels, or its reason."""
    generator, torchvision_decoder = np.random.default_rng(0), get_decoder("torchvision")
    originals = [USUAL_JPEGS[name] for name in ("jpeg", "jpeg-progressive", "jpeg-cmyk", "exif-6", "exif-after-xmp")]
    outcomes = []
    for i in range(400):
        data = bytearray(originals[i % len(originals)])
        scan = data.find(b"\xff\xda")
        if i % 4 == 3:
            start = int(generator.integers(scan, len(data)))
            del data[start : start + 30]
        else:
            first, last = (scan, len(data)) if i % 4 == 2 else (2, scan)
            data[int(generator.integers(first, last))] = int(generator.integers(256))
        expected, got = outcome(decode_rgb, bytes(data)), outcome(torchvision_decoder.decode, bytes(data))
        np.testing.assert_array_equal(got, expected)
        outcomes.append(isinstance(got, str))
    assert 20 < sum(outcomes) < 380, "of both kinds"


@pytest.mark.parametrize("name", ["jpeg", "exif-6", "png"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))])
def test_every_kind_of_buffer_decodes_and_stays(kind: Any, name: str, decoder: Decoder[Any]) -> None:
    data = {**USUAL_JPEGS, **OTHERS}[name]
    buffer = kind(data)
    np.testing.assert_array_equal(pixels(decoder.decode(buffer)), pixels(decode_rgb(data)))
    assert bytes(buffer) == data


def test_large_jpegs_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header that is looked at promises 65,535 x 65,535 pixels, 13 GB."""

    def fail(*_: object) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr(torch.ops, "image", SimpleNamespace(decode_jpeg=SimpleNamespace(default=fail)))
    with pytest.raises(UndecodableImageError, match=r"bomb|pixels, more than"):
        get_decoder("torchvision").decode(UNDECODABLE["jpeg-huge"])


def test_photographs_decode_to_the_same_pixels(photographs: list[bytes]) -> None:
    decoder = get_decoder("torchvision")
    for data in photographs[::13]:
        np.testing.assert_array_equal(pixels(decoder.decode(data)), pixels(decode_rgb(data)))


@pytest.mark.slow
def test_all_photographs_decode_to_the_same_pixels(photographs: list[bytes]) -> None:
    decoder = get_decoder("torchvision")
    for data in photographs:
        np.testing.assert_array_equal(pixels(decoder.decode(data)), pixels(decode_rgb(data)))


def test_threads_share_a_decoder(photographs: list[bytes], decoder: Decoder[Any]) -> None:
    data = [*photographs[:6], *USUAL_JPEGS.values(), *OTHERS.values(), b"broken"] * 2
    batch = torch.zeros(2, len(data), 32, 32, 3, dtype=torch.uint8)

    def fill(out: Tensor, encoded_image: bytes) -> str:
        try:
            image = decoder.decode(encoded_image)
        except UndecodableImageError as error:
            return str(error)
        decoder.resize_into(image, PixelBox(0, 0, *decoder.size(image)), out, True, "bicubic")
        return ""

    alone = list(map(fill, batch[0], data))
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(fill, batch[1], data))
    assert together == alone
    assert torch.equal(batch[1], batch[0])
    assert batch.flatten(2).amax(dim=2).count_nonzero() == 2 * (len(data) - 2), "all but the broken ones"


def test_decoders_can_be_sent_to_other_processes(decoder: Decoder[Any]) -> None:
    sent = pickle.loads(pickle.dumps(decoder))
    np.testing.assert_array_equal(pixels(sent.decode(JPEG)), pixels(decoder.decode(JPEG)))


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be 'torchvision' or 'pillow', got 'opencv'"):
        get_decoder("opencv")  # type: ignore[arg-type]


def test_a_torchvision_without_jpeg_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "image", SimpleNamespace())
    with pytest.raises(ValueError, match=r"torchvision \S+ was built without JPEG; use the decoder 'pillow'"):
        get_decoder("torchvision")
    assert get_decoder("pillow").decode(JPEG).size == (WIDTH, HEIGHT)
