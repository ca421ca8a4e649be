"""Small tars with labels, written for the tests of the loaders."""

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tokenlabels.store import (
    ImageLevelRecord,
    LabelSet,
    SkippedRecord,
    SourceRecord,
    TeacherRecord,
    claim_shard,
    create_label_set,
)
from tokenlabels.types import ScoreMaps

NUM_CLASSES, TOPK = 20, 3


@dataclass(frozen=True)
class Photos:
    """Tars of small images with labels.

    Attributes:
        tars: paths, to be given to a loader.
        labels: their label set.
        index_dir: where indexes may be kept.
        keys: of all samples, tar by tar.
        images: encoded, by key.
        classes: class index, by key.
    """

    tars: list[str]
    labels: Path
    index_dir: Path
    keys: list[list[str]]
    images: dict[str, bytes]
    classes: dict[str, int]


def smooth_image(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Colours that vary slowly, as in photographs."""
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    """A WebDataset tar: {key: {extension: content}}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def random_maps(
    rng: np.random.Generator, keys: Sequence[str], grid: tuple[int, int] = (5, 6), num_classes: int = NUM_CLASSES
) -> ScoreMaps:
    """Maps of the whole image with random classes."""
    shape = (len(keys), *grid, TOPK)
    scores = -np.sort(-rng.normal(3, 2, shape), axis=-1).astype(np.float16)
    steps = rng.integers(1, num_classes // TOPK, shape)  # no class twice in a cell
    classes = steps.cumsum(axis=-1) % num_classes
    tail = rng.uniform(0, 0.5, shape[:3]).astype(np.float16)
    views = np.tile(np.array([0, 0, 1, 1], np.float32), (len(keys), 1))
    return ScoreMaps(tuple(keys), scores, classes.astype(np.uint16), tail, views)


def write_label_set(
    labels: Path,
    maps_of: Mapping[str, ScoreMaps],
    *,
    num_classes: int = NUM_CLASSES,
    class_names: tuple[str, ...] | None = None,
    skipped: Mapping[str, Sequence[SkippedRecord]] | None = None,
    num_agreeing: int | None = None,
    size_of: Callable[[str], int] = lambda _: 0,
) -> Path:
    """A label set: {stem of the tar: its maps}."""
    first = next(iter(maps_of.values()))
    info = LabelSet(
        grid=first.grid,
        k=first.k,
        num_classes=num_classes,
        class_names=class_names,
        teacher=TeacherRecord(models=(), flip=False, amp="none", digest="test", origin="test"),
        resize="squash",
        tars=tuple(sorted(f"{stem}.tar" for stem in maps_of)),
    )
    info = create_label_set(labels, info)
    for stem, maps in maps_of.items():
        left_out = tuple((skipped or {}).get(stem, ()))
        agreeing = len(maps) if num_agreeing is None else num_agreeing
        num_samples = len(maps) + len(left_out)
        with claim_shard(labels, stem, info) as writer:
            writer.write(
                maps,
                source=SourceRecord(name=f"{stem}.tar", size_bytes=size_of(stem), num_samples=num_samples),
                image_level=ImageLevelRecord(num_labelled=len(maps), num_agreeing=agreeing),
                skipped=left_out,
                versions={},
            )
    return labels


def write_photos(
    folder: Path,
    lengths: Sequence[int],
    *,
    side: int = 40,
    num_classes: int = NUM_CLASSES,
    stem: str = "train-{:02d}",
) -> Photos:
    """Tars of the given lengths, with images of about `side` pixels, and their labels."""
    rng = np.random.default_rng(len(lengths))
    tars: list[str] = []
    keys: list[list[str]] = []
    images: dict[str, bytes] = {}
    classes: dict[str, int] = {}
    maps: dict[str, ScoreMaps] = {}
    for number, length in enumerate(lengths):
        name = stem.format(number)
        keys.append([f"{name}/img_{row:03d}" for row in range(length)])
        for key in keys[-1]:
            width, height = rng.integers(side // 2, 2 * side, 2).tolist()
            images[key] = encode(smooth_image(rng, width, height))
            classes[key] = int(rng.integers(num_classes))
        tars.append(str(folder / f"{name}.tar"))
        write_tar(
            Path(tars[-1]),
            {key: {"jpg": images[key], "cls": str(classes[key]).encode()} for key in keys[-1]},
        )
        maps[name] = random_maps(rng, keys[-1], num_classes=num_classes)
    return Photos(
        tars, write_label_set(folder / "labels", maps, num_classes=num_classes), folder / "index", keys, images, classes
    )
