"""Equations 2 and 13 against loops over tokens, and the shares of layers against blocks that are run by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tokenlabels.align import TLAlign, TransMix
from tokenlabels.analysis import LayerShares, alignment, label_rmse, layer_shares, similarity_share, token_presence
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier


def similarity_by_loops(mixed: Tensor, own: Tensor, partner: Tensor) -> Tensor:
    """Equation 13 as it is written."""

    def largest(token: Tensor, others: Tensor) -> Tensor:
        return torch.stack([token @ other / (token.norm() * other.norm()) for other in others]).max()

    def share(token: Tensor, of_own: Tensor, of_partner: Tensor) -> Tensor:
        return torch.stack([largest(token, of_own), largest(token, of_partner)]).softmax(0)[0]

    rows = zip(mixed.double(), own.double(), partner.double(), strict=True)
    return torch.stack([torch.stack([share(token, one, other) for token in tokens]) for tokens, one, other in rows])


def presence_by_loops(weights: Tensor) -> Tensor:
    """Equation 2: how much of the sum of an output's weights is a token's, summed over the outputs."""
    num_outputs, num_tokens = weights.shape
    presence = torch.zeros(num_tokens, dtype=torch.float64)
    for output in range(num_outputs):
        total = sum(abs(float(weights[output, token])) for token in range(num_tokens))
        for token in range(num_tokens):
            presence[token] += abs(float(weights[output, token])) / total
    return presence


class TestSimilarityShare:
    @pytest.mark.parametrize("most", [1, 7, 2**24], ids=["token by token", "some at a time", "all at once"])
    def test_equals_the_loops(self, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(alignment, "_MAX_PRODUCTS", most)
        mixed, own, partner = torch.randn(2, 5, 6), torch.randn(2, 4, 6), torch.randn(2, 3, 6)
        found = similarity_share(mixed, own, partner)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), similarity_by_loops(mixed, own, partner), rtol=0, atol=1e-6)

    def test_a_token_that_is_in_one_image_alone(self) -> None:
        basis = torch.eye(4)
        share = similarity_share(3 * basis[None, :2], basis[None, :1], basis[None, 1:2])
        torch.testing.assert_close(share, torch.tensor([[1.0, -1.0]]).sigmoid())

    @given(seed=st.integers(0, 99), scale=st.floats(0.01, 100))
    @settings(max_examples=20, deadline=None)
    def test_bounds_exchange_and_lengths_of_tokens(self, seed: int, scale: float) -> None:
        mixed, own, partner = torch.randn(3, 1, 6, 5, generator=torch.Generator().manual_seed(seed))
        share = similarity_share(mixed, own, partner)
        assert (1 - 1e-6) / (1 + math.e**2) <= share.min()
        torch.testing.assert_close(similarity_share(mixed, partner, own), 1 - share)
        torch.testing.assert_close(similarity_share(scale * mixed, own.flip(1), partner), share)

    def test_half_precision_and_autocast_are_computed_in_float32(self) -> None:
        tokens = torch.randn(3, 2, 4, 8).bfloat16()
        expected = similarity_by_loops(*tokens)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(similarity_share(*tokens).double(), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"own": torch.ones(2, 4, 5)}, r"own must be \[2, T, 6\] as mixed is, got float32 \[2, 4, 5\]"),
            ({"partner": torch.ones(1, 4, 6)}, r"partner must be \[2, T, 6\]"),
            ({"mixed": torch.ones(2, 6)}, r"mixed must be floating \[B, T, D\]"),
            ({"mixed": torch.ones(2, 4, 6, dtype=torch.int64)}, r"mixed must be floating .*got int64"),
            ({"own": torch.ones(2, 0, 6)}, "own must be .* without empty sides"),
            ({"own": torch.ones(2, 4, 6, device="meta")}, "own must be on cpu"),
            ({"own": None}, "own must be a torch.Tensor"),
        ],
    )
    def test_refused(self, change: dict[str, Any], message: str) -> None:
        tokens: dict[str, Any] = {name: torch.ones(2, 4, 6) for name in ("mixed", "own", "partner")}
        with pytest.raises(ValueError, match=message):
            similarity_share(**(tokens | change))


class TestTokenPresence:
    @given(num_outputs=st.integers(1, 6), num_tokens=st.integers(1, 6), seed=st.integers(0, 99))
    @settings(max_examples=30, deadline=None)
    def test_equals_the_loops(self, num_outputs: int, num_tokens: int, seed: int) -> None:
        weights = torch.randn(3, num_outputs, num_tokens, generator=torch.Generator().manual_seed(seed))
        found = token_presence(weights)
        assert found.dtype == torch.float32
        expected = torch.stack([presence_by_loops(matrix) for matrix in weights])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.mean(dim=-1), torch.full((3,), num_outputs / num_tokens))

    def test_of_softmax_attention_it_is_the_sum_of_columns(self) -> None:
        attention = torch.randn(2, 3, 5, 5, dtype=torch.float64).softmax(dim=-1)
        torch.testing.assert_close(token_presence(attention), attention.sum(dim=-2))

    def test_doubly_stochastic_weights_change_no_token(self) -> None:
        permutations = torch.stack([torch.eye(6)[torch.randperm(6)] for _ in range(4)])
        torch.testing.assert_close(token_presence(permutations.mean(dim=0)), torch.ones(6))

    def test_a_depthwise_convolution_changes_none_but_near_the_edges(self) -> None:
        """Equation 3. What the edge cuts off is felt one kernel further in: those outputs weigh the others more."""
        kernel = torch.randn(1, 1, 3, 3, dtype=torch.float64)
        units = torch.eye(81, dtype=torch.float64).reshape(81, 1, 9, 9)
        weights = functional.conv2d(units, kernel, padding=1).flatten(1).T  # column i: what token i brings
        presence = token_presence(weights).reshape(9, 9)
        torch.testing.assert_close(presence[2:-2, 2:-2], torch.ones(5, 5, dtype=torch.float64))
        assert not torch.allclose(presence[0], torch.ones(9, dtype=torch.float64), atol=0.05)

    def test_the_first_index_is_the_output(self) -> None:
        everything_from_token_1 = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        assert token_presence(everything_from_token_1).tolist() == [0, 2]

    def test_outputs_that_read_nothing(self) -> None:
        assert token_presence(torch.tensor([[0.0, 0.0], [1.0, -1.0]]).half()).tolist() == [0.5, 0.5]

    @pytest.mark.parametrize("weights", [torch.ones(4), torch.ones(2, 2, dtype=torch.int64)], ids=["vector", "int"])
    def test_refused(self, weights: Tensor) -> None:
        with pytest.raises(ValueError, match=r"weights must be floating \[\.\.\., outputs, tokens\]"):
            token_presence(weights)


class TestLabelRmse:
    def test_by_hand(self) -> None:
        assert label_rmse(torch.tensor([0.5, 0.2]), torch.tensor([0.8, 0.6])) == pytest.approx(math.sqrt(0.25 / 2))
        assert label_rmse(torch.ones(2, 3), torch.ones(2, 3)) == 0

    @pytest.mark.parametrize("num_classes", [2, 10])
    def test_relation_to_label_vectors(self, num_classes: int) -> None:
        initial, aligned = torch.rand(2, 6)
        own, partner = torch.eye(num_classes)[0], torch.eye(num_classes)[1]

        def vectors(share: Tensor) -> Tensor:
            return share[:, None] * own + (1 - share[:, None]) * partner

        of_vectors = (vectors(initial) - vectors(aligned)).square().mean().sqrt()
        assert math.sqrt(2 / num_classes) * label_rmse(initial, aligned) == pytest.approx(float(of_vectors))

    @pytest.mark.parametrize(
        ("aligned", "message"),
        [
            (torch.ones(2, 1), "must be of one shape and not empty"),
            (torch.ones(3, device="meta"), "aligned must be on cpu"),
            (0.5, "aligned must be a torch.Tensor"),
        ],
    )
    def test_refused(self, aligned: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            label_rmse(torch.ones(3), aligned)


def build(name: str, **arguments: Any) -> nn.Module:
    """A small model with sharpened random weights, in evaluation mode."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=4, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.eval()


