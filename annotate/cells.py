"""A timm classifier applied at every position of its own feature map.

A timm classifier is `forward_head(forward_features(images))`, and its head pools the map to one vector before it
classifies. A map of a single cell pools to that cell. So the head, fed one cell at a time, says what the classifier
thinks of each position, whatever the head does after pooling. That is the score map of ReLabel (arXiv 2101.05022) and
Token Labeling (arXiv 2104.10858, section 3.2), without cutting the head open.

It holds for a head that treats positions alike: permuting the cells changes nothing, and a map of equal cells is worth
one cell. Every model is tested for both when it is loaded, and refused if it fails.

Legend: B images, H x W cells, C feature channels, K classes, P prefix tokens (class and register tokens).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Layout = Literal["NCHW", "NHWC", "NLC"]

# Rounding of float32 leaves differences below 1e-4 of the spread of the logits, and TF32 convolutions below 1e-3; heads
# with weights or embeddings per position differ by a few per cent of it or more.
_SPREAD_TOLERANCE = 5e-3
_ROUNDING_TOLERANCE = 1e-5


class TeacherError(ValueError):
    """A model, its weights or its settings cannot make token labels; the message names the model and what to do."""


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


class CellClassifier(nn.Module):
    """Turns an image classifier of timm into one that classifies every cell of its feature map.

    Args:
        model: a timm model with `forward_features` and `forward_head`, on its device; put into evaluation mode.
        name: what error messages call it.
        image_size: pixels of the images to come, (H, W).

    Attributes:
        format: layout of the features; `format.grid` is the grid of the score map.
        num_classes: K.

    Raises:
        TeacherError: the model has no classifier, takes no images of this size, returns features of unknown layout, or
            its head does not treat positions alike.
    """

    def __init__(self, model: nn.Module, name: str, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.num_classes = _num_classes(model, name)
        self.model = model.eval()
        self.name = name
        features = _probe(model, name, image_size)
        self.format = feature_format(model, name, features, image_size)
        self._check_head(features)

    def cells(self, images: Tensor) -> Tensor:
        """Normalised images float [B, 3, H_px, W_px] -> feature cells [B, H, W, C]."""
        return self.format.cells(_forward_features(self.model)(images))

    def logits(self, cells_bhwc: Tensor) -> Tensor:
        """Feature cells -> the class logits of every cell, [B, H, W, K]."""
        single_cells = cells_bhwc.reshape(-1, 1, 1, cells_bhwc.shape[-1])
        logits = self._head(single_cells, prefix_bc=single_cells[:, 0, 0])
        return logits.reshape(*cells_bhwc.shape[:3], -1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images float [B, 3, H_px, W_px] -> logits [B, H, W, K]."""
        return self.logits(self.cells(images))

    def _head(self, cells_bhwc: Tensor, prefix_bc: Tensor) -> Tensor:
        head: Callable[[Tensor], Tensor] = self.model.forward_head  # type: ignore[assignment]
        return head(self.format.features(cells_bhwc, prefix_bc))

    @torch.inference_mode()
    def _check_head(self, features: Tensor) -> None:
        """Feed the head random cells as large as real ones: singly, tiled over the grid, and permuted."""
        height, width = self.format.grid
        real = self.format.cells(features)
        scale = real.float().square().mean().sqrt()
        generator = torch.Generator().manual_seed(0)
        cells = torch.randn(1, height * width + 1, self.format.num_channels, generator=generator).to(real)
        cells = cells * torch.where(scale > 0, scale, 1.0)
        first, others = cells[:, :1], cells[:, 1:]

        def on_grid(row: Tensor) -> Tensor:
            return self._head(row.reshape(1, height, width, -1), prefix_bc=first[:, 0])

        try:
            single, other = self.logits(cells[:, None, :2])[0, 0]
            tiled = on_grid(first.expand_as(others))[0]
            permuted = on_grid(others)[0], on_grid(others.flip(1))[0]
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
            raise TeacherError(
                f"{self.name}: its head cannot be applied to single cells ({error}); choose another teacher"
            ) from error
        if single.shape != (self.num_classes,):
            raise TeacherError(
                f"{self.name}: its head returns {tuple(single.shape)} per cell instead of {self.num_classes} logits; "
                "choose another teacher"
            )
        tolerance = _SPREAD_TOLERANCE * (single - other).abs().max() + _ROUNDING_TOLERANCE * single.abs().max()
        for left, right, finding in (
            (single, tiled, "a map of equal cells and one such cell differ"),
            (*permuted, "the order of the cells changes the result"),
        ):
            if not (left - right).abs().max() <= tolerance:
                raise TeacherError(
                    f"{self.name}: its head does not treat all positions alike ({finding}: logits up to "
                    f"{float((left - right).abs().max()):.3g} apart, allowed {float(tolerance):.3g}), so it has no "
                    "meaning at a single cell; choose a teacher with plain pooling"
                )


def feature_format(model: nn.Module, name: str, features: object, image_size: tuple[int, int]) -> FeatureFormat:
    """Read the layout off the features of one image. Works on the meta device too.

    Raises:
        TeacherError: several feature maps, or a layout that timm's attributes of the model do not explain.
    """
    if not isinstance(features, Tensor):
        raise TeacherError(
            f"{name}: forward_features returns a {type(features).__name__}, not one feature map; choose another teacher"
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
    raise TeacherError(
        f"{name}: cannot tell positions in features of shape {tuple(features.shape)} from a "
        f"{image_size[0]} x {image_size[1]} image; choose another teacher"
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


def _num_classes(model: nn.Module, name: str) -> int:
    for method in ("forward_features", "forward_head"):
        if not callable(getattr(model, method, None)):
            raise TeacherError(f"{name}: it has no {method}; choose an image classifier of timm")
    num_classes = getattr(model, "num_classes", 0)
    if not num_classes:
        raise TeacherError(
            f"{name}: it has no classifier (num_classes is 0); choose weights that end in a classifier, such as those "
            "whose tag ends in in1k"
        )
    return int(num_classes)


def _forward_features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return model.forward_features  # type: ignore[return-value]


@torch.inference_mode()
def _probe(model: nn.Module, name: str, image_size: tuple[int, int]) -> Tensor:
    """Features of one image of noise."""
    parameter = next(model.parameters())
    noise = torch.randn(1, 3, *image_size, generator=torch.Generator().manual_seed(0))
    try:
        return _forward_features(model)(noise.to(parameter))
    except torch.OutOfMemoryError as error:
        raise TeacherError(
            f"{name}: one {image_size[0]} x {image_size[1]} image does not fit into the memory of {parameter.device}; "
            "give a smaller image_size"
        ) from error
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise TeacherError(
            f"{name}: it does not take {image_size[0]} x {image_size[1]} images ({error}); leave image_size out for "
            "the model's own size, or give a multiple of its stride"
        ) from error
