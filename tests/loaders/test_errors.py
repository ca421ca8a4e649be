"""What is wrong with the data: which error comes, when, and what it says; and what `on_error="skip"` does instead."""

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loaders import EvaluationLoader, SampleError, TokenLabelBatch, TokenLabelLoader
from tests.loaders.photos import Photos, random_maps, write_label_set, write_tar
from tokenlabels.store import LabelStoreError, SkippedRecord
from tokenlabels.tars import TarError

BAD_JPEG = b"\xff\xd8\xff\xe0 no JPEG at all"
THREADS = [1, 2, 8]

# Below: (members of a sample, stage, reason).
BAD_SAMPLES = [
    pytest.param({"jpg": BAD_JPEG}, "decode", "truncated image data", id="corrupt JPEG"),
    pytest.param({"jpg": b""}, "decode", "empty", id="empty image"),
    pytest.param({"cls": b"1"}, "read", "has no image member", id="no image"),
]


@pytest.fixture(scope="module")
def few(make_photos: Callable[..., Photos], tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """Three tars of 8, 5 and 7 images: five batches of 4."""
    return make_photos(tmp_path_factory.mktemp("few"), (8, 5, 7))


@pytest.fixture
def flat(few: Photos) -> list[str]:
    """All keys, in the order of the loader's first epoch."""
    return [key for batch in loader_of(few) for key in batch.keys]


def loader_of(photos: Photos, tars: list[str] | None = None, **changes: Any) -> TokenLabelLoader:
    options = {"image_size": 32, "grid": 4, "batch_size": 4, "threads": 2, "index_dir": photos.index_dir, **changes}
    labels = options.pop("labels", photos.labels)
    return TokenLabelLoader(photos.tars if tars is None else tars, labels, **options)


def tar_of(tars: list[str], key: str) -> str:
    return next(tar for tar in tars if Path(tar).stem == key.split("/")[0])


def rewritten(photos: Photos, folder: Path, changed: Mapping[str, Mapping[str, bytes]]) -> list[str]:
    """The tars again, with other members for some samples."""
    for tar, keys in zip(photos.tars, photos.keys, strict=True):
        usual = {key: {"jpg": photos.images[key], "cls": str(photos.classes[key]).encode()} for key in keys}
        write_tar(folder / Path(tar).name, usual | {key: changed[key] for key in keys if key in changed})
    return [str(folder / Path(tar).name) for tar in photos.tars]


def until_error(loader: TokenLabelLoader | EvaluationLoader) -> tuple[list[TokenLabelBatch], Exception]:
    batches: list[TokenLabelBatch] = []
    with pytest.raises((ValueError, OSError)) as raised:
        batches.extend(loader)
    return batches, raised.value


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("members", "stage", "reason"), BAD_SAMPLES)
def test_a_bad_sample_is_an_error_at_its_batch(
    members: dict[str, bytes], stage: str, reason: str, threads: int, few: Photos, flat: list[str], tmp_path: Path
) -> None:
    key = flat[13]
    tars = rewritten(few, tmp_path, {key: members})
    batches, error = until_error(loader_of(few, tars, threads=threads))
    assert isinstance(error, SampleError)
    assert str(error).startswith(f"{tar_of(tars, key)}: sample {key!r}: {stage}: ")
    assert str(error).count(repr(key)) == 1
    assert re.search(reason, str(error))
    assert [batch.keys for batch in batches] == [tuple(flat[first : first + 4]) for first in (0, 4, 8)]
    for batch, good in zip(batches, loader_of(few), strict=False):
        assert torch.equal(batch.images, good.images)


@pytest.mark.parametrize("threads", THREADS)
def test_of_two_bad_samples_the_first_of_the_batch_is_told(
    threads: int, few: Photos, flat: list[str], tmp_path: Path
) -> None:
    changed = {flat[6]: {"jpg": BAD_JPEG}, flat[5]: {"jpg": b""}, flat[9]: {"cls": b"1"}}
    batches, error = until_error(loader_of(few, rewritten(few, tmp_path, changed), threads=threads))
    assert len(batches) == 1
    assert repr(flat[5]) in str(error)


def test_a_key_that_the_labels_do_not_know(few: Photos, flat: list[str], tmp_path: Path) -> None:
    key = flat[10]
    rng = np.random.default_rng(0)
    names = [[("another" if name == key else name) for name in keys] for keys in few.keys]
    stems = [Path(tar).stem for tar in few.tars]
    maps = {stem: random_maps(rng, keys) for stem, keys in zip(stems, names, strict=True)}
    labels = write_label_set(tmp_path / "labels", maps)
    batches, error = until_error(loader_of(few, labels=labels))
    assert len(batches) == 2
    assert isinstance(error, SampleError)
    told = f"{tar_of(few.tars, key)}: sample {key!r}: labels: "
    assert str(error).startswith(told)
    assert "does not know it; is it another version of the images?" in str(error)


