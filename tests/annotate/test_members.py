"""One model of a teacher: how it prepares images, and what is recorded of it."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import normalize, to_tensor

from annotate.cells import TeacherError
from annotate.members import TeacherModel, load_model
from annotate.specs import TeacherSpec
from annotate.weights import build_model, state_digest

CPU = torch.device("cpu")


def _pictures(num_images: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_images, height, width, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        pytest.param((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), id="imagenet"),
        pytest.param((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), id="inception"),
        pytest.param((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), id="none"),
    ],
)
def test_normalisation_is_that_of_torchvision(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    loaded = load_model(TeacherSpec("test_resnet", seed=0, image_size=64), CPU)
    model = TeacherModel(loaded.classifier, dataclasses.replace(loaded.info, mean=mean, std=std))
    images = _pictures(2, 40, 56)
    before = images.clone()
    found = model.normalise(images)
    expected = torch.stack([normalize(to_tensor(image.numpy()), mean, std) for image in images])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_the_preparation_comes_from_the_model_itself() -> None:
    spec = TeacherSpec("tf_efficientnet_b0.ap_in1k", seed=0, image_size=160)
    model = load_model(spec, CPU)
    assert (model.info.name, model.info.weights) == (spec.name, "random, seed 0")
    assert (model.info.image_size, model.info.interpolation, model.info.crop_pct) == ((160, 160), "bicubic", 0.875)
    assert (model.info.mean, model.info.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert model.info.digest == state_digest(build_model(spec))
    assert (model.classifier.format.grid, model.classifier.num_classes) == ((5, 5), 1000)
    assert model.class_names is not None
    assert model.class_names[0].startswith("tench")


def test_layers_with_weights_of_five_axes_are_left_alone() -> None:
    model = load_model(TeacherSpec("lambda_resnet26t", seed=0, image_size=128), CPU)
    kinds = {parameter.ndim for parameter in model.classifier.parameters()}
    assert 5 in kinds
    assert all(
        parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in model.classifier.parameters()
        if parameter.ndim == 4
    )


def test_a_head_that_cannot_be_used_per_cell_is_refused_by_name() -> None:
    with pytest.raises(TeacherError, match=r"^resnet50_clip: its head does not treat all positions alike"):
        load_model(TeacherSpec("resnet50_clip", seed=0, image_size=64), CPU)
