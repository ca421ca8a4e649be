"""Brings labels that others have published into a label set.

The published layout (published_read.py) leaves out what our sets record. What is missing is set as follows.

* view: the published maps were made from timm's evaluation crop with crop_pct 1, the centre square, although published
  trainers read them as if they covered the whole image. `view="center"` gives each map the square it really shows.
* orientation: the published generator looked at pixels as they are stored and ignored the orientation in the EXIF
  block. Whoever reads our labels looks at upright images, so the maps of such images are turned as the image is.
* tail: published trainers give the classes that are not stored the logit 0. The tail is the softmax mass that these
  classes then have; it is a property of that rule and says nothing about what the teacher thought of them.
"""

import copy
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from annotate.published_read import (
    Axes,
    ImportSettings,
    LabelFiles,
    PublishedLayoutError,
    PublishedMap,
    base_name,
    open_label_files,
    tail_of_zero_logits,
)
from annotate.shard import check_skipped, finished_manifest, image_level_agreement, library_versions
from tokenlabels.geometry import view_center, view_squash
from tokenlabels.images import EncodedImage, ImageShard
from tokenlabels.images.decode import FORMATS, exif_orientation
from tokenlabels.store import (
    LabelSet,
    Manifest,
    SkippedRecord,
    SourceRecord,
    TeacherRecord,
    claim_shard,
    create_label_set,
)
from tokenlabels.types import ScoreMaps, class_dtype

_Value = TypeVar("_Value", bound=np.generic)