def test_labels_of_other_images(few: Photos, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    maps = {
        Path(tar).stem: random_maps(rng, [f"other_{row}" for row in range(len(keys))])
        for tar, keys in zip(few.tars, few.keys, strict=True)
    }
    batches, error = until_error(loader_of(few, labels=write_label_set(tmp_path / "labels", maps)))
    assert batches == []
    assert isinstance(error, LabelStoreError)
    assert re.search(r"train-0\d\.tar: labels of other images: .* Annotate these images", str(error))


def test_a_key_that_was_skipped_says_why(few: Photos, flat: list[str], tmp_path: Path) -> None:
    key = flat[7]
    rng = np.random.default_rng(0)
    maps = {
        Path(tar).stem: random_maps(rng, [name for name in keys if name != key])
        for tar, keys in zip(few.tars, few.keys, strict=True)
    }
    skipped = {Path(tar_of(few.tars, key)).stem: [SkippedRecord(key=key, reason="could not be decoded: it is a PDF")]}
    batches, error = until_error(loader_of(few, labels=write_label_set(tmp_path / "labels", maps, skipped=skipped)))
    assert len(batches) == 1
    assert repr(key) in str(error)
    assert "could not be decoded: it is a PDF" in str(error)


def test_an_image_shard_without_labels(few: Photos, tmp_path: Path) -> None:
    more = tmp_path / "val-07.tar"
    write_tar(more, {"a": {"jpg": few.images[few.keys[0][0]]}})
    with pytest.raises(LabelStoreError, match=r"1 of 4 image shards have no labels\. The first is .*val-07\.tar.*ann"):
        loader_of(few, [*few.tars, str(more)])


@pytest.mark.parametrize("array", ["scores", "classes", "tail", "views"])
def test_a_damaged_label_shard(array: str, few: Photos, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    shutil.copytree(few.labels, labels)
    chunk = next(path for path in sorted((labels / "train-01.zarr" / array / "c").rglob("*")) if path.is_file())
    content = bytearray(chunk.read_bytes())
    for place in range(len(content) // 3, len(content) // 3 + 8):
        content[place] ^= 0xFF
    chunk.write_bytes(content)
    batches, error = until_error(loader_of(few, labels=labels, shuffle_shards=1))
    assert isinstance(error, LabelStoreError)
    assert "train-01.zarr" in str(error)
    assert "annotate" in str(error)
    good = loader_of(few, shuffle_shards=1)
    for batch, usual in zip(batches, good, strict=False):
        assert batch.keys == usual.keys
        assert not any(key.startswith("train-01") for key in batch.keys)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_tar_cut_off_after_it_was_indexed(on_error: str, few: Photos, tmp_path: Path) -> None:
    tars = rewritten(few, tmp_path, {})
    loader = loader_of(few, tars, on_error=on_error)
    os.truncate(tars[1], 3 * 512)
    batches, error = until_error(loader)
    assert batches == []
    assert isinstance(error, TarError)
    assert re.search(r"train-01\.tar: the tar changed after the dataset was found.*start again", str(error))


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_tar_cut_off_while_it_is_read(on_error: str, threads: int, few: Photos, tmp_path: Path) -> None:
    # A bad image in front of each: with "skip", what is told is the tar, not the image that would be skipped.
    samples = {f"k{row:03d}": {"jpg": few.images[few.keys[0][0]]} for row in range(200)}
    samples |= {f"k{row:03d}": {"jpg": BAD_JPEG} for row in range(0, 200, 7)} if on_error == "skip" else {}
    write_tar(tmp_path / "long.tar", samples)
    loader = loader_of(few, [str(tmp_path / "long.tar")], labels=None, threads=threads, on_error=on_error)
    batches = iter(loader)
    assert len(next(batches)) == 4
    os.truncate(tmp_path / "long.tar", 1024)
    with pytest.raises(SampleError, match=r"long\.tar: sample 'k\d+': read: .*the tar was truncated") as raised:
        list(batches)
    assert raised.value.is_of_tar


def test_a_tar_cut_off_before_it_is_indexed(few: Photos, tmp_path: Path) -> None:
    tars = rewritten(few, tmp_path, {})
    os.truncate(tars[2], 5 * 512)
    with pytest.raises(TarError, match=r"train-02\.tar"):
        loader_of(few, tars)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        pytest.param({}, "no class index in its cls or json", id="none"),
        pytest.param({"cls": b"20"}, r"class 20, but targets are made of classes 0\.\.19", id="out of range"),
        pytest.param({"cls": b"cat"}, "no class index in its cls or json", id="no number"),
    ],
)
def test_hard_labels_that_no_target_can_be_made_of(
    members: dict[str, bytes], told: str, few: Photos, flat: list[str], tmp_path: Path
) -> None:
    tars = rewritten(few, tmp_path, {flat[4]: {"jpg": few.images[flat[4]], **members}})
    batches, error = until_error(loader_of(few, tars, labels=None, num_classes=20))
    assert len(batches) == 1
    assert str(error).startswith(f"{tar_of(tars, flat[4])}: sample {flat[4]!r}: label: ")
    assert re.search(told, str(error))
    assert len(list(loader_of(few, tars, labels=None))) == 5, "without targets nobody asks for classes"


def test_a_file_of_a_tree_that_cannot_be_read(few: Photos, tmp_path: Path) -> None:
    for name in ("cat/a.jpg", "cat/b.jpg", "dog/c.jpg", "dog/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(few.images[few.keys[0][0]])
    loader = EvaluationLoader(tmp_path, image_size=32, batch_size=2, threads=2)
    assert [batch.labels.tolist() for batch in loader] == [[0, 0], [1, 1]]
    (tmp_path / "dog" / "c.jpg").unlink()
    batches, error = until_error(loader)
    assert [batch.labels.tolist() for batch in batches] == [[0, 0]]
    assert isinstance(error, SampleError)
    assert re.search(r"sample '.*c': read: .*No such file", str(error))


def outcome(batches: list[TokenLabelBatch]) -> list[tuple[Any, ...]]:
    return [
        (
            batch.keys,
            batch.images.sum(dtype=torch.float64).item(),
            batch.labels.tolist(),
            batch.boxes.tolist(),
            batch.flip.tolist(),
            batch.targets.dense().sum(dim=1).tolist() if batch.targets is not None else None,
        )
        for batch in batches
    ]


def test_skipping_puts_another_sample_of_the_batch_into_the_place(
    few: Photos, flat: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = {flat[5]: {"jpg": BAD_JPEG}, flat[6]: {"jpg": b""}, flat[19]: {"cls": b"1"}}
    tars = rewritten(few, tmp_path, changed)
    outcomes = []
    for threads in THREADS:
        caplog.clear()
        loader = loader_of(few, tars, threads=threads, on_error="skip", rand_augment="rand-m9-mstd0.5")
        with caplog.at_level(logging.WARNING):
            batches = list(loader)
        assert loader.stats().num_skipped == 3
        assert sorted(re.findall(r"sample '(\S+)'", caplog.text)) == sorted(changed)
        assert all(tar_of(tars, key) in caplog.text for key in changed)
        outcomes.append(outcome(batches))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert [len(batch) for batch in batches] == [4] * 5
    assert not changed.keys() & {key for batch in batches for key in batch.keys}
    assert batches[1].keys == (flat[4], flat[4], flat[7], flat[7])
    assert batches[4].keys == (*flat[16:19], flat[16])


def test_the_sample_that_steps_in_is_the_same_in_all_parts_of_the_batch(
    few: Photos, flat: list[str], tmp_path: Path
) -> None:
    tars = rewritten(few, tmp_path, {flat[4]: {"jpg": BAD_JPEG}, flat[6]: {"jpg": BAD_JPEG}})
    _, batch, *_ = loader_of(few, tars, on_error="skip")
    _, good, *_ = loader_of(few)
    assert batch.keys == tuple(flat[row] for row in (5, 5, 7, 7))
    rows = [1, 1, 3, 3]
    for name in ("images", "labels", "boxes", "flip"):
        assert torch.equal(getattr(batch, name), getattr(good, name)[rows]), name
    assert batch.targets is not None
    assert good.targets is not None
    torch.testing.assert_close(batch.targets.dense(), good.targets.dense()[rows])


def test_a_batch_of_bad_samples_alone_is_an_error(few: Photos, flat: list[str], tmp_path: Path) -> None:
    tars = rewritten(few, tmp_path, {key: {"jpg": BAD_JPEG} for key in flat[8:12]})
    batches, error = until_error(loader_of(few, tars, on_error="skip"))
    assert len(batches) == 2
    assert repr(flat[8]) in str(error)


def test_evaluation_skips_without_counting_a_sample_twice(few: Photos, tmp_path: Path) -> None:
    keys = [key for shard in few.keys for key in shard]
    bad = [keys[1], keys[2], *keys[8:12], keys[19]]  # of the third batch all
    tars = rewritten(few, tmp_path, {key: {"jpg": BAD_JPEG} for key in bad})
    loader = EvaluationLoader(
        tars, image_size=32, batch_size=4, threads=2, on_error="skip", index_dir=few.index_dir, prefetch=1
    )
    batches = list(loader)
    assert [len(batch) for batch in batches] == [2, 4, 4, 3]
    assert all(batch.images.shape[0] == len(batch) for batch in batches)
    assert [key for batch in batches for key in batch.keys] == [key for key in keys if key not in bad]
    assert [label for batch in batches for label in batch.labels.tolist()] == [
        few.classes[key] for key in keys if key not in bad
    ]
    assert loader.stats().num_skipped == len(bad)
    whole = torch.cat([batch.images for batch in EvaluationLoader(few.tars, image_size=32, index_dir=few.index_dir)])
    kept = [row for row, key in enumerate(keys) if key not in bad]
    assert torch.equal(torch.cat([batch.images for batch in batches]), whole[kept])
