"""The loader's parts as stages of a WebDataset pipeline, for those who have one already.

    dataset = (
        webdataset.WebDataset("imagenet1k-train-{0000..1023}.tar", shardshuffle=100)
        .compose(attach_score_maps("labels/"))
        .shuffle(1000)
        .compose(random_resized_crop_with_box(224))
        .batched(128, collation_fn=collate_token_labels())
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=8)

Shards are read as WebDataset reads them: without the order, the resume and the equal ranks of `TokenLabelLoader`.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import get_worker_info
from webdataset import reraise_exception

from loaders.batch import HostBatch, SampleError, TokenLabelBatch
from loaders.crop_targets import CropTargets
from loaders.crops import NUM_CROP_UNIFORMS, check_crop_range, random_resized_crop
from loaders.decode import DecoderName, Interpolation, get_decoder
from loaders.device import DeviceStage
from loaders.finish import FinishBatch
from loaders.label_windows import LabelBlock, LabelJoin
from loaders.options import token_grid
from loaders.plan import Window
from loaders.randomness import hash_of, uniforms
from loaders.rows import sample_error
from tokenlabels.checks import check_choice, check_grid, check_share
from tokenlabels.images.shards import TAR_IMAGE_EXTENSIONS, TAR_LABEL_EXTENSIONS, parse_label
from tokenlabels.store import LabelStore, LabelStoreError, open_store, stem_of
from tokenlabels.target_inputs import InterpolationRule
from tokenlabels.types import ScoreMap

Sample = dict[str, Any]

Handler = Callable[[Exception], bool]
"""What becomes of an error: raises it, or says whether to go on without its sample (`webdataset.warn_and_continue`)."""

NO_TAR = "no __url__"

# Behind `shuffle(1000)`, tars of 1,250 images are read 1.2 times each with 8 in memory, 31 times with 4.
MAX_TARS = 8


@dataclass(eq=False)
class _TarLabels:
    """The labels of one tar: maps, the row of every key, and how many rows have not been asked for."""

    block: LabelBlock
    rows: dict[str, int]
    num_left: int


class attach_score_maps:  # noqa: N801 - a stage is called like a function
    """Add the score map of every sample: `score_map` (a `tokenlabels.ScoreMap`) and `num_classes`.

    Put it before any shuffling: then the labels of a tar are read once, all together, and let go after its last sample.
    Behind a shuffling stage samples of several tars come in turn; those of up to 8 are held (9 MB for 1,250 maps of
    18x18 cells, k=5). That is enough for `shuffle(1000)` over such tars; with much longer buffers tars are read again
    and again.

    Args:
        labels: label set made of these tars.
        handler: what becomes of a sample without labels, as for WebDataset's own stages.

    Raises:
        LabelStoreError: there is no label set, or one of its records is damaged.
        SampleError: a tar or a key has no labels, or damaged ones; names both.
    """

    def __init__(self, labels: str | Path | LabelStore, *, handler: Handler = reraise_exception) -> None:
        self._store = labels if isinstance(labels, LabelStore) else open_store(labels)
        self._shards = {shard.stem: shard for shard in self._store.shards}
        self._handler = handler

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples, each with its map."""
        held: OrderedDict[str, _TarLabels] = OrderedDict()
        return _handled(samples, lambda sample, _: self._attach(sample, held), self._handler)

    def _attach(self, sample: Sample, held: OrderedDict[str, _TarLabels]) -> Sample:
        key, url = _key_and_url(sample, "labels")
        if url == NO_TAR:
            raise sample_error(url, key, "labels", "which tar it is of is not known; keep __url__ in earlier stages")
        stem = _stem_of_url(url)
        if stem not in held:
            held[stem] = self._read(stem, url, key)
            if len(held) > MAX_TARS:
                held.popitem(last=False)
        held.move_to_end(stem)
        tar = held[stem]
        if key not in tar.rows:
            raise sample_error(url, key, "labels", self._reason(stem, key))
        row = tar.rows[key]
        tar.num_left -= 1
        if not tar.num_left:
            del held[stem]
        if row in tar.block.problems:
            raise sample_error(url, key, "labels", tar.block.problems[row])
        block = tar.block
        arrays = (block.scores[row], block.classes[row], block.tail[row], block.views[row])
        score_map = ScoreMap(key, *(array.copy() for array in arrays))
        return {**sample, "score_map": score_map, "num_classes": self._store.info.num_classes}

    def _read(self, stem: str, url: str, key: str) -> _TarLabels:
        if stem not in self._shards:
            raise sample_error(url, key, "labels", f"{self._store.path} has no labels of {stem!r}; annotate this tar")
        try:
            keys = copy(self._shards[stem]).keys  # a reader keeps its keys: on a copy they go with it
            if key not in keys:
                raise sample_error(url, key, "labels", self._reason(stem, key))
            every_row = np.stack([np.zeros(len(keys), np.int64), np.arange(len(keys))], axis=1)
            block = LabelJoin(self._store, [stem], [url]).read(Window(every_row), lambda _: keys)
        except LabelStoreError as error:
            raise sample_error(url, key, "labels", str(error)) from error
        return _TarLabels(block, {key: row for row, key in enumerate(keys)}, len(keys))

    def _reason(self, stem: str, key: str) -> str:
        shard = self._shards[stem]
        skipped = {record.key: record.reason for record in shard.manifest.skipped}
        if key in skipped:
            return f"it was skipped when the labels were made ({skipped[key]})"
        return f"{shard.path} has no such key; are these the tars that were annotated?"