def vit(**arguments: Any) -> nn.Module:
    return build("vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=24, num_heads=2, **arguments)


def swin() -> nn.Module:
    return build(
        "swin_tiny_patch4_window7_224", img_size=64, depths=(2, 1), embed_dim=16, num_heads=(2, 2), drop_path_rate=0
    )


def pvt() -> nn.Module:
    return build("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 2))


def convnext() -> nn.Module:
    return build("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 16, 24))


def mixer() -> nn.Module:
    return build("mixer_s16_224", img_size=64)


# With the shape of what every block gives, as the block lays it out for one image.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "vit": (vit, 3 * [(17, 24)]),
    "swin": (swin, [(16, 16, 16), (16, 16, 16), (8, 8, 32)]),
    "pvt": (pvt, [(256, 8), (64, 16), (16, 16), (4, 16)]),
    "convnext": (convnext, [(8, 16, 16), (16, 8, 8), *2 * [(16, 4, 4)], (24, 2, 2)]),
    "mixer": (mixer, 8 * [(16, 512)]),
}


def blocks_of(model: Any) -> list[nn.Module]:
    stages = getattr(model, "stages", getattr(model, "layers", None)) if not hasattr(model, "blocks") else [model]
    return [block for stage in stages for block in stage.blocks]


@torch.no_grad()
def tokens_by_hand(
    model: nn.Module, images: Tensor, shapes: list[tuple[int, ...]], channels_first: bool
) -> list[Tensor]:
    """[B, T, D] behind every block, caught by hooks while the plain model runs."""
    caught: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: caught.append(call[-1])) for block in blocks_of(model)]
    model.forward_features(images)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    assert [tuple(x.shape[1:]) for x in caught] == shapes
    return [x.flatten(2).mT if channels_first else x.reshape(len(x), -1, x.shape[-1]) for x in caught]


