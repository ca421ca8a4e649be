import gc
import io
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from loaders import stages
from loaders.batch import TokenLabelBatch
from loaders.stages import attach_score_maps, collate_token_labels, random_resized_crop_with_box
from tests.loaders.photos import NUM_CLASSES, Photos, encode, smooth_image
from tokenlabels.boxes import box_in_map
from tokenlabels.store import ShardReader, open_store
from tokenlabels.targets import token_targets

Sample = dict[str, Any]
SIZE, GRID = 32, 4

# WebDataset 1.0.2 leaves the tars that it has read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def _collect_tars() -> Iterator[None]:
    """Not in the tests of others."""
    yield
    gc.collect()


def through(photos: Photos, *parts: Any, shardshuffle: int | bool = False) -> wds.WebDataset:
    return wds.WebDataset(photos.tars, shardshuffle=shardshuffle, empty_check=False).compose(*parts)


def labelled(photos: Photos, *, size: int = SIZE, **crop: Any) -> list[Any]:
    return [attach_score_maps(photos.labels), random_resized_crop_with_box(size, **crop)]


def pipeline(photos: Photos, *, shuffle: int = 0) -> wds.DataPipeline:
    attach, crop = labelled(photos)
    return wds.DataPipeline(
        wds.SimpleShardList(photos.tars),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        attach,
        wds.shuffle(shuffle) if shuffle else None,
        crop,
        wds.batched(8, collation_fn=collate_token_labels(GRID)),
    )


def boxes_by_key(samples: Iterable[Sample]) -> dict[str, Any]:
    return {sample["__key__"]: sample["box"] for sample in samples}


def batched_boxes(batches: Iterable[TokenLabelBatch]) -> dict[str, Any]:
    return {key: tuple(box) for batch in batches for key, box in zip(batch.keys, batch.boxes.tolist(), strict=True)}


def every_key(photos: Photos) -> list[str]:
    return [key for keys in photos.keys for key in keys]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stems of the label shards, as often as they are read."""
    stems: list[str] = []
    stream = ShardReader.stream

    def counted(shard: ShardReader, *args: Any) -> Iterator[Any]:
        stems.append(shard.stem)
        return stream(shard, *args)

    monkeypatch.setattr(ShardReader, "stream", counted)
    return stems


# How the stages stand in a pipeline


@pytest.mark.parametrize("shuffle", [0, 10], ids=["in order", "shuffled"])
def test_stages_of_a_web_dataset(photos: Photos, shuffle: int) -> None:
    attach, crop = labelled(photos)
    dataset = through(photos, attach)
    dataset = (dataset.shuffle(shuffle) if shuffle else dataset).compose(crop)
    batches = list(dataset.batched(8, collation_fn=collate_token_labels(GRID)))
    assert [len(batch) for batch in batches] == [8, 8, 8, 8]
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys) == sorted(every_key(photos))
    assert (keys == every_key(photos)) == (shuffle == 0)
    for batch in batches:
        assert batch.labels.tolist() == [photos.classes[key] for key in batch.keys]
        assert batch.images.shape == (8, 3, SIZE, SIZE)
        assert batch.targets is not None
        assert batch.targets.dense().shape == (8, 1 + GRID**2, NUM_CLASSES)


@pytest.mark.parametrize("shuffle", [0, 10], ids=["in order", "shuffled"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_stages_of_a_data_pipeline_in_worker_processes(photos: Photos, workers: int, shuffle: int) -> None:
    loader = wds.WebLoader(pipeline(photos, shuffle=shuffle), batch_size=None, num_workers=workers)
    batches = list(loader)
    assert sorted(key for batch in batches for key in batch.keys) == sorted(every_key(photos))
    for batch in batches:
        assert batch.labels.tolist() == [photos.classes[key] for key in batch.keys]
        assert batch.targets is not None
        torch.testing.assert_close(batch.targets.dense().sum(-1), torch.ones(len(batch), 1 + GRID**2))


@pytest.mark.slow
def test_stages_in_spawned_workers(photos: Photos) -> None:
    loader = wds.WebLoader(pipeline(photos), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert list(batched_boxes(loader)) == every_key(photos)


def test_stages_survive_pickling(photos: Photos) -> None:
    there = pickle.loads(pickle.dumps(pipeline(photos)))
    for ours, theirs in zip(pipeline(photos), there, strict=True):
        torch.testing.assert_close(theirs.images, ours.images, rtol=0, atol=0)
        torch.testing.assert_close(theirs.targets.dense(), ours.targets.dense(), rtol=0, atol=0)


def test_a_batch_of_a_worker_can_be_moved(photos: Photos) -> None:
    batch = next(iter(wds.WebLoader(pipeline(photos), batch_size=None, num_workers=1)))
    moved = batch.to("meta", non_blocking=True)
    assert moved.keys == batch.keys
    assert moved.plan is None
    devices = {part.device.type for part in (moved.images, moved.labels, moved.boxes, moved.flip, moved.targets)}
    assert devices == {"meta"}
    assert batch.images.device.type == "cpu"


# Labels


@pytest.mark.parametrize("as_store", [False, True], ids=["path", "store"])
def test_samples_get_the_maps_of_their_keys(photos: Photos, as_store: bool) -> None:
    store = open_store(photos.labels)
    for sample in through(photos, attach_score_maps(store if as_store else str(photos.labels))):
        expected = store[sample["__key__"]]
        assert sample["score_map"].key == expected.key
        assert sample["num_classes"] == NUM_CLASSES
        assert "jpg" in sample
        for name in ("scores", "classes", "tail", "view"):
            np.testing.assert_array_equal(getattr(sample["score_map"], name), getattr(expected, name))


def test_labels_are_read_once_per_tar(photos: Photos, reads: list[str]) -> None:
    dataset = through(photos, attach_score_maps(photos.labels))
    for _ in range(2):
        list(dataset)
        assert reads == [Path(tar).stem for tar in photos.tars]
        reads.clear()


def test_labels_of_interleaved_tars_are_read_once(photos: Photos, reads: list[str]) -> None:
    dataset = through(photos).shuffle(100, initial=100).compose(attach_score_maps(photos.labels))
    urls = [sample["__url__"] for sample in dataset]
    assert sum(one != other for one, other in pairwise(urls)) > 2 * len(photos.tars)
    assert sorted(reads) == [Path(tar).stem for tar in photos.tars]


def test_a_tar_is_let_go_after_its_last_sample(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, one at a time is in memory."""
    held: list[Any] = []

    def spy() -> Any:
        held.append(OrderedDict())
        return held[-1]

    monkeypatch.setattr("loaders.stages.OrderedDict", spy)
    sizes = [len(held[-1]) for _ in through(photos, attach_score_maps(photos.labels))]
    assert max(sizes) == 1
    assert len(held[-1]) == 0


