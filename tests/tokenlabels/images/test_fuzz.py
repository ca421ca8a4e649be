"""Damaged tars and images by the thousand: every outcome is one that a user can act on.

A mutant that crashes the interpreter or hangs takes the test run with it: after a minute in one case the traceback of
all threads is written and the run ends.
"""

import faulthandler
import io
import os
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annotate.fit import ImageSpec, fit
from tokenlabels.images import TarShard
from tokenlabels.images.decode import UndecodableImageError, decode_rgb
from tokenlabels.tars import TarError

HANG_SECONDS = 60
SPEC = ImageSpec((16, 16), "bilinear", "letterbox", 1.0, (0, 0, 0))
Mutation = Callable[[random.Random, bytearray], None]


@pytest.fixture
def hang_guard(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], None]]:
    """Call it at the start of every case."""
    with capfd.disabled(), os.fdopen(os.dup(2), "w") as stderr:
        yield lambda: faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=stderr)
        faulthandler.cancel_dump_traceback_later()


def encoded(mode: str, file_format: str, **options: object) -> bytes:
    ramp = np.arange(24 * 18 * 3, dtype=np.uint32).reshape(18, 24, 3) * 5 % 251
    buffer = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


IMAGES = {
    "jpeg": encoded("RGB", "JPEG", exif=rotated()),
    "jpeg-progressive": encoded("RGB", "JPEG", progressive=True),
    "jpeg-grey": encoded("L", "JPEG", restart_marker_blocks=1),
    "jpeg-cmyk": encoded("CMYK", "JPEG"),
    "png": encoded("RGB", "PNG", exif=rotated()),
    "png-palette": encoded("P", "PNG", transparency=bytes(range(256))),
    "png-16": encoded("I;16", "PNG"),
    "webp": encoded("RGB", "WEBP", exif=rotated()),
    "webp-lossless": encoded("RGBA", "WEBP", lossless=True),
    "tiff": encoded("RGB", "TIFF", compression="tiff_lzw"),
    "gif": encoded("P", "GIF"),
    "bmp": encoded("RGB", "BMP"),
    "ppm": encoded("RGB", "PPM"),
}


