"""What the stages say of samples that they cannot use."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from loaders.batch import SampleError
from loaders.stages import attach_score_maps, collate_token_labels, random_resized_crop_with_box
from tests.loaders.photos import Photos, encode, random_maps, smooth_image, write_label_set, write_tar
from tokenlabels.store import LabelStoreError, SkippedRecord

Sample = dict[str, Any]
SIZE, GRID = 32, 4

# WebDataset 1.0.2 leaves the tars that it has read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def _collect_tars() -> Iterator[None]:
    """Not in the tests of others."""
    yield
    gc.collect()


@pytest.fixture
def faulty(tmp_path: Path) -> Callable[..., Sample]:
    """A function that makes a sample; the label set knows the tar t.tar, with good, bad (NaN scores) and skipped."""
    maps = random_maps(np.random.default_rng(0), ["good", "bad"])
    maps.scores[1, 0, 0] = np.nan
    write_label_set(tmp_path / "labels", {"t": maps}, skipped={"t": [SkippedRecord(key="skipped", reason="grey")]})
    good = {"__url__": "/data/t.tar", "__key__": "good", "jpg": encode(smooth_image(np.random.default_rng(0), 30, 20))}

    def make(**changes: Any) -> Sample:
        return {name: value for name, value in {**good, **changes}.items() if value is not None}

    return make


FAULTS = {
    "tar without labels": (
        {"__url__": "/data/u.tar"},
        r"/data/u\.tar: sample 'good': labels: .* no labels of 'u'.*ann",
    ),
    "key without labels": ({"__key__": "k"}, r"/data/t\.tar: sample 'k': labels: .*no such key.*were annotated"),
    "skipped key": ({"__key__": "skipped"}, r"/data/t\.tar: sample 'skipped': labels: .*skipped when.*grey"),
    "damaged labels": ({"__key__": "bad"}, r"/data/t\.tar: sample 'bad': labels: .*not finite.*tokenlabels verify"),
    "no tar": ({"__url__": None}, r"sample 'good': labels: .*keep __url__"),
    "no key": ({"__key__": None}, r"labels: needs samples as WebDataset reads them, got a dict"),
    "no image": ({"jpg": None}, r"/data/t\.tar: sample 'good': crop: .*got none"),
    "decoded image": ({"jpg": np.zeros((4, 4, 3))}, r"/data/t\.tar: sample 'good': crop: .*ndarray.*before \.decode"),
    "damaged image": ({"jpg": b"\xff\xd8\xff"}, r"/data/t\.tar: sample 'good': decode: "),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_name_tar_and_key_or_go_to_the_handler(
    faulty: Callable[..., Sample], tmp_path: Path, change: Sample, message: str
) -> None:
    def stream(handler: Any) -> Iterator[Sample]:
        attach = attach_score_maps(tmp_path / "labels", handler=handler)
        crop = random_resized_crop_with_box(SIZE, handler=handler)
        return crop(attach(iter([faulty(), faulty(**change), faulty()])))

    with pytest.raises(SampleError, match=message):
        list(stream(wds.reraise_exception))
    assert [sample["__key__"] for sample in stream(wds.ignore_and_continue)] == ["good", "good"]
    assert [sample["__key__"] for sample in stream(wds.ignore_and_stop)] == ["good"]


def test_other_errors_of_labels(faulty: Callable[..., Sample], tmp_path: Path) -> None:
    with pytest.raises(LabelStoreError, match="nowhere"):
        attach_score_maps(tmp_path / "nowhere")
    attach = attach_score_maps(tmp_path / "labels")
    for file in (tmp_path / "labels" / "t.zarr").rglob("c"):
        file.rename(file.with_name("gone"))
    with pytest.raises(SampleError, match=r"/data/t\.tar: sample 'good': labels: .*t\.zarr"):
        list(attach([faulty()]))
    with pytest.raises(SampleError, match="got a tuple"):
        list(attach([(b"a", 1)]))  # type: ignore[list-item]


def test_a_stage_behind_decode_says_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", {"a": {"png": encode(smooth_image(np.random.default_rng(0), 9, 9), "PNG")}})
    dataset = wds.WebDataset(str(tmp_path / "t.tar"), shardshuffle=False).decode("rgb8")
    with pytest.raises(SampleError, match=r"t\.tar: sample 'a': crop: .*png as ndarray; put it before \.decode"):
        list(dataset.compose(random_resized_crop_with_box(SIZE)))


def test_collation_names_what_is_missing(photos: Photos) -> None:
    attach, crop = attach_score_maps(photos.labels), random_resized_crop_with_box(SIZE)
    attached = list(wds.WebDataset(photos.tars, shardshuffle=False).compose(attach))[:2]
    with pytest.raises(SampleError, match=r"train-00\.tar: .*img_000.*no image, box, flip; put random_resized"):
        collate_token_labels(GRID)(attached)
    both, image_alone = list(crop([attached[0], {**attached[1], "score_map": None}]))
    del image_alone["score_map"]
    with pytest.raises(SampleError, match=r"train-00\.tar: .*img_001.*no score_map; put attach_score_maps"):
        collate_token_labels(GRID)([both, image_alone])
    with pytest.raises(ValueError, match="labels of one kind"):
        collate_token_labels(GRID)([both, {**both, "num_classes": 3}])
    with pytest.raises(ValueError, match="tokens must be whole pixels"):
        collate_token_labels(5)([both])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"size": 0}, "size"), ({"scale": (0.5, 0.1)}, "scale"), ({"hflip": 2}, "hflip"), ({"decoder": "cv"}, "decoder")],
    ids=["size", "scale", "hflip", "decoder"],
)
def test_arguments_of_the_crop_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_resized_crop_with_box(**arguments)
