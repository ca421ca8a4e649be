"""Other patch embeddings: the refinements of "What Makes for Good Tokenizers in Vision Transformer?" (arXiv
2212.11115, section 4 and appendix A.2), and the convolutional stem that it compares with.

``timm.create_model("deit_small_patch16_224", embed_layer=tokenizer("intra", "local"))``. The grid of tokens stays that
of the patches, whatever the windows overlap.

Legend: B images, N = h x w tokens, D channels.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from timm.layers import Attention, PatchEmbed
from timm.layers.format import nchw_to
from torch import Tensor, nn
from torch.nn import functional

from tokenlabels.checks import check_choice, check_count
from tokenlabels.models.patch_embed import ConvPatchEmbed

Refinement = Literal["intra", "local", "inter", "frozen", "conv_stem"]

_HEAD_CHANNELS = 64  # as in DeiT


def tokenizer(*refinements: Refinement) -> Callable[..., PatchEmbed]:
    """What timm's `embed_layer=` takes (ViT, DeiT, Swin): no refinement is the linear patch embedding.

    Args:
        refinements: "intra", "local" and "inter" in any combination, Table 1 has ("intra",), ("intra", "local") and all
            three; or "frozen", or "conv_stem", alone. See `RefinedPatchEmbed` and `ConvStemEmbed`.

    Raises:
        ValueError: there is no such refinement, one is named twice, or two contradict each other.
    """
    for refinement in refinements:
        check_choice("refinement", refinement, Refinement)
    if len(set(refinements)) < len(refinements):
        raise ValueError(f"refinements must differ, got {refinements}")
    if refinements == ("conv_stem",):
        return ConvStemEmbed
    if "conv_stem" in refinements:
        raise ValueError(f"conv_stem takes the place of the whole patch embedding and goes alone, got {refinements}")
    _check_frozen("frozen" in refinements, refinements)
    chosen: dict[str, Any] = dict.fromkeys(refinements, True)
    return partial(RefinedPatchEmbed, **chosen)


class _MapEmbed(ConvPatchEmbed):
    """A patch embedding of one size of patch whose `maps` a subclass computes; without one it is linear."""

    def maps(self, images: Tensor) -> Tensor:
        """Images [B, 3, H_px, W_px] -> tokens on their grid [B, D, h, w]."""
        tokens: Tensor = self.proj(images)
        return tokens

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H_px, W_px] -> tokens [B, N, D], or what `output_fmt` says.

        Raises:
            ValueError: images of another size than the model is built for, or of no whole patches where it is dynamic.
        """
        self._check_size(x.shape[2], x.shape[3])
        x = self.maps(x)
        tokens: Tensor = self.norm(x.flatten(2).transpose(1, 2) if self.flatten else nchw_to(x, self.output_fmt))
        return tokens


class RefinedPatchEmbed(_MapEmbed):
    """The patch embedding of ViT with the refinements of Table 1, each on or off.

    intra: convolutions with kernels of a quarter, a half and the whole of a patch (4, 8, 16), GELU, their mean over
        each patch, and a 1 x 1 convolution of all scales together (appendix A.2). Each steps by its own kernel. The
        scales share 2 D channels evenly, which with half steps for "local" gives Table 1's 22.3 M parameters and 4.7
        and 5.1 GFLOPs. The paper names no nonlinearity; without one all is linear in the patch, as the plain embedding
        is already.
    local: every kernel steps by half of itself, with a quarter of zeros around the image, and the mean over each patch
        is taken, so that a token sees half a patch more than its own and shares it with its neighbours. Table 1 adds no
        parameters for it: kernels stay, where PVTv2's grow.
    inter: a layer of pre-norm self-attention with a residual on the tokens, with heads of 64 channels. It makes 22.9 M
        parameters of DeiT-S; Table 1 has 25.7, which no single layer gave that we tried (24.7 on all scales before the
        last convolution, 24.1 for a block with an MLP).
    frozen: a random projection that never learns, as in MoCo v3 (arXiv 2104.02057). It is in the state dict.

    Args:
        img_size, patch_size, in_chans, embed_dim, bias: in pixels and channels, as of `timm.layers.PatchEmbed`.
        kwargs: further arguments of `timm.layers.PatchEmbed`.

    Attributes:
        proj: the last convolution.
        scales: with `intra`, the convolutions before, from the smallest kernel.

    Raises:
        ValueError: the patch has no quarters or halves that a refinement needs, or `frozen` is combined with others.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        *,
        intra: bool = False,
        local: bool = False,
        inter: bool = False,
        frozen: bool = False,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        _check_frozen(frozen, [name for name, is_on in (("intra", intra), ("local", local), ("inter", inter)) if is_on])
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        linear = {"stem_kernels": (), "stem_strides": (), "proj_kernel": None}
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, **place, **(kwargs | linear))
        kernels = _kernels(patch_size, intra, local)
        self.is_frozen = frozen
        if intra:
            widths = [2 * embed_dim // len(kernels) + (i < 2 * embed_dim % len(kernels)) for i in range(len(kernels))]
            pairs = zip(widths, kernels, strict=True)
            self.scales = nn.ModuleList(_windows(in_chans, width, kernel, local, **place) for width, kernel in pairs)
            self.proj = nn.Conv2d(2 * embed_dim, embed_dim, 1, bias=bias, **place)
        else:
            self.scales = nn.ModuleList()
            self.proj = _windows(in_chans, embed_dim, patch_size, local, bias=bias, **place)
        self.attn_norm = nn.LayerNorm(embed_dim, eps=1e-6, **place) if inter else nn.Identity()
        self.attn = Attention(embed_dim, _num_heads(embed_dim), qkv_bias=True, **place) if inter else None
        if frozen:
            self.reset_parameters()
            self.proj.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draw a frozen projection again, as MoCo v3 does; timm calls it, after the parts have drawn theirs."""
        if self.is_frozen:
            nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))  # a view
            if self.proj.bias is not None:
                nn.init.zeros_(self.proj.bias)

    def maps(self, images: Tensor) -> Tensor:
        """Images [B, 3, H_px, W_px] -> tokens on their grid [B, D, h, w]."""
        if len(self.scales):
            of_scales = [self._over_patches(functional.gelu(conv(images)), conv) for conv in self.scales]
            tokens: Tensor = self.proj(torch.cat(of_scales, dim=1))
        else:
            tokens = self._over_patches(self.proj(images), self.proj)
        return tokens if self.attn is None else self._attended(tokens)

    def _over_patches(self, windows: Tensor, conv: nn.Module) -> Tensor:
        step: int = conv.stride[0]  # type: ignore[index, assignment]
        per_side = self.patch_size[0] // step
        return windows if per_side == 1 else functional.avg_pool2d(windows, per_side)

    def _attended(self, maps: Tensor) -> Tensor:
        assert self.attn is not None
        tokens = maps.flatten(2).transpose(1, 2)
        attended: Tensor = tokens + self.attn(self.attn_norm(tokens))
        return attended.transpose(1, 2).reshape(maps.shape)


