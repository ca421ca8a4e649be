"""From encoded bytes to the pixels of a crop, written straight into a batch: two backends behind one protocol.

torchvision  the default: libjpeg-turbo, and the antialiased uint8 resize of torch. Both release the GIL.
pillow       Pillow for everything, or pillow-simd where it stands in Pillow's place.

Which images exist and which way up they are is decided once, by `tokenlabels.images.decode`, so that labels and images
lie on each other. torchvision decodes JPEGs with a header as usual, to the same pixels; whatever else there is, and
whatever torchvision refuses, goes to `decode_rgb`, which decodes it or says why not.

Crops are cut first and resized then, as torchvision's `RandomResizedCrop` does: the pixels of a crop show nothing but
the crop. (`PIL.Image.resize(box=...)`, cheaper by a copy, lets the filter look across the border.) Evaluation
crops are resized first and cut then, as `Resize` and `CenterCrop` do.

Threads may share a decoder. They should set torch to one thread of its own: `torch.set_num_threads(1)`.
"""

import io
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode

from loaders.crops import PixelBox, center_crop
from tokenlabels.geometry import Box
from tokenlabels.images.decode import (
    FORMATS,
    MAX_PIXELS,
    decode_rgb,
    exif_orientation,
    ignore_pillow_warnings,
)

Encoded = bytes | bytearray | memoryview
DecoderName = Literal["torchvision", "pillow"]
Interpolation = Literal["bilinear", "bicubic"]

ImageT = TypeVar("ImageT")


class Decoder(Protocol[ImageT]):
    """Decodes to images of a type of its own, and resizes parts of them into batches."""

    def decode(self, data: Encoded) -> ImageT:
        """Decode an image to upright RGB.

        Raises:
            UndecodableImageError: exactly if `tokenlabels.images.decode.decode_rgb` does, with its reason.
        """

    def size(self, image: ImageT) -> tuple[int, int]:
        """Width and height in pixels."""

    def resize_into(self, image: ImageT, box: PixelBox, out: Tensor, flip: bool, interpolation: Interpolation) -> None:
        """Cut a box out of an image, resize it with antialiasing, mirror it left-right if asked, and write it.

        Args:
            image: what `decode` returned; it stays as it is.
            box: in pixels of the image, inside of it.
            out: uint8 [H, W, 3], contiguous, on the CPU; the box is resized to its size.
            flip: whether to mirror the resized crop.
            interpolation: bilinear or bicubic.
        """

    def center_into(self, image: ImageT, out: Tensor, crop_pct: float, interpolation: Interpolation) -> Box:
        """Write the evaluation crop of `loaders.crops.center_crop` into `out`, uint8 [H, W, 3], contiguous.

        Returns:
            The part of the image that `out` shows, xyxy in 0..1 of the image.
        """


def get_decoder(name: DecoderName) -> Decoder[Any]:
    """The backend of a name.

    Raises:
        ValueError: for names that are none, and where the installed torchvision does not decode JPEGs.
    """
    if name == "pillow":
        return PillowDecoder()
    if name != "torchvision":
        raise ValueError(f"the decoder must be 'torchvision' or 'pillow', got {name!r}")
    if not hasattr(torch.ops.image, "decode_jpeg"):
        raise ValueError(f"torchvision {torchvision.__version__} was built without JPEG; use the decoder 'pillow'")
    return TorchvisionDecoder()


class PillowDecoder:
    """Images are PIL's, mode RGB."""

    _RESAMPLING: ClassVar[dict[Interpolation, Image.Resampling]] = {
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
    }

    def decode(self, data: Encoded) -> Image.Image:
        return decode_rgb(bytes(data))

    def size(self, image: Image.Image) -> tuple[int, int]:
        return image.size

    def resize_into(
        self, image: Image.Image, box: PixelBox, out: Tensor, flip: bool, interpolation: Interpolation
    ) -> None:
        assert box.fits_in(*image.size), f"{box} in {image.size}"
        cut = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        resized = self._resize(cut, (0, 0, box.width, box.height), out, interpolation)
        out.numpy()[...] = np.asarray(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized)

    def center_into(self, image: Image.Image, out: Tensor, crop_pct: float, interpolation: Interpolation) -> Box:
        left, top, right, bottom = center_crop(*image.size, (out.shape[0], out.shape[1]), crop_pct).normalised()
        # Here the filter has to look across the border of the box: as if all were resized, a part is computed.
        source_px = (left * image.width, top * image.height, right * image.width, bottom * image.height)
        out.numpy()[...] = np.asarray(self._resize(image, source_px, out, interpolation))
        return left, top, right, bottom

    def _resize(self, image: Image.Image, box_px: Box, out: Tensor, interpolation: Interpolation) -> Image.Image:
        """Resize a box to the size of `out`, rows first.

        From version 13 on Pillow by itself begins with the columns where that is faster. Between the two passes bicubic
        values are cut off at 0 and 255, so the order shows at hard edges, by up to 24 grey levels.
        """
        _check_out(out)
        (left, top, right, bottom), (height, width, _) = box_px, out.shape
        resampling = self._RESAMPLING[interpolation]
        rows = image.resize((width, image.height), resampling, box=(left, 0, right, image.height))
        return rows.resize((width, height), resampling, box=(0, top, width, bottom))


