"""The loaders on public WebDataset shards as they are: nothing is changed, converted or written beside them."""

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds

from annotate.shard import AnnotateConfig, annotate_shard
from annotate.teachers import TeacherSpec, load_teacher
from loaders.batch import TokenLabelBatch
from loaders.evaluation import EvaluationLoader
from loaders.loader import TokenLabelLoader
from loaders.stages import attach_score_maps, collate_token_labels, random_resized_crop_with_box
from tokenlabels.boxes import box_in_map
from tokenlabels.images import TarShard
from tokenlabels.store import open_store
from tokenlabels.targets import token_targets

# WebDataset 1.0.2 leaves the tars that it has read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

SIZE, GRID = 64, (4, 4)


@pytest.fixture(scope="module", autouse=True)
def _collect_tars() -> Iterator[None]:
    """Not in the tests of others."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def index_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


def by_webdataset(tars: list[Path]) -> list[dict[str, Any]]:
    return list(wds.WebDataset([str(tar) for tar in tars], shardshuffle=False).decode(only=["cls", "json"]))


def keys_and_labels(batches: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for batch in batches:
        for key, label in zip(batch.keys, batch.labels.tolist(), strict=True):
            assert key not in found
            found[key] = label
    return found


@pytest.fixture(scope="module")
def photographs(imagenet_sample: Path) -> Path:
    """44 photographs with jpg, cls and json."""
    return imagenet_sample / "imagenet1k-train-0003.tar"


def test_imagenet_shards_are_read_as_webdataset_reads_them(photographs: Path, index_dir: Path) -> None:
    expected = {sample["__key__"]: sample["cls"] for sample in by_webdataset([photographs])}
    settings: dict[str, Any] = {"image_size": SIZE, "batch_size": 11, "threads": 2, "index_dir": index_dir}
    evaluation = EvaluationLoader(photographs, **settings)
    assert list(keys_and_labels(evaluation).items()) == list(expected.items())
    training = TokenLabelLoader(photographs, num_classes=1000, **settings)
    assert keys_and_labels(training) == expected
    assert list(keys_and_labels(training)) != list(expected)


def test_lengths_of_imagenet_shards(imagenet_sample: Path, index_dir: Path) -> None:
    loader = EvaluationLoader(f"{imagenet_sample}/imagenet1k-train-{{0000..0003}}.tar", index_dir=index_dir)
    assert loader.dataset.lengths == (128, 128, 100, 44)
    assert len(loader) == 4


def test_indexes_go_where_they_are_told_to(imagenet_sample: Path, tiny_imagenet: Path, index_dir: Path) -> None:
    before = [sorted(folder.iterdir()) for folder in (imagenet_sample, tiny_imagenet)]
    EvaluationLoader([f"{imagenet_sample}/*.tar", f"{tiny_imagenet}/tiny-val-*.tar"], index_dir=index_dir)
    assert before == [sorted(folder.iterdir()) for folder in (imagenet_sample, tiny_imagenet)]
    assert any(index_dir.rglob("*"))


def test_tiny_imagenet_shards_are_read_as_webdataset_reads_them(tiny_imagenet: Path, index_dir: Path) -> None:
    tars = sorted(tiny_imagenet.glob("tiny-val-*.tar"))
    expected = {sample["__key__"]: sample["cls"] for sample in by_webdataset(tars)}
    settings: dict[str, Any] = {"image_size": 16, "batch_size": 125, "threads": 2, "index_dir": index_dir}
    assert keys_and_labels(EvaluationLoader(f"{tiny_imagenet}/tiny-val-*.tar", **settings)) == expected
    training = TokenLabelLoader(f"{tiny_imagenet}/tiny-val-*.tar", num_classes=50, **settings)
    assert keys_and_labels(training) == expected
    assert set(expected.values()) == set(range(50))
    assert len(expected) == 2500


@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_a_tree_of_the_same_images_has_the_same_pixels(
    photographs: Path, index_dir: Path, tmp_path: Path, decoder: Any
) -> None:
    samples = by_webdataset([photographs])[:12]
    for sample in samples:
        folder = tmp_path / "tree" / f"{sample['cls']:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{sample['__key__']}.jpg").write_bytes(sample["jpg"])
    settings: dict[str, Any] = {"image_size": SIZE, "batch_size": 11, "threads": 2, "decoder": decoder}
    by_key = {
        Path(key).name: (image, label)
        for batch in EvaluationLoader(photographs, index_dir=index_dir, **settings)
        for key, image, label in zip(batch.keys, batch.images, batch.labels.tolist(), strict=True)
    }
    classes = sorted({sample["cls"] for sample in samples})
    num_compared = 0
    for batch in EvaluationLoader(tmp_path / "tree", **settings):
        for key, image, label in zip(batch.keys, batch.images, batch.labels.tolist(), strict=True):
            expected, expected_class = by_key[Path(key).name]
            assert torch.equal(image, expected)
            assert classes[label] == expected_class
            num_compared += 1
    assert num_compared == 12


@pytest.fixture(scope="module")
def labels(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of the photographs, by a real model of timm with random weights: 2 x 2 cells, 1000 classes."""
    labels = tmp_path_factory.mktemp("public") / "labels"
    teacher = load_teacher([TeacherSpec("test_efficientnet_gn", seed=0, image_size=64)])
    annotate_shard(TarShard(str(photographs)), labels, teacher, AnnotateConfig())
    return labels


def check_targets(batch: TokenLabelBatch, labels: Path) -> None:
    """Every target is that of the key's own map for the batch's own box."""
    store = open_store(labels)
    maps = store.shards[0].read()
    rows = [maps.keys.index(key) for key in batch.keys]
    assert batch.targets is not None
    assert batch.targets.dense().shape == (len(batch), 1 + GRID[0] * GRID[1], 1000)
    expected = token_targets(
        torch.from_numpy(maps.scores[rows]),
        torch.from_numpy(maps.classes[rows].astype(np.int64)),
        box_in_map(batch.boxes, torch.from_numpy(maps.views[rows])),
        flip=batch.flip,
        grid=GRID,
        num_classes=1000,
    )
    # Boxes of a batch are float32, targets were made with float64.
    torch.testing.assert_close(batch.targets.dense(), expected.dense(), rtol=0, atol=1e-5)


def test_labels_made_of_them_join_by_key(photographs: Path, labels: Path, index_dir: Path) -> None:
    loader = TokenLabelLoader(
        photographs, labels, image_size=SIZE, grid=GRID, batch_size=11, threads=2, index_dir=index_dir
    )
    assert (loader.supervision, loader.num_classes, len(loader)) == ("token", 1000, 4)
    batches = list(loader)
    for batch in batches:
        check_targets(batch, labels)
    assert sorted(keys_and_labels(batches)) == sorted(open_store(labels).keys())


def test_labels_made_of_them_join_in_a_webdataset_pipeline(photographs: Path, labels: Path) -> None:
    dataset = (
        wds.WebDataset(str(photographs), shardshuffle=False)
        .compose(attach_score_maps(labels))
        .shuffle(20, rng=random.Random(0))
        .compose(random_resized_crop_with_box(SIZE))
        .batched(11, collation_fn=collate_token_labels(GRID))
    )
    batches = list(dataset)
    for batch in batches:
        check_targets(batch, labels)
    expected = {sample["__key__"]: sample["cls"] for sample in by_webdataset([photographs])}
    assert keys_and_labels(batches) == expected