class random_resized_crop_with_box:  # noqa: N801 - a stage is called like a function
    """Decode the image of every sample and cut out a random crop, which travels with it.

    `image` is uint8 [3, S_h, S_w], `box` the part of the image that it shows, float64 xyxy in 0..1, `flip` whether
    it is mirrored. The encoded image is taken off.

    Crops are a function of the seed, the pass, the key and the number of the sample in the pass; in worker processes
    of the worker's own seed as well, which PyTorch draws anew for every epoch (after `torch.manual_seed`, the same
    ones): new workers would not know of earlier passes.

    Args:
        size: side in pixels, or (height, width).
        scale, ratio, hflip, interpolation, decoder: as for `TokenLabelLoader`.
        seed: of the crops.
        handler: what becomes of an image that cannot be used, as for WebDataset's own stages.

    Raises:
        SampleError: an image is missing or cannot be decoded; names tar, key and reason.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 224,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        interpolation: Interpolation = "bicubic",
        decoder: DecoderName = "torchvision",
        seed: int = 0,
        handler: Handler = reraise_exception,
    ) -> None:
        self._size = check_grid((size, size) if isinstance(size, int) else size, "size")
        check_crop_range(scale, ratio)
        check_share("hflip", hflip)
        check_choice("interpolation", interpolation, Interpolation)
        self._scale, self._ratio, self._hflip, self._interpolation = scale, ratio, hflip, interpolation
        self._decoder, self._seed, self._handler, self._num_passes = get_decoder(decoder), seed, handler, 0

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples, each with its crop in place of the encoded image."""
        self._num_passes += 1
        worker = get_worker_info()
        hash_of_pass = hash_of(self._seed, self._num_passes, -1 if worker is None else worker.seed)
        return _handled(samples, lambda sample, number: self._crop(sample, hash_of_pass, number), self._handler)

    def _crop(self, sample: Sample, hash_of_pass: int, number: int) -> Sample:
        key, url = _key_and_url(sample, "crop")
        extension = next((name for name in TAR_IMAGE_EXTENSIONS if name in sample), None)
        if extension is None or not isinstance(sample[extension], bytes):
            found = "none" if extension is None else f"{extension} as {type(sample[extension]).__name__}"
            wanted = f"needs an encoded image ({', '.join(TAR_IMAGE_EXTENSIONS)}), got {found}; put it before .decode()"
            raise sample_error(url, key, "crop", wanted)
        draws = uniforms(np.array(hash_of(hash_of_pass, key, number), np.uint64), NUM_CROP_UNIFORMS + 1).tolist()
        flip = draws[-1] < self._hflip
        pixels = torch.empty(*self._size, 3, dtype=torch.uint8)
        try:
            image = self._decoder.decode(sample[extension])
            width, height = self._decoder.size(image)
            box = random_resized_crop(width, height, draws, self._scale, self._ratio)
            self._decoder.resize_into(image, box, pixels, flip, self._interpolation)
        except ValueError as error:
            raise sample_error(url, key, "decode", str(error)) from error
        rest = {name: value for name, value in sample.items() if name != extension}
        return {**rest, "image": pixels.permute(2, 0, 1), "box": box.normalised(width, height), "flip": flip}


