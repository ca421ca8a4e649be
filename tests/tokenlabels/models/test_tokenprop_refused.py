"""What TokenProp refuses: arguments, models and images that do not fit."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.tokenlabels.models.families import plain
from tokenlabels.models import DenseClassifier, TokenProp
from tokenlabels.models.features import FeatureError
from tokenlabels.models.tokenprop import TokenDecoder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "l3"}, "loss must be one of 'l1', 'l2', 'perceptual', 'contextual', got 'l3'"),
        ({"loss": "perceptual"}, r"perceptual loss needs a VGG .* vgg=torchvision.models.vgg19"),
        ({"loss": "contextual"}, "contextual loss needs a VGG"),
        ({"loss": "contextual", "vgg": nn.Linear(2, 2)}, "vgg must be a VGG of torchvision"),
        ({"vgg": nn.Linear(2, 2)}, "l2 would not use it"),
        ({"scale": 100}, "scale must be one of 64, 128, 256, got 100"),
        ({"width": 3}, "width must be one of 1, 2, 4, got 3"),
        ({"weight": 0}, "weight must be a number above 0, got 0"),
        ({"weight": float("nan")}, "weight must be a number above 0"),
        ({"weight": float("inf")}, "weight must be a number above 0"),
    ],
)
def test_arguments_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenProp(plain("deit"), **arguments)


def test_other_decoders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"in_size must be scale 64 divided by 4, 8, 16, ..., got 32"):
        TokenDecoder(4, in_size=32)
    with pytest.raises(ValueError, match="in_size must be scale 128 divided"):
        TokenDecoder(4, 128, in_size=12)


@pytest.mark.parametrize(
    ("name", "arguments", "image_size", "message"),
    [
        pytest.param("test_resnet", {}, None, "ResNet: it has no patch embedding", id="no-embedding"),
        pytest.param("test_vit", {"img_size": 32, "dynamic_img_size": False}, 48, "no tokens of 48 x 48", id="size"),
        pytest.param("test_vit", {"in_chans": 1}, 32, "of 32 x 32 images of 3 channels", id="grey"),
    ],
)
def test_models_refused(name: str, arguments: dict[str, Any], image_size: int | None, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        TokenProp(timm.create_model(name, **arguments), image_size)
    if name == "test_resnet":
        with pytest.raises(FeatureError, match="ResNet: it has no patch embedding"):
            TokenProp(DenseClassifier(timm.create_model(name), 64))


@pytest.mark.parametrize("shape", [(2, 3, 48, 32), (2, 1, 32, 48), (3, 32, 48)])
def test_images_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"images must be \[B, 3, 32, 48\], got float32 .* TokenProp\(model, image_size\)"
    ):
        TokenProp(plain("deit")).train()(torch.randn(shape))


def test_an_exchanged_embedding_is_noticed() -> None:
    wrapper, images = TokenProp(plain("deit")).train(), torch.randn(4, 3, 32, 48)
    wrapper.model.patch_embed = plain("deit").patch_embed
    with pytest.raises(ValueError, match="VisionTransformer's patch embedding is another module"):
        wrapper(images)
