"""What the patch embedding of a model keeps of an image, and how alike its tokens are (arXiv 2212.11115, sections 3.2
and 4.2, Figure 2, appendix A.1).

Legend: B images, N = h x w tokens of the patch embedding, C or D channels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from timm.data.config import resolve_model_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional

from tokenlabels.checks import Grid, check_count, check_grid, check_tensor, describe
from tokenlabels.models.embedding import embedding_format, find_patch_embedding
from tokenlabels.models.features import FeatureError, FeatureFormat
from tokenlabels.models.modulation import ModulatedEmbedding, modulations
from tokenlabels.models.tokenprop import TokenDecoder
from tokenlabels.precision import without_autocast

SIDE_PX = 64
"""Of the images that are reconstructed."""

_LEARNING_RATE, _BETAS = 1e-3, (0.5, 0.999)  # of Adam, appendix A.1


@torch.no_grad()
def token_similarity(tokens: Tensor) -> Tensor:
    """The mean cosine over all pairs of different tokens of an image, in O(N D).

    Of unit vectors u, ``sum over i != j of u_i . u_j = |sum of u|^2 - sum of |u|^2``. A token that is zero has no
    direction; its cosines count as 0. Tokens that are not finite give NaN.

    Args:
        tokens: floating [B, N, D] with at least two tokens, of any length: neither squares overflow nor small ones are
            lost.

    Returns:
        float32 [B], -1 / (N - 1)..1, computed in float32 with sums in float64, without gradient.

    Raises:
        ValueError: no such tokens.
    """
    check_tensor("tokens", tokens)
    if tokens.ndim != 3 or not tokens.is_floating_point() or tokens.shape[1] < 2 or not tokens.shape[2]:
        raise ValueError(f"tokens must be floating [B, N, D] with N of at least 2, got {describe(tokens)}")
    num_tokens = tokens.shape[1]
    with without_autocast(tokens.device):
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        largest = tokens.abs().amax(dim=2, keepdim=True)
        unit = functional.normalize(tokens / largest.masked_fill(largest == 0, 1), dim=2)
        squares = unit.sum(dim=1, dtype=torch.float64).square().sum(dim=1)
        pairs = squares - unit.square().sum(dim=(1, 2), dtype=torch.float64)
        return (pairs / (num_tokens * (num_tokens - 1))).float()


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """The patch embedding of a model as a function of images: ``tokenizer(images)``, without gradient.

    Position embedding and class token are added behind it and are not part of it; modulation of the tokens, where it
    belongs to the patch embedding, is.

    Attributes:
        embedding: in evaluation mode.
        format: of its output.
        mean, std: of the pixels, 0..1, float32 [3, 1, 1] on the device of the model.
    """

    embedding: nn.Module
    format: FeatureFormat
    mean: Tensor
    std: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, image_size: Grid) -> "Tokenizer":
        """The tokenizer of a timm model, which is put into evaluation mode.

        Args:
            model: on its device.
            image_size: pixels of the images to come, (height, width).

        Raises:
            FeatureError: it has no patch embedding, or one that does not take such images or whose tokens have no
                known layout.
        """
        name = type(model).__name__
        embedding = find_patch_embedding(model)
        if embedding is None:
            raise FeatureError(
                f"{name}: it has no patch embedding (patch_embed, patch_embeds or stem), so that there are no tokens "
                "to look at; choose a transformer"
            )
        model.eval()
        like = next(model.parameters())
        noise = torch.randn(1, 3, *image_size, generator=torch.Generator().manual_seed(0)).to(like)
        try:
            found = embedding_format(embedding, noise, embedding(noise))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise FeatureError(
                f"{name}: its patch embedding gives no tokens of {image_size[0]} x {image_size[1]} images: {error}"
            ) from error
        pixels: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        mean, std = (_pixel_scale(pixels[key], like.device) for key in ("mean", "std"))
        return cls(embedding, found, mean, std)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images float [B, 3, H_px, W_px], 0..1 -> tokens [B, N, C], row-major."""
        output = self.embedding((images - self.mean) / self.std)
        tokens: Tensor = output[0] if isinstance(output, tuple) else output  # some return their grid too
        return self.format.cells(tokens).flatten(1, 2)

    @property
    def name(self) -> str:
        """Of the class of the patch embedding, and of what normalises its tokens."""
        embedding = self.embedding.wrapped if isinstance(self.embedding, ModulatedEmbedding) else self.embedding
        kinds = dict.fromkeys(type(part).__name__ for part in (embedding, *modulations(self.embedding)))
        return " + ".join(kinds)

    def __repr__(self) -> str:
        (height, width), channels = self.format.grid, self.format.num_channels
        return f"Tokenizer({self.name}, {height}x{width} tokens of {channels} channels)"


@dataclass(frozen=True)
class Reconstruction:
    """How well images are made again from their tokens.

    Errors are mean squared differences of pixels that are normalised by ImageNet's mean and standard deviation.

    Attributes:
        error: on validation images, after the last epoch.
        before: the same of the decoder as it began.
        variance: the same of one colour for all pixels, the mean of the validation images: what is known without
            tokens.
        train_errors: of every epoch, on the training images as it went.
        num_images: of validation.
    """

    error: float
    before: float
    variance: float
    train_errors: tuple[float, ...]
    num_images: int


