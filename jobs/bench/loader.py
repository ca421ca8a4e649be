"""The loader against the speed of its decoder, and against other loaders: `tokenlabels bench loader`.

Given photographs are packed several times over into new tars, with simulated labels. All sides use the same decoder,
the same crops and as many threads or worker processes; they take turns, so that a busy machine slows all of them.
Against the bare decoder, and for the cost of labels, the host's part is measured, from tars to uint8 batches in memory;
against other loaders all of it, to normalised float32 batches, with the device's part on the CPU.
"""

import io
import itertools
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from annotate.bench_store import GRID, NUM_CLASSES, TOPK, simulate_maps
from loaders import TokenLabelLoader
from loaders.crops import NUM_CROP_UNIFORMS, random_resized_crop
from loaders.decode import get_decoder
from loaders.stats import LoaderStats
from loaders.stream import BatchStream
from tokenlabels.images import find_shards
from tokenlabels.measure import Comparison, interleave
from tokenlabels.store import (
    ImageLevelRecord,
    LabelSet,
    SourceRecord,
    TeacherRecord,
    claim_shard,
    create_label_set,
)
from tokenlabels.types import ScoreMaps

SIZE, SCALE, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)
SAMPLES_PER_TAR = 1300  # as in the public shards of ImageNet


@dataclass(frozen=True)
class BenchData:
    """What all sides read.

    Attributes:
        tars, labels: images in tars, and their label set.
        tree: the same images as an ImageFolder tree, each once.
        images: the encoded images, each once.
        num_images: samples of all tars together.
    """

    tars: list[str]
    labels: Path
    tree: Path
    images: list[bytes]
    num_images: int


def bench_loader(data: BenchData, *, threads: int, batch_size: int, rounds: int) -> Iterator[Comparison]:
    """Each figure when it is there."""

    def loader(**options: Any) -> TokenLabelLoader:
        return TokenLabelLoader(data.tars, batch_size=batch_size, threads=threads, **options)

    plain, labelled = loader(), loader(labels=data.labels)
    augmented = loader(labels=data.labels, mix="mixtoken", rand_augment="rand-m9-mstd0.5-inc1")
    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "host: loader / decoding and cropping alone": (
            lambda: fill_batches(plain),
            lambda: decode_all(data, threads, num_images=len(plain) * batch_size),
        ),
        "host: with labels / without": (lambda: fill_batches(labelled), lambda: fill_batches(plain)),
        "loader / a WebDataset WebLoader": (
            lambda: exhaust(plain),
            lambda: exhaust(web_loader(data, threads, batch_size)),
        ),
        "loader / a DataLoader over ImageFolder": (
            lambda: exhaust(plain),
            lambda: exhaust(folder_loader(data, threads, batch_size)),
        ),
        "all on the CPU: with labels / without": (lambda: exhaust(labelled), lambda: exhaust(plain)),
        "all on the CPU: with labels, MixToken and RandAugment / without": (
            lambda: exhaust(augmented),
            lambda: exhaust(plain),
        ),
    }
    for name, (ours, reference) in sides.items():
        yield interleave(name, len(plain) * batch_size, rounds, ours, reference)


