"""Tokens-to-Token module of T2T-ViT (arXiv 2101.11986, section 3.1): an image is split softly, into windows that
overlap, three times. Between two splits the tokens look at each other, by a Performer (arXiv 2009.14794).

Legend: B images, H_px x W_px pixels, N = h x w tokens, C channels before, E channels of a token in the module, F random
features, D channels of the tokens that come out.
"""

import math
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.layers.format import nchw_to
from timm.models import checkpoint
from torch import Tensor, nn
from torch.nn import functional

from tokenlabels.checks import Grid
from tokenlabels.precision import without_autocast

PATCH_SIZE = 16
"""Pixels from one token to the next: the product of the strides of the three splits."""

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
"""Kernel, stride and padding of the three soft splits (section 3.3: patches of 7, 3, 3 that overlap by 3, 1, 1)."""

_LEAST = 1e-8
"""Added to the sum of a query's weights, as published: what looks at nothing gets nothing."""


def soft_split(maps: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Grid]:
    """Overlapping windows of a map as tokens, zeros beyond its border.

    Args:
        maps: [B, C, h, w].
        kernel, stride, padding: of the square windows.

    Returns:
        Tokens [B, N', C * kernel * kernel] in row-major order, channel first, then row and column in the window; and
        their grid (h', w').
    """
    rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in maps.shape[2:])
    windows = functional.unfold(maps, kernel, padding=padding, stride=stride)
    return windows.transpose(1, 2), (rows, columns)


class TokenPerformer(nn.Module):
    """One head of attention with positive random features, and an MLP: tokens [B, N, C] -> [B, N, E].

    Time and memory are linear in N. The skip connection around attention is the value, because the width changes.
    Random features are drawn once and neither trained nor drawn again, as published.

    Args:
        in_dim: C.
        dim: E; there are half as many random features, F.
        drop_rate: dropout behind attention and behind the MLP; always there in the published code.
    """

    w: Tensor

    def __init__(
        self,
        in_dim: int,
        dim: int,
        drop_rate: float = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim, device=device, dtype=dtype)
        self.kqv = nn.Linear(in_dim, 3 * dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop_rate)
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(dim, dim, device=device, dtype=dtype),
            nn.Dropout(drop_rate),
        )
        self.register_buffer("w", torch.empty(max(1, dim // 2), dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the random features: orthogonal rows, sqrt(F) long."""
        drawn = nn.init.orthogonal_(torch.empty_like(self.w, dtype=torch.float32))
        self.w.copy_(drawn * math.sqrt(len(drawn)))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] -> [B, N, E]."""
        key, query, value = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        x = value + self.drop(self.proj(self._attend(query, key, value)))
        widened: Tensor = x + self.mlp(self.norm2(x))
        return widened

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax attention, approximately, [B, N, E] each -> [B, N, E]. In float32 at least: it takes exponentials."""
        with without_autocast(value.device):
            query, key = self._features(query), self._features(key)
            brought = query @ (key.mT @ value.to(key.dtype))
            total = query @ key.sum(dim=1).unsqueeze(-1)
            return (brought / (total + _LEAST)).to(value.dtype)

    def _features(self, x: Tensor) -> Tensor:
        """``exp(w x - |x|^2 / 2) / sqrt(F)``, [B, N, E] -> [B, N, F] (Performer, equation 5)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        exponents = x @ self.w.to(x.dtype).T - x.square().sum(dim=-1, keepdim=True) / 2
        return exponents.exp() / math.sqrt(len(self.w))


class T2TPatchEmbed(PatchEmbed):
    """Tokens-to-Token module (section 3.1): split, Performer, split, Performer, split, linear. Every 16 pixels a token.

    Args:
        img_size, in_chans, embed_dim, bias: in pixels and channels, as of `timm.layers.PatchEmbed`.
        patch_size: 16, which the strides of the splits come to.
        token_dim: E.
        token_drop_rate: dropout of the Performers.
        kwargs: further arguments of `timm.layers.PatchEmbed`.

    Raises:
        ValueError: patches of another size, or images of no whole patches.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = PATCH_SIZE,
        in_chans: int = 3,
        embed_dim: int = 384,
        *,
        token_dim: int = 64,
        token_drop_rate: float = 0.1,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("dynamic_img_pad"):
            raise ValueError("dynamic_img_pad is not supported: pad images to whole patches before the model")
        _check_patch_size(patch_size)
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, device=device, dtype=dtype, **kwargs)
        (first, *_), (second, *_), (third, *_) = SPLITS
        self.attention1 = TokenPerformer(in_chans * first**2, token_dim, token_drop_rate, device=device, dtype=dtype)
        self.attention2 = TokenPerformer(token_dim * second**2, token_dim, token_drop_rate, device=device, dtype=dtype)
        proj = nn.Linear(token_dim * third**2, embed_dim, bias=bias, device=device, dtype=dtype)
        self.proj = proj  # type: ignore[assignment] # timm's is a convolution
        self.grad_checkpointing = False

    def _init_img_size(self, img_size: Any) -> Any:
        """timm's image size, grid and number of patches; refuses what is not made of whole patches."""
        found = super()._init_img_size(img_size)
        if found[0] is not None:
            _check_whole(*found[0])
        return found

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size.

        Raises:
            ValueError: another patch size was asked for, or an image size of no whole patches.
        """
        if patch_size is not None:
            _check_patch_size(patch_size)
        super().set_input_size(img_size=img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the Performers compute activations again in backward, to save memory."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H_px, W_px] -> tokens [B, N, D], or what `output_fmt` says.

        Raises:
            ValueError: images of another size than the model is built for, or of no whole patches where it is dynamic.
        """
        self._check_size(x.shape[2], x.shape[3])
        x, grid = soft_split(x, *SPLITS[0])
        for attention, split in ((self.attention1, SPLITS[1]), (self.attention2, SPLITS[2])):
            x = checkpoint(attention, x) if self.grad_checkpointing else attention(x)
            x, grid = soft_split(_as_maps(x, grid), *split)
        x = self.proj(x)
        if not self.flatten:
            x = nchw_to(_as_maps(x, grid), self.output_fmt)
        tokens: Tensor = self.norm(x)
        return tokens

    def _check_size(self, height: int, width: int) -> None:
        if self.strict_img_size and self.img_size is not None and (height, width) != self.img_size:
            raise ValueError(
                f"images are {height} x {width} pixels, the model takes {self.img_size[0]} x {self.img_size[1]}; build "
                "it with their img_size, or call set_input_size"
            )
        _check_whole(height, width)


def _as_maps(tokens: Tensor, grid: Grid) -> Tensor:
    """[B, h * w, E] -> [B, E, h, w]."""
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid)


def _check_patch_size(patch_size: object) -> None:
    if patch_size not in (PATCH_SIZE, (PATCH_SIZE, PATCH_SIZE)):
        raise ValueError(
            f"patch_size must be {PATCH_SIZE}, which the strides of the three soft splits come to, got {patch_size!r}"
        )


def _check_whole(height: int, width: int) -> None:
    if height % PATCH_SIZE or width % PATCH_SIZE:
        raise ValueError(
            f"images of {height} x {width} pixels have no whole patches of {PATCH_SIZE} pixels; crop or pad them to a "
            "multiple"
        )
