"""Photographs, small and inline."""

import base64
import io
from dataclasses import dataclass

from PIL import Image

from tokenlabels.images.decode import decode_rgb

LONGEST_SIDE_PX = 384
_QUALITY = 80  # of WebP; about 20 kB for a photograph


@dataclass(frozen=True)
class Thumbnail:
    """A photograph at no more than `LONGEST_SIDE_PX`.

    Attributes:
        width_px, height_px: of the upright original. Its aspect ratio is the exact one.
        uri: data URI of a WebP image.
    """

    width_px: int
    height_px: int
    uri: str


def thumbnail(data: bytes) -> Thumbnail:
    """Shrink an encoded image; small ones keep their size.

    Raises:
        UndecodableImageError: it cannot be decoded.
    """
    image = decode_rgb(data)
    width_px, height_px = image.size
    image.thumbnail((LONGEST_SIDE_PX, LONGEST_SIDE_PX), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=_QUALITY)
    return Thumbnail(width_px, height_px, "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode())