def prepare(images: Sequence[str], folder: Path, num_images: int) -> BenchData:
    """Pack the images over and over until there are `num_images` samples.

    Raises:
        ValueError: the patterns find no images.
    """
    data = [image.data for shard in find_shards(images) for image in shard.images() if image.data is not None]
    tars, labels = [], folder / "labels"
    num_tars = -(-num_images // SAMPLES_PER_TAR)
    names = [f"bench-{number:04d}.tar" for number in range(num_tars)]
    source = itertools.cycle(data)
    for number, name in enumerate(names):
        keys = [f"{number:04d}_{row:04d}" for row in range(SAMPLES_PER_TAR)]
        tars.append(str(write_tar(folder / name, {key: next(source) for key in keys})))
        write_labels(labels, names, name, keys)
    for row, image in enumerate(data):
        path = folder / "tree" / f"class{row % 10}" / f"{row}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return BenchData(tars, labels, folder / "tree", data, num_tars * SAMPLES_PER_TAR)


def write_tar(path: Path, images: dict[str, bytes]) -> Path:
    """A WebDataset tar with a label for each image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, image in images.items():
            for extension, content in (("jpg", image), ("cls", b"0")):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def write_labels(
    labels: Path, tars: Sequence[str], tar: str, keys: Sequence[str], grid: tuple[int, int] = GRID
) -> None:
    """Simulated labels of one tar, or a corner of each map."""
    teacher = TeacherRecord(models=(), flip=False, amp="none", digest="simulated", origin="simulated")
    info = LabelSet(
        grid=grid,
        k=TOPK,
        num_classes=NUM_CLASSES,
        class_names=None,
        teacher=teacher,
        resize="squash",
        tars=tuple(sorted(tars)),
    )
    few, part = _few_maps(), np.s_[np.arange(len(keys)) % 64, : grid[0], : grid[1]]
    maps = ScoreMaps(tuple(keys), few.scores[part], few.classes[part], few.tail[part], few.views[part[0]])
    with claim_shard(labels, tar.removesuffix(".tar"), create_label_set(labels, info)) as writer:
        writer.write(
            maps,
            source=SourceRecord(name=tar, size_bytes=0, num_samples=len(keys)),
            image_level=ImageLevelRecord(num_labelled=0, num_agreeing=0),
            versions={},
        )


@cache
def _few_maps() -> ScoreMaps:
    return simulate_maps(64, seed=0)


def fill_batches(loader: TokenLabelLoader) -> None:
    """The host's part of a pass."""
    stream = BatchStream(loader.source(), loader.stream_config, LoaderStats())
    for batch in stream:
        assert not batch.problems, batch.problems
        stream.release(batch)


def exhaust(batches: Iterable[object]) -> None:
    """A pass over a loader."""
    for _ in batches:
        pass


def decode_all(data: BenchData, threads: int, *, num_images: int) -> None:
    """The ceiling: threads that decode and crop what is in memory, into one buffer each."""
    numbers = itertools.count()

    def work() -> None:
        torch.set_num_threads(1)
        crop = CropSample(seed=threading.get_ident())
        while next(numbers) < num_images:
            crop(data.images[crop.num_cropped % len(data.images)])

    intra_op_threads = torch.get_num_threads()
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(intra_op_threads)


class CropSample:
    """The decoder and the crops of the loader, for one image after the other."""

    def __init__(self, seed: int) -> None:
        self._decoder = get_decoder("torchvision")
        self._rng = np.random.default_rng(seed)
        self._out = torch.empty(SIZE, SIZE, 3, dtype=torch.uint8)
        self.num_cropped = 0

    def __call__(self, image: bytes) -> Tensor:
        """Uint8 [S, S, 3], overwritten by the next call."""
        self.num_cropped += 1
        decoded = self._decoder.decode(image)
        uniforms = self._rng.random(NUM_CROP_UNIFORMS + 1).tolist()
        box = random_resized_crop(*self._decoder.size(decoded), uniforms, SCALE, RATIO)
        self._decoder.resize_into(decoded, box, self._out, uniforms[-1] < 0.5, "bicubic")
        return self._out


def web_loader(data: BenchData, num_workers: int, batch_size: int) -> Iterable[object]:
    """A pipeline of the usual form: shuffled shards, a shuffle buffer, and all work in worker processes."""
    crop, normalise = CropSample(seed=0), v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def transform(image: bytes) -> Tensor:
        return normalise(crop(image).permute(2, 0, 1).float() / 255)  # type: ignore[no-any-return]

    dataset = (
        webdataset.WebDataset(data.tars, shardshuffle=len(data.tars), empty_check=False)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(batch_size, partial=False)
    )
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=num_workers)  # type: ignore[no-any-return]


def folder_loader(data: BenchData, num_workers: int, batch_size: int) -> Iterable[object]:
    """torchvision's ImageFolder and transforms, in worker processes."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, SCALE, RATIO, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
    dataset = ImageFolder(str(data.tree), transform)
    sampler = RandomSampler(dataset, replacement=True, num_samples=data.num_images)
    return DataLoader(dataset, batch_size, sampler=sampler, num_workers=num_workers, drop_last=True)
