"""The loader against slow and obvious code, sample by sample.

That code is Pillow for the pixels, and for the targets a map of all classes in float64, torchvision's RoIAlign, and
softmax. What was drawn at random, the box and the flip, it takes from the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align

from loaders import TokenLabelBatch, TokenLabelLoader
from tests.loaders.photos import NUM_CLASSES, Photos, random_maps, write_label_set
from tokenlabels.images.decode import decode_rgb
from tokenlabels.target_inputs import InterpolationRule
from tokenlabels.tars import TarReader, scan_tar
from tokenlabels.types import ScoreMaps

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.3, 0.2)
TARGET_TOLERANCE = 2e-6
GREY_LEVELS = 2.01
RULES: tuple[InterpolationRule, ...] = ("logits", "probs")


@dataclass(frozen=True)
class Samples:
    """Where a loader reads from, and the same for slow code.

    Attributes:
        images: encoded, by key.
        maps: score maps, by key.
    """

    tars: list[str]
    labels: Path
    index_dir: Path
    images: dict[str, bytes]
    maps: dict[str, ScoreMaps] = field(repr=False)

    def load(self, **options: Any) -> Iterator[TokenLabelBatch]:
        defaults: dict[str, Any] = {
            "threads": 2,
            "mean": MEAN,
            "std": STD,
            "index_dir": self.index_dir,
            "last": "repeat",
        }
        yield from TokenLabelLoader(self.tars, self.labels, **(defaults | options))


@pytest.fixture(scope="module")
def small(photos: Photos, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    rng = np.random.default_rng(7)
    stems = [Path(tar).stem for tar in photos.tars]
    maps = {stem: random_maps(rng, keys, grid=(9, 7)) for stem, keys in zip(stems, photos.keys, strict=True)}
    labels = write_label_set(tmp_path_factory.mktemp("small") / "labels", maps)
    return Samples(photos.tars, labels, photos.index_dir, photos.images, by_key(maps))


@pytest.fixture(scope="module")
def photographs(imagenet_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """The tar of 44 photographs, 20 classes in their maps."""
    folder, tar = (
        tmp_path_factory.mktemp("photographs"),
        min(imagenet_sample.glob("*.tar"), key=lambda path: path.stat().st_size),
    )
    with TarReader(index := scan_tar(str(tar))) as reader:
        images = {sample.key: reader.read(sample.members["jpg"]) for sample in index.samples}
    maps = {tar.stem: random_maps(np.random.default_rng(8), list(images), grid=(18, 18))}
    return Samples([str(tar)], write_label_set(folder / "labels", maps), folder / "index", images, by_key(maps))


def by_key(maps: dict[str, ScoreMaps]) -> dict[str, ScoreMaps]:
    """Maps of one image each."""
    names = ("scores", "classes", "tail", "views")
    return {
        key: ScoreMaps((key,), *(getattr(block, name)[row : row + 1] for name in names))
        for block in maps.values()
        for row, key in enumerate(block.keys)
    }


def slow_pixels(data: bytes, box: Tensor, flip: bool, size_hw: tuple[int, int], resampling: Image.Resampling) -> Tensor:
    """Grey levels, float32 [3, H, W], before normalisation."""
    image = decode_rgb(data)
    left, top, right, bottom = (box.double() * torch.tensor([image.width, image.height] * 2)).round().int().tolist()
    # Rows first, as all decoders do: bicubic values are cut off between the passes, and Pillow's own order varies.
    cut = image.crop((left, top, right, bottom))
    resized = cut.resize((size_hw[1], cut.height), resampling).resize((size_hw[1], size_hw[0]), resampling)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
    return pixels.flip(2) if flip else pixels


def dense_map(maps: ScoreMaps, rule: InterpolationRule) -> Tensor:
    """All classes of the cells of one map, float64 [K, H, W]: logits, or probabilities."""
    _, height, width, topk = maps.scores.shape
    dense = torch.zeros(NUM_CLASSES, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            scores = torch.from_numpy(maps.scores[0, y, x].astype(np.float64))
            if rule == "probs":
                rest = float(maps.tail[0, y, x])
                dense[:, y, x] = rest / (NUM_CLASSES - topk)
                scores = (1 - rest) * scores.softmax(0)
            dense[maps.classes[0, y, x].astype(np.int64), y, x] = scores
    return dense


def slow_targets(maps: ScoreMaps, box: Tensor, flip: bool, grid: tuple[int, int], rule: InterpolationRule) -> Tensor:
    """float64 [1 + N, K]."""
    dense = dense_map(maps, rule)
    box_in_cells = box.double() * torch.tensor([dense.shape[2], dense.shape[1]] * 2)
    rows = []
    for size in ((1, 1), grid):
        crop = roi_align(dense[None], [box_in_cells[None]], size, sampling_ratio=-1, aligned=True)[0]
        rows.append((crop.flip(2) if flip else crop).flatten(1).T)
    aligned = torch.cat(rows)
    return aligned.softmax(1) if rule == "logits" else aligned


def exact_box(box: Tensor, data: bytes) -> Tensor:
    """The box as it was drawn, in whole pixels: rounded to float32 it can take one sample more or less per token."""
    size = torch.tensor(decode_rgb(data).size * 2, dtype=torch.float64)
    return (box.double() * size).round() / size


def check_pixels(batch: TokenLabelBatch, samples: Samples, interpolation: str) -> None:
    grey = 255 * (batch.images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])
    resampling = Image.Resampling[interpolation.upper()]
    for row, key in enumerate(batch.keys):
        size_hw = (grey.shape[2], grey.shape[3])
        slow = slow_pixels(samples.images[key], batch.boxes[row], bool(batch.flip[row]), size_hw, resampling)
        assert (grey[row] - slow).abs().max() <= GREY_LEVELS, key


def check_targets(batch: TokenLabelBatch, samples: Samples, grid: tuple[int, int], rule: InterpolationRule) -> None:
    assert batch.targets is not None
    assert batch.targets.grid == grid
    assert bool(batch.targets.valid.all())
    dense = batch.targets.dense().double()
    for row, key in enumerate(batch.keys):
        box = exact_box(batch.boxes[row], samples.images[key])
        slow = slow_targets(samples.maps[key], box, bool(batch.flip[row]), grid, rule)
        assert (dense[row] - slow).abs().max() <= TARGET_TOLERANCE, key


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("image_size", "grid"),
    [
        pytest.param((48, 48), (3, 3), id="square"),
        pytest.param((32, 60), (4, 6), id="wide"),
        pytest.param((60, 24), (12, 2), id="more rows than cells"),
        pytest.param((16, 16), (1, 1), id="one token"),
    ],
)
def test_small_images(
    small: Samples, image_size: tuple[int, int], grid: tuple[int, int], rule: InterpolationRule
) -> None:
    flips = []
    for batch in small.load(image_size=image_size, grid=grid, batch_size=8, interpolate=rule):
        check_pixels(batch, small, "bicubic")
        check_targets(batch, small, grid, rule)
        flips.append(batch.flip)
    assert 0 < torch.cat(flips).float().mean() < 1


@pytest.mark.parametrize("rule", RULES)
def test_photographs(photographs: Samples, rule: InterpolationRule) -> None:
    batch = next(photographs.load(image_size=224, grid=14, batch_size=12, interpolate=rule))
    check_pixels(batch, photographs, "bicubic")
    check_targets(batch, photographs, (14, 14), rule)


@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_decoder_and_interpolation(photographs: Samples, decoder: str, interpolation: str) -> None:
    options = {"decoder": decoder, "interpolation": interpolation, "scale": (0.3, 1.0)}
    batch = next(photographs.load(image_size=96, batch_size=6, **options))
    check_pixels(batch, photographs, interpolation)


def test_the_image_level_row_alone(small: Samples) -> None:
    for batch in small.load(image_size=32, grid=2, batch_size=8, supervision="relabel"):
        assert batch.targets is not None
        assert batch.targets.grid is None
        for row, key in enumerate(batch.keys):
            box = exact_box(batch.boxes[row], small.images[key])
            slow = slow_targets(small.maps[key], box, bool(batch.flip[row]), (1, 1), "logits")[:1]
            assert (batch.targets.dense()[row] - slow).abs().max() <= TARGET_TOLERANCE, key


@pytest.mark.parametrize("order", ["after crop", "before crop"])
def test_a_batch_is_its_samples_one_by_one(small: Samples, order: str) -> None:
    """Samples do not see each other, though some are warped and others are not, and all have lists of one length."""
    options: dict[str, Any] = {"image_size": 32, "grid": 2, "rand_augment": "rand-m9-mstd0.5-inc1"}
    options |= {"augment_order": order, "erase_prob": 0.3, "erase_mode": "const"}
    alone: dict[str, TokenLabelBatch] = {batch.keys[0]: batch for batch in small.load(batch_size=1, **options)}
    assert len(alone) == len(small.images)
    for batch in small.load(batch_size=8, **options):
        assert batch.targets is not None
        dense = batch.targets.dense()
        for row, key in enumerate(batch.keys):
            single = alone[key]
            assert single.targets is not None
            torch.testing.assert_close(batch.images[row], single.images[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(dense[row], single.targets.dense()[0], rtol=0, atol=TARGET_TOLERANCE)
            assert torch.equal(batch.targets.valid[row], single.targets.valid[0])
            assert torch.equal(batch.boxes[row], single.boxes[0])


def test_slow_code_finds_a_wrong_box(small: Samples) -> None:
    """A pixel of difference shows, so that what is asserted here says something."""
    batch = next(small.load(image_size=48, grid=3, batch_size=8))
    batch.boxes[:, 0] += 0.05
    batch.boxes[:, 2] += 0.05
    with pytest.raises(AssertionError):
        check_pixels(batch, small, "bicubic")
    with pytest.raises(AssertionError):
        check_targets(batch, small, (3, 3), "logits")