def reconstruct(
    embedding_of: Callable[[Tensor], Tensor],
    grid: Grid,
    channels: int,
    batches: Callable[[int], Iterable[Tensor]],
    val_batches: Callable[[], Iterable[Tensor]],
    *,
    epochs: int = 10,
    seed: int = 0,
    device: str | torch.device = "cpu",
    decoder: nn.Module | None = None,
    on_batch: Callable[[int], object] = lambda _: None,
) -> Reconstruction:
    """Train a decoder from the tokens of a frozen tokenizer to images of 64 x 64 pixels: estimates H(image | tokens).

    As in appendix A.1: Adam with 1e-3 and betas of 0.5 and 0.999, mean squared error, 10 epochs. Targets are the
    images, resized bilinearly with antialiasing. The paper does not say in which units of pixels it counts; here
    targets are normalised by ImageNet's mean and standard deviation, whatever the tokenizer does, so that models which
    normalise differently can be compared.

    Args:
        embedding_of: images -> tokens [B, N, C], row-major, such as a `Tokenizer`. It gets no gradient.
        grid: (h, w) of the tokens.
        channels: C.
        batches: from the number of an epoch to its images, float [B, 3, H_px, W_px], 0..1, of any number and size.
        val_batches: the validation images, from the first; they are gone through twice.
        epochs: over the training images.
        seed: of the decoder's weights. On the CPU all figures are a function of it and the images.
        device: of the decoder; images are moved there.
        decoder: maps [B, C, h, w] -> images [B, 3, 64, 64], trained in place; None is the one of Table 16.
        on_batch: called after every batch, also of validation, with its number of images.

    Raises:
        ValueError: no images, tokens of another shape, a decoder of another one, or an error that is not finite.
    """
    check_grid(grid)
    check_count("channels", channels)
    check_count("epochs", epochs)
    reader = _Reader(embedding_of, grid, channels, torch.device(device), on_batch)
    decoder = (_new_decoder(channels, seed) if decoder is None else decoder).to(device)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=_LEARNING_RATE, betas=_BETAS)
    before, variance, _ = _validate(decoder, reader, val_batches())
    train_errors = [_train(decoder, optimizer, reader, batches(epoch)) for epoch in range(epochs)]
    error, _, num_images = _validate(decoder, reader, val_batches())
    return Reconstruction(error, before, variance, tuple(train_errors), num_images)


@dataclass(frozen=True)
class _Reader:
    """From batches of images to what the decoder is given and is to make of it."""

    embedding_of: Callable[[Tensor], Tensor]
    grid: Grid
    channels: int
    device: torch.device
    on_batch: Callable[[int], object]

    def read(self, batches: Iterable[Tensor], which: str) -> Iterable[tuple[Tensor, Tensor]]:
        """Maps of tokens [B, C, h, w] and images [B, 3, 64, 64]; without any, it is said `which` are missing."""
        mean, std = _pixel_scale(IMAGENET_DEFAULT_MEAN, self.device), _pixel_scale(IMAGENET_DEFAULT_STD, self.device)
        iterator = iter(batches)
        first = next(iterator, None)
        if first is None:
            raise ValueError(f"there are no {which} images")
        for images in chain([first], iterator):
            moved = images.to(self.device)
            targets = functional.interpolate(moved, (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True)
            yield self._maps(moved), (targets - mean) / std
            self.on_batch(len(images))

    @torch.no_grad()
    def _maps(self, images: Tensor) -> Tensor:
        tokens = self.embedding_of(images)
        rows, columns = self.grid
        if tokens.shape != (len(images), rows * columns, self.channels):
            wanted = f"[{len(images)}, {rows * columns}, {self.channels}]"
            raise ValueError(f"tokens must be {wanted} on a grid of {rows}x{columns}, got {describe(tokens)}")
        return tokens.float().mT.reshape(len(images), self.channels, rows, columns)


def _pixel_scale(values: Sequence[float], device: torch.device) -> Tensor:
    """[3, 1, 1]"""
    return torch.tensor(values, device=device)[:, None, None]


def _new_decoder(channels: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # and not the generators of GPUs
        return TokenDecoder(channels, scale=SIDE_PX)


def _train(decoder: nn.Module, optimizer: torch.optim.Optimizer, reader: _Reader, batches: Iterable[Tensor]) -> float:
    """The mean error of one epoch, as it went."""
    decoder.train()
    total = torch.zeros((), dtype=torch.float64, device=reader.device)
    num_images = 0
    for maps, targets in reader.read(batches, "training"):
        loss = _squares(decoder, maps, targets).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach() * len(targets)
        num_images += len(targets)
    return _finite(float(total) / num_images)


@torch.no_grad()
def _validate(decoder: nn.Module, reader: _Reader, batches: Iterable[Tensor]) -> tuple[float, float, int]:
    """Mean error, variance of the pixels around their mean colour, and number of images."""
    decoder.eval()
    errors = torch.zeros((), dtype=torch.float64, device=reader.device)
    moments = torch.zeros(2, 3, dtype=torch.float64, device=reader.device)
    num_images = 0
    for maps, targets in reader.read(batches, "validation"):
        errors += _squares(decoder, maps, targets).sum(dtype=torch.float64)
        pixels = targets.double()
        moments += torch.stack([pixels.sum(dim=(0, 2, 3)), pixels.square().sum(dim=(0, 2, 3))])
        num_images += len(targets)
    num_pixels = num_images * SIDE_PX**2
    mean, mean_square = moments / num_pixels
    return _finite(float(errors) / (3 * num_pixels)), float((mean_square - mean.square()).mean()), num_images


def _squares(decoder: nn.Module, maps: Tensor, targets: Tensor) -> Tensor:
    made: Tensor = decoder(maps)
    if made.shape != targets.shape:
        raise ValueError(f"the decoder must make images {list(targets.shape)}, got {describe(made)}")
    return (made - targets).square()


def _finite(error: float) -> float:
    if not torch.isfinite(torch.tensor(error)):
        raise ValueError(f"the reconstruction error is {error}: the weights, tokens or images hold no finite numbers")
    return error