# How stored pixels become upright, by EXIF orientation: rows and columns swapped, then rows, then columns reversed.
_TO_UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        num_shards: shards written now.
        num_finished_before: shards that were there already.
        num_images: images with labels, in the shards written now.
        num_skipped: images without, in the same shards; the manifests name them with their reasons.
        num_turned: images in the same shards whose map was turned because of their EXIF orientation.
        num_unused_files: label files that belong to no image of any shard.
    """

    num_shards: int
    num_finished_before: int
    num_images: int
    num_skipped: int
    num_turned: int
    num_unused_files: int


def import_published(
    archive: Path,
    shards: Sequence[ImageShard],
    labels: Path,
    *,
    axes: Axes = "hw",
    view: Literal["center", "squash"] = "center",
    crop_pct: float = 1.0,
    num_classes: int = 1000,
    class_names: Sequence[str] | None = None,
    max_skip: float = 0.001,
    on_shard: Callable[[str], None] = lambda _: None,
) -> ImportReport:
    """Write a label set from an archive in the published layout. A rerun goes on where the last one stopped.

    Images and label files are matched by base name up to the first dot, all of them before anything is written. The
    index of names is what memory grows with (1 GB for ImageNet); labels are held for one shard at a time.

    Args:
        archive: a folder tree, a `.tar` or a `.zip` of `.pt` files.
        shards: the images that the labels are for.
        labels: folder of the label set; made if it is not there.
        axes, view, crop_pct, num_classes: as in `ImportSettings`.
        class_names: one name per class.
        max_skip: share of a shard's images, 0..1, that may stay without labels before the shard fails.
        on_shard: called with the stem of every shard before it is worked on.

    Raises:
        PublishedLayoutError: two files or two images have one base name, no image has a file, or a file is damaged.
        ShardError: more than `max_skip` of a shard's images have no labels, or they are other images than before.
        TarError: a tar is damaged.
        LabelStoreError: `labels` holds other labels, or could not be written.
    """
    settings = ImportSettings(axes, view, crop_pct, num_classes)
    with open_label_files(archive) as files:
        num_used, first_used = _match(files, shards)
        info = create_label_set(labels, _label_set(files, first_used, shards, settings, class_names))
        written: list[Manifest] = []
        num_turned = 0
        for shard in map(copy.copy, shards):  # copies, so that the header index of a tar goes when its shard is done
            on_shard(shard.stem)
            with claim_shard(labels, shard.stem, info, wait=True) as writer:
                if finished_manifest(labels, shard, info)[0] is not None:
                    continue
                imported = _import_images(shard.images(), files, info, settings)
                num_samples = len(shard.keys())
                check_skipped(shard, imported.skipped, num_samples, max_skip)
                manifest = writer.write(
                    imported.maps,
                    source=SourceRecord.model_validate(asdict(shard.source)),
                    image_level=image_level_agreement(imported.maps, imported.labels),
                    skipped=imported.skipped,
                    versions=library_versions(),
                )
            written.append(manifest)
            num_turned += imported.num_turned
    return ImportReport(
        num_shards=len(written),
        num_finished_before=len(shards) - len(written),
        num_images=sum(manifest.rows for manifest in written),
        num_skipped=sum(len(manifest.skipped) for manifest in written),
        num_turned=num_turned,
        num_unused_files=len(files) - num_used,
    )


def _match(files: LabelFiles, shards: Iterable[ImageShard]) -> tuple[int, str]:
    """How many label files belong to an image, and the base name of one of them."""
    image_by_base: dict[str, tuple[str, str]] = {}
    example_key = None
    for shard in map(copy.copy, shards):
        keys = shard.keys()
        example_key = example_key or keys[0]
        for key in keys:
            base = base_name(key)
            if base not in files:
                continue
            if base in image_by_base:
                first_stem, first_key = image_by_base[base]
                raise PublishedLayoutError(
                    f"{files.name(base)} would be the labels of two images, {first_key} in {first_stem} and {key} in "
                    f"{shard.stem}. Images are matched by base name alone; import one class or split at a time."
                )
            image_by_base[base] = shard.stem, key
    if not image_by_base:
        raise PublishedLayoutError(
            f"no image has a label file. Images have keys such as {example_key!r}, and there are files such as "
            f"{files.name(next(iter(files)))}: are these the images that the labels were made for?"
        )
    return len(image_by_base), next(iter(image_by_base))


def _label_set(
    files: LabelFiles,
    first_used: str,
    shards: Iterable[ImageShard],
    settings: ImportSettings,
    class_names: Sequence[str] | None,
) -> LabelSet:
    height, width, k = files.load(first_used, settings).scores.shape
    identity = {"layout": "published", "files": files.digest(), **asdict(settings)}
    return LabelSet(
        grid=(height, width),
        k=k,
        num_classes=settings.num_classes,
        class_names=None if class_names is None else tuple(class_names),
        teacher=TeacherRecord(
            models=(),
            flip=False,
            amp="none",
            digest=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            origin=f"published layout: {files.archive.name}, {settings}",
        ),
        resize=settings.view,
        tars=tuple(sorted(shard.name for shard in shards)),
    )


@dataclass(frozen=True)
class _Imported:
    maps: ScoreMaps
    labels: tuple[int | None, ...]
    skipped: tuple[SkippedRecord, ...]
    num_turned: int


@dataclass(frozen=True)
class _Upright:
    """The map of an upright image and its view."""

    map: PublishedMap
    view: tuple[float, float, float, float]
    turned: bool


class _NoLabelsError(ValueError):
    """An image gets no labels; the message is the reason."""


def _import_images(
    images: Iterable[EncodedImage], files: LabelFiles, info: LabelSet, settings: ImportSettings
) -> _Imported:
    keys: list[str] = []
    labels: list[int | None] = []
    found: list[_Upright] = []
    skipped: list[SkippedRecord] = []
    for image in images:
        try:
            found.append(_labels_of(image, files, info, settings))
        except _NoLabelsError as reason:
            skipped.append(SkippedRecord(key=image.key, reason=str(reason)))
            continue
        keys.append(image.key)
        labels.append(image.label)
    shape = (len(keys), *info.grid, info.k)
    scores_nHWk = np.array([one.map.scores for one in found], np.float16).reshape(shape)
    maps = ScoreMaps(
        keys=tuple(keys),
        scores=scores_nHWk,
        classes=np.array([one.map.classes for one in found], class_dtype(info.num_classes)).reshape(shape),
        tail=tail_of_zero_logits(scores_nHWk, info.num_classes),
        views=np.array([one.view for one in found], np.float32).reshape(-1, 4),
    )
    return _Imported(maps, tuple(labels), tuple(skipped), sum(one.turned for one in found))


def _labels_of(image: EncodedImage, files: LabelFiles, info: LabelSet, settings: ImportSettings) -> _Upright:
    """The labels of one image. Raises `_NoLabelsError` where there are none to give."""
    if image.data is None:
        raise _NoLabelsError(image.problem)
    base = base_name(image.key)
    if base not in files:
        raise _NoLabelsError(f"no {base}.pt in {files.archive.name}")
    published = files.load(base, settings)
    expected = (*info.grid, info.k)
    if published.scores.shape != expected:
        raise PublishedLayoutError(
            f"{files.name(base)}: a map of {published.scores.shape} (H, W, k), but the first one was {expected}"
        )
    width_px, height_px, orientation = _read_header(image.data)
    turned = orientation in _TO_UPRIGHT
    if turned:
        published = PublishedMap(
            scores=_upright(published.scores, orientation), classes=_upright(published.classes, orientation)
        )
        if published.scores.shape != expected:
            raise _NoLabelsError(f"EXIF orientation {orientation} lays its map, which is not square, on its side")
    center = settings.view == "center"
    view = view_center(width_px, height_px, settings.crop_pct) if center else view_squash()
    return _Upright(published, view, turned)


def _read_header(data: bytes) -> tuple[int, int, int]:
    """Width and height in pixels of the upright image, and the EXIF orientation of the stored one; decodes nothing."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.format not in ("JPEG", "MPO"):
                image.load()  # elsewhere the EXIF block may stand behind the pixels
            orientation = exif_orientation(image)
            width_px, height_px = image.size
    except Exception as error:  # Pillow lets through whatever a damaged file leads it into
        raise _NoLabelsError(f"its size cannot be read: {' '.join(str(error).split())[:160]}") from error
    if orientation in _TO_UPRIGHT and _TO_UPRIGHT[orientation][0]:
        width_px, height_px = height_px, width_px
    return width_px, height_px, orientation


def _upright(array_HWk: NDArray[_Value], orientation: int) -> NDArray[_Value]:
    swap, reverse_rows, reverse_columns = _TO_UPRIGHT[orientation]
    array = array_HWk.swapaxes(0, 1) if swap else array_HWk
    array = array[::-1] if reverse_rows else array
    return array[:, ::-1] if reverse_columns else array
