"""How the spatial features of a timm image classifier are laid out.

A timm classifier is `forward_head(forward_features(images))`. Its features are maps, channels first (ResNet) or last
(Swin), or tokens (ViT), and its attributes do not always say which. So an image is put through the model, and the
layout is read off what comes back.

Legend: B images, H x W cells, C feature channels, P prefix tokens (class and register tokens).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Layout = Literal["NCHW", "NHWC", "NLC"]
"""Of maps, channels first and last, and of token sequences, whose tokens are in row-major order."""


class FeatureError(ValueError):
    """A model is no classifier with features that have positions; the message names the model and what to do."""


@dataclass(frozen=True)
class FeatureFormat:
    """How the features of one model are laid out at one image size.

    Attributes:
        layout: NCHW and NHWC maps, or NLC token sequences.
        grid: rows and columns of cells, (H, W).
        num_channels: C.
        num_prefix_tokens: P, the tokens in front of the H * W patch tokens; 0 for maps.
    """

    layout: Layout
    grid: tuple[int, int]
    num_channels: int
    num_prefix_tokens: int

    def cells(self, features: Tensor) -> Tensor:
        """Features as the model returns them -> cells [B, H, W, C]."""
        if self.layout == "NCHW":
            return features.permute(0, 2, 3, 1)
        if self.layout == "NHWC":
            return features
        return features[:, self.num_prefix_tokens :].reshape(-1, *self.grid, self.num_channels)

    def features(self, cells_bhwc: Tensor, prefix_bc: Tensor) -> Tensor:
        """Cells -> features as the head takes them; each of the P prefix tokens is `prefix_bc`."""
        if self.layout == "NCHW":
            return cells_bhwc.permute(0, 3, 1, 2)
        if self.layout == "NHWC":
            return cells_bhwc
        prefix = prefix_bc.unsqueeze(1).expand(-1, self.num_prefix_tokens, -1)
        return torch.cat([prefix, cells_bhwc.flatten(1, 2)], dim=1)


def feature_format(model: nn.Module, name: str, features: object, image_size: tuple[int, int]) -> FeatureFormat:
    """Read the layout off the features of images of this size. Works on the meta device too.

    Args:
        model: of timm.
        name: what error messages call it.
        features: what `forward_features` returned.
        image_size: pixels of the images, (height, width).

    Raises:
        FeatureError: several feature maps, or a layout that timm's attributes of the model do not explain.
    """
    if not isinstance(features, Tensor):
        raise FeatureError(
            f"{name}: forward_features returns a {type(features).__name__}, not one feature map; choose another model"
        )
    if features.ndim == 4:
        layout: Layout = "NHWC" if getattr(model, "output_fmt", None) == "NHWC" else "NCHW"
        channels, height, width = (features.shape[layout.index(axis)] for axis in "CHW")
        if channels == getattr(model, "num_features", channels):
            return FeatureFormat(layout, (height, width), channels, num_prefix_tokens=0)
    if features.ndim == 3:
        num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
        num_tokens = features.shape[1] - num_prefix_tokens
        for grid in _token_grids(model, image_size):
            if grid[0] * grid[1] == num_tokens:
                return FeatureFormat("NLC", grid, features.shape[2], num_prefix_tokens)
    raise FeatureError(
        f"{name}: cannot tell positions in features of shape {tuple(features.shape)} from a "
        f"{image_size[0]} x {image_size[1]} image; choose another model"
    )


def _token_grids(model: nn.Module, image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Grids that the model itself names: of its patch embedding, then by the stride of its last stage."""
    grids: list[tuple[int, int]] = []
    for embedding in (getattr(model, "patch_embed", None), getattr(model, "stem", None)):
        grid = getattr(embedding, "grid_size", None)
        # an embedding of flexible size keeps the grid of its nominal size
        if grid is not None and getattr(embedding, "img_size", None) == image_size:
            grids.append((grid[0], grid[1]))
    stages = getattr(model, "feature_info", None)
    if isinstance(stages, list) and stages:
        stride = stages[-1]["reduction"]
        grids.append((-(-image_size[0] // stride), -(-image_size[1] // stride)))
    return grids


def count_classes(model: nn.Module, name: str) -> int:
    """The number of classes of a timm classifier.

    Raises:
        FeatureError: it has no `forward_features`, no `forward_head` or no classifier.
    """
    for method in ("forward_features", "forward_head"):
        if not callable(getattr(model, method, None)):
            raise FeatureError(f"{name}: it has no {method}; choose an image classifier of timm")
    num_classes = getattr(model, "num_classes", 0)
    if not num_classes:
        raise FeatureError(
            f"{name}: it has no classifier (num_classes is 0); choose weights that end in a classifier, such as those "
            "whose tag ends in in1k"
        )
    return int(num_classes)


def probe_features(model: nn.Module, name: str, image_size: tuple[int, int]) -> Tensor:
    """The features of one image of noise, always the same, in the model's dtype and on its device.

    Args:
        model: of timm, in evaluation mode.
        name: what error messages call it.
        image_size: pixels, (height, width).

    Raises:
        FeatureError: the model takes no images of this size, or one does not fit into memory.
    """
    forward_features: Callable[[Tensor], Tensor] = model.forward_features  # type: ignore[assignment]
    parameter = next(model.parameters())
    noise = torch.randn(1, getattr(model, "in_chans", 3), *image_size, generator=torch.Generator().manual_seed(0))
    try:
        return forward_features(noise.to(parameter))
    except torch.OutOfMemoryError as error:
        raise FeatureError(
            f"{name}: one {image_size[0]} x {image_size[1]} image does not fit into the memory of {parameter.device}; "
            "give a smaller image_size"
        ) from error
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise FeatureError(
            f"{name}: it does not take {image_size[0]} x {image_size[1]} images ({error}); give the image_size that it "
            "is built for, or a multiple of its stride"
        ) from error
