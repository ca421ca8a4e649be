"""Colour operations of a batch against timm's on Pillow images, one by one and in layers."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

from loaders.augment_ops import COLOR_OPS, Op
from loaders.color_ops import apply_color
from loaders.rand_augment import NOT_APPLIED, AugmentDraw, RandAugment

TIMM_NAMES = {
    Op.AUTO_CONTRAST: "AutoContrast",
    Op.EQUALIZE: "Equalize",
    Op.INVERT: "Invert",
    Op.POSTERIZE: "Posterize",
    Op.SOLARIZE: "Solarize",
    Op.SOLARIZE_ADD: "SolarizeAdd",
    Op.COLOR: "Color",
    Op.CONTRAST: "Contrast",
    Op.BRIGHTNESS: "Brightness",
    Op.SHARPNESS: "Sharpness",
}
ARGUMENTS = {
    **dict.fromkeys((Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT), (0.0,)),
    Op.POSTERIZE: tuple(map(float, range(1, 10))),
    Op.SOLARIZE: (0.0, 1.0, 26.0, 128.0, 255.0, 256.0),
    Op.SOLARIZE_ADD: (0.0, 1.0, 55.0, 99.0, 128.0),
    **dict.fromkeys((Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS), (0.1, 0.37, 0.9999, 1.0, 1.63, 1.9, 2.8)),
}
WITHOUT_ROUNDING = set(COLOR_OPS) - {Op.AUTO_CONTRAST}
"""Operations whose values are those of Pillow exactly."""


def synthetic() -> Tensor:
    """uint8 [6, 3, 40, 56]: noise, dark noise, one colour, two colours, ramps, one bright pixel."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 40, 56), generator=generator, dtype=torch.uint8)
    images[1] = images[1] // 8 + 3
    images[2] = torch.tensor([7, 200, 128], dtype=torch.uint8)[:, None, None]
    images[3] = torch.where(images[3, :1] > 100, images[2], 255 - images[2])
    images[4] = (torch.arange(40)[:, None] * 2 + torch.arange(56) * 3).clamp(max=255).to(torch.uint8)
    images[5], images[5, 1, 3, 9] = 10, 255
    return images


@pytest.fixture(scope="module")
def photographs(imagenet_sample: Path) -> Tensor:
    """uint8 [12, 3, 96, 128]: parts of ImageNet photographs."""
    images = []
    with tarfile.open(sorted(imagenet_sample.glob("*.tar"))[0]) as tar:
        for member in tar:
            if member.name.endswith((".jpg", ".jpeg", ".JPEG")):
                file = tar.extractfile(member)
                assert file is not None
                picture = Image.open(io.BytesIO(file.read())).convert("RGB").resize((256, 192)).crop((64, 48, 192, 144))
                images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
                if len(images) == 12:
                    break
    return torch.stack(images)


def by_timm(image: Tensor, op: Op, argument: float) -> Tensor:
    """One operation on uint8 [3, H, W] with Pillow."""
    whole = op in (Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD)
    arguments = () if op in (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT) else (int(argument) if whole else argument,)
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    operation: Callable[..., Image.Image] = vars(auto_augment)["NAME_TO_OP"][TIMM_NAMES[op]]
    return torch.from_numpy(np.array(operation(picture, *arguments))).permute(2, 0, 1)


def the_same_for_all(num: int, op: Op, argument: float) -> AugmentDraw:
    return AugmentDraw.from_ops(torch.full((num, 1), int(op)), torch.full((num, 1), argument))


def compare(images: Tensor, op: Op) -> None:
    for argument in ARGUMENTS[op]:
        expected = torch.stack([by_timm(image, op, argument) for image in images]).float()
        actual = apply_color(images.float(), the_same_for_all(len(images), op, argument))
        assert torch.equal(actual, actual.round())
        difference = (actual - expected).abs()
        assert difference.max() <= (0 if op in WITHOUT_ROUNDING else 1)
        assert (difference > 0).float().mean() < 0.05


@pytest.mark.parametrize("op", COLOR_OPS)
def test_photographs_look_as_with_timm(op: Op, photographs: Tensor) -> None:
    compare(photographs, op)


@pytest.mark.parametrize("op", COLOR_OPS)
def test_hard_images_look_as_with_timm(op: Op) -> None:
    compare(synthetic(), op)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 2), (3, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("op", COLOR_OPS)
def test_tiny_images_are_no_exception(op: Op, shape: tuple[int, int]) -> None:
    compare(synthetic()[..., : shape[0], : shape[1]], op)


def test_contrast_is_exact_on_large_images() -> None:
    """The sum of their grey levels is beyond the whole numbers of float32."""
    image = torch.full((1, 3, 300, 400), 200, dtype=torch.uint8)
    image[..., :101] = 201
    image[..., 0, 0] = 90
    compare(image, Op.CONTRAST)


def test_layers_follow_each_other_sample_by_sample() -> None:
    augment = RandAugment.parse("rand-m9-mstd0.5-inc1-n4-p0.9")
    numbers = torch.rand(40, augment.num_uniforms, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    draw = augment.draw(numbers)
    images = synthetic().repeat(7, 1, 1, 1)[:40]
    actual, num_exact = apply_color(images.float(), draw), 0
    for sample in range(40):
        expected, is_exact = images[sample], True
        for op, argument in zip(draw.ops[sample].tolist(), draw.arguments[sample].tolist(), strict=True):
            if op in COLOR_OPS:
                expected = by_timm(expected, Op(op), argument)
                is_exact = is_exact and op in WITHOUT_ROUNDING
        if is_exact:
            num_exact += 1
            assert torch.equal(actual[sample], expected.float())
    assert num_exact > 25
    assert len(draw.color_runs) > 20


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_images_are_overwritten_only_on_request(inplace: bool, memory_format: torch.memory_format) -> None:
    images = synthetic().float().contiguous(memory_format=memory_format)
    before = images.clone()
    augmented = apply_color(images, the_same_for_all(6, Op.INVERT, 0.0), inplace=inplace)
    assert torch.equal(augmented, 255 - before)
    assert torch.equal(images, augmented if inplace else before)


def test_nothing_to_do_changes_nothing() -> None:
    images = synthetic().float()
    draw = AugmentDraw.from_ops(torch.tensor([[NOT_APPLIED, Op.ROTATE]] * 6), torch.ones(6, 2))
    assert torch.equal(apply_color(images, draw), images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (synthetic(), "images must be float32"),
        (synthetic().float().permute(0, 2, 3, 1), "images must be float32"),
        (synthetic()[:5].float(), "draw must be of 5 samples"),
    ],
    ids=["bytes", "channels last", "another batch"],
)
def test_other_images_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_color(images, the_same_for_all(6, Op.INVERT, 0.0))


@pytest.mark.gpu
def test_cuda_gives_the_same_images(cuda: torch.device) -> None:
    augment = RandAugment.parse("rand-m9-mstd0.5-inc1-n4-p0.9")
    numbers = torch.rand(60, augment.num_uniforms, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    images, draw = synthetic().repeat(10, 1, 1, 1).float(), augment.draw(numbers)
    on_cuda, draw_on_cuda = images.to(cuda), draw.to(cuda, non_blocking=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = apply_color(on_cuda, draw_on_cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual.cpu(), apply_color(images, draw))
