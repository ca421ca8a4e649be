"""Classifiers applied per cell, against a twin that cuts out each cell and puts it through the head by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from annotate.cells import CellClassifier, FeatureFormat, TeacherError, feature_format
from annotate.specs import PRESETS


def _model(name: str, image_size: tuple[int, int], **arguments: Any) -> Any:
    """A model of timm with random weights that answers differently to different cells."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=20, **arguments)
    for parameter_name, parameter in model.named_parameters():
        last_name = parameter_name.rpartition(".")[2]
        if last_name in {"gamma", "skipinit_gain", "gain"}:
            nn.init.constant_(parameter, 0.7)
        elif parameter.shape[:1] == (20,) and last_name == "weight":
            nn.init.normal_(parameter, std=4 / parameter[0].numel() ** 0.5)
        elif last_name == "bias":
            nn.init.normal_(parameter, std=0.3)
    _calibrate(model, image_size)
    return model.eval()


def _calibrate(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Set the running statistics of batch norm from noise, so that features neither vanish nor explode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.7, 1.4)
    if norms:
        with torch.no_grad():
            model.train()(torch.randn(4, 3, *image_size))


def _cell_by_cell(one_cell: Callable[[int, int], Tensor], grid: tuple[int, int]) -> Tensor:
    """[1, H, W, K] from a function that returns the logits [1, K] of one cell."""
    rows = [torch.stack([one_cell(i, j) for j in range(grid[1])], dim=1) for i in range(grid[0])]
    return torch.stack(rows, dim=1)


def _assert_answers_vary(logits: Tensor) -> None:
    """A test against the twin proves something only where the cells do not all say the same."""
    assert logits.flatten(1, 2).std(dim=1).mean() > 0.005 * logits.std()
    assert logits.std() > 1e-3


MAPS = {
    "efficientnet-b0": ("efficientnet_b0", (64, 96), (2, 3)),
    "efficientnet-b3": ("efficientnet_b3", (64, 64), (2, 2)),
    "tiny-efficientnet": ("test_efficientnet", (96, 64), (3, 2)),
    "nfnet-f0": ("dm_nfnet_f0", (32, 64), (1, 2)),
    "tiny-nfnet": ("test_nfnet", (96, 64), (3, 2)),
    "resnest": ("resnest14d", (64, 96), (2, 3)),
    "resnet": ("resnet18", (64, 96), (2, 3)),
    "tiny-resnet": ("test_resnet", (64, 64), (2, 2)),
    "resnet-mlp-head": ("resnet50_mlp", (32, 64), (1, 2)),
    "convnext": ("convnext_atto", (64, 96), (2, 3)),
    "tiny-convnext": ("test_convnext", (64, 64), (2, 2)),
    "ghostnet": ("ghostnet_050", (64, 96), (2, 3)),
    "mobilenetv3": ("mobilenetv3_small_050", (64, 96), (2, 3)),
    "regnet": ("regnetx_002", (64, 96), (2, 3)),
    "maxvit": ("test_coatnet", (160, 160), (5, 5)),
}
LINEAR_HEADS = ("efficientnet-b0", "efficientnet-b3", "nfnet-f0", "tiny-nfnet", "resnest", "resnet", "regnet")


@pytest.mark.parametrize("case", MAPS)
@torch.inference_mode()
def test_maps_match_cells_cut_out_one_at_a_time(case: str) -> None:
    name, image_size, grid = MAPS[case]
    model = _model(name, image_size)
    classifier = CellClassifier(model, name, image_size)
    images = torch.randn(2, 3, *image_size)
    logits = classifier(images)
    features = model.forward_features(images)
    expected = _cell_by_cell(lambda i, j: model.forward_head(features[:, :, i : i + 1, j : j + 1]), grid)
    assert classifier.format == FeatureFormat("NCHW", grid, features.shape[1], num_prefix_tokens=0)
    _assert_answers_vary(expected)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    if case in LINEAR_HEADS:
        torch.testing.assert_close(
            logits.mean((1, 2)), model(images), rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )


