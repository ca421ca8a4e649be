"""The Tokens-to-Token module against slow twins of its parts."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenlabels.models.t2t_embed import T2TPatchEmbed, TokenPerformer, soft_split


def small(img_size: tuple[int, int]) -> T2TPatchEmbed:
    """Without dropout; with weights as in a T2T-ViT, but four times as large, so that they do something."""
    torch.manual_seed(0)
    embed = T2TPatchEmbed(img_size, embed_dim=24, token_dim=8, token_drop_rate=0.0)
    for part in embed.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.08)
            nn.init.zeros_(part.bias)
    return embed.eval()


@pytest.mark.parametrize("split", [(7, 4, 2), (3, 2, 1)])
@pytest.mark.parametrize("size", [(16, 16), (8, 20), (9, 7)])
def test_soft_split_window_by_window(split: tuple[int, int, int], size: tuple[int, int]) -> None:
    kernel, stride, padding = split
    maps = torch.randn(2, 3, *size, dtype=torch.float64)
    tokens, grid = soft_split(maps, *split)
    assert tokens.shape == (2, grid[0] * grid[1], 3 * kernel**2)
    for i, j in product(*map(range, grid)):
        expected = torch.zeros(2, 3, kernel, kernel, dtype=torch.float64)
        for row, column in product(range(kernel), repeat=2):
            y, x = i * stride - padding + row, j * stride - padding + column
            if 0 <= y < size[0] and 0 <= x < size[1]:
                expected[:, :, row, column] = maps[:, :, y, x]
        assert torch.equal(tokens[:, i * grid[1] + j], expected.flatten(1))
    # there is no further window that begins inside
    assert all((grid[d] * stride - padding) + kernel > size[d] + padding for d in range(2))


def plain_performer(attention: TokenPerformer, x: Tensor) -> Tensor:
    """Query by query and key by key: the approximated softmax kernel as a matrix over tokens."""
    key, query, value = attention.kqv(functional.layer_norm(x, x.shape[2:], *_affine(attention.norm1))).chunk(3, dim=-1)
    num_features = attention.w.shape[0]

    def feature(vector: Tensor) -> Tensor:
        return torch.stack([((w * vector).sum() - (vector**2).sum() / 2).exp() for w in attention.w]) / math.sqrt(
            num_features
        )

    rows = []
    for b in range(len(x)):
        kernel = torch.stack(
            [torch.stack([feature(q) @ feature(k) for k in key[b]]) for q in query[b]]
        )  # [N, N], positive
        rows.append(kernel @ value[b] / (kernel.sum(dim=1, keepdim=True) + 1e-8))
    x = value + attention.proj(torch.stack(rows))
    return x + attention.mlp(functional.layer_norm(x, x.shape[2:], *_affine(attention.norm2)))


def _affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


@torch.no_grad()
def test_performer_is_attention_by_random_features() -> None:
    torch.manual_seed(0)
    attention = TokenPerformer(12, 6, drop_rate=0.1).double().eval()
    gram = attention.w @ attention.w.T
    torch.testing.assert_close(gram, 3 * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-5)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(attention(x), plain_performer(attention, x))


@torch.no_grad()
def test_tokenizer_step_by_step() -> None:
    embed = small((32, 48)).double()
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    tokens = functional.unfold(x, 7, stride=4, padding=2).mT
    assert tokens.shape == (2, 8 * 12, 147)
    tokens = functional.unfold(embed.attention1(tokens).mT.reshape(2, 8, 8, 12), 3, stride=2, padding=1).mT
    tokens = functional.unfold(embed.attention2(tokens).mT.reshape(2, 8, 4, 6), 3, stride=2, padding=1).mT
    torch.testing.assert_close(embed(x), embed.proj(tokens))


@torch.no_grad()
def test_tokens_are_row_major_and_see_their_place_most() -> None:
    embed = small((48, 64))
    changed = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    before = embed(changed)
    changed[..., 16:32, 48:64] += 3
    assert int((embed(changed) - before)[0].norm(dim=1).argmax()) == 1 * 4 + 3