class TestLayerShares:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_similarity_equals_blocks_run_by_hand(self, family: str) -> None:
        make, shapes = FAMILIES[family]
        model, images, plan = make(), torch.randn(3, 3, 64, 64), MixPlan.cutmix(3, image_size=64)
        shares = layer_shares(TLAlign(model), images, plan)
        runs = [
            tokens_by_hand(model, batch, shapes, family == "convnext")
            for batch in (plan.mix(images), images, images[plan.partner])
        ]
        assert len(shares.similarity) == len(shares.aligned) == len(shapes)
        for found, mixed, own, partner in zip(shares.similarity, *runs, strict=True):
            torch.testing.assert_close(found, similarity_share(mixed, own, partner), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_aligned_shares_end_in_the_training_target(self, family: str) -> None:
        model, images, plan = FAMILIES[family][0](), torch.randn(2, 3, 64, 64), MixPlan.cutmix(2, image_size=64)
        aligned = TLAlign(model)
        shares = layer_shares(aligned.eval(), images, plan)
        aligned.train()  # its dropout rates are 0
        _, target, token_share = aligned(plan.mix(images), plan, return_token_share=True)
        torch.testing.assert_close(shares.aligned_of_classified[-1], target, rtol=0, atol=1e-5)
        torch.testing.assert_close(shares.final_map.flatten(1), token_share, rtol=0, atol=1e-5)
        torch.testing.assert_close(shares.area, plan.share())
        assert shares.similarity_of_classified.shape == shares.aligned_of_classified.shape

    def test_every_block_of_a_vit(self) -> None:
        """Equations 9 and 11 with attention that is computed here."""
        model, images, plan = vit(), torch.randn(2, 3, 64, 64), MixPlan.cutmix(2, image_size=64)
        x = model._pos_embed(model.patch_embed(plan.mix(images)))
        label = torch.cat([plan.share()[:, None], plan.coverage((4, 4)).flatten(1)], dim=1)
        shares = layer_shares(TLAlign(model), images, plan)
        torch.testing.assert_close(shares.initial, plan.coverage((4, 4)))
        for block, found, of_classified in zip(model.blocks, shares.aligned, shares.aligned_of_classified, strict=True):
            q, k, _ = block.attn.qkv(block.norm1(x)).reshape(2, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
            attention = (q @ k.mT / math.sqrt(12)).softmax(dim=-1).mean(dim=1)
            label, x = (label + (attention @ label[..., None])[..., 0]) / 2, block(x)
            torch.testing.assert_close(found, label, rtol=0, atol=1e-5)
            torch.testing.assert_close(of_classified, label[:, 0], rtol=0, atol=1e-5)

    def test_what_is_classified(self) -> None:
        images, plan = torch.randn(2, 3, 64, 64), MixPlan.cutmix(2, image_size=64)
        by_class_token = layer_shares(TLAlign(vit()), images, plan)
        torch.testing.assert_close(
            by_class_token.similarity_of_classified, torch.stack([of[:, 0] for of in by_class_token.similarity])
        )
        by_mean = layer_shares(TLAlign(swin()), images, plan)
        torch.testing.assert_close(
            by_mean.similarity_of_classified, torch.stack([of.mean(dim=1) for of in by_mean.similarity])
        )

    def test_unmixed_samples_are_themselves(self) -> None:
        plan = MixPlan(torch.tensor([0, 0]), torch.stack([torch.ones(64, 64), torch.eye(64)]))
        shares = layer_shares(TLAlign(vit()), torch.randn(2, 3, 64, 64), plan)
        assert all((of[0] - 1).abs().max() < 1e-6 for of in shares.aligned)
        assert all((of[0] - 0.5).abs().max() < 1e-6 for of in shares.similarity), "own and partner are one image"

    def test_token_classifiers_and_settings_change_nothing_or_what_they_should(self) -> None:
        images, plan = torch.randn(2, 3, 64, 64), MixPlan.mixup(2)
        plain, dense = (layer_shares(TLAlign(model), images, plan) for model in (vit(), DenseClassifier(vit(), 64)))
        torch.testing.assert_close(dense.similarity_of_classified, plain.similarity_of_classified)
        cutmix = MixPlan.cutmix(2, image_size=64)
        last = layer_shares(TLAlign(vit(), layers=(-1,)), images, cutmix)
        torch.testing.assert_close(last.aligned[0], last.aligned[1])
        assert not torch.allclose(last.aligned[1], last.aligned[2])

    def test_leaves_no_trace(self) -> None:
        aligned = TLAlign(vit(drop_path_rate=0.5)).train()
        shares = layer_shares(aligned, torch.randn(2, 3, 64, 64, requires_grad=True), MixPlan.cutmix(2, image_size=64))
        assert not shares.initial.requires_grad
        assert not any(of.requires_grad for of in (*shares.similarity, *shares.aligned))
        assert aligned.training
        assert aligned.alignment.seen is None

    def test_repr_says_how_much(self) -> None:
        shares: LayerShares = layer_shares(TLAlign(pvt()), torch.randn(2, 3, 64, 96), MixPlan.mixup(2))
        assert repr(shares) == "LayerShares(2 samples, 4 blocks, 2x3 tokens behind the last)"
        assert shares.final_map.shape == (2, 2, 3)
        assert shares.initial.shape == (2, 16, 24)

    def test_refused(self) -> None:
        images, plan = torch.randn(2, 3, 64, 64), MixPlan.cutmix(2, image_size=64)
        with pytest.raises(ValueError, match="TransMix gives tokens no labels"):
            layer_shares(TransMix(vit()), images, plan)
        with pytest.raises(ValueError, match="a plan of 2 samples"):
            layer_shares(TLAlign(vit()), images[:1], plan)
        with pytest.raises(ValueError, match="no whole patches"):
            layer_shares(TLAlign(convnext()), torch.randn(2, 3, 66, 66), MixPlan.mixup(2))