def test_the_number_of_tars_in_memory_is_bounded(
    photos: Photos, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two tars, A B A C A B needs B a second time, not A, which was used in between."""
    monkeypatch.setattr(stages, "MAX_TARS", 2)
    samples = [next(iter(wds.WebDataset(tar, shardshuffle=False))) for tar in photos.tars[:3]]
    order = [0, 1, 0, 2, 0, 1]
    maps = [one["score_map"] for one in attach_score_maps(photos.labels)(samples[number] for number in order)]
    assert [one.key for one in maps] == [photos.keys[number][0] for number in order]
    assert [stem[-2:] for stem in reads] == ["00", "01", "02", "01"]


@pytest.mark.parametrize(
    "url",
    [
        "train-00.tar",
        "s3://bucket/folder/train-00.tar",
        "https://host/train-00.tar?key=a/b.tar#x",
        "pipe:curl -s -L https://host/train-00.tar || true",
        "pipe:aws s3 cp 's3://bucket/train-00.tar' -",
        "/odd folder/a#b?c/train-00.tar",
    ],
)
def test_tars_are_known_by_the_names_webdataset_takes(photos: Photos, url: str) -> None:
    (sample,) = attach_score_maps(photos.labels)([{"__key__": photos.keys[0][0], "__url__": url}])
    assert sample["score_map"].key == photos.keys[0][0]


# Crops


@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_boxes_travel_with_pixels_and_targets(photos: Photos, decoder: str) -> None:
    """Pixels are those of Pillow for the box, targets those of the label set's map for it."""
    store = open_store(photos.labels)
    flips: set[bool] = set()
    dataset = through(photos, *labelled(photos, decoder=decoder, interpolation="bilinear"))
    for sample in dataset:
        (left, top, right, bottom), flip = sample["box"], sample["flip"]
        image = Image.open(io.BytesIO(photos.images[sample["__key__"]])).convert("RGB")
        box_px = (left * image.width, top * image.height, right * image.width, bottom * image.height)
        assert np.allclose(box_px, np.round(box_px))
        corners = (round(box_px[0]), round(box_px[1]), round(box_px[2]), round(box_px[3]))
        crop = image.crop(corners).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        expected = np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)
        assert sample["image"].dtype == torch.uint8
        difference = sample["image"].permute(1, 2, 0).numpy().astype(int) - expected
        assert np.abs(difference).max() <= 2
        batch = collate_token_labels(GRID, interpolate="probs", mean=(0.0,) * 3, std=(1.0,) * 3)([sample])
        torch.testing.assert_close(batch.images[0], sample["image"] / 255)
        torch.testing.assert_close(batch.boxes, torch.tensor([sample["box"]], dtype=torch.float32))
        map_, flips = store[sample["__key__"]], flips | {flip}
        targets = token_targets(
            torch.from_numpy(map_.scores)[None],
            torch.from_numpy(map_.classes.astype(np.int64))[None],
            box_in_map(torch.tensor([sample["box"]], dtype=torch.float64), torch.from_numpy(map_.view)[None].double()),
            flip=torch.tensor([flip]),
            grid=(GRID, GRID),
            num_classes=NUM_CLASSES,
            interpolate="probs",
            tail=torch.from_numpy(map_.tail)[None],
        )
        assert batch.targets is not None
        torch.testing.assert_close(batch.targets.dense(), targets.dense(), rtol=0, atol=1e-6)
    assert flips == {False, True}