class ConvStemEmbed(_MapEmbed):
    """3 x 3 convolutions of stride 2, each with batch norm and ReLU, and a last one of 1 x 1 (Xiao et al., Early
    Convolutions Help Transformers See Better, arXiv 2106.14881).

    Channels double up to D: 48, 96, 192, 384 for DeiT-S, as in the ViT_C of 4 GFLOPs. That model also has a block less,
    which is left to you: ``depth=11``.

    Args:
        patch_size: a power of two of at least 2; there are as many convolutions as halvings.
        others: as of `RefinedPatchEmbed`.

    Attributes:
        stem: the convolutions before the last.
        proj: the last.

    Raises:
        ValueError: the patch size is no power of two.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        linear = {"stem_kernels": (), "stem_strides": (), "proj_kernel": None}
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, **place, **(kwargs | linear))
        self.num_convs = num_convs = patch_size.bit_length() - 1
        if patch_size < 2 or patch_size != 1 << num_convs:
            raise ValueError(f"patch_size must be a power of two, for a stem of strides of 2, got {patch_size}")
        channels = [in_chans, *(max(1, embed_dim >> (num_convs - number)) for number in range(1, num_convs + 1))]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(channels):
            conv = nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False, **place)
            layers += [conv, nn.BatchNorm2d(width_out, **place), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(channels[-1], embed_dim, 1, bias=bias, **place)

    def maps(self, images: Tensor) -> Tensor:
        """Images [B, 3, H_px, W_px] -> tokens on their grid [B, D, h, w]."""
        tokens: Tensor = self.proj(self.stem(images))
        return tokens


def _windows(in_chans: int, width: int, kernel: int, is_overlapping: bool, **kwargs: Any) -> nn.Conv2d:
    """A convolution whose windows tile the image, or overlap by half."""
    if not is_overlapping:
        return nn.Conv2d(in_chans, width, kernel, stride=kernel, **kwargs)
    return nn.Conv2d(in_chans, width, kernel, stride=kernel // 2, padding=kernel // 4, **kwargs)


def _kernels(patch_size: int, intra: bool, local: bool) -> tuple[int, ...]:
    """Sides of the windows in pixels, or a ValueError where the patch cannot be divided into them."""
    check_count("patch_size", patch_size)
    wanted = (4 if intra else 1) * (4 if local else 1)
    if patch_size % wanted:
        names = " and ".join(name for name, is_on in (("intra", intra), ("local", local)) if is_on)
        raise ValueError(
            f"patch_size must be a multiple of {wanted} for {names} (windows of a quarter of a patch; windows that "
            f"overlap by half are padded by a quarter of themselves), got {patch_size}"
        )
    return (patch_size // 4, patch_size // 2, patch_size) if intra else (patch_size,)


def _num_heads(channels: int) -> int:
    most = max(1, channels // _HEAD_CHANNELS)
    return next(heads for heads in range(most, 0, -1) if channels % heads == 0)


def _check_frozen(is_frozen: bool, refinements: Any) -> None:
    others = [name for name in refinements if name != "frozen"]
    if is_frozen and others:
        raise ValueError(f"frozen keeps the plain projection as it was drawn, and cannot be combined with {others}")