class TorchvisionDecoder:
    """Images are tensors, uint8 [H, W, 3]."""

    # How many times as large as the crop a resized image may be; a panorama of one row of pixels would take gigabytes.
    _MAX_RESIZED = 16

    def decode(self, data: Encoded) -> Tensor:
        # torch warns of buffers that cannot be written, and a copy takes 5 us.
        encoded = data if isinstance(data, bytearray) else bytearray(data)
        image = _decode_usual_jpeg(encoded)
        return _to_tensor(decode_rgb(bytes(encoded))) if image is None else image

    def size(self, image: Tensor) -> tuple[int, int]:
        return image.shape[1], image.shape[0]

    def resize_into(self, image: Tensor, box: PixelBox, out: Tensor, flip: bool, interpolation: Interpolation) -> None:
        _check_out(out)
        assert box.fits_in(*self.size(image)), f"{box} in {self.size(image)}"
        cut = image[box.top : box.top + box.height, box.left : box.left + box.width]
        resized = _resize(cut, out.shape[0], out.shape[1], interpolation)
        out.copy_(resized.flip(1) if flip else resized)

    def center_into(self, image: Tensor, out: Tensor, crop_pct: float, interpolation: Interpolation) -> Box:
        crop = center_crop(*self.size(image), (out.shape[0], out.shape[1]), crop_pct)
        if crop.resized_width_px * crop.resized_height_px > self._MAX_RESIZED * crop.box.width * crop.box.height:
            pillow = PillowDecoder()
            return pillow.center_into(Image.fromarray(image.numpy()), out, crop_pct, interpolation)
        _check_out(out)
        resized = _resize(image, crop.resized_height_px, crop.resized_width_px, interpolation)
        left, top = crop.box.left, crop.box.top
        out.copy_(resized[top : top + crop.box.height, left : left + crop.box.width])
        return crop.normalised()


def _resize(image: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    """Resize uint8 [h, w, 3] to [height, width, 3] with antialiasing; bicubic values are clamped to 0..255."""
    old_height, old_width, _ = image.shape
    # torch reads pixels whose channels lie together without repacking them, and twice as fast, if it knows: from the
    # usual strides of a batch of one it cannot tell, with the true stride between images it can.
    strides = (old_height * old_width * 3, 1, old_width * 3, 3)
    batch = image.contiguous().as_strided((1, 3, old_height, old_width), strides)
    resized = functional.interpolate(batch, size=(height, width), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0)


def _check_out(out: Tensor) -> None:
    assert out.dtype == torch.uint8 and out.ndim == 3 and out.shape[2] == 3, (out.dtype, out.shape)  # noqa: PT018
    assert out.is_contiguous(), out.stride()


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


_JPEG_START = b"\xff\xd8\xff"
_EXIF_START = b"Exif\0\0"
_APP1, _SCAN = 0xE1, 0xDA
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_SEGMENTS = range(0xC0, 0xFF)
_WITHOUT_LENGTH = range(0xD0, 0xDA)


def _decode_usual_jpeg(jpeg: bytearray) -> Tensor | None:
    """Decode a JPEG with torchvision, or return None where Pillow has to judge it."""
    header = _usual_header(jpeg)
    if header is None:
        return None
    num_pixels, has_exif = header
    if not 0 < num_pixels <= MAX_PIXELS:
        return None
    try:
        orientation = _orientation(jpeg) if has_exif else 1
        # The operator, as its Python function warns at every call that torchcodec will follow it. It could apply the
        # orientation, but looks into the first APP1 segment alone, which may hold XMP.
        image = torch.ops.image.decode_jpeg.default(
            torch.frombuffer(jpeg, dtype=torch.uint8), ImageReadMode.RGB.value, False
        )
    except Exception:  # whatever is wrong with it, `decode_rgb` finds the words
        return None
    return _upright(image.permute(1, 2, 0), orientation)


def _usual_header(jpeg: bytearray) -> tuple[int, bool] | None:
    """Number of pixels of a JPEG and whether it has an EXIF block; None if the header is no plain run of segments."""
    if not jpeg.startswith(_JPEG_START):
        return None
    num_pixels, has_exif, position = 0, False, 2
    try:
        while jpeg[position] == 0xFF:
            marker = jpeg[position + 1]
            if marker == _SCAN:
                return num_pixels, has_exif
            if marker not in _SEGMENTS or marker in _WITHOUT_LENGTH:
                return None
            if marker in _FRAMES:
                height, width = (jpeg[position + i] << 8 | jpeg[position + i + 1] for i in (5, 7))
                num_pixels = height * width
            elif marker == _APP1:
                has_exif |= jpeg.startswith(_EXIF_START, position + 4)
            position += 2 + (jpeg[position + 2] << 8 | jpeg[position + 3])
    except IndexError:
        pass
    return None


def _orientation(jpeg: bytearray) -> int:
    ignore_pillow_warnings()
    with Image.open(io.BytesIO(jpeg), formats=FORMATS) as image:  # the header only
        return exif_orientation(image)


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation to [H, W, 3]."""
    if orientation not in range(2, 9):
        return image
    if orientation >= 5:
        image = image.transpose(0, 1)
    flipped_dims = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}[orientation]
    return image.flip(flipped_dims)