def tar_of(tar_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for number, (name, image) in enumerate(IMAGES.items()):
            key = name if number % 3 else f"{'long' * 30}/{name}-ü"
            if tar_format == tarfile.USTAR_FORMAT:
                key = f"sub/{name}"
            extension = {"jpeg": "jpg", "png": "png", "webp": "webp"}.get(name.partition("-")[0], "jpg")
            files = {extension: image, "cls": b"%d" % number, "json": b'{"label": 1}'}
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


TARS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def flip_bits(generator: random.Random, data: bytearray) -> None:
    for _ in range(generator.choice([1, 2, 10, 100])):
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


def truncate(generator: random.Random, data: bytearray) -> None:
    del data[generator.randrange(len(data)) :]


def insert(generator: random.Random, data: bytearray) -> None:
    place = generator.randrange(len(data))
    data[place:place] = generator.randbytes(generator.choice([1, 3, 512, 700]))


def delete(generator: random.Random, data: bytearray) -> None:
    place = generator.randrange(len(data))
    del data[place : place + generator.choice([1, 3, 512, 700])]


def wipe(generator: random.Random, data: bytearray) -> None:
    place, length = generator.randrange(len(data)), generator.choice([1, 16, 512])
    data[place : place + length] = generator.choice([b"\0", b"\xff"]) * len(data[place : place + length])


def swap_blocks(generator: random.Random, data: bytearray) -> None:
    length = min(generator.choice([8, 512]), max(1, len(data) // 2))
    first, second = (generator.randrange(len(data) // length) * length for _ in range(2))
    data[first : first + length], data[second : second + length] = (
        data[second : second + length],
        data[first : first + length],
    )


def edit_number(generator: random.Random, data: bytearray) -> None:
    """Put an extreme number where a length or a size may be."""
    place = generator.randrange(max(1, min(len(data) - 8, 200)))
    data[place : place + 4] = generator.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"])


# Field of a tar header, and values that programs trip over; the checksum is made right again.
SIZES = [b"7" * 11 + b"\0", b"\x80" + b"\0" * 11, b"\xff" * 10 + b"\xfe\0", b"\x80" + b"\xff" * 11, b"z" * 12]
HEADER_EDITS = [
    (slice(0, 100), [bytes(100), b"/" * 100, b".." + bytes(98), b"a.jpg" + bytes(95), b"\xff" * 100]),
    (slice(124, 136), SIZES),
    (slice(156, 157), [bytes([kind]) for kind in b"\x000123456789ABDKLMNSVXgxz"]),
    (slice(257, 265), [b"ustar  \0", b"ustar\x0000", bytes(8)]),
    (slice(345, 500), [b"p" * 155, bytes(155)]),
]


def edit_header(generator: random.Random, data: bytearray) -> None:
    headers = [place for place in range(0, len(data) - 511, 512) if data[place + 257 : place + 262] == b"ustar"]
    for place in generator.sample(headers, min(len(headers), generator.choice([1, 1, 3]))):
        block = data[place : place + 512]
        field, values = generator.choice(HEADER_EDITS)
        block[field] = generator.choice(values)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        data[place : place + 512] = block


def edit_pax(generator: random.Random, data: bytearray) -> None:
    """Change a record of an extended header; other tars have none, and a bit is flipped instead."""
    place = data.find(b" path=", generator.randrange(len(data)))
    if place < 0:
        flip_bits(generator, data)
        return
    values = [
        b" size=-512",
        b" size=9999",
        b" path=\xff\xff",
        b" GNU.sparse.map=1,2",
        b" GNU.sparse.major=1",
        b"0 path=",
        b" ==",
    ]
    value = generator.choice(values)
    data[place : place + len(value)] = value


ANYTHING: list[Mutation] = [flip_bits, truncate, insert, delete, wipe, swap_blocks]


def mutant(generator: random.Random, original: bytes, mutations: list[Mutation]) -> bytes:
    data = bytearray(original)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        if data:
            generator.choice(mutations)(generator, data)
    return bytes(data)


def outcome_of_image(data: bytes) -> str:
    try:
        image = decode_rgb(data)
    except UndecodableImageError as error:
        return _checked_reason(str(error))
    pixels, view = fit(image, SPEC)
    assert pixels.shape == (16, 16, 3)
    assert np.isfinite(view).all()
    return "decoded"


def _checked_reason(reason: str) -> str:
    assert 0 < len(reason) < 300
    assert reason.isprintable()
    return "undecodable"


def outcome_of_tar(path: Path) -> str:
    shard = TarShard(str(path))
    try:
        keys = shard.keys()
    except TarError as error:
        return _checked_refusal(str(error), path)
    images = list(shard.images())
    assert [image.key for image in images] == keys
    assert len(set(keys)) == len(keys) > 0
    for image in images:
        if image.data is None:
            assert image.problem
            assert image.problem.isprintable()
        else:
            outcome_of_image(image.data)
    return "read"


def _checked_refusal(message: str, path: Path) -> str:
    assert message.startswith(f"{path}: ")
    assert "(at byte " in message
    assert message.isprintable()
    return "refused"


NUM_MUTANTS = pytest.mark.parametrize(
    "num_mutants", [pytest.param(200, id="200"), pytest.param(2000, id="2000", marks=pytest.mark.slow)]
)


@NUM_MUTANTS
def test_mutated_images(num_mutants: int, hang_guard: Callable[[], None]) -> None:
    generator = random.Random(num_mutants)
    outcomes: Counter[str] = Counter()
    originals = list(IMAGES.values())
    for number in range(num_mutants):
        hang_guard()
        data = mutant(generator, originals[number % len(originals)], [*ANYTHING, edit_number])
        outcomes[outcome_of_image(data)] += 1
    assert outcomes.total() == num_mutants
    assert min(outcomes["decoded"], outcomes["undecodable"]) > num_mutants / 10


@NUM_MUTANTS
def test_mutated_tars(num_mutants: int, hang_guard: Callable[[], None], tmp_path: Path) -> None:
    generator = random.Random(num_mutants)
    outcomes: Counter[str] = Counter()
    originals = [tar_of(tar_format) for tar_format in TARS.values()]
    path = tmp_path / "mutant.tar"
    for number in range(num_mutants):
        hang_guard()
        path.write_bytes(mutant(generator, originals[number % 3], [*ANYTHING, edit_header, edit_pax]))
        outcomes[outcome_of_tar(path)] += 1
    assert outcomes.total() == num_mutants
    assert min(outcomes["read"], outcomes["refused"]) > num_mutants / 10


@pytest.mark.parametrize("name", IMAGES)
def test_originals_decode(name: str) -> None:
    assert outcome_of_image(IMAGES[name]) == "decoded"


@pytest.mark.parametrize("tar_format", TARS.values(), ids=TARS.keys())
def test_original_tars_are_read_whole(tar_format: int, tmp_path: Path) -> None:
    path = tmp_path / "whole.tar"
    path.write_bytes(tar_of(tar_format))
    images = list(TarShard(str(path)).images())
    assert [image.data for image in images] == list(IMAGES.values())
    assert [image.label for image in images] == list(range(len(IMAGES)))
