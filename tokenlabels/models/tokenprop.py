"""TokenProp (What Makes for Good Tokenizers in Vision Transformer?, arXiv 2212.11115, section 6): while a model learns
its task, a small decoder makes the image again from the tokens of its patch embedding (equation 7).

Legend: B images, h x w tokens on their grid, C channels of a token, P positions of a feature map.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenlabels.checks import Grid, check_choice, check_count, check_tensor, describe, is_number
from tokenlabels.models.dense import DenseClassifier, find_image_size
from tokenlabels.models.embedding import embedding_format, find_patch_embedding
from tokenlabels.models.features import FeatureError, FeatureFormat
from tokenlabels.models.reconstruction import Loss, in_full, reconstruction_loss
from tokenlabels.models.wrapper import TrainingWrapper
from tokenlabels.precision import without_autocast

Scale = Literal[64, 128, 256]
Width = Literal[1, 2, 4]

WEIGHT = 0.001
"""Of the reconstruction loss (section 6.3)."""


class ResidualConv(nn.Module):
    """``relu(shortcut(x) + conv(x))`` with a 3 x 3 convolution; the shortcut is 1 x 1 where the channels change."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.shortcut = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, h, w] -> [B, width_out, h, w]."""
        return functional.relu(self.shortcut(x) + self.conv(x))


