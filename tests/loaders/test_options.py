"""Arguments that are not allowed, or do not fit each other: refused when the loader is made, with what is allowed."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from loaders import EvaluationLoader, TokenLabelLoader
from loaders.options import choose_device, num_threads, ranks, token_grid
from tests.loaders.batches import loader_of
from tests.loaders.photos import NUM_CLASSES, Photos, random_maps, write_label_set
from tokenlabels.store import open_store

OF_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "mix": ({"mix": "cutmux"}, "mix must be one of 'mixtoken', 'cutmix', .*, got 'cutmux'"),
    "mix_alpha 0": ({"mix": "cutmix", "mix_alpha": 0.0}, "mix_alpha must be a finite number above 0, got 0.0"),
    "mix_alpha text": ({"mix": "mixup", "mix_alpha": "1"}, "mix_alpha must be a finite number above 0, got '1'"),
    "mix_alpha inf": (
        {"mix": "mixup", "mix_alpha": float("inf")},
        "mix_alpha must be a finite number above 0, got inf",
    ),
    "mix_prob": ({"mix": "mixup", "mix_prob": 1.5}, "mix_prob must be a number in 0..1, got 1.5"),
    "mixup_alpha text": ({"mix": "cutmix", "mixup_alpha": "1"}, "mixup_alpha must be a finite number .*got '1'"),
    "mixup_alpha negative": ({"mix": "mixtoken", "mixup_alpha": -0.8}, "mixup_alpha must be .* 0 or more, got -0.8"),
    "mixup_alpha inf": ({"mix": "cutmix", "mixup_alpha": float("inf")}, "mixup_alpha must be .*got inf"),
    "mixup_alpha with mixup": (
        {"mix": "mixup", "mixup_alpha": 0.8},
        "mixup_alpha above 0 needs mix='cutmix' or mix='mixtoken', got 0.8 and 'mixup'; MixUp alone is mix='mixup'",
    ),
    "mixup_alpha with blockwise": ({"mix": "blockwise", "mixup_alpha": 0.8}, "needs .*, got 0.8 and 'blockwise'$"),
    "mixup_alpha without mix": ({"mixup_alpha": 0.8}, "needs mix='cutmix' or .*, got 0.8 and None; MixUp alone"),
    "mixup_alpha negative without mix": ({"mixup_alpha": -1}, "mixup_alpha must be .* 0 or more, got -1"),
    "mix alone": ({"mix": "cutmix", "batch_size": 1}, "mix='cutmix' needs another sample .* batch_size is 1; raise it"),
    "supervision": ({"supervision": "soft"}, "supervision must be one of 'token', 'relabel', 'hard', got 'soft'"),
    "augment_order": ({"augment_order": "first"}, "one of 'after crop', 'before crop', got 'first'"),
    "rand_augment": ({"rand_augment": "randaug"}, "randaug"),
    "decoder": ({"decoder": "opencv"}, "must be 'torchvision' or 'pillow', got 'opencv'"),
    "interpolation": (
        {"interpolation": "nearest"},
        "interpolation must be one of 'bilinear', .*got 'nearest'",
    ),
    "interpolate": ({"interpolate": "scores"}, "interpolate must be one of 'logits', 'probs', got 'scores'"),
    "erase_mode": ({"erase_mode": "black"}, "erase_mode must be one of 'const', 'pixel', got 'black'"),
    "erase_prob": ({"erase_prob": -0.1}, "erase_prob must be a number in 0..1, got -0.1"),
    "on_error": ({"on_error": "ignore"}, "on_error must be one of 'raise', 'skip', got 'ignore'"),
    "hflip": ({"hflip": True}, "hflip must be a number in 0..1, got True"),
    "scale order": ({"scale": (1.0, 0.5)}, r"scale must be .*got \(1.0, 0.5\)"),
    "scale above 1": ({"scale": (0.5, 1.5)}, r"scale must be .* at most 1, got \(0.5, 1.5\)"),
    "scale 0": ({"scale": (0.0, 1.0)}, r"scale must be .*above 0"),
    "scale number": ({"scale": 0.5}, r"scale must be \(lowest, highest\).*got 0.5"),
    "scale text": ({"scale": ("a", "b")}, "scale must be"),
    "ratio nan": ({"ratio": (float("nan"), 1.0)}, "ratio must be .* both above 0, got"),
    "ratio inf": ({"ratio": (0.5, float("inf"))}, "ratio must be"),
    "ratio number": ({"ratio": 1.0}, r"ratio must be .*got 1.0"),
    "mean length": ({"mean": (0.5, 0.5)}, r"mean must be three numbers, .*got \(0.5, 0.5\)"),
    "mean number": ({"mean": 0.5}, "mean must be three numbers, .*got 0.5"),
    "mean nan": ({"mean": (0.5, 0.5, float("nan"))}, "mean must be three finite numbers, got"),
    "std length": ({"std": (0.2, 0.2, 0.2, 1.0)}, "std must be three numbers"),
    "std text": ({"std": "rgb"}, "std must be three numbers"),
    "std 0": ({"std": (0.2, 0.2, 0.0)}, "std must be three finite numbers above 0, got"),
    "device": ({"device": "gpu"}, "device must be 'cpu', 'cuda' or 'cuda:<number>', got 'gpu'"),
    "device None": ({"device": None}, "device must be 'cpu', 'cuda' or 'cuda:<number>', got None"),
    "device meta": ({"device": "meta"}, "device must be 'cpu' or a CUDA device, got 'meta'"),
    "no such device": ({"device": "cuda:99"}, "device is 'cuda:99', but torch sees [0-9]+ CUDA devices"),
    "threads 0": ({"threads": 0}, "threads must be an integer of at least 1, got 0"),
    "threads negative": ({"threads": -2}, "threads must be an integer of at least 1, got -2"),
    "threads bool": ({"threads": True}, "threads must be an integer of at least 1, got True"),
    "prefetch 0": ({"prefetch": 0}, "prefetch must be an integer of at least 1, got 0"),
    "prefetch negative": ({"prefetch": -1}, "prefetch must be an integer of at least 1, got -1"),
    "prefetch float": ({"prefetch": 2.0}, "prefetch must be an integer of at least 1, got 2.0"),
    "image_size odd": ({"image_size": 40}, r"images of \(40, 40\) pixels have no whole patches of 16; give grid="),
    "image_size 0": ({"image_size": 0}, r"image_size must be two positive integers .*got \(0, 0\)"),
    "image_size bool": ({"image_size": True}, "image_size must be two positive integers"),
    "image_size float": ({"image_size": 32.0}, "image_size must be two positive integers .*got 32.0"),
    "image_size three": ({"image_size": (32, 32, 3)}, r"image_size must be two positive integers .*got \(32, 32, 3\)"),
    "image_size numpy": ({"image_size": np.int64(32)}, "image_size must be two positive integers"),
    "grid": ({"grid": 5}, r"grid \(5, 5\) does not fit images of \(32, 32\) pixels: tokens must be whole pixels"),
    "grid columns": ({"grid": (4, 3)}, r"grid \(4, 3\) does not fit images"),
    "grid 0": ({"grid": 0}, r"grid must be two positive integers .*got \(0, 0\)"),
    "num_classes": ({"num_classes": 1000}, "num_classes is 1000, but .* has labels of 20 classes; leave it out"),
    "num_classes 0": ({"labels": None, "num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
    "num_classes bool": ({"labels": None, "num_classes": True}, "num_classes must be an integer of at least 1"),
    "no labels": ({"labels": None, "supervision": "token"}, "supervision 'token' needs labels; give the folder"),
    "no classes": ({"labels": None, "supervision": "hard"}, "supervision 'hard' without labels needs num_classes"),
}

# Only with the number of samples is the order of an epoch checked.
OF_THE_PLAN: dict[str, tuple[dict[str, Any], str]] = {
    "last": ({"last": "pad"}, r"last must be one of .*'drop', 'repeat'.*, got 'pad'"),
    "batch_size 0": ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    "batch_size bool": ({"batch_size": True}, "batch_size must be an integer of at least 1, got True"),
    "batch_size numpy": (
        {"batch_size": np.int64(4)},
        r"batch_size must be an integer .*, got np.int64\(4\)",
    ),
    "batch_size text": ({"batch_size": "4", "mix": "mixup"}, "batch_size must be an integer of at least 1, got '4'"),
    "batch too large": ({"batch_size": 33}, "32 samples do not fill one global batch of 1 ranks x 33; .*last='repeat'"),
    "ranks too many": (
        {"rank": 0, "world_size": 9},
        "32 samples do not fill one global batch of 9 ranks x 4; lower batch_size",
    ),
    "shuffle_shards": ({"shuffle_shards": 0}, "shuffle_shards must be an integer of at least 1, got 0"),
    "seed float": ({"seed": 1.5}, "seed must be an integer, got 1.5"),
    "seed bool": ({"seed": True}, "seed must be an integer, got True"),
    "seed numpy": ({"seed": np.int64(1)}, r"seed must be an integer, got np.int64\(1\)"),
    "seed None": ({"seed": None}, "seed must be an integer, got None"),
    "rank alone": ({"rank": 1}, "give both rank and world_size, or none; got 1 and None"),
    "world_size alone": ({"world_size": 2}, "give both rank and world_size, or none; got None and 2"),
    "rank too high": ({"rank": 2, "world_size": 2}, "rank must be in 0..1, as world_size is 2, got 2"),
    "rank negative": ({"rank": -1, "world_size": 2}, "rank must be an integer of at least 0, got -1"),
    "rank text": ({"rank": "0", "world_size": 2}, "rank must be an integer of at least 0, got '0'"),
    "world_size 0": ({"rank": 0, "world_size": 0}, "world_size must be an integer of at least 1, got 0"),
}

REFUSED = {**OF_ARGUMENTS, **OF_THE_PLAN}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_when_the_loader_is_made(photos: Photos, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loader_of(photos, **options)


@pytest.mark.parametrize(("options", "words"), OF_ARGUMENTS.values(), ids=OF_ARGUMENTS)
def test_refused_before_images_are_looked_for(
    photos: Photos, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    """Without indexes, a thousand tars are read to find the number of samples."""
    monkeypatch.setattr("loaders.loader.ImageDataset.find", lambda *_: pytest.fail("images were looked for"))
    with pytest.raises(ValueError, match=words):
        loader_of(photos, **options)


EVALUATION = (
    *("mean number", "std 0", "device", "threads 0", "prefetch negative", "interpolation", "decoder", "on_error"),
    *("batch_size bool", "rank alone", "rank too high", "image_size float"),
)


@pytest.mark.parametrize(("options", "words"), [REFUSED[name] for name in EVALUATION], ids=EVALUATION)
def test_the_evaluation_loader_refuses_the_same(photos: Photos, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvaluationLoader(photos.tars, **{"image_size": 32, "index_dir": photos.index_dir, **options})


@pytest.mark.parametrize("crop_pct", [0, 1.1, "1", True], ids=repr)
def test_crop_pct_is_a_share(photos: Photos, crop_pct: Any) -> None:
    with pytest.raises(ValueError, match=f"crop_pct must be above 0 and at most 1, got {crop_pct}"):
        EvaluationLoader(photos.tars, crop_pct=crop_pct, index_dir=photos.index_dir)


def test_no_images_are_refused(tmp_path: Path, photos: Photos) -> None:
    with pytest.raises(ValueError, match=r"none-\*\.tar"):
        TokenLabelLoader(str(tmp_path / "none-*.tar"), index_dir=photos.index_dir)


def test_a_folder_without_labels_is_refused(tmp_path: Path, photos: Photos) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        loader_of(photos, labels=tmp_path)


def labels_of(photos: Photos, folder: Path, keys: list[list[str]], **options: Any) -> Path:
    """A label set of the first tars, with these keys."""
    rng = np.random.default_rng(0)
    stems = [Path(tar).stem for tar in photos.tars]
    return write_label_set(
        folder, {stem: random_maps(rng, some) for stem, some in zip(stems, keys, strict=False)}, **options
    )


def test_labels_of_another_number_of_images_are_refused(tmp_path: Path, photos: Photos) -> None:
    labels = labels_of(photos, tmp_path / "labels", [keys[:-1] or ["x"] for keys in photos.keys])
    with pytest.raises(ValueError, match=rf"{photos.tars[0]} has 9 samples, but .* was made from 8 .*labels of other"):
        loader_of(photos, labels=labels)


def test_hard_supervision_reads_no_maps(tmp_path: Path, photos: Photos) -> None:
    """Of the labels only the number of classes is used, so they may be of fewer images."""
    loader = loader_of(photos, labels=labels_of(photos, tmp_path / "labels", photos.keys[:1]), supervision="hard")
    assert loader.num_classes == NUM_CLASSES
    assert len(list(loader)) == 8


def test_a_store_is_as_good_as_its_path(photos: Photos) -> None:
    loader = loader_of(photos, labels=open_store(photos.labels))
    assert (loader.supervision, loader.num_classes) == ("token", NUM_CLASSES)


@pytest.mark.parametrize(("num_agreeing", "warns"), [(0, True), (1, False)], ids=["never", "sometimes"])
def test_a_teacher_that_never_agrees_is_suspicious(
    photos: Photos, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_agreeing: int, warns: bool
) -> None:
    labels = labels_of(photos, tmp_path / "labels", photos.keys, num_agreeing=num_agreeing)
    with caplog.at_level(logging.WARNING, logger="loaders.options"):
        loader_of(photos, labels=labels)
    messages = [record.getMessage() for record in caplog.records]
    expected = f"{labels}: the teacher's best class is the image's own class in 0.0 % of the images only; are its "
    assert len(messages) == warns
    assert all(message.startswith(expected) for message in messages)


@pytest.mark.parametrize(("grown_bytes", "warns"), [(0, False), (512, True)], ids=["same size", "another size"])
def test_tars_of_another_size_than_their_labels_are_suspicious(
    photos: Photos, tmp_path: Path, caplog: pytest.LogCaptureFixture, grown_bytes: int, warns: bool
) -> None:
    sizes = {Path(tar).stem: Path(tar).stat().st_size for tar in photos.tars}
    sizes["train-02"] += grown_bytes
    labels = labels_of(photos, tmp_path / "labels", photos.keys, size_of=sizes.__getitem__)
    with caplog.at_level(logging.WARNING, logger="loaders.options"):
        loader_of(photos, labels=labels)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warns
    assert all("1 of 5 tars have another size" in text and "train-02.tar" in text for text in messages)


@pytest.mark.parametrize(
    ("grid", "image_size", "expected"),
    [
        (None, (224, 224), (14, 14)),
        (None, (32, 64), (2, 4)),
        (7, (224, 224), (7, 7)),
        ((4, 8), (32, 64), (4, 8)),
        ([2, 2], (40, 40), (2, 2)),
    ],
    ids=str,
)
def test_grids(grid: Any, image_size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert token_grid(grid, image_size) == expected


def test_images_need_not_be_square(photos: Photos) -> None:
    loader = loader_of(photos, image_size=(32, 64), mix="mixtoken")
    assert loader.grid == (2, 4)
    batch = next(iter(loader))
    assert batch.images.shape == (4, 3, 32, 64)
    assert batch.targets is not None
    assert batch.targets.grid == (2, 4)
    assert batch.plan is not None
    assert batch.plan.own.shape == (4, 2, 4)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=repr)
def test_the_cpu(device: Any) -> None:
    assert choose_device(device) == torch.device("cpu")


def test_threads_are_those_of_the_process() -> None:
    assert num_threads(3) == 3
    assert num_threads(None) == len(os.sched_getaffinity(0))


def test_ranks_are_those_of_torch_distributed(tmp_path: Path, photos: Photos) -> None:
    assert ranks(None, None) == (0, 1)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert ranks(None, None) == (0, 1)
        assert ranks(2, 3) == (2, 3)
        assert len(loader_of(photos)) == 8
    finally:
        distributed.destroy_process_group()


def test_ranks_are_asked_for_when_they_are_needed(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader may be made before the process group is."""
    loader = loader_of(photos)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    assert ranks(None, None) == (1, 2)
    assert len(loader) == 4
    assert "on rank 1 of 2" in repr(loader)
