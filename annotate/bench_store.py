"""Bytes, reading speed and memory of the store, against one file per image: `tokenlabels bench store`."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tokenlabels.measure import Comparison, interleave, peak_memory
from tokenlabels.store import (
    ImageLevelRecord,
    LabelSet,
    Manifest,
    SourceRecord,
    TeacherRecord,
    claim_shard,
    create_label_set,
    open_store,
)
from tokenlabels.summary import num_distinct_classes
from tokenlabels.types import ScoreMaps

GRID, TOPK, NUM_CLASSES = (18, 18), 5, 1000


@dataclass(frozen=True)
class StoreFigures:
    """What `bench store` measures.

    Attributes:
        num_images: simulated maps, 18x18 cells, top 5 of 1000 classes.
        distinct_classes_median: how varied they are; the more classes a map holds, the less it compresses.
        published_bytes: bytes per image of the published layout, one .pt file each.
        store_bytes: bytes per image of the store.
        ratio, ratio_without_tail: store over published; the published layout has no tail.
        read: bulk reads of a shard against torch.load of the same number of files.
        writer_memory: peak of a writer's memory over the raw bytes of its shard, the maps themselves included.
    """

    num_images: int
    distinct_classes_median: float
    published_bytes: float
    store_bytes: float
    ratio: float
    ratio_without_tail: float
    read: Comparison
    writer_memory: float

    def __str__(self) -> str:
        return (
            f"{self.num_images} simulated maps, median {self.distinct_classes_median:.0f} distinct classes\n"
            f"bytes per image: {self.store_bytes:.0f} / {self.published_bytes:.0f} published = {self.ratio:.3f}, "
            f"without tail {self.ratio_without_tail:.3f}\n"
            f"{self.read}\n"
            f"peak memory of a writer / raw bytes of its shard: {self.writer_memory:.2f}"
        )


def bench_store(folder: Path, *, num_images: int, rounds: int) -> StoreFigures:
    """Write the same simulated maps both ways into `folder`, and read them in turn."""
    maps = simulate_maps(num_images, seed=0)
    manifest = write_simulated(folder / "labels", maps)
    files = _write_published(folder / "published", maps)
    tail_bytes = sum(record.size_bytes for name, record in manifest.files.items() if name.startswith("tail/"))
    published = sum(file.stat().st_size for file in files) / num_images
    store = manifest.size_bytes / num_images
    return StoreFigures(
        num_images=num_images,
        distinct_classes_median=float(np.median(num_distinct_classes(maps))),
        published_bytes=published,
        store_bytes=store,
        ratio=store / published,
        ratio_without_tail=(store - tail_bytes / num_images) / published,
        read=_compare_reading(folder / "labels", files, rounds),
        writer_memory=_writer_memory(folder / "memory", num_images),
    )


def simulate_maps(num_images: int, *, seed: int) -> ScoreMaps:
    """Score maps in the manner of a teacher's: two objects with smooth borders over 1000 classes of background.

    Each class has an offset per image and a smooth field of its own. How much they vary sets how many classes a map
    holds, and with it how well it compresses; these values give a median near 100.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [_simulate_part(min(64, num_images - start), generator) for start in range(0, num_images, 64)]
    scores, classes, tail = (torch.cat(side).numpy() for side in zip(*parts, strict=True))
    views = np.tile(np.array([0, 0, 1, 1], np.float32), (num_images, 1))
    keys = tuple(f"n{i // 1300:08d}_{i}" for i in range(num_images))
    return ScoreMaps(keys, scores, classes.astype(np.uint16), tail, views)


def write_simulated(labels: Path, maps: ScoreMaps) -> Manifest:
    """One shard with these maps."""
    teacher = TeacherRecord(models=(), flip=False, amp="none", digest="simulated", origin="simulated")
    info = LabelSet(
        grid=GRID, k=TOPK, num_classes=NUM_CLASSES, class_names=None, teacher=teacher, resize="squash", tars=("a.tar",)
    )
    with claim_shard(labels, "a", create_label_set(labels, info)) as writer:
        return writer.write(
            maps,
            source=SourceRecord(name="a.tar", size_bytes=0, num_samples=len(maps)),
            image_level=ImageLevelRecord(num_labelled=0, num_agreeing=0),
            versions={},
        )


def _simulate_part(num_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    def smooth_fields(num_fields: int) -> Tensor:
        coarse = torch.randn(num_images, num_fields, 5, 5, generator=generator)
        return functional.interpolate(coarse, GRID, mode="bilinear", align_corners=True)

    offsets = torch.randn(num_images, NUM_CLASSES, 1, 1, generator=generator)
    logits = 0.55 * offsets + 0.8 * smooth_fields(NUM_CLASSES)
    objects = 8 * torch.sigmoid(4 * (smooth_fields(2) + 0.3))
    for number in range(2):
        class_ids = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
        logits[torch.arange(num_images), class_ids] += objects[:, number]
    scores, classes = logits.movedim(1, -1).topk(TOPK)
    tail = 1 - (scores - logits.logsumexp(1)[..., None]).exp().sum(-1)
    return scores.half(), classes, tail.clamp(0, 1).half()


def _write_published(folder: Path, maps: ScoreMaps) -> list[Path]:
    folder.mkdir(parents=True)
    files = []
    for score_map in maps:
        both = np.stack([score_map.scores, score_map.classes.astype(np.float16)]).transpose(0, 3, 1, 2)
        files.append(folder / f"{score_map.key}.pt")
        torch.save(torch.from_numpy(np.ascontiguousarray(both)), files[-1])
    return files


def _compare_reading(labels: Path, files: Sequence[Path], rounds: int) -> Comparison:
    def bulk() -> None:
        maps = open_store(labels).shards[0].read()
        assert len(maps) == len(files)

    def one_by_one() -> None:
        for file in files:
            torch.load(file, weights_only=True)

    return interleave("bulk read / torch.load of each file", len(files), rounds, bulk, one_by_one)


def _writer_memory(folder: Path, num_images: int) -> float:
    """Peak resident memory of a process of its own that writes one shard, above what it had before, in raw bytes."""
    code = f"from annotate.bench_store import _measure_writer; _measure_writer({str(folder)!r}, {num_images})"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return float(json.loads(output)["ratio"])


def _measure_writer(folder: str, num_images: int) -> None:
    write_simulated(Path(folder, "warm"), simulate_maps(8, seed=1))
    source = simulate_maps(64, seed=0)
    repeats = -(-num_images // len(source))
    with peak_memory() as peak:
        # Tiled from few maps, so that making them leaves no peak of its own.
        maps = ScoreMaps(
            tuple(map(str, range(repeats * len(source)))),
            *(np.concatenate([side] * repeats) for side in (source.scores, source.classes, source.tail, source.views)),
        )
        write_simulated(Path(folder, "shard"), maps)
    print(json.dumps({"ratio": peak.num_bytes / maps.num_bytes}))  # noqa: T201