class collate_token_labels:  # noqa: N801 - it is called like a function
    """Make a `TokenLabelBatch` on the CPU of samples from the two stages above; for `batched(collation_fn=...)`.

    Samples without score maps make batches without targets, as those of `TokenLabelLoader` are without labels.

    Args:
        grid: (rows, columns) of the model's tokens, or the side of a square; None makes the image-level target alone.
        interpolate: rule from maps to targets, see `tokenlabels.token_targets`.
        mean, std: of the normalisation.

    Raises:
        SampleError: a sample does not come from the crop stage, or a part of the batch has no score maps.
        ValueError: the grid does not fit the images, or the samples have labels of different label sets.
    """

    def __init__(
        self,
        grid: int | Sequence[int] | None = (14, 14),
        *,
        interpolate: InterpolationRule = "logits",
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        self._grid = None if grid is None else check_grid((grid, grid) if isinstance(grid, int) else grid)
        self._interpolate, self._mean, self._std = interpolate, mean, std

    def __call__(self, samples: Sequence[Sample]) -> TokenLabelBatch:
        """One batch, not mixed."""
        _require(samples, ("image", "box", "flip"), "random_resized_crop_with_box")
        num, cpu = len(samples), torch.device("cpu")
        has_maps = any("score_map" in sample for sample in samples)
        host = HostBatch(
            number=0,
            keys=tuple(sample["__key__"] for sample in samples),
            labels=np.array([_label_of(sample) for sample in samples], np.int64),
            boxes=np.array([sample["box"] for sample in samples], np.float64),
            flip=np.array([sample["flip"] for sample in samples], np.bool_),
            warp=np.tile(np.eye(2, 3), (num, 1, 1)),
            is_warped=np.zeros(num, np.bool_),
            hash=0,
            maps=_stacked_maps(samples) if has_maps else None,
            images=torch.stack([sample["image"].permute(1, 2, 0) for sample in samples]),
        )
        targets = None
        if has_maps:
            if self._grid is not None:
                token_grid(self._grid, (host.images.shape[1], host.images.shape[2]))
            num_classes = samples[0]["num_classes"]
            FinishBatch("raise", keeps_size=True, num_classes=num_classes)(host)
            targets = CropTargets(num_classes, self._grid, self._interpolate, True, cpu)
        return DeviceStage(cpu, self._mean, self._std, targets)(host)


def _handled(samples: Iterable[Sample], stage: Callable[[Sample, int], Sample], handler: Handler) -> Iterator[Sample]:
    """Every sample, with its number, through a stage; errors go to the handler, as in `webdataset.filters.map`."""
    for number, sample in enumerate(samples):
        try:
            result = stage(sample, number)
        except Exception as error:
            if handler(error):
                continue
            return
        yield result


def _key_and_url(sample: object, stage: str) -> tuple[str, str]:
    """Which sample this is, and of which tar.

    Raises:
        SampleError: it is none of WebDataset's.
    """
    if not isinstance(sample, dict) or "__key__" not in sample:
        got = type(sample).__name__
        raise SampleError(f"{stage}: needs samples as WebDataset reads them, got a {got} without __key__")
    return sample["__key__"], sample.get("__url__", NO_TAR)


def _stem_of_url(url: str) -> str:
    """Stem of a tar by its path, its URL, or WebDataset's `pipe:` and the command that prints it."""
    words = [word.strip("'\"") for word in url.split()] if url.startswith("pipe:") else [url]
    names = [Path(urlsplit(word).path if "://" in word else word).name for word in words]
    return stem_of(next((name for name in names if name.endswith(".tar")), names[-1]))


def _require(samples: Sequence[Sample], names: Sequence[str], stage: str) -> None:
    for sample in samples:
        missing = [name for name in names if name not in sample]
        if missing:
            key, url = _key_and_url(sample, "collate")
            raise sample_error(url, key, "collate", f"has no {', '.join(missing)}; put {stage} in front")


def _stacked_maps(samples: Sequence[Sample]) -> LabelBlock:
    _require(samples, ("score_map", "num_classes"), "attach_score_maps")
    maps: list[ScoreMap] = [sample["score_map"] for sample in samples]
    kinds = {(*one.grid, one.k, sample["num_classes"]) for one, sample in zip(maps, samples, strict=True)}
    if len(kinds) > 1:
        raise ValueError(f"a batch needs labels of one kind, got (rows, columns, k, num_classes) {sorted(kinds)}")
    return LabelBlock(
        scores=np.stack([one.scores for one in maps]),
        classes=np.stack([one.classes for one in maps]),
        tail=np.stack([one.tail for one in maps]),
        views=np.stack([one.view for one in maps]),
        problems={},
    )


def _label_of(sample: Mapping[str, Any]) -> int:
    extension = next((name for name in TAR_LABEL_EXTENSIONS if name in sample), None)
    label = None if extension is None else sample[extension]
    if isinstance(label, bytes) and extension is not None:
        label = parse_label(extension, label)
    elif isinstance(label, Mapping):
        label = label.get("label")
    return label if isinstance(label, int) and label >= 0 else -1
