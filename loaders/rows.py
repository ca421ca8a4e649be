"""One sample on its way into a batch: read, decode, crop, each failure with the name of its stage."""

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loaders.batch import HostBatch, SampleError
from loaders.crops import PixelBox, check_crop_pct, check_crop_range, random_resized_crop
from loaders.decode import Decoder, Interpolation
from loaders.shard_files import ShardFile
from tokenlabels.affine import affine_from_boxes, apply_affine, compose_affine, invert_affine
from tokenlabels.checks import check_choice, check_share
from tokenlabels.tars import TarError

_CORNERS_XY = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)


@dataclass(eq=False)
class PreparedBatch:
    """A batch with all that its threads need to fill it.

    Attributes:
        host: the batch.
        files: the open shard of every row.
        rows: place of every row in its shard.
        names: of every row, "<stem of the shard>/<key>": keys alone may be the same in two tars.
        uniforms: float64 [B, n], what the crops are drawn from.
    """

    host: HostBatch
    files: list[ShardFile]
    rows: list[int]
    names: list[str]
    uniforms: NDArray[np.float64]


class Crop(Protocol):
    """Cuts the student's input out of a decoded image."""

    def __call__(self, decoder: Decoder[Any], image: Any, batch: PreparedBatch, row: int, out: Tensor) -> None:
        """Write uint8 [S_h, S_w, 3] to `out`, and to the batch what was cut out."""


@dataclass(frozen=True)
class RandomCrop:
    """RandomResizedCrop and a horizontal flip.

    Attributes:
        scale: range of the crop's share of the image area.
        ratio: range of its width over height.
        flip: probability of mirroring left-right.
        interpolation: of the resize.
        augment_before_crop: whether geometric augmentation acts on the whole image, so that a crop shows what lies
            beyond its border in the image. Then the smallest box that holds all of it is cut out, and the batch says
            how the output lies in that.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    interpolation: Interpolation
    augment_before_crop: bool

    def __post_init__(self) -> None:
        check_crop_range(self.scale, self.ratio)
        check_share("hflip", self.flip)
        check_choice("interpolation", self.interpolation, Interpolation)

    def __call__(self, decoder: Decoder[Any], image: Any, batch: PreparedBatch, row: int, out: Tensor) -> None:
        """See `Crop`."""
        width, height = decoder.size(image)
        uniforms, host = batch.uniforms[row].tolist(), batch.host
        box = random_resized_crop(width, height, uniforms, self.scale, self.ratio)
        flip = uniforms[-1] < self.flip
        host.crops[row], host.mirrored[row] = box.normalised(width, height), flip
        if self.augment_before_crop and host.is_warped[row]:
            box, warp = self._around(box, flip, batch, row, (width, height))
            host.warp[row], flip = warp.numpy(), False
        decoder.resize_into(image, box, out, flip, self.interpolation)
        host.boxes[row], host.flip[row] = box.normalised(width, height), flip

    def _around(
        self, box: PixelBox, flip: bool, batch: PreparedBatch, row: int, size_wh: tuple[int, int]
    ) -> tuple[PixelBox, Tensor]:
        """The box of the image that holds all that the output shows, and the map [2, 3] from the output into it."""
        assert batch.host.augment is not None, "only augmentation warps"
        width, height = size_wh
        to_image = compose_affine(
            output_to_middle=_crop_map(box, flip, size_wh),
            middle_to_source=batch.host.augment.sample_affine(row, width, height).double(),
        )
        corners_px = apply_affine(to_image, _CORNERS_XY) * torch.tensor([width, height], dtype=torch.float64)
        low, high = corners_px.floor().amin(dim=0).long().tolist(), corners_px.ceil().amax(dim=0).long().tolist()
        # What lies outside the image altogether still needs a box of a pixel, of which the output then shows nothing.
        left, top = min(max(low[0], 0), width - 1), min(max(low[1], 0), height - 1)
        right, bottom = min(max(high[0], left + 1), width), min(max(high[1], top + 1), height)
        around = PixelBox(left, top, right - left, bottom - top)
        to_box = invert_affine(_crop_map(around, False, size_wh))
        return around, compose_affine(output_to_middle=to_image, middle_to_source=to_box)


@dataclass(frozen=True)
class EvaluationCrop:
    """The evaluation crop: the shorter side resized to S / crop_pct, then the middle."""

    crop_pct: float
    interpolation: Interpolation

    def __post_init__(self) -> None:
        check_crop_pct(self.crop_pct)
        check_choice("interpolation", self.interpolation, Interpolation)

    def __call__(self, decoder: Decoder[Any], image: Any, batch: PreparedBatch, row: int, out: Tensor) -> None:
        """See `Crop`."""
        box = decoder.center_into(image, out, self.crop_pct, self.interpolation)
        batch.host.boxes[row] = batch.host.crops[row] = box


def fill_row(batch: PreparedBatch, row: int, out: Tensor, decoder: Decoder[Any], crop: Crop) -> tuple[float, float]:
    """Bring one sample into the batch.

    Args:
        out: uint8 [S_h, S_w, 3], its place in the ring.

    Returns:
        Seconds of reading, and of decoding and cropping.

    Raises:
        SampleError: naming stage, shard and key.
    """
    file, index = batch.files[row], batch.rows[row]
    stage = "read"
    started = time.perf_counter()
    try:
        data = file.read(index)
        was_read = time.perf_counter()
        stage = "decode"
        image = decoder.decode(data)
        stage = "crop"
        crop(decoder, image, batch, row, out)
    except (OSError, ValueError) as error:
        problem = sample_error(file.path, batch.host.keys[row], stage, str(error))
        problem.is_of_tar = isinstance(error, TarError)
        raise problem from error
    except Exception as error:
        error.add_note(f"{file.path}: sample {batch.host.keys[row]!r}: {stage}")
        raise
    return was_read - started, time.perf_counter() - was_read


def sample_error(path: str, key: str, stage: str, reason: str) -> SampleError:
    """The error of one sample; a reason that names it already does not do so twice."""
    sample = f"{path}: sample {key!r}"
    return SampleError(f"{sample}: {stage}: {reason.removeprefix(sample).lstrip(': ')}")


def _crop_map(box: PixelBox, flip: bool, size_wh: tuple[int, int]) -> Tensor:
    boxes = torch.tensor(box.normalised(*size_wh), dtype=torch.float64)
    return affine_from_boxes(boxes, torch.tensor(flip))
