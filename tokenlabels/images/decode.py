"""From encoded bytes to upright RGB, the same pixels for whoever makes labels and whoever trains with them.

Decoding is Pillow's, by content and not by name. What can be decoded is, in one defined way:

* The orientation in the image's EXIF block is applied (a TIFF's own tag too); one that is written in XMP or in a PNG's
  text alone is not. Whoever joins labels and images has to do the same, or they do not lie on each other:
  torchvision's `apply_exif_orientation` does, and `PIL.ImageOps.exif_transpose` does wherever EXIF has it.
* Greyscale, palette, CMYK, YCCK, LAB and the rest become RGB. Transparency is dropped, as torchvision's default loader
  does: hidden colours show.
* Greyscale of 16 bits keeps its high byte, as Pillow does for colour of 16 bits. 32-bit integers and floats
  do not say what white is: it is the smallest customary full scale (1 for floats, 255, 65,535, then the largest
  value) that holds all pixels.
* Of an animation, the first frame.
* A JPEG without its end marker is decoded if all of its pixels are there.

Everything else raises `UndecodableImageError` with the reason on one line.
"""

import io
import re
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# Raster formats only; MPO, several JPEGs in a file, opens as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# From here on Pillow suspects a decompression bomb; a photograph of this size takes 340 MB.
MAX_PIXELS = 89_478_485

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
# Bits that no run of missing pixels has all three of: libjpeg's own filling, and these two, each other's opposite.
_JPEG_NOISES = (b"\xa5\x3c\x96\x5b" * 64, b"\x5a\xc3\x69\xa4" * 64)
_PIXELS_MISSING = "truncated image data: no end marker, and pixels are missing"
_MAX_REASON_LENGTH = 160
_PILLOW_MODULES = r"PIL\."


class UndecodableImageError(ValueError):
    """An image that cannot be decoded; the message is a short reason on one line."""


def decode_rgb(data: bytes) -> Image.Image:
    """Decode an image, upright, in mode RGB. Safe to call from several threads.

    Raises:
        UndecodableImageError: for whatever reason.
    """
    ignore_pillow_warnings()
    if not data:
        raise UndecodableImageError("empty file")
    try:
        if data.startswith(_JPEG_START) and not _has_end_marker(data):
            return _decode_open_ended(data)
        return _decode(data)
    except UndecodableImageError:
        raise
    except UnidentifiedImageError:
        start = bytes(data[:8])
        raise UndecodableImageError(
            f"broken header, or not one of {', '.join(FORMATS)}: starts with {start!r}"
        ) from None
    except Exception as error:  # Pillow's decoders let through whatever a damaged file leads them into
        raise UndecodableImageError(_reason(error)) from error


def _decode(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UndecodableImageError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
        image.load()
        transposition = _UPRIGHT.get(exif_orientation(image))
        rgb = _to_rgb(image)
        return rgb if transposition is None else rgb.transpose(transposition)


def exif_orientation(image: Image.Image) -> int:
    """1..8 from the EXIF block; 1, upright, where there is none or it makes no sense."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        orientation = exif.get(_EXIF_ORIENTATION)
    except Exception:  # a broken EXIF block does not make the pixels worse
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    # Left in, it would make Pillow warn, and colour-key images differ from others.
    image.info.pop("transparency", None)
    if image.mode.startswith("I;16"):
        high_byte = np.asarray(image, np.uint16) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_scaled_to_bytes(np.asarray(image))).convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied: Pillow converts them in two steps only
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")


def _scaled_to_bytes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    full_scales = [255.0, 65_535.0] if np.issubdtype(values.dtype, np.integer) else [1.0, 255.0, 65_535.0]
    finite = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    largest = float(finite.max())
    full_scale = next((scale for scale in full_scales if largest <= scale), largest)
    return np.clip(np.rint(finite * (255 / full_scale)), 0, 255).astype(np.uint8)


def _has_end_marker(jpeg: bytes) -> bool:
    """Whether an end marker follows the last scan; the one of an embedded thumbnail comes before."""
    return jpeg.endswith(_JPEG_END) or jpeg.rfind(_JPEG_END) > jpeg.rfind(_JPEG_SCAN)


def _decode_open_ended(jpeg: bytes) -> Image.Image:
    """Decode a JPEG without end marker if all of its pixels are there.

    libjpeg makes up what is missing once it sees an end marker, and takes the zeros of an unfinished download for
    pixels. But pixels that are there stay the same whatever stands between them and the end marker.
    """
    scan = jpeg.rstrip(b"\0\xff")
    try:
        image = _decode(scan + _JPEG_END)
        variants = [_decode(scan + noise + _JPEG_END) for noise in _JPEG_NOISES]
    except UndecodableImageError:
        raise
    except Exception as error:
        raise UndecodableImageError(_PIXELS_MISSING) from error
    if any(variant.tobytes() != image.tobytes() for variant in variants):
        raise UndecodableImageError(_PIXELS_MISSING)
    return image


def _reason(error: Exception) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))[:_MAX_REASON_LENGTH]
    if "truncated" in text.lower():
        return f"truncated image data: {text}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def ignore_pillow_warnings() -> None:
    """Ignore the warnings of Pillow's own modules: a reason says what is wrong with an image.

    For the whole process and not in a context, which would swap the filters of other threads; looked up again at every
    call because others (test runners) put their filters back.
    """
    ours = ("ignore", None, Warning, re.compile(_PILLOW_MODULES), 0)
    if ours not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES)
