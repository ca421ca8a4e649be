"""One image shard from start to finish: decode ahead, run the teacher, keep the best classes, write.

Nothing here knows of Ray or of other shards.
"""

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from annotate.fitted import FittedImage, fitted_images, image_specs
from annotate.teachers import Teacher, TopK
from tokenlabels.doctor import pillow_flavour
from tokenlabels.geometry import ResizeMode
from tokenlabels.images import EncodedImage, ImageShard
from tokenlabels.store import (
    ImageLevelRecord,
    LabelSet,
    LabelStoreError,
    Manifest,
    ShardReader,
    SkippedRecord,
    SourceRecord,
    TeacherRecord,
    claim_shard,
    create_label_set,
    keys_sha256,
    manifest_path,
)
from tokenlabels.summary import image_level_class
from tokenlabels.types import ScoreMaps, class_dtype

SHOWN_REASONS = 5


@dataclass(frozen=True)
class AnnotateConfig:
    """How images get to the teacher, and what is said of it. Only the first two change what is stored.

    Attributes:
        resize: how an image is fitted to the teacher's square input.
        class_names: names of the classes where the teacher's weights do not carry them, or other ones.
        batch_size: images per forward pass.
        decode_threads: threads that decode and resize ahead of the teacher.
        queue_bytes: bound on encoded and resized images that wait for the teacher.
        max_skip: share of a shard's images, 0..1, that may be skipped before the shard fails.
    """

    resize: ResizeMode = "squash"
    class_names: tuple[str, ...] | None = None
    batch_size: int = 32
    decode_threads: int = 2
    queue_bytes: int = 512 * 2**20
    max_skip: float = 0.001

    def __post_init__(self) -> None:
        for name in ("batch_size", "decode_threads", "queue_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_skip <= 1:
            raise ValueError(f"max_skip is a share of the images, 0..1, got {self.max_skip}")


@dataclass(frozen=True)
class ShardReport:
    """What became of one shard.

    Attributes:
        stem: name of the shard.
        status: "written", or "finished before" when its manifest was there already.
        rows: images with labels.
        skipped: images without, and why.
        size_bytes: bytes on disk.
        seconds: time it took, waiting for another process included.
        redone: why labels that were there had to be made again, or None.
    """

    stem: str
    status: Literal["written", "finished before"]
    rows: int
    skipped: tuple[SkippedRecord, ...]
    size_bytes: int
    seconds: float
    redone: str | None = None


class ShardError(ValueError):
    """A shard cannot be annotated; trying again would end the same way."""


def annotate_shard(
    source: ImageShard,
    destination: Path,
    teacher: Teacher,
    config: AnnotateConfig,
    *,
    wait: bool = False,
    on_images: Callable[[int], None] = lambda _: None,
) -> ShardReport:
    """Label one image shard and commit it to the label set `destination`.

    Args:
        source: the images.
        destination: folder of the label set; made if it is not there.
        wait: wait for another process that is writing this shard, instead of raising.
        on_images: called with the number of images after every forward pass.

    Raises:
        ShardBusyError: another process is writing this shard, and `wait` is false.
        ShardError: more than `config.max_skip` of the images could not be labelled.
        TarError: the tar is damaged.
        LabelStoreError: the destination holds other labels, or could not be written.
    """
    start_seconds = time.monotonic()
    info = create_label_set(destination, label_set(teacher, config, [source.name]))
    with claim_shard(destination, source.stem, info, wait=wait) as writer:
        manifest, redone = finished_manifest(destination, source, info)
        status: Literal["written", "finished before"] = "finished before"
        if manifest is None:
            status = "written"
            num_samples = len(source.keys())
            labelled = label_images(source.images(), num_samples, teacher, config, on_images)
            record = SourceRecord.model_validate(asdict(source.source))
            check_skipped(source, labelled.skipped, num_samples, config.max_skip)
            manifest = writer.write(
                labelled.maps,
                source=record,
                image_level=labelled.image_level,
                skipped=labelled.skipped,
                versions=library_versions(),
            )
        return ShardReport(
            stem=source.stem,
            status=status,
            rows=manifest.rows,
            skipped=manifest.skipped,
            size_bytes=manifest.size_bytes,
            seconds=time.monotonic() - start_seconds,
            redone=redone,
        )


def label_set(teacher: Teacher, config: AnnotateConfig, tars: Iterable[str]) -> LabelSet:
    """What labels.json says of labels made by this teacher.

    Raises:
        ValueError: there is not one class name per class.
    """
    names = config.class_names or teacher.class_names
    if names is not None and len(names) != teacher.num_classes:
        raise ValueError(f"{len(names)} class names were given; the teacher has {teacher.num_classes} classes")
    return LabelSet(
        grid=teacher.grid,
        k=teacher.topk,
        num_classes=teacher.num_classes,
        class_names=names,
        teacher=TeacherRecord.model_validate(asdict(teacher.info)),
        resize=config.resize,
        tars=tuple(sorted(tars)),
    )


def library_versions() -> dict[str, str]:
    """Versions of everything that can change a stored bit."""
    names = ("tokenlabels", "torch", "timm", "zarr", "numpy")
    return {"python": platform.python_version(), "pillow": pillow_flavour()} | {name: version(name) for name in names}


@dataclass(frozen=True)
class Labelled:
    """Maps of the images that could be labelled, in order, and what became of the others."""

    maps: ScoreMaps
    skipped: tuple[SkippedRecord, ...]
    image_level: ImageLevelRecord


def label_images(
    images: Iterable[EncodedImage],
    num_samples: int,
    teacher: Teacher,
    config: AnnotateConfig,
    on_images: Callable[[int], None] = lambda _: None,
) -> Labelled:
    """Run the teacher over `num_samples` encoded images, in memory."""
    rows = _Rows(num_samples, teacher)
    skipped: list[SkippedRecord] = []
    batch: list[FittedImage] = []
    ahead = fitted_images(
        images,
        image_specs(teacher, config.resize),
        num_threads=config.decode_threads,
        max_bytes=config.queue_bytes,
    )
    with closing(ahead) as fitted:
        for image in fitted:
            if image.problem is not None:
                skipped.append(SkippedRecord(key=image.key, reason=image.problem))
                continue
            batch.append(image)
            if len(batch) == config.batch_size:
                rows.add(batch, teacher)
                on_images(len(batch))
                batch = []
    if batch:
        rows.add(batch, teacher)
        on_images(len(batch))
    maps = rows.maps()
    return Labelled(maps, tuple(skipped), image_level_agreement(maps, rows.labels))


class _Rows:
    """The arrays of a shard while they fill up, made once so that nothing is copied at the end."""

    def __init__(self, num_samples: int, teacher: Teacher) -> None:
        shape = (num_samples, *teacher.grid)
        self._scores = np.empty((*shape, teacher.topk), np.float16)
        self._classes = np.empty((*shape, teacher.topk), class_dtype(teacher.num_classes))
        self._tail = np.empty(shape, np.float16)
        self._views = np.empty((num_samples, 4), np.float32)
        self._keys: list[str] = []
        self.labels: list[int | None] = []

    def add(self, batch: Sequence[FittedImage], teacher: Teacher) -> None:
        inputs = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*(image.arrays for image in batch), strict=True)]
        best: TopK = teacher(inputs)
        rows = slice(len(self._keys), len(self._keys) + len(batch))
        self._scores[rows] = best.scores.numpy()
        self._classes[rows] = best.classes.numpy()
        self._tail[rows] = best.tail.numpy()
        self._views[rows] = [image.view for image in batch]
        self._keys += [image.key for image in batch]
        self.labels += [image.label for image in batch]

    def maps(self) -> ScoreMaps:
        rows = slice(0, len(self._keys))
        return ScoreMaps(
            tuple(self._keys), self._scores[rows], self._classes[rows], self._tail[rows], self._views[rows]
        )


