"""A stage of PVT (arXiv 2102.12122), the first version: positions, a class token if one joins, and blocks;
and what the stages of one model ask of each other and of the image.

Legend: B images, N = h x w tokens of the stage, P its prefix tokens (1 in the last stage, else 0), D its channels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp, resample_abs_pos_embed, to_2tuple
from timm.models import checkpoint
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

from tokenlabels.checks import Grid

norm_layer = partial(LayerNorm, eps=1e-6)
"""Of the blocks, and behind the last stage; those of patch embeddings and of keys have 1e-5."""


class PVTBlock(nn.Module):
    """Pre-norm block with spatial-reduction attention (section 3.3), which PVT v2's attention is as well, and an MLP.

    Args:
        dim: D.
        num_heads, mlp_ratio: of attention and MLP.
        sr_ratio: side of the squares of tokens that a key is made of.
        qkv_bias, attn_drop, proj_drop, drop_path: as in timm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        sr_ratio: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(
            dim,
            num_heads=num_heads,
            sr_ratio=sr_ratio,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **dd,
        )
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens [B, P + N, D] on this grid -> the same."""
        x = x + self.drop_path1(self.attn(self.norm1(x), grid))
        widened: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return widened


class PVTStage(nn.Module):
    """Position embedding, class token in front if there is one, and blocks.

    Args:
        grid_size: of its tokens, (h, w).
        dim: D.
        drop_paths: stochastic depth of each block.
        class_token: whether a class token joins.
        pos_drop: dropout behind the position embedding.
        kwargs: of `PVTBlock`.

    Attributes:
        grid_size, num_prefix_tokens: (h, w) and P.
        pos_embed: [1, P + N, D].
    """

    def __init__(
        self,
        grid_size: Grid,
        dim: int,
        *,
        drop_paths: Sequence[float],
        class_token: bool,
        pos_drop: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grid_size, self.num_prefix_tokens = grid_size, int(class_token)
        self.grad_checkpointing = False
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd)) if class_token else None
        num_tokens = self.num_prefix_tokens + grid_size[0] * grid_size[1]
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop)
        self.blocks = nn.ModuleList(PVTBlock(dim, drop_path=rate, **kwargs, **dd) for rate in drop_paths)

    @property
    def patch_embed(self) -> "PVTStage":
        """What names the grid of `pos_embed`, see `tokenlabels.models.checkpoints.fit_positions`."""
        return self

    def embed(self, x: Tensor) -> Tensor:
        """Embedded patches [B, h, w, D] -> tokens [B, P + N, D] with their positions."""
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        embedded: Tensor = self.pos_drop(x + self.pos_embed)
        return embedded

    def forward(self, x: Tensor) -> Tensor:
        """Embedded patches [B, h, w, D] -> tokens [B, P + N, D]."""
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, self.grid_size) if self.grad_checkpointing else block(x, self.grid_size)
        return x

    def maps(self, tokens: Tensor) -> Tensor:
        """Its tokens [B, P + N, D] -> the patch tokens as maps [B, D, h, w]."""
        patches = tokens[:, self.num_prefix_tokens :]
        return patches.transpose(1, 2).reshape(len(tokens), patches.shape[2], *self.grid_size)

    def set_grid_size(self, grid_size: Grid) -> None:
        """Take another grid: the position embedding is resampled, bicubic and without antialiasing."""
        if grid_size == self.grid_size:
            return
        resampled = resample_abs_pos_embed(
            self.pos_embed, grid_size, self.grid_size, self.num_prefix_tokens, antialias=False
        )
        self.pos_embed = nn.Parameter(resampled.detach(), requires_grad=self.pos_embed.requires_grad)
        self.grid_size = grid_size


def check_stages(*settings: Sequence[float]) -> None:
    """Refuse embed_dims, depths, num_heads, mlp_ratios and sr_ratios that are not those of the same stages."""
    lengths = [len(setting) for setting in settings]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(
            "embed_dims, depths, num_heads, mlp_ratios and sr_ratios must name the same stages, got "
            f"{', '.join(map(str, lengths))} of them"
        )
    if settings[-1][-1] != 1:
        raise ValueError(
            "sr_ratios must end in 1: the class token of the last stage has no place on the grid that a convolution "
            f"reduces; got {tuple(settings[-1])}"
        )


def check_image_size(img_size: int | tuple[int, int], side: int) -> Grid:
    """(height, width) in pixels; refuses images that are no multiple of this side, on which all stages have patches."""
    height, width = to_2tuple(img_size)
    if height % side or width % side:
        raise ValueError(
            f"images of {height} x {width} pixels have no whole patches in every stage; crop or pad them to a "
            f"multiple of {side} pixels"
        )
    return height, width