@pytest.mark.parametrize("channels_last", [False, True], ids=["plain", "channels-last"])
@torch.inference_mode()
def test_swin_maps_have_their_channels_at_the_end(channels_last: bool) -> None:
    model = _model("swin_tiny_patch4_window7_224", (64, 96), img_size=(64, 96))
    images = torch.randn(2, 3, 64, 96)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    classifier = CellClassifier(model, "swin", (64, 96))
    logits = classifier(images)
    features = model.forward_features(images)
    expected = _cell_by_cell(lambda i, j: model.head.fc(features[:, i, j]), (2, 3))
    assert classifier.format.layout == "NHWC"
    _assert_answers_vary(expected)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits.mean((1, 2)), model(images), rtol=1e-4, atol=1e-4)


TOKENS = {
    "class-token": ({"global_pool": "token"}, 1),
    "mean": ({"global_pool": "avg"}, 1),
    "mean-without-class-token": ({"global_pool": "avg", "class_token": False}, 0),
    "registers": ({"global_pool": "token", "reg_tokens": 4}, 5),
    "registers-mean": ({"global_pool": "avg", "reg_tokens": 4}, 5),
    "attention-pool": ({"global_pool": "map", "class_token": False}, 0),
    "attention-pool-registers": ({"global_pool": "map", "reg_tokens": 2}, 3),
}


@pytest.mark.parametrize("case", TOKENS)
@torch.inference_mode()
def test_patch_tokens_go_through_every_kind_of_pooling(case: str) -> None:
    arguments, num_prefix_tokens = TOKENS[case]
    model = _model("vit_tiny_patch16_224", (32, 48), img_size=(32, 48), depth=2, **arguments)
    images = torch.randn(2, 3, 32, 48)
    classifier = CellClassifier(model, "vit", (32, 48))
    logits = classifier(images)
    tokens = model.forward_features(images)[:, num_prefix_tokens:]

    def one_cell(i: int, j: int) -> Tensor:
        token = tokens[:, 3 * i + j]
        pooled = token if model.attn_pool is None else model.attn_pool(token[:, None])
        return model.head(model.fc_norm(pooled))

    expected = _cell_by_cell(one_cell, (2, 3))
    assert classifier.format == FeatureFormat("NLC", (2, 3), tokens.shape[2], num_prefix_tokens)
    _assert_answers_vary(expected)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments", "image_size", "grid"),
    [
        pytest.param("mixer_s32_224", {"img_size": (64, 96)}, (64, 96), (2, 3), id="mixer"),
        pytest.param("test_vit", {"dynamic_img_size": True}, (64, 96), (4, 6), id="vit-of-flexible-size"),
        pytest.param("twins_svt_small", {}, (64, 96), (2, 3), id="twins"),
        pytest.param("levit_128s", {"img_size": 128}, (128, 128), (2, 2), id="levit"),
        pytest.param("xcit_nano_12_p16_224", {}, (64, 96), (4, 6), id="xcit"),
    ],
)
def test_grid_of_token_models(
    name: str, arguments: dict[str, Any], image_size: tuple[int, int], grid: tuple[int, int]
) -> None:
    assert CellClassifier(timm.create_model(name, **arguments).eval(), name, image_size).format.grid == grid