def image_level_agreement(maps: ScoreMaps, labels: Sequence[int | None]) -> ImageLevelRecord:
    """How often the most probable class of a whole map is the data set's own label, where there is one."""
    predicted = image_level_class(maps)
    pairs = [(label, best) for label, best in zip(labels, predicted.tolist(), strict=True) if label is not None]
    return ImageLevelRecord(num_labelled=len(pairs), num_agreeing=sum(label == best for label, best in pairs))


def finished_manifest(labels: Path, source: ImageShard, info: LabelSet) -> tuple[Manifest | None, str | None]:
    """The manifest of a shard that is done; or None, and why labels that are there must be made again."""
    if not manifest_path(labels, source.stem).exists():
        return None, None
    try:
        shard = ShardReader(labels, source.stem, info)
        problem = next((f"{name}: {problem}" for name, problem in shard.check_files()), None)
    except LabelStoreError as error:
        return None, str(error)
    if problem:
        return None, problem
    made_from = shard.manifest.source
    skipped = {record.key for record in shard.manifest.skipped}
    # Sizes of tars are padded, so the keys are compared too.
    keys = tuple(key for key in list(source.keys()) if key not in skipped)
    same_keys = shard.manifest.keys_sha256 == keys_sha256(keys)
    if (made_from.name, made_from.size_bytes) != (source.name, source.size_bytes) or not same_keys:
        other = "other keys" if made_from.size_bytes == source.size_bytes else f"{source.size_bytes} bytes"
        raise ShardError(
            f"{shard.path} was made from {made_from.name} of {made_from.size_bytes} bytes, but {source.path} has "
            f"{other}: other images. Write to another folder, or remove "
            f"{manifest_path(labels, source.stem)} to label this shard again."
        )
    return shard.manifest, None


def check_skipped(source: ImageShard, skipped: Sequence[SkippedRecord], num_samples: int, max_skip: float) -> None:
    if not skipped or len(skipped) / num_samples <= max_skip:
        return
    reasons = "".join(f"\n  {record.key}: {record.reason}" for record in skipped[:SHOWN_REASONS])
    more = f"\n  ... and {len(skipped) - SHOWN_REASONS} more" if len(skipped) > SHOWN_REASONS else ""
    raise ShardError(
        f"{source.name}: {len(skipped)} of {num_samples} images cannot be labelled, {max_skip:.2%} are allowed "
        f"(--max-skip):{reasons}{more}"
    )