def test_every_pass_has_other_crops_and_every_run_the_same(photos: Photos) -> None:
    first, again, other = (through(photos, random_resized_crop_with_box(SIZE, seed=seed)) for seed in (1, 1, 2))
    passes = [boxes_by_key(first) for _ in range(3)]
    assert passes == [boxes_by_key(again) for _ in range(3)]
    assert different(passes[0], passes[1])
    assert different(passes[1], passes[2])
    assert different(passes[0], boxes_by_key(other))


def different(some: dict[str, Any], others: dict[str, Any]) -> bool:
    assert set(some) == set(others)
    return len([key for key in some if some[key] == others[key]]) < len(some) / 4


@pytest.mark.parametrize("persistent", [False, True], ids=["new workers", "lasting workers"])
def test_every_epoch_of_worker_processes_has_other_crops(photos: Photos, persistent: bool) -> None:
    loader = wds.WebLoader(pipeline(photos), batch_size=None, num_workers=1, persistent_workers=persistent)
    torch.manual_seed(0)
    first, second = batched_boxes(loader), batched_boxes(loader)
    assert different(first, second)
    if not persistent:
        torch.manual_seed(0)
        assert batched_boxes(loader) == first


def test_workers_and_repetitions_have_crops_of_their_own(photos: Photos) -> None:
    """Two workers that read the same tar, each twice: as with resampled shards."""
    crop = random_resized_crop_with_box(SIZE)
    dataset = wds.DataPipeline(wds.SimpleShardList(photos.tars[:1] * 2), wds.tarfile_to_samples(), crop)
    torch.manual_seed(0)
    samples = list(wds.WebLoader(dataset, batch_size=None, num_workers=2))
    assert len(samples) == 4 * len(photos.keys[0])
    assert len({(sample["__key__"], *sample["box"]) for sample in samples}) > 0.9 * len(samples)


# Batches


def test_images_alone_make_batches_without_targets(photos: Photos) -> None:
    dataset = through(photos, random_resized_crop_with_box((24, 32)))
    batch = next(iter(dataset.batched(8, collation_fn=collate_token_labels(GRID))))
    assert batch.targets is None
    assert batch.images.shape == (8, 3, 24, 32)
    assert batch.labels.tolist() == [photos.classes[key] for key in batch.keys]


def test_without_grid_there_is_the_image_level_target_alone(photos: Photos) -> None:
    samples = list(through(photos, *labelled(photos)))[:5]
    alone, with_tokens = collate_token_labels(None)(samples), collate_token_labels(GRID)(samples)
    assert alone.targets is not None
    assert alone.targets.dense().shape == (5, 1, NUM_CLASSES)
    torch.testing.assert_close(alone.targets.dense(), with_tokens.targets.dense()[:, :1])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("members", "label"),
    [
        pytest.param({"cls": b"7"}, 7, id="cls"),
        pytest.param({"cls": 7}, 7, id="cls after decode"),
        pytest.param({"json": b'{"label": 3}'}, 3, id="json"),
        pytest.param({"json": {"label": 3}}, 3, id="json after decode"),
        pytest.param({"cls": b"dog"}, -1, id="no number"),
        pytest.param({"cls": -7}, -1, id="negative"),
        pytest.param({"json": {}}, -1, id="json without label"),
        pytest.param({}, -1, id="none"),
    ],
)
def test_labels_of_samples(members: Sample, label: int) -> None:
    image = encode(smooth_image(np.random.default_rng(0), 30, 20))
    samples = random_resized_crop_with_box(SIZE)([{"__key__": "a", "__url__": "t.tar", "jpg": image, **members}])
    assert collate_token_labels()(list(samples)).labels.tolist() == [label]
