"""LV-ViT's patch embedding: a few convolutions in place of one linear map (Token Labeling, Tables 8 and 9)."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.layers.format import nchw_to
from torch import Tensor, nn

from tokenlabels.checks import check_count


class ConvPatchEmbed(PatchEmbed):
    """Convolutions, each with batch norm and ReLU, and a last one that makes a token of every patch.

    The stem is ``conv1``, ``bn1``, ``conv2``, ... and the last convolution ``proj``, as in the published checkpoints.

    Args:
        img_size, patch_size, in_chans, embed_dim, bias: in pixels and channels, as of `timm.layers.PatchEmbed`.
        stem_kernels, stem_strides: of the convolutions before the last, in pixels; none is a linear patch embedding.
        stem_channels: of every convolution but the last.
        proj_kernel: of the last; None takes its stride, which is what the stem leaves of the patch size.
        kwargs: further arguments of `timm.layers.PatchEmbed`.

    Raises:
        ValueError: kernels and strides do not fit each other or the patch size.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        *,
        stem_kernels: Sequence[int] = (7, 3, 3),
        stem_strides: Sequence[int] = (2, 1, 1),
        stem_channels: int = 64,
        proj_kernel: int | None = None,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("dynamic_img_pad"):
            raise ValueError("dynamic_img_pad is not supported: pad images to whole patches before the model")
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, device=device, dtype=dtype, **kwargs)
        check_count("patch_size", patch_size)
        if any(kernel % 2 == 0 for kernel in stem_kernels):
            raise ValueError(f"stem_kernels must be odd, so that padding keeps the grid, got {tuple(stem_kernels)}")
        proj_stride, rest = divmod(patch_size, math.prod(stem_strides))
        if len(stem_kernels) != len(stem_strides) or rest or proj_stride < 1:
            raise ValueError(
                f"stem_kernels {tuple(stem_kernels)} and stem_strides {tuple(stem_strides)} do not fit patches of "
                f"{patch_size} pixels; give as many of both, and strides whose product divides the patch size"
            )
        proj_kernel = proj_stride if proj_kernel is None else proj_kernel
        if proj_kernel < proj_stride or (proj_kernel - proj_stride) % 2:
            raise ValueError(
                f"proj_kernel must be {proj_stride} (the stride that is left of the patch size) or more by an even "
                f"number of pixels, got {proj_kernel}"
            )
        channels = [in_chans, *(stem_channels for _ in stem_kernels)]
        self.num_convs = len(stem_kernels)
        for number, (width_in, width_out) in enumerate(pairwise(channels)):
            kernel, stride = stem_kernels[number], stem_strides[number]
            conv = nn.Conv2d(
                width_in, width_out, kernel, stride, (kernel - 1) // 2, bias=False, device=device, dtype=dtype
            )
            self.add_module(f"conv{number + 1}", conv)
            self.add_module(f"bn{number + 1}", nn.BatchNorm2d(width_out, device=device, dtype=dtype))
        padding = (proj_kernel - proj_stride) // 2
        self.proj = nn.Conv2d(
            channels[-1], embed_dim, proj_kernel, proj_stride, padding, bias=bias, device=device, dtype=dtype
        )

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size; patches keep theirs.

        Raises:
            ValueError: another patch size was asked for: kernels of several convolutions cannot be resampled.
        """
        if patch_size is not None and patch_size not in (self.patch_size, self.patch_size[0]):
            raise ValueError(
                f"patch_size is {self.patch_size[0]} and cannot become {patch_size}: build the model with it instead"
            )
        super().set_input_size(img_size=img_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H_px, W_px] -> tokens [B, N, D], or what `output_fmt` says.

        Raises:
            ValueError: images of another size than the model is built for, or of no whole patches where it is dynamic.
        """
        self._check_size(x.shape[2], x.shape[3])
        for number in range(1, self.num_convs + 1):
            norm = self.get_submodule(f"bn{number}")
            x = nn.functional.relu(norm(self.get_submodule(f"conv{number}")(x)))
        x = self.proj(x)
        x = x.flatten(2).transpose(1, 2) if self.flatten else nchw_to(x, self.output_fmt)
        tokens: Tensor = self.norm(x)
        return tokens

    def _check_size(self, height: int, width: int) -> None:
        if self.strict_img_size and (height, width) != self.img_size:
            raise ValueError(
                f"images are {height} x {width} pixels, the model takes {self.img_size[0]} x {self.img_size[1]}; build "
                "it with their img_size, or call set_input_size"
            )
        if height % self.patch_size[0] or width % self.patch_size[1]:
            raise ValueError(
                f"images of {height} x {width} pixels have no whole patches of {self.patch_size[0]} pixels; crop or "
                "pad them to a multiple"
            )