class TokenDecoder(nn.Module):
    """The decoder of Table 16: tokens -> 196 channels at 16, 256, 256, shuffled to 64 at 32, 64, to 16 at 64, 3.

    Where the table leaves a choice: "Input w Concat, 196" is read as a linear map of each token to 196 channels, its
    place kept, after grids of other sizes are resized to 16 x 16. (196 is also the number of DeiT's tokens; as channels
    they would lose their places, and a decoder would fit one grid only.) "The convolutional layer denotes residual
    blocks" is read as one convolution to a block, without normalisation: that is 7 % of DeiT-S's multiplications, two
    would be 15 % where Table 9 has measured 4.1 % more time. The last convolution is bare, since pixels have a sign.

    Args:
        channels: C.
        scale: side of the image that is made, in pixels. Beyond 64, each further step is a block that widens 16
            channels to 64 and a pixel shuffle (Table 9: "stacking more upsampling layers").
        width: times the channels of every convolution but the last (Table 9).
        in_size: side of the map that tokens are resized to.

    Raises:
        ValueError: no such scale or width, or `in_size` is not `scale` divided by a power of two from 4 up.
    """

    def __init__(self, channels: int, scale: int = 64, width: int = 1, in_size: int = 16) -> None:
        super().__init__()
        check_count("channels", channels)
        check_choice("scale", scale, Scale)
        check_choice("width", width, Width)
        check_count("in_size", in_size)
        steps = (scale // in_size).bit_length() - 1
        if in_size << steps != scale or steps < 2:
            raise ValueError(f"in_size must be scale {scale} divided by 4, 8, 16, ..., got {in_size}")
        self.in_size, self.scale = in_size, scale
        self.proj = nn.Conv2d(channels, 196, 1)
        layers: list[nn.Module] = [ResidualConv(196, 256 * width), ResidualConv(256 * width, 256 * width)]
        layers += [nn.PixelShuffle(2), ResidualConv(64 * width, 64 * width), nn.PixelShuffle(2)]
        for _ in range(steps - 2):
            layers += [ResidualConv(16 * width, 64 * width), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(16 * width, 3, 3, padding=1))

    def forward(self, maps: Tensor) -> Tensor:
        """Tokens on their grid, floating [B, C, h, w] -> images [B, 3, scale, scale]."""
        if tuple(maps.shape[2:]) != (self.in_size, self.in_size):
            maps = _resized(maps, self.in_size).to(maps.dtype)
        made: Tensor = self.layers(self.proj(maps))
        return made


class TokenHook:
    """A forward hook that keeps the output of a patch embedding for whoever has asked for the next one.

    Like `PlanHook` it stays registered, and does nothing unless asked.

    Attributes:
        format: of the output.
        is_on: whether the next output is to be kept.
        tokens: what was kept.
    """

    def __init__(self, embedding_format: FeatureFormat) -> None:
        self.format = embedding_format
        self.is_on = False
        self.tokens: Tensor | None = None

    def __call__(self, _embedding: nn.Module, _args: object, output: Any) -> None:
        """What torch calls behind the embedding. Some return a tuple, the tokens and their grid."""
        if self.is_on:
            self.is_on = False
            self.tokens = output[0] if isinstance(output, tuple) else output


class TokenProp(TrainingWrapper):
    """A model that in training also gives the loss of making its images again from its tokens.

    In training ``tokenprop(images, ...)`` returns (outputs, reconstruction), in evaluation outputs, where outputs are
    what ``model(images, ...)`` returns. Train with ``loss(outputs) + reconstruction``. Tokens are those of the patch
    embedding, before position embedding, class token and MixToken. Nothing is added at inference;
    ``tokenprop.model`` is what you keep.

    Args:
        model: with a patch embedding: ViT, DeiT, Swin, PVT v2 or MLP-Mixer of timm, LV-ViT, ..., or `DenseClassifier`
            or `TLAlign` around one. It is not copied.
        image_size: pixels of the images to come, (height, width), or the side of a square. None takes that of the
            model.
        weight: of the reconstruction loss, lambda of equation 7. With 1 the paper's training diverged (Table 8).
        loss, vgg: see `reconstruction_loss`. What is made is compared with the images as the model gets them,
            normalised, resized to `scale` x `scale` (bilinear, antialiased).
        scale, width: of the decoder, see `TokenDecoder`.

    Attributes:
        model: the model; its patch embedding has a forward hook, which does nothing outside of ``tokenprop(images)``.
        decoder: the decoder. Like `loss` with its VGG it is in the state dict of this wrapper, and not of the model.
        loss: the reconstruction loss, without weight.
        format: of the tokens.
        image_size: (height, width).

    Several threads must not call one instance at the same time: the tokens come from the hook by an attribute.

    Raises:
        FeatureError: the model has no patch embedding, takes no such images, or its tokens have an unknown layout.
        ValueError: no such loss, scale, width or weight, or a loss without its VGG.
    """

    def __init__(
        self,
        model: nn.Module,
        image_size: int | Grid | None = None,
        *,
        weight: float = WEIGHT,
        loss: Loss = "l2",
        scale: int = 64,
        width: int = 1,
        vgg: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not is_number(weight) or not 0 < weight < math.inf:
            raise ValueError(f"weight must be a number above 0, got {weight!r}")
        models = list(_inside(model))
        backbone = models[-1]
        name = type(backbone).__name__
        if image_size is None:
            image_size = next((part.image_size for part in models if isinstance(part, DenseClassifier)), None)
        embedding = find_patch_embedding(backbone)
        if embedding is None:
            raise FeatureError(
                f"{name}: it has no patch embedding (patch_embed, patch_embeds or stem), so that there are no tokens "
                "to make images from; choose a vision transformer"
            )
        self.image_size = find_image_size(backbone, name, image_size)
        self.format = _format(backbone, embedding, name, self.image_size)
        self.weight = weight
        self.model = model
        like = next(model.parameters())
        self.decoder = TokenDecoder(self.format.num_channels, scale, width).to(like.device, like.dtype)
        self.loss = reconstruction_loss(loss, vgg).to(like.device, like.dtype)
        self._hook = TokenHook(self.format)
        # first, because DenseClassifier's hook mixes tokens
        embedding.register_forward_hook(self._hook, prepend=True)

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In training (outputs, reconstruction), in evaluation outputs.

        Args:
            images: floating [B, 3, H_px, W_px], normalised; in training of the size of `image_size`.
            args, kwargs: further arguments of the model, such as a `MixPlan`.

        Returns:
            outputs: the model's.
            reconstruction: scalar, weight times loss, in float32 (float64 for such models).

        Raises:
            ValueError: images of another size, or a patch embedding that was exchanged.
        """
        if not self.training:
            return self.model(images, *args, **kwargs)
        self._check_images(images)
        self._hook.is_on = True
        try:
            outputs = self.model(images, *args, **kwargs)
            tokens = self._hook.tokens
        finally:
            self._hook.is_on, self._hook.tokens = False, None
        if tokens is None:
            raise ValueError(
                f"{type(self.model).__name__}'s patch embedding is another module than when TokenProp was built; build "
                "TokenProp after such changes"
            )
        return outputs, self.weight * self._error(tokens, images)

    def _error(self, tokens: Tensor, images: Tensor) -> Tensor:
        made = self.decoder(self.format.cells(tokens).permute(0, 3, 1, 2))
        error: Tensor = self.loss(in_full(made), _resized(images, self.decoder.scale))
        return error

    def _check_images(self, images: Tensor) -> None:
        check_tensor("images", images)
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            height, width = self.image_size
            raise ValueError(
                f"images must be [B, 3, {height}, {width}], got {describe(images)}; resize them, or build "
                "TokenProp(model, image_size) for their size"
            )


def _inside(model: nn.Module) -> Iterator[nn.Module]:
    """The model and those that it wraps, down to one with a patch embedding."""
    yield model
    inner = getattr(model, "model", None)
    if find_patch_embedding(model) is None and isinstance(inner, nn.Module):
        yield from _inside(inner)


def _format(backbone: nn.Module, embedding: nn.Module, name: str, image_size: Grid) -> FeatureFormat:
    """How the tokens of such images are laid out: a copy of the embedding is tried, so that no statistics move."""
    like = next(backbone.parameters())
    noise = torch.randn(1, 3, *image_size, generator=torch.Generator().manual_seed(0)).to(like)
    embedding = copy.deepcopy(embedding).eval()
    try:
        with torch.no_grad(), without_autocast(like.device):
            return embedding_format(embedding, noise, embedding(noise))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise FeatureError(
            f"{name}: its patch embedding gives no tokens of {image_size[0]} x {image_size[1]} images of 3 channels "
            f"({error}); give the image_size that it is built for, or choose another model"
        ) from error


def _resized(maps: Tensor, side: int) -> Tensor:
    """[B, C, h, w] -> [B, C, side, side], antialiased so that every cell counts, and not in half precision, which the
    CPU cannot do."""
    return functional.interpolate(in_full(maps), (side, side), mode="bilinear", antialias=True)
