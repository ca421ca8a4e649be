"""Samples on their way into a batch: where every output pixel is from, and what the errors say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from loaders.augment_ops import Op
from loaders.batch import HostBatch, SampleError
from loaders.crops import NUM_CROP_UNIFORMS, random_resized_crop
from loaders.dataset import ImageDataset
from loaders.decode import PillowDecoder, get_decoder
from loaders.rand_augment import NOT_APPLIED, AugmentDraw
from loaders.rows import EvaluationCrop, PreparedBatch, RandomCrop, fill_row, sample_error
from loaders.shard_files import ShardFile
from loaders.warp import warp
from tests.loaders.photos import encode, smooth_image, write_tar
from tokenlabels.affine import affine_from_boxes, apply_affine, compose_affine, token_centres
from tokenlabels.tars import TarError

SIZE = (20, 24)
BEFORE = RandomCrop((0.08, 1.0), (3 / 4, 4 / 3), 0.5, "bicubic", augment_before_crop=True)
AFTER = RandomCrop((0.08, 1.0), (3 / 4, 4 / 3), 0.5, "bicubic", augment_before_crop=False)
FILL = torch.tensor([10.0, 20.0, 30.0])


def prepared(
    ops: list[tuple[Op | int, float]], uniforms: np.ndarray[Any, Any], files: list[ShardFile] | None = None
) -> PreparedBatch:
    """A batch of one sample."""
    host = HostBatch(
        number=0,
        keys=("one",),
        labels=np.zeros(1, np.int64),
        boxes=np.zeros((1, 4)),
        flip=np.zeros(1, np.bool_),
        warp=np.eye(2, 3)[None].copy(),
        is_warped=np.zeros(1, np.bool_),
        hash=1,
    )
    host.augment = AugmentDraw.from_ops(
        torch.tensor([[int(op) for op, _ in ops]]), torch.tensor([[argument for _, argument in ops]])
    )
    host.is_warped = host.augment.is_geometric.numpy()
    return PreparedBatch(host, files or [], [0], list(host.keys), uniforms[None])


def output_to_image(host: HostBatch) -> Tensor:
    """What the batch says of its sample, float64 [2, 3]."""
    box = affine_from_boxes(torch.from_numpy(host.boxes), torch.from_numpy(host.flip))
    return compose_affine(output_to_middle=torch.from_numpy(host.warp), middle_to_source=box)[0]


arguments = st.tuples(
    st.floats(-30, 30), st.floats(-0.3, 0.3), st.floats(-0.3, 0.3), st.floats(-0.45, 0.45), st.floats(-0.45, 0.45)
)


@settings(deadline=None, max_examples=60)
@given(arguments, st.integers(0, 10_000), st.integers(1, 90), st.integers(1, 90))
def test_before_the_crop_output_pixels_are_those_of_crop_and_geometry(
    values: tuple[float, ...], seed: int, width: int, height: int
) -> None:
    uniforms = np.random.default_rng(seed).random(NUM_CROP_UNIFORMS + 1)
    batch = prepared(list(zip(tuple(Op)[Op.ROTATE :], values, strict=True)), uniforms)
    image = Image.new("RGB", (width, height))
    BEFORE(PillowDecoder(), image, batch, 0, torch.empty((*SIZE, 3), dtype=torch.uint8))
    assert batch.host.augment is not None
    crop = random_resized_crop(width, height, uniforms.tolist())
    box = torch.tensor(crop.normalised(width, height), dtype=torch.float64)
    points = token_centres((7, 5), dtype=torch.float64)
    in_crop = apply_affine(affine_from_boxes(box, torch.tensor(bool(uniforms[-1] < 0.5))), points)
    in_image = apply_affine(batch.host.augment.sample_affine(0, width, height).double(), in_crop)
    torch.testing.assert_close(apply_affine(output_to_image(batch.host), points), in_image, rtol=0, atol=1e-9)
    assert not batch.host.flip[0], "the flip is part of the warp"
    low, high = batch.host.boxes[0, :2], batch.host.boxes[0, 2:]
    assert ((low >= 0) & (low < high) & (high <= 1)).all()
    # The box holds all of the image that is shown.
    inside = in_image[((in_image >= 0) & (in_image <= 1)).all(dim=1)].numpy()
    assert ((inside >= low - 1e-9) & (inside <= high + 1e-9)).all()


@pytest.mark.parametrize("ops", [[(NOT_APPLIED, 0.0)], [(Op.INVERT, 0.0)]], ids=["nothing", "colours"])
@pytest.mark.parametrize("crop", [BEFORE, AFTER], ids=["before crop", "after crop"])
def test_without_geometry_the_box_is_the_crop(crop: RandomCrop, ops: list[tuple[int, float]]) -> None:
    for seed in range(8):
        uniforms = np.random.default_rng(seed).random(NUM_CROP_UNIFORMS + 1)
        batch = prepared(list(ops), uniforms)
        image = smooth_image(np.random.default_rng(seed), 50, 40)
        out = torch.empty((*SIZE, 3), dtype=torch.uint8)
        crop(PillowDecoder(), image, batch, 0, out)
        box = random_resized_crop(50, 40, uniforms.tolist())
        assert tuple(batch.host.boxes[0]) == box.normalised(50, 40)
        assert batch.host.flip[0] == (uniforms[-1] < 0.5)
        expected = torch.empty_like(out)
        PillowDecoder().resize_into(image, box, expected, bool(batch.host.flip[0]), "bicubic")
        assert torch.equal(out, expected)
        assert torch.equal(torch.from_numpy(batch.host.warp[0]), torch.eye(2, 3, dtype=torch.float64))


def test_after_the_crop_geometry_is_left_to_the_device() -> None:
    uniforms = np.random.default_rng(0).random(NUM_CROP_UNIFORMS + 1)
    batch = prepared([(Op.ROTATE, 20.0)], uniforms)
    batch.host.warp[0, 0, 2] = 0.25
    AFTER(PillowDecoder(), Image.new("RGB", (50, 40)), batch, 0, torch.empty((*SIZE, 3), dtype=torch.uint8))
    assert tuple(batch.host.boxes[0]) == random_resized_crop(50, 40, uniforms.tolist()).normalised(50, 40)
    assert batch.host.warp[0, 0, 2] == 0.25


@pytest.mark.parametrize("shares", [(3.0, 0.0), (-3.0, 0.0), (0.0, 3.0), (0.0, -3.0), (2.5, -4.0)])
def test_a_crop_outside_of_the_image_shows_fill_alone(shares: tuple[float, float]) -> None:
    uniforms = np.random.default_rng(3).random(NUM_CROP_UNIFORMS + 1)
    batch = prepared([(Op.TRANSLATE_X, shares[0]), (Op.TRANSLATE_Y, shares[1])], uniforms)
    out = torch.empty((*SIZE, 3), dtype=torch.uint8)
    BEFORE(PillowDecoder(), Image.new("RGB", (50, 40), (200, 200, 200)), batch, 0, out)
    box_px = batch.host.boxes[0] * [50, 40, 50, 40]
    assert (box_px[2:] - box_px[:2]).min() == pytest.approx(1)
    shown = warp(out.permute(2, 0, 1)[None].float(), torch.from_numpy(batch.host.warp).float(), FILL)
    assert torch.equal(shown, FILL[:, None, None].expand_as(shown))


def open_samples(folder: Path, images: dict[str, bytes]) -> ShardFile:
    tar = folder / "train.tar"
    write_tar(tar, {key: {"jpg": data} for key, data in images.items()})
    return ImageDataset.find(str(tar), folder / "index").shards[0].open()


def failure(file: ShardFile, crop: Any = AFTER) -> SampleError:
    batch = prepared([(NOT_APPLIED, 0.0)], np.full(NUM_CROP_UNIFORMS + 1, 0.5), [file])
    out = torch.empty((*SIZE, 3), dtype=torch.uint8)
    with pytest.raises(SampleError) as caught:
        fill_row(batch, 0, out, get_decoder("torchvision"), crop)
    return caught.value


def test_a_row_is_read_decoded_and_cropped(tmp_path: Path) -> None:
    image = smooth_image(np.random.default_rng(0), 50, 40)
    batch = prepared([(NOT_APPLIED, 0.0)], np.full(NUM_CROP_UNIFORMS + 1, 0.5))
    out = torch.zeros((*SIZE, 3), dtype=torch.uint8)
    with open_samples(tmp_path, {"one": encode(image, "PNG")}) as file:
        batch.files.append(file)
        read_seconds, decode_seconds = fill_row(batch, 0, out, get_decoder("pillow"), AFTER)
    expected = torch.empty_like(out)
    box = random_resized_crop(50, 40, batch.uniforms[0].tolist())
    PillowDecoder().resize_into(image, box, expected, False, "bicubic")
    assert torch.equal(out, expected)
    assert read_seconds > 0
    assert decode_seconds > 0


def test_the_evaluation_crop_says_what_it_shows() -> None:
    batch = prepared([(NOT_APPLIED, 0.0)], np.zeros(NUM_CROP_UNIFORMS + 1))
    crop = EvaluationCrop(crop_pct=0.5, interpolation="bicubic")
    crop(PillowDecoder(), Image.new("RGB", (80, 40)), batch, 0, torch.empty((20, 20, 3), dtype=torch.uint8))
    np.testing.assert_allclose(batch.host.boxes[0], [0.375, 0.25, 0.625, 0.75])


def test_errors_name_tar_key_and_stage(tmp_path: Path) -> None:
    with open_samples(tmp_path, {"one": b"no image"}) as file:
        decoding = failure(file)

        def broken_crop(*_: Any) -> None:
            raise ValueError("no room")

        good = smooth_image(np.random.default_rng(0), 50, 40)
        (tmp_path / "good").mkdir()
        with open_samples(tmp_path / "good", {"one": encode(good)}) as good_file:
            cropping = failure(good_file, broken_crop)
            path = Path(good_file.path)
            path.write_bytes(path.read_bytes()[:700])
            reading = failure(good_file)
    assert str(decoding).startswith(f"{tmp_path / 'train.tar'}: sample 'one': decode: ")
    assert str(cropping) == f"{tmp_path / 'good' / 'train.tar'}: sample 'one': crop: no room"
    assert str(reading).startswith(f"{tmp_path / 'good' / 'train.tar'}: sample 'one': read: the tar was truncated")
    assert str(reading).count("sample 'one'") == 1
    assert isinstance(reading.__cause__, TarError)
    assert [error.is_of_tar for error in (decoding, cropping, reading)] == [False, False, True]


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        pytest.param("broken", "a.tar: sample 'k': decode: broken", id="plain"),
        pytest.param("a.tar: sample 'k': broken", "a.tar: sample 'k': decode: broken", id="names the sample"),
        pytest.param("a.tar: sample 'k' has no image", "a.tar: sample 'k': decode: has no image", id="in a sentence"),
        pytest.param("b.tar: sample 'k': broken", "a.tar: sample 'k': decode: b.tar: sample 'k': broken", id="another"),
    ],
)
def test_what_names_the_sample_does_not_do_so_twice(reason: str, message: str) -> None:
    assert str(sample_error("a.tar", "k", "decode", reason)) == message
