"""Reading boxes: from a file of all boxes, or from the json of every sample.

Boxes are in pixels of the upright image. In a file, x1 and y1 are the last pixels inside, as in the annotations of
ImageNet; in the json of a sample they are the first ones outside, as in the scenes that `tokenlabels demo` draws.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenlabels.audit.boxes import NO_BOXES
from tokenlabels.audit.images import Images
from tokenlabels.images import ImageShard, TarShard
from tokenlabels.images.decode import FORMATS, exif_orientation, ignore_pillow_warnings
from tokenlabels.store import ShardReader
from tokenlabels.tars import TarReader, scan_tar

Boxes = NDArray[np.float64]

_FIRST_SIDEWAYS = 5  # from this EXIF orientation on, width and height are swapped
_SLACK_PX = 1.0  # annotations that count pixels from 1 end one pixel behind the image


def read_boxes(path: Path) -> dict[str, Boxes]:
    """Annotated boxes by key: float64 [m, 4] in pixels, of which x1 and y1 are the edges (one more than in the file).

    Args:
        path: JSON, {key: [x0, y0, x1, y1]} or {key: [[x0, y0, x1, y1], ...]}.

    Raises:
        ValueError: it holds something else.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not boxes by key; write {{key: [x0, y0, x1, y1]}}, in pixels")
    boxes = {key: _checked(value, f"{path}: {key!r}") for key, value in content.items()}
    return {key: box + np.array([0, 0, 1, 1]) for key, box in boxes.items()}


def boxes_from_file(path: Path, images: Images) -> Callable[[ShardReader], list[Boxes]]:
    """Gives the boxes of every row of a shard, n times float64 [m, 4], xyxy in 0..1 of the image.

    The headers of all images with a box are read for their sizes.

    Raises:
        ValueError: see `read_boxes`; later also for an image without a readable header, or a box outside of its image.
        OSError: see `read_boxes`.
    """
    by_key = read_boxes(path)

    def boxes_of(shard: ShardReader) -> list[Boxes]:
        return _normalised(shard, [by_key.get(key, NO_BOXES) for key in shard.keys], images)

    return boxes_of


def boxes_from_json(images: Images) -> Callable[[ShardReader], list[Boxes]]:
    """Gives the boxes as `boxes_from_file` does, from the json files of the tars.

    A sample's json has "box_xyxy", one box or a list of them; or "objects", each with a "class" and its "box_xyxy", of
    which those of the image's own class count.
    """

    def boxes_of(shard: ShardReader) -> list[Boxes]:
        if shard not in images:
            return [NO_BOXES] * len(shard)
        found = _boxes_in_tar(images.source(shard), dict(zip(shard.keys, images.labels(shard).tolist(), strict=True)))
        return _normalised(shard, [found.get(key, NO_BOXES) for key in shard.keys], images)

    return boxes_of


def _boxes_in_tar(source: ImageShard, label_of: Mapping[str, int]) -> dict[str, Boxes]:
    if not isinstance(source, TarShard):
        raise ValueError(f"{source.path}: a folder of images has no json with boxes; give a file of boxes")
    found = {}
    with TarReader(scan_tar(source.path)) as reader:
        for sample in reader.index.samples:
            if "json" in sample.members and sample.key in label_of:
                text, where = reader.read(sample.members["json"]), f"{source.path}: json of {sample.key!r}"
                found[sample.key] = _boxes_in_json(text, label_of[sample.key], where)
    return found


def _boxes_in_json(text: bytes, label: int, where: str) -> Boxes:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(content, dict):
        return NO_BOXES
    if "box_xyxy" in content:
        return _checked(content["box_xyxy"], where)
    objects = content.get("objects")
    own = [
        thing["box_xyxy"]
        for thing in (objects if isinstance(objects, list) else [])
        if isinstance(thing, dict) and "box_xyxy" in thing and thing.get("class") == label
    ]
    return _checked(own, where)


def _checked(value: Any, where: str) -> Boxes:
    """One box or a list of them as float64 [m, 4]."""
    try:
        boxes = np.array(value, np.float64)
        boxes = boxes.reshape(-1, 4) if boxes.size == 0 or boxes.ndim == 1 else boxes
        fits = boxes.ndim == 2 and boxes.shape[1] == 4 and np.isfinite(boxes).all()
        fits = fits and bool((boxes[:, :2] <= boxes[:, 2:]).all())
    except (ValueError, TypeError):
        fits = False
    if not fits:
        raise ValueError(f"{where}: a box is [x0, y0, x1, y1] in pixels with x0 <= x1 and y0 <= y1, got {value!r}")
    return boxes


def _normalised(shard: ShardReader, boxes_px: Sequence[Boxes], images: Images) -> list[Boxes]:
    """The boxes in 0..1 of their images, cut at the borders."""
    rows = [row for row, boxes in enumerate(boxes_px) if len(boxes)] if shard in images else []
    normalised = [NO_BOXES] * len(boxes_px)
    for row, data in zip(rows, images.read(shard, rows) if rows else (), strict=True):
        where = f"{images.source(shard).path}: {shard.keys[row]!r}"
        width, height = _upright_size_px(data, where)
        size = np.array([width, height, width, height])
        if (boxes_px[row] < -_SLACK_PX).any() or (boxes_px[row] > size + _SLACK_PX).any():
            raise ValueError(
                f"{where}: has {width} x {height} pixels, but a box at {boxes_px[row].tolist()}; were the images "
                "resized after the boxes were drawn?"
            )
        normalised[row] = np.clip(boxes_px[row] / size, 0, 1)
    return normalised


def _upright_size_px(data: bytes, where: str) -> tuple[int, int]:
    """Width and height from the header of an encoded image, as `tokenlabels.images.decode` would give it."""
    ignore_pillow_warnings()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            return (height, width) if exif_orientation(image) >= _FIRST_SIDEWAYS else (width, height)
    except Exception as error:  # Pillow lets through whatever a damaged file leads it into
        problem = f"{type(error).__name__}: its header is broken, or it is not one of {', '.join(FORMATS)}"
        raise ValueError(f"{where}: cannot be read as an image ({problem})") from error
