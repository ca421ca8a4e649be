"""Similarity of tokens against loops over pairs, tokenizers against what models embed, and decoders against what can
be known."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional

from tests.tokenlabels.models.families import FAMILIES, WITH_EMBEDDING, plain
from tokenlabels.analysis import Reconstruction, Tokenizer, reconstruct, token_similarity
from tokenlabels.models.features import FeatureError
from tokenlabels.models.modulation import modulate, modulations


def similarity_by_pairs(tokens: Tensor) -> Tensor:
    """The mean of the cosines of all pairs."""

    def of_image(rows: Tensor) -> Tensor:
        pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
        return torch.stack([functional.cosine_similarity(rows[i], rows[j], dim=0) for i, j in pairs]).mean()

    return torch.stack([of_image(rows) for rows in tokens.double()])


class TestTokenSimilarity:
    @given(num_tokens=st.integers(2, 9), channels=st.integers(1, 6), seed=st.integers(0, 99))
    @settings(max_examples=30, deadline=None)
    def test_equals_the_pairs(self, num_tokens: int, channels: int, seed: int) -> None:
        tokens = torch.randn(3, num_tokens, channels, generator=torch.Generator().manual_seed(seed))
        found = token_similarity(tokens)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), similarity_by_pairs(tokens), rtol=0, atol=3e-7)

    def test_known_values(self) -> None:
        simplex = torch.eye(4) - 0.25  # as unlike each other as four can be
        tokens = torch.stack([torch.ones(4, 4), torch.eye(4), simplex])
        torch.testing.assert_close(token_similarity(tokens), torch.tensor([1, 0, -1 / 3]), rtol=0, atol=1e-6)

    def test_many_tokens_that_are_almost_the_same_or_not_alike_at_all(self) -> None:
        """3,136 tokens as of Swin: neither cancels."""
        direction = torch.randn(96)
        close = direction + 1e-2 * torch.randn(1, 3136, 96)
        unit = functional.normalize(close.double(), dim=2)
        expected = (unit.sum(1).square().sum(1) - 3136) / (3136 * 3135)
        torch.testing.assert_close(token_similarity(close).double(), expected, rtol=0, atol=1e-6)
        opposite = torch.cat([close[:, :1568], -close[:, :1568]], dim=1)
        assert float(token_similarity(opposite)) == pytest.approx(-1 / 3135, abs=1e-8)

    def test_zero_tokens_are_like_nothing(self) -> None:
        tokens = torch.tensor([[[1.0, 0], [2, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]])
        torch.testing.assert_close(token_similarity(tokens), torch.tensor([1 / 3, 0]))

    @pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 1e38])
    def test_lengths_do_not_matter(self, scale: float) -> None:
        tokens = torch.randn(2, 5, 4).clamp(-2, 2)  # 1e38 times 3 is still finite
        tokens[..., 0] += 1
        atol = 1e-5 if scale > 1e-38 else 1e-3  # numbers this small have few digits themselves
        torch.testing.assert_close(token_similarity(scale * tokens), token_similarity(tokens), rtol=0, atol=atol)

    def test_half_precision_and_autocast_are_computed_in_float32(self) -> None:
        tokens = 300 * torch.randn(2, 6, 8).half()
        with torch.autocast("cpu", torch.bfloat16):
            found = token_similarity(tokens)
        torch.testing.assert_close(found.double(), similarity_by_pairs(tokens), rtol=0, atol=1e-6)

    def test_tokens_that_are_not_finite_are_seen(self) -> None:
        tokens = torch.randn(3, 4, 5)
        tokens[0, 1, 2], tokens[1, 1, 2] = torch.inf, torch.nan
        assert token_similarity(tokens).isnan().tolist() == [True, True, False]

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            pytest.param(torch.ones(2, 1, 4), r"N of at least 2, got float32 \[2, 1, 4\]", id="one token"),
            pytest.param(torch.ones(4, 4), r"floating \[B, N, D\]", id="matrix"),
            pytest.param(torch.ones(2, 4, 0), r"floating \[B, N, D\]", id="no channels"),
            pytest.param(torch.ones(2, 4, 4).long(), "got int64", id="integers"),
            pytest.param([[1.0]], "tokens must be a torch.Tensor", id="list"),
        ],
    )
    def test_refused(self, tokens: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            token_similarity(tokens)


class TestTokenizer:
    @pytest.mark.parametrize("case", WITH_EMBEDDING)
    def test_gives_what_the_model_embeds(self, case: str) -> None:
        model, size = plain(case).eval(), FAMILIES[case][2]
        tokenizer = Tokenizer.of(model, size)
        images = torch.rand(2, 3, *size)
        mean, std = (torch.tensor(timm.data.resolve_model_data_config(model)[key]) for key in ("mean", "std"))
        seen: list[Any] = []
        hook = tokenizer.embedding.register_forward_hook(lambda *call: seen.append(call[-1]))
        with torch.no_grad():
            model.forward_features((images - mean[:, None, None]) / std[:, None, None])
        hook.remove()
        found, expected = tokenizer(images), seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        rows, columns = tokenizer.format.grid
        assert found.shape == (2, rows * columns, tokenizer.format.num_channels)
        assert not found.requires_grad
        if expected.ndim == 4:
            channels_last = expected if tokenizer.format.layout == "NHWC" else expected.permute(0, 2, 3, 1)
            expected = channels_last.flatten(1, 2)
        torch.testing.assert_close(found, expected)

    def test_of_a_modulated_model(self) -> None:
        model = modulate(plain("deit"), "moto", num_entities=3)
        tokenizer = Tokenizer.of(model, (32, 48))
        assert repr(tokenizer) == "Tokenizer(PatchEmbed + MoTo, 2x3 tokens of 192 channels)"
        with torch.no_grad():
            modulations(model)[0].alpha += 100  # type: ignore[operator]
        assert tokenizer(torch.rand(1, 3, 32, 48)).mean() > 90

    def test_puts_the_model_into_evaluation_mode(self) -> None:
        model = plain("fasternet").train()
        tokenizer = Tokenizer.of(model, (64, 96))
        assert not model.training
        assert tokenizer.name == "PatchEmbed"
        torch.testing.assert_close(tokenizer(torch.ones(1, 3, 64, 96)), tokenizer(torch.ones(2, 3, 64, 96))[:1])

    def test_models_without_tokens_are_refused(self) -> None:
        with pytest.raises(FeatureError, match="ResNet: it has no patch embedding"):
            Tokenizer.of(plain("resnet"), (64, 96))
        with pytest.raises(FeatureError, match="gives no tokens of 40 x 40 images: "):
            Tokenizer.of(plain("deit"), (40, 40))


class Upsampled(nn.Module):
    """A decoder in a single layer: every token is a patch of pixels."""

    def __init__(self, channels: int, patch_px: int) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(channels, 3, patch_px, patch_px)

    def forward(self, maps: Tensor) -> Tensor:
        made: Tensor = self.layer(maps)
        return made


def pixel_tokens(images: Tensor) -> Tensor:
    """Patches of 4 x 4 pixels of 64 x 64 images as they are: [B, 256, 48]."""
    return functional.unfold(images, 4, stride=4).mT


def batches_of(images: Tensor, size: int = 8) -> Callable[..., Iterator[Tensor]]:
    return lambda *_: iter(images.split(size))


def blots(num_images: int, side: int = 64, seed: int = 0) -> Tensor:
    """Smooth images in 0..1."""
    coarse = torch.rand(num_images, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return functional.interpolate(coarse, (side, side), mode="bilinear")


def run(embedding_of: Callable[[Tensor], Tensor] = pixel_tokens, **changes: Any) -> Reconstruction:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "grid": (16, 16),
        "channels": 48,
        "batches": batches_of(blots(24)),
        "val_batches": batches_of(blots(10, seed=1)),
        "epochs": 2,
        "decoder": Upsampled(48, 4),
    }
    return reconstruct(embedding_of, **(arguments | changes))


class TestReconstruct:
    def test_tokens_that_hold_everything_and_nothing(self) -> None:
        everything = run(lambda images: pixel_tokens(10 * images - 5), epochs=60)
        nothing = run(lambda images: torch.zeros(len(images), 256, 48), epochs=60)
        assert everything.error < 0.1 * everything.variance
        assert nothing.error > 0.95 * nothing.variance
        assert everything.num_images == 10
        assert everything.train_errors[-1] < 0.1 * everything.train_errors[0]

    def test_figures_of_a_decoder_that_is_known(self) -> None:
        """One that makes zeros: errors are the mean square of normalised pixels, over uneven batches."""
        decoder = Upsampled(48, 4)
        nn.init.zeros_(decoder.layer.weight)
        nn.init.zeros_(decoder.layer.bias)  # type: ignore[arg-type]
        val = blots(10, seed=1)
        found = run(decoder=decoder)
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        pixels = ((val - mean) / std).double()
        assert found.before == pytest.approx(float(pixels.square().mean()), rel=1e-6)
        by_colour = pixels.transpose(0, 1).flatten(1)
        assert found.variance == pytest.approx(float(by_colour.var(dim=1, correction=0).mean()), rel=1e-6)

    def test_optimised_as_in_appendix_a1(self) -> None:
        """Adam, written out for the bias alone, whose gradient is known."""
        decoder = Upsampled(48, 4)
        nn.init.zeros_(decoder.layer.weight)
        decoder.layer.weight.requires_grad_(False)
        nn.init.zeros_(decoder.layer.bias)  # type: ignore[arg-type]
        images = blots(24)
        run(decoder=decoder, epochs=1)
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        bias, first, second = torch.zeros(3, 3, dtype=torch.float64)
        for step, batch in enumerate(images.double().split(8), start=1):
            gradient = 2 * (bias - (batch.mean(dim=(0, 2, 3)) - mean) / std) / 3
            first, second = 0.5 * first + 0.5 * gradient, 0.999 * second + 0.001 * gradient**2
            bias = bias - 1e-3 * (first / (1 - 0.5**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(decoder.layer.bias.detach().double(), bias, rtol=0, atol=1e-6)  # type: ignore[union-attr]

    @pytest.mark.parametrize("side", [32, 64, 96])
    def test_targets_have_64_pixels_whatever_the_input(self, side: int) -> None:
        shapes: set[tuple[int, ...]] = set()

        class Looking(Upsampled):
            def forward(self, maps: Tensor) -> Tensor:
                shapes.add(tuple(maps.shape[1:]))
                return super().forward(maps)

        def tokens(images: Tensor) -> Tensor:
            assert images.shape[2:] == (side, side)
            return functional.unfold(images, side // 16, stride=side // 16).mT[..., :5]

        images = batches_of(blots(8, side))
        channels = 5
        run(tokens, channels=channels, batches=images, val_batches=images, decoder=Looking(channels, 4))
        assert shapes == {(5, 16, 16)}

    def test_tokens_keep_their_places(self) -> None:
        maps: list[Tensor] = []

        class Looking(Upsampled):
            def forward(self, x: Tensor) -> Tensor:
                maps.append(x)
                return super().forward(x)

        images = blots(4)
        run(batches=batches_of(images), val_batches=batches_of(images), decoder=Looking(48, 4))
        torch.testing.assert_close(maps[0], functional.pixel_unshuffle(images, 4))

    def test_the_decoder_of_the_paper_is_made_from_the_seed(self) -> None:
        before = torch.get_rng_state()
        settings = {"batches": batches_of(blots(2)), "val_batches": batches_of(blots(2)), "epochs": 1}
        first, again, other = (
            reconstruct(pixel_tokens, (16, 16), 48, **settings, seed=seed)  # type: ignore[arg-type]
            for seed in (0, 0, 1)
        )
        assert torch.equal(torch.get_rng_state(), before)
        assert first == again
        assert first.before != other.before
        assert first.error < first.before

    def test_the_tokenizer_is_frozen(self) -> None:
        embedding = nn.Conv2d(3, 6, 4, 4)
        weight = embedding.weight.detach().clone()
        run(lambda images: embedding(images).flatten(2).mT, channels=6, decoder=Upsampled(6, 4))
        assert embedding.weight.grad is None
        assert torch.equal(embedding.weight, weight)

    def test_epochs_and_progress_are_told(self) -> None:
        told: list[int] = []
        epochs: list[int] = []

        def batches(epoch: int) -> Iterator[Tensor]:
            epochs.append(epoch)
            return iter(blots(5).split(3))

        found = run(batches=batches, epochs=3, on_batch=told.append)
        assert epochs == [0, 1, 2]
        assert told == [8, 2, *3 * [3, 2], 8, 2]
        assert len(found.train_errors) == 3

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"batches": lambda _: iter(())}, "there are no training images"),
            ({"val_batches": lambda: iter(())}, "there are no validation images"),
            ({"grid": (8, 16)}, r"tokens must be \[8, 128, 48\] on a grid of 8x16, got float32 \[8, 256, 48\]"),
            ({"channels": 3}, r"tokens must be \[8, 256, 3\]"),
            ({"epochs": 0}, "epochs must be an integer of at least 1"),
            ({"decoder": Upsampled(48, 2)}, r"the decoder must make images \[8, 3, 64, 64\], got float32 \[8, 3, 32"),
            ({"embedding_of": lambda images: pixel_tokens(images) * math.nan}, "the reconstruction error is nan"),
        ],
    )
    def test_refused(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            run(**change)