@pytest.mark.parametrize("name", PRESETS)
@torch.inference_mode()
def test_presets_have_the_grid_of_their_stride(name: str) -> None:
    full_name, size = PRESETS[name]
    with torch.device("meta"):
        model = timm.create_model(full_name).eval()
        features = model.forward_features(torch.empty(1, 3, size, size))
    grid = feature_format(model, full_name, features, (size, size)).grid
    assert grid == (-(-size // 32), -(-size // 32))
    if name == "dm_nfnet_f6":
        assert grid == (18, 18)


class _Plain(nn.Module):
    """The smallest classifier of timm's shape: strided convolution, mean, linear layer."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 6
        self.stem = nn.Conv2d(3, 6, 8, stride=8)
        self.fc = nn.Linear(6, 5)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.stem(images)

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))


class _WeighsPositions(_Plain):
    def forward_head(self, features: Tensor) -> Tensor:
        ramp = torch.linspace(0.5, 1.5, features.shape[3])
        return self.fc((features * ramp / ramp.mean()).mean((2, 3)))


class _CountsCells(_Plain):
    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.sum((2, 3)))


class _NotFinite(_Plain):
    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3))) / 0


class _NeedsManyCells(_Plain):
    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(nn.functional.avg_pool2d(features, 4).mean((2, 3)))


class _ManyMaps(_Plain):
    def forward_features(self, images: Tensor) -> list[Tensor]:
        return [self.stem(images)]


class _FlatFeatures(_Plain):
    def forward_features(self, images: Tensor) -> Tensor:
        return self.stem(images).mean((2, 3))


class _OtherChannels(_Plain):
    def __init__(self) -> None:
        super().__init__()
        self.num_features = 7


class _WrongClassCount(_Plain):
    def __init__(self) -> None:
        super().__init__(num_classes=4)


def test_the_smallest_classifier_is_accepted() -> None:
    assert CellClassifier(_Plain(), "plain", (32, 64)).format.grid == (4, 8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(_WeighsPositions(), "order of the cells", id="weights-per-position"),
        pytest.param(_CountsCells(), "equal cells", id="depends-on-number-of-cells"),
        pytest.param(_NotFinite(), "does not treat all positions alike", id="not-finite"),
        pytest.param(_NeedsManyCells(), "cannot be applied to single cells", id="head-that-fails-on-one-cell"),
        pytest.param(_ManyMaps(), "returns a list", id="list-of-maps"),
        pytest.param(_FlatFeatures(), "cannot tell positions", id="features-without-positions"),
        pytest.param(_OtherChannels(), "cannot tell positions", id="unknown-layout"),
        pytest.param(_WrongClassCount(), "instead of 4 logits", id="wrong-number-of-classes"),
        pytest.param(_Plain(num_classes=0), "no classifier", id="no-classifier"),
        pytest.param(nn.Conv2d(3, 5, 1), "no forward_features", id="no-model-of-timm"),
    ],
)
def test_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(TeacherError, match=rf"^this model: .*{message}"):
        CellClassifier(model, "this model", (64, 64))


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        pytest.param("crossvit_tiny_240", (240, 240), "returns a list", id="crossvit"),
        pytest.param("coat_lite_tiny", (224, 224), "cannot tell positions", id="coat"),
        pytest.param("pit_ti_224", (224, 224), "cannot tell positions", id="pit"),
        pytest.param("resnet50_clip", (64, 64), "equal cells", id="attention-pool-with-position-embedding"),
        pytest.param("vgg11", (224, 224), "order of the cells", id="vgg", marks=pytest.mark.slow),
    ],
)
def test_models_of_timm_that_are_refused(name: str, image_size: tuple[int, int], message: str) -> None:
    model = timm.create_model(name).eval()
    with pytest.raises(TeacherError, match=rf"^{name}: .*{message}"):
        CellClassifier(model, name, image_size)


def test_wrong_image_size_is_refused() -> None:
    with pytest.raises(TeacherError, match=r"^vit: it does not take 100 x 100 images"):
        CellClassifier(timm.create_model("test_vit").eval(), "vit", (100, 100))


def test_running_out_of_memory_on_the_first_image_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(f"{tuple(images.shape)}")

    model = _Plain()
    monkeypatch.setattr(model, "forward_features", out_of_memory)
    with pytest.raises(TeacherError, match="one 64 x 64 image does not fit into the memory of cpu"):
        CellClassifier(model, "big", (64, 64))


def test_the_check_leaves_the_random_state_alone() -> None:
    model = _Plain()
    before = torch.get_rng_state()
    CellClassifier(model, "plain", (32, 32))
    assert torch.equal(torch.get_rng_state(), before)
