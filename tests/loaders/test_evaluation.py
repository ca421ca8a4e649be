import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor
from torchvision import transforms

from loaders.batch import SampleError, TokenLabelBatch
from loaders.evaluation import EvaluationLoader
from tests.loaders.photos import Photos, encode, smooth_image, write_tar
from tokenlabels.images.decode import decode_rgb

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TWO_LEVELS = 2.01
NUM_PHOTOGRAPHS = 11  # a quarter of the tar, and so a batch


def loader_of(photos: Photos, **options: Any) -> EvaluationLoader:
    settings = {"image_size": 16, "batch_size": 5, "threads": 2, "index_dir": photos.index_dir}
    return EvaluationLoader(photos.tars, **{**settings, **options})


def every_key(photos: Photos) -> list[str]:
    return [key for keys in photos.keys for key in keys]


def keys_of(batches: list[TokenLabelBatch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.mark.parametrize("batch_size", [1, 5, 8, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 40])
def test_every_image_once_over_all_ranks(photos: Photos, world_size: int, batch_size: int) -> None:
    ranks = []
    for rank in range(world_size):
        loader = loader_of(photos, rank=rank, world_size=world_size, batch_size=batch_size)
        ranks.append(list(loader))
        assert len(ranks[-1]) == len(loader)
        assert all(0 < len(batch) <= batch_size for batch in ranks[-1])
    assert [key for batches in ranks for key in keys_of(batches)] == every_key(photos)
    steps = [len(batches) for batches in ranks]
    num_full = -(-len(every_key(photos)) // (world_size * batch_size))
    may_differ = batch_size == 1 or world_size > len(every_key(photos))
    assert set(steps) <= ({num_full - 1, num_full} if may_differ else {num_full})


def test_passes_and_threads_give_the_same_batches(photos: Photos) -> None:
    loader = loader_of(photos, threads=1)
    expected = list(loader)
    others = (loader_of(photos, threads=threads) for threads in (2, 8))
    for again in (loader, pickle.loads(pickle.dumps(loader)), *others):
        for batch, other in zip(expected, again, strict=True):
            assert batch.keys == other.keys
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.boxes, other.boxes)


def test_batches_hold_what_a_metric_needs(photos: Photos) -> None:
    for batch in loader_of(photos):
        assert batch.labels.tolist() == [photos.classes[key] for key in batch.keys]
        assert batch.images.dtype == torch.float32
        assert batch.images.shape == (len(batch), 3, 16, 16)
        assert (batch.targets, batch.plan) == (None, None)
        assert not batch.flip.any()


def test_top_1_over_ranks_is_that_of_one_process(photos: Photos) -> None:
    """The model is linear, and knows the first half of the images by heart."""
    images = torch.cat([batch.images.flatten(1) for batch in loader_of(photos)]).double()
    classes = torch.tensor([photos.classes[key] for key in every_key(photos)])
    weights = torch.linalg.pinv(images[:16]) @ torch.nn.functional.one_hot(classes[:16], 20).double()

    def num_correct(batches: Iterator[TokenLabelBatch]) -> tuple[int, int]:
        hits = [(batch.images.flatten(1).double() @ weights).argmax(dim=1) == batch.labels for batch in batches]
        return int(sum(hit.sum() for hit in hits)), sum(len(hit) for hit in hits)

    alone = num_correct(iter(loader_of(photos)))
    assert 16 <= alone[0] < alone[1] == len(every_key(photos))
    ranks = [num_correct(iter(loader_of(photos, rank=rank, world_size=3))) for rank in range(3)]
    assert alone == tuple(map(sum, zip(*ranks, strict=True)))


@pytest.fixture(scope="module")
def photographs(imagenet_sample: Path) -> tuple[Path, dict[str, Image.Image]]:
    """The smallest tar, and the first of its images as Pillow decodes them."""
    path = imagenet_sample / "imagenet1k-train-0003.tar"
    images: dict[str, Image.Image] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.endswith(".jpg") and len(images) < NUM_PHOTOGRAPHS:
                images[member.name.removesuffix(".jpg")] = decode_rgb(archive.extractfile(member).read())  # type: ignore[union-attr]
    return path, images


def transform_of(size: int | tuple[int, int], crop_pct: float, library: str) -> Any:
    if library == "timm":
        return transforms_imagenet_eval(size, crop_pct=crop_pct, interpolation="bicubic", mean=MEAN, std=STD)
    assert isinstance(size, int)
    return transforms.Compose(
        [
            transforms.Resize(int(size / crop_pct), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


@pytest.mark.parametrize(
    ("size", "crop_pct", "library"),
    [
        pytest.param(224, 0.875, "torchvision", id="torchvision"),
        pytest.param(224, 1.0, "torchvision", id="torchvision, whole side"),
        pytest.param(224, 0.875, "timm", id="timm"),
        pytest.param(160, 1.0, "timm", id="timm, whole side"),
        pytest.param((192, 256), 0.9, "timm", id="timm, not square"),
    ],
)
@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_pixels_are_those_of_the_usual_transforms(
    photographs: tuple[Path, dict[str, Image.Image]],
    tmp_path: Path,
    size: int | tuple[int, int],
    crop_pct: float,
    library: str,
    decoder: Any,
) -> None:
    path, images = photographs
    loader = EvaluationLoader(
        path,
        image_size=size,
        crop_pct=crop_pct,
        batch_size=NUM_PHOTOGRAPHS,
        decoder=decoder,
        threads=2,
        index_dir=tmp_path,
    )
    batch = next(iter(loader))
    assert batch.keys == tuple(images)
    expected = torch.stack([transform_of(size, crop_pct, library)(image) for image in images.values()])
    levels = grey_levels(batch.images) - grey_levels(expected)
    assert levels.abs().max() <= TWO_LEVELS
    assert levels.abs().mean() < 0.01


def grey_levels(images: Tensor) -> Tensor:
    return 255 * (images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])


def test_boxes_are_the_part_that_is_shown(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_tar(tmp_path / "t.tar", {"a": {"png": encode(smooth_image(rng, 200, 100), "PNG")}})
    (batch,) = EvaluationLoader(tmp_path / "t.tar", image_size=50, crop_pct=0.5, threads=1)
    torch.testing.assert_close(batch.boxes, torch.tensor([[0.375, 0.25, 0.625, 0.75]]))


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A tar of five images of which the first two, and the last, are damaged; the third has no label."""
    rng = np.random.default_rng(0)
    image, broken = encode(smooth_image(rng, 30, 20)), b"\xff\xd8\xff no image"
    contents = {"a": broken, "b": broken, "c": image, "d": image, "e": broken}
    write_tar(
        tmp_path / "t.tar",
        {key: {"jpg": data, **({} if key == "c" else {"cls": b"4"})} for key, data in contents.items()},
    )
    return tmp_path / "t.tar"


def test_damaged_images_are_errors(damaged: Path) -> None:
    with pytest.raises(SampleError, match=r"t\.tar: sample 'a': decode: "):
        list(EvaluationLoader(damaged, image_size=8, batch_size=2, threads=2))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_damaged_images_are_left_out_and_counted(
    damaged: Path, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """None takes their place: no image may count twice."""
    loader = EvaluationLoader(damaged, image_size=8, batch_size=batch_size, threads=2, on_error="skip")
    batches = list(loader)
    assert keys_of(batches) == ["c", "d"]
    assert all(len(batch.images) == len(batch.labels) == len(batch) for batch in batches)
    assert [label for batch in batches for label in batch.labels.tolist()] == [-1, 4]
    assert (loader.stats().num_skipped, loader.stats().num_images) == (3, 2)
    assert sum("left out" in record.message for record in caplog.records) == 3


def test_trees_have_the_classes_of_their_folders(photos: Photos, tmp_path: Path) -> None:
    keys = every_key(photos)[:6]
    for number, key in enumerate(keys):
        folder = tmp_path / "tree" / ("cat", "dog", "eel")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(photos.images[key])
    batches = list(EvaluationLoader(tmp_path / "tree", image_size=16, batch_size=4, threads=2))
    labels = [label for batch in batches for label in batch.labels.tolist()]
    assert labels == [0, 0, 1, 1, 2, 2]
    by_tar = {key: image for batch in loader_of(photos) for key, image in zip(batch.keys, batch.images, strict=True)}
    images = torch.cat([batch.images for batch in batches])
    for image, number in zip(images, (0, 3, 1, 4, 2, 5), strict=True):
        assert torch.equal(image, by_tar[keys[number]])


def test_images_go_through_the_resize_that_was_asked_for(photos: Photos) -> None:
    bicubic, bilinear = (next(iter(loader_of(photos, interpolation=name))) for name in ("bicubic", "bilinear"))
    image = Image.open(io.BytesIO(photos.images[bilinear.keys[0]])).convert("RGB")
    side = min(image.size)
    scaled = image.resize([int(18 * edge / side) for edge in image.size], Image.Resampling.BILINEAR)
    expected = transforms.functional.to_tensor(transforms.functional.center_crop(scaled, [16, 16]))
    assert (grey_levels(bilinear.images[0]) - 255 * expected).abs().max() <= TWO_LEVELS
    assert not torch.equal(bicubic.images, bilinear.images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"image_size": 0}, "image_size", id="size"),
        pytest.param({"crop_pct": 1.5}, "crop_pct", id="crop_pct"),
        pytest.param({"batch_size": 0}, "batch_size", id="batch size"),
        pytest.param({"rank": 3}, "both rank and world_size", id="rank alone"),
        pytest.param({"rank": 3, "world_size": 3}, "rank must be", id="rank too large"),
        pytest.param({"on_error": "ignore"}, "on_error", id="on_error"),
        pytest.param({"threads": 0}, "threads", id="threads"),
        pytest.param({"prefetch": 0}, "prefetch", id="prefetch"),
        pytest.param({"interpolation": "nearest"}, "interpolation", id="interpolation"),
        pytest.param({"decoder": "cv"}, "decoder", id="decoder"),
    ],
)
def test_arguments_are_checked(photos: Photos, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader_of(photos, **arguments)


def test_shows_what_it_is(photos: Photos) -> None:
    assert repr(loader_of(photos, rank=1, world_size=2)) == "EvaluationLoader(32 images, 4 batches on rank 1 of 2)"
