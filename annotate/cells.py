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

import torch
from torch import Tensor, nn

from tokenlabels.models.features import FeatureError, FeatureFormat, count_classes, feature_format, probe_features

# Rounding of float32 leaves differences below 1e-4 of the spread of the logits, and TF32 convolutions below 1e-3; heads
# with weights or embeddings per position differ by a few per cent of it or more.
_SPREAD_TOLERANCE = 5e-3
_ROUNDING_TOLERANCE = 1e-5


class TeacherError(ValueError):
    """A model, its weights or its settings cannot make token labels; the message names the model and what to do."""


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
        self.name = name
        try:
            self.num_classes = count_classes(model, name)
            self.model = model.eval()
            with torch.inference_mode():
                features = probe_features(model, name, image_size)
            self.format: FeatureFormat = feature_format(model, name, features, image_size)
        except FeatureError as error:
            raise TeacherError(str(error)) from error
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


def _forward_features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return model.forward_features  # type: ignore[return-value]
