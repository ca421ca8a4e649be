"""PVT (Pyramid Vision Transformer, arXiv 2102.12122), the first version: timm has the second.

Four stages, each behind a patch embedding of its own. Keys are reduced by a strided convolution, and a class token
joins in the last stage.

Legend: B images, N = h x w tokens of a stage, P its prefix tokens (1 in the last stage, else 0), D its channels.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any, Literal

import torch
from timm.layers import LayerNorm, PatchEmbed, calculate_drop_path_rates, get_device_dtype, global_pool_nlc
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from tokenlabels.checks import Grid, check_choice
from tokenlabels.models.pvt_stage import PVTStage, check_image_size, check_stages, norm_layer
from tokenlabels.models.pvt_weights import fit_checkpoint, init_weights

Pooling = Literal["token", "avg", ""]
"""What is classified: the class token, as published, the mean of the patch tokens, or each token."""

_patch_norm_layer = partial(LayerNorm, eps=1e-5)


class PyramidVisionTransformer(nn.Module):
    """PVT v1 as a classifier of timm's kind. Features are the tokens of the last stage, the class token first.

    Args:
        img_size: (height, width) in pixels, or the side of a square. Every stage must have whole patches and whole
            squares of keys: multiples of 32 for the published sizes.
        patch_size: pixels of a patch of the first stage; those of the others are 2 x 2 tokens.
        num_classes: K; 0 makes a backbone that returns features.
        global_pool: see `Pooling`.
        embed_dims, depths, num_heads, mlp_ratios, sr_ratios: of each stage; keys of the last are not reduced.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout behind the position embeddings.
        drop_path_rate: stochastic depth of the last block.
        device, dtype: of the parameters.
        kwargs: qkv_bias, attn_drop, proj_drop of `PVTBlock`.

    Attributes:
        patch_embeds: an `nn.ModuleList`; each takes maps [B, C, H, W] and returns normalised patches [B, h, w, D]. A
            module that does more may take the place of one.
        stages: an `nn.ModuleList` of `PVTStage`, each behind its patch embedding.
        img_size: (height, width) in pixels.

    Raises:
        ValueError: lists of unequal length, keys of the last stage reduced, or images of no whole patches.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pooling = "token",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_stages(embed_dims, depths, num_heads, mlp_ratios, sr_ratios)
        check_choice("global_pool", global_pool, Pooling)
        self.strides = [patch_size * 2**number for number in range(len(depths))]
        self._side = math.lcm(*(stride * ratio for stride, ratio in zip(self.strides, sr_ratios, strict=True)))
        self.img_size = check_image_size(img_size, self._side)
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[-1]
        self.num_prefix_tokens = 1

        rates: Iterator[float] = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))  # type: ignore[arg-type]
        self.patch_embeds, self.stages = nn.ModuleList(), nn.ModuleList()
        for number, (width, dim) in enumerate(pairwise([in_chans, *embed_dims])):
            side = 2 if number else patch_size
            embed = PatchEmbed(
                self._map_size(number), side, width, dim, norm_layer=_patch_norm_layer, output_fmt="NHWC", **dd
            )
            stage = PVTStage(
                embed.grid_size,
                dim,
                drop_paths=list(islice(rates, depths[number])),
                class_token=number == len(depths) - 1,
                pos_drop=pos_drop_rate,
                num_heads=num_heads[number],
                mlp_ratio=mlp_ratios[number],
                sr_ratio=sr_ratios[number],
                **kwargs,
                **dd,
            )
            self.patch_embeds.append(embed)
            self.stages.append(stage)
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{number}"}
            for number, (dim, stride) in enumerate(zip(embed_dims, self.strides, strict=True))
        ]
        self.norm: nn.Module = norm_layer(self.num_features, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(self.num_features, num_classes, **dd) if num_classes else nn.Identity()
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        """The class token alone, as published: position embeddings decay."""
        return {name for name, _ in self.named_parameters() if name.endswith("cls_token")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of names that group parameters by depth: by stage, or by block."""
        stage = r"^(?:patch_embeds|stages)\.(\d+)"
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (stage, (0,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embeds\.0|^stages\.0\.pos_embed", "blocks": stage if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks compute activations again in backward, to save memory."""
        for _, stage in self._pairs():
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The linear layer, or an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Pooling | None = None) -> None:
        """Classify into other classes, or pool otherwise. 0 classes leave the features."""
        if global_pool is not None:
            check_choice("global_pool", global_pool, Pooling)
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd: dict[str, Any] = get_device_dtype(self)  # type: ignore[no-untyped-call]
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes else nn.Identity()
        self.head.apply(init_weights).train(self.training)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size; position embeddings are resampled.

        Raises:
            ValueError: images of no whole patches.
        """
        self.img_size = check_image_size(img_size, self._side)
        for number, (embed, stage) in enumerate(self._pairs()):
            for module in embed.modules():  # it may be inside a module that does more
                if isinstance(module, PatchEmbed):
                    module.set_input_size(self._map_size(number))
            stage.set_grid_size(self._map_size(number + 1))
        update_model_input_size(self, self.img_size)

    def _pairs(self) -> list[tuple[Any, Any]]:
        """Every patch embedding with its stage."""
        return list(zip(self.patch_embeds, self.stages, strict=True))

    def _map_size(self, number: int) -> Grid:
        """Rows and columns of what the patch embedding of this stage gets: pixels, or tokens of the stage before."""
        stride = self.strides[number - 1] if number else 1
        return self.img_size[0] // stride, self.img_size[1] // stride

    def check_images(self, images: Tensor) -> None:
        """Refuse images of another size than the model's.

        Raises:
            ValueError: they are not [B, C, *img_size].
        """
        if tuple(images.shape[2:]) != self.img_size:
            raise ValueError(
                f"images are {' x '.join(map(str, images.shape[2:]))} pixels, the model takes {self.img_size[0]} x "
                f"{self.img_size[1]}; build it with their img_size, or call set_input_size"
            )

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, H_px, W_px] -> normalised tokens of the last stage [B, 1 + N, D], the class token first."""
        return self._forward_stages(x)[0]

    def _forward_stages(self, x: Tensor, num_stages: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, P + N, D] of the last of these stages, normalised behind all, and the map [B, D, h, w] of each."""
        self.check_images(x)
        tokens, maps = x, [x]
        for embed, stage in self._pairs()[:num_stages]:
            tokens = stage(embed(maps[-1]))
            maps.append(stage.maps(tokens))
        return self.norm(tokens) if len(maps) > len(self.stages) else tokens, maps[1:]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Images -> tokens as of `forward_features`, and the maps [B, D, h, w] of stages.

        Args:
            x: images [B, 3, H_px, W_px].
            indices: of the stages; a number is that many of the last, None all.
            norm: whether the map of the last stage is normalised too.
            stop_early: whether stages after the last of them are left out, and tokens are then those of that stage.
            output_fmt: "NCHW".
            intermediates_only: whether only the maps are returned.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.stages), indices)
        tokens, maps = self._forward_stages(x, last + 1 if stop_early else None)
        if norm and len(maps) == len(self.stages):
            maps[-1] = self._pairs()[-1][1].maps(tokens)
        maps = [maps[number] for number in wanted]
        return maps if intermediates_only else (tokens, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Throw away the stages after the last of these, and what classifies them. Returns the numbers of stages."""
        wanted: list[int]
        wanted, last = feature_take_indices(len(self.stages), indices)
        is_shorter = last + 1 < len(self.stages)
        self.patch_embeds, self.stages = self.patch_embeds[: last + 1], self.stages[: last + 1]
        self.num_features = self.head_hidden_size = self.embed_dim = self.feature_info[last]["num_chs"]
        self.num_prefix_tokens = self._pairs()[last][1].num_prefix_tokens
        if prune_norm or is_shorter:
            self.norm = nn.Identity()
        if prune_head or is_shorter:
            self.reset_classifier(0, "")
        return wanted

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, 1 + N, D] -> logits [B, K], or what is classified, [B, D]."""
        pooled: Tensor = self.head_drop(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        if pre_logits:
            return pooled
        logits: Tensor = self.head(pooled)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H_px, W_px] -> logits [B, K]."""
        return self.forward_head(self.forward_features(x))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> PyramidVisionTransformer:
    model: PyramidVisionTransformer = build_model_with_cfg(
        PyramidVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=fit_checkpoint,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )
    return model


default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embeds.0.proj",
            "classifier": "head",
            "paper_ids": "arXiv:2102.12122",
        }
        for name in ("pvt_tiny", "pvt_small", "pvt_medium")
    }
)


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Tiny, 13.2 M parameters."""
    return _create("pvt_tiny", pretrained, **({"depths": (2, 2, 2, 2)} | kwargs))


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Small, 24.5 M parameters."""
    return _create("pvt_small", pretrained, **({"depths": (3, 4, 6, 3)} | kwargs))


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-Medium, 44.2 M parameters."""
    return _create("pvt_medium", pretrained, **({"depths": (3, 4, 18, 3)} | kwargs))
