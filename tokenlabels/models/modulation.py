"""Normalisation in the tokenizer of a model (arXiv 2212.11115, section 5.2): MoTo, or what Table 6 compares it with.

A module of the model is put into a small one that normalises what comes out of it and is otherwise the same to its
readers. State-dict keys of the wrapped module begin with ``wrapped.`` afterwards, those of the normalisation with
``modulation.``: load pretrained weights before.

Of the parameters of Table 2, in millions, those with MoTo are met for PVT-Small 24.7, PVTv2-B2 25.6, Swin-T 28.6 and
Swin-S 49.9. Here PVT-Medium has 44.4 (44.5 in the table), DeiT-S 22.1 (22.5), DeiT-B 86.7 (86.9) and T2T-ViT-14 21.6
(21.8): no reading of section 5.1 that meets the first four meets these.

Legend: B images, C channels, h x w tokens, N = h * w, P prefix tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenlabels.checks import Grid, check_choice
from tokenlabels.models.features import Layout
from tokenlabels.models.moto import MoTo, Partition
from tokenlabels.models.patch_embed import ConvPatchEmbed

Modulation = Literal["moto", "layer_norm", "batch_norm", "instance_norm"]
"""MoTo, and the rows of Table 6: over the channels of a token, over the batch, over the map of a channel."""

Placement = Literal["every", "first", "stem"]
"""After every patch embedding, after the first alone, or on the map before the last convolution of its stem."""

EPSILON = 1e-5


class ModulationError(ValueError):
    """A model has no place for the normalisation that was asked for; the message says which there are."""


class _Modulated(nn.Module):
    """A module and the normalisation of what it takes or returns.

    All other attributes are those of the wrapped module: timm reads the grid and the size of patch embeddings, and the
    weights of projections.
    """

    def __init__(self, wrapped: nn.Module, modulation: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.modulation = modulation

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            wrapped = self.__dict__.get("_modules", {}).get("wrapped")  # a copy in the making has none yet
            if wrapped is None:
                raise
            return getattr(wrapped, name)


class ModulatedEmbedding(_Modulated):
    """A patch embedding that returns tokens [B, N, C], maps, or a tuple of one of them and the grid (h, w).

    Attributes:
        output_fmt: the layout of maps; that of the wrapped one, or channels last, as of Swin and PVT, if it names none.
    """

    def __init__(self, wrapped: nn.Module, modulation: nn.Module) -> None:
        super().__init__(wrapped, modulation)
        if getattr(wrapped, "output_fmt", None) is None:
            self.output_fmt = "NHWC"

    def forward(self, x: Tensor) -> Any:
        """What the wrapped embedding takes -> what it returns, normalised."""
        output = self.wrapped(x)
        tokens, rest = (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, ())
        if tokens.ndim == 3:
            grid = tuple(rest[0]) if rest else token_grid(self.wrapped, tokens.shape[1], (x.shape[2], x.shape[3]))
            tokens = on_map(self.modulation, tokens, "NLC", grid)
        else:
            tokens = on_map(self.modulation, tokens, "NHWC" if self.output_fmt == "NHWC" else "NCHW")
        return (tokens, *rest) if isinstance(output, tuple) else tokens


class ModulatedStem(_Modulated):
    """The last projection of a convolutional stem, behind the normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> what the projection makes of the normalised map."""
        projected: Tensor = self.wrapped(self.modulation(x))
        return projected


class ModulatedBlock(_Modulated):
    """A transformer block at whose end the patch tokens are normalised (Table 5); prefix tokens pass through.

    Args:
        wrapped: takes and returns tokens [B, P + N, C].
        modulation: of maps [B, C, h, w].
        embedding: the patch embedding of the model. It is asked for its grid and stays the model's alone.
        num_prefix_tokens: P.
    """

    def __init__(self, wrapped: nn.Module, modulation: nn.Module, embedding: nn.Module, num_prefix_tokens: int) -> None:
        super().__init__(wrapped, modulation)
        self.num_prefix_tokens = num_prefix_tokens
        self._embedding = (embedding,)  # in a tuple torch does not look for submodules

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens [B, P + N, C] -> the same."""
        x = self.wrapped(x, *args, **kwargs)
        prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        grid = token_grid(self._embedding[0], tokens.shape[1])
        return torch.cat([prefix, on_map(self.modulation, tokens, "NLC", grid)], dim=1)


def on_map(modulation: nn.Module, tokens: Tensor, layout: Layout, grid: Sequence[int] = ()) -> Tensor:
    """``modulation`` of maps [B, C, h, w], applied to tokens of another layout, which is that of the result too.

    Args:
        modulation: the normalisation.
        tokens: [B, N, C] in row-major order ("NLC"), [B, h, w, C] ("NHWC") or [B, C, h, w] ("NCHW").
        layout: which of them.
        grid: (h, w), for "NLC" alone.
    """
    modulated: Tensor
    if layout == "NLC":
        modulated = modulation(tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid))
        return modulated.flatten(2).transpose(1, 2)
    if layout == "NHWC":
        modulated = modulation(tokens.permute(0, 3, 1, 2))
        return modulated.permute(0, 2, 3, 1)
    modulated = modulation(tokens)
    return modulated


def token_grid(embedding: Any, num_tokens: int, image_size: Grid | None = None) -> Grid:
    """Rows and columns of the tokens of a patch embedding: as it works them out for this size in pixels, or its own.

    Raises:
        ValueError: it names no grid of so many tokens.
    """
    work_out = getattr(embedding, "dynamic_feat_size", None)
    grid = work_out(image_size) if work_out is not None and image_size is not None else None
    grid = getattr(embedding, "grid_size", None) if grid is None else grid
    if grid is None or grid[0] * grid[1] != num_tokens:
        raise ValueError(
            f"{num_tokens} tokens are not on the grid of their {_name(embedding)}, {grid}; give images of the size "
            "that the model is built for, or call its set_input_size"
        )
    return grid[0], grid[1]


@dataclass(frozen=True)
class _Place:
    """Where a module of the model is put into another: which attribute of which module, and what goes there."""

    parent: nn.Module
    name: str
    num_channels: int
    wrap: Callable[[nn.Module, nn.Module], nn.Module]

    def fill(self, modulation: nn.Module) -> None:
        module = self.parent.get_submodule(self.name)
        reference = next(module.parameters())
        modulation.to(reference.device, reference.dtype).train(module.training)
        setattr(self.parent, self.name, self.wrap(module, modulation))


def modulate(
    model: nn.Module,
    kind: Modulation = "moto",
    *,
    placement: Placement = "every",
    blocks: Sequence[int] = (),
    num_entities: int = 8,
    partition: Partition = "soft",
) -> nn.Module:
    """Put normalisations into the tokenizer of a model.

    Args:
        model: of timm or of this package: ViT, DeiT, LV-ViT, T2T-ViT (`patch_embed`), Swin and PVTv2 (also the
            `downsample` of their stages), PVT and Twins (`patch_embeds`). It is changed. `DenseClassifier` and
            `torch.compile` come afterwards.
        kind: of the normalisations.
        placement: where in the tokenizer.
        blocks: numbers of the transformer blocks, counted from 0, at whose end another one acts on the patch tokens
            (Table 5, which counts from 1); ViT, DeiT, LV-ViT and T2T-ViT alone.
        num_entities, partition: of MoTo alone, see there. More entities than tokens in a stage are refused by its
            forward pass.

    Returns:
        The model.

    Raises:
        ModulationError: the model has no such place, or is modulated already. Nothing was changed.
        ValueError: another argument is not one of these.
    """
    check_choice("kind", kind, Modulation)
    check_choice("placement", placement, Placement)
    if kind != "moto" and (num_entities, partition) != (8, "soft"):
        raise ValueError(f"num_entities and partition are of kind='moto' alone; leave them out for {kind!r}")
    if modulations(model):
        raise ModulationError(f"{_name(model)} is modulated already; build it anew for another kind or placement")
    places = [*_tokenizer_places(model, placement), *_block_places(model, blocks)]
    made = [_make(kind, place.num_channels, num_entities, partition) for place in places]
    for place, modulation in zip(places, made, strict=True):
        place.fill(modulation)
    return model


def modulations(model: nn.Module) -> list[nn.Module]:
    """The normalisations that `modulate` put into a model, in order: of its tokenizer, then of its blocks."""
    return [part.modulation for part in model.modules() if isinstance(part, _Modulated)]


def _make(kind: Modulation, num_channels: int, num_entities: int, partition: Partition) -> nn.Module:
    if kind == "moto":
        return MoTo(num_channels, num_entities, partition)
    if kind == "layer_norm":
        layer_norm: nn.Module = LayerNorm2d(num_channels, eps=EPSILON)
        return layer_norm
    if kind == "batch_norm":
        return nn.BatchNorm2d(num_channels, eps=EPSILON)
    return nn.InstanceNorm2d(num_channels, eps=EPSILON, affine=True)


def _tokenizer_places(model: nn.Module, placement: Placement) -> list[_Place]:
    embeddings = list(_embeddings(model))
    if not embeddings:
        raise ModulationError(
            f"{_name(model)} has no patch embedding (patch_embed or patch_embeds); modulate a ViT, DeiT, LV-ViT, "
            "T2T-ViT, PVT or Swin, before DenseClassifier or torch.compile is put around it"
        )
    for parent, name in embeddings:
        if parent.get_submodule(name)._forward_hooks:
            raise ModulationError(
                f"{_name(model)}'s patch embedding has forward hooks, which would go on seeing tokens before the "
                "normalisation; modulate first, and put DenseClassifier or TokenProp around the model then"
            )
    if placement == "stem":
        return [_stem_place(embeddings[0][0].get_submodule(embeddings[0][1]), model)]
    if placement == "first":
        embeddings = embeddings[:1]
    return [
        _Place(parent, name, _num_channels(parent.get_submodule(name), model), ModulatedEmbedding)
        for parent, name in embeddings
    ]


def _embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The module and the attribute that hold each patch embedding, in order."""
    stages = getattr(model, "patch_embeds", None)
    if isinstance(getattr(model, "patch_embed", None), nn.Module):
        yield model, "patch_embed"
    elif isinstance(stages, nn.ModuleList):
        yield from ((stages, str(number)) for number in range(len(stages)))
        return
    else:
        return
    for name in ("layers", "stages"):
        for stage in getattr(model, name, ()):
            downsample = getattr(stage, "downsample", None)
            if isinstance(downsample, nn.Module) and not isinstance(downsample, nn.Identity):
                yield stage, "downsample"


def _num_channels(embedding: Any, model: nn.Module) -> int:
    """Channels of what a patch embedding returns."""
    projection = getattr(embedding, "proj", None)
    for owner, name in (
        (embedding, "out_dim"),
        (projection, "out_channels"),
        (projection, "out_features"),
        (embedding, "embed_dim"),
        (model, "embed_dim"),
    ):
        found = getattr(owner, name, None)
        if isinstance(found, int):
            return found
    raise ModulationError(
        f"{_name(model)}'s {_name(embedding)} does not say how many channels it returns (out_dim, proj or embed_dim)"
    )


def _stem_place(embedding: Any, model: nn.Module) -> _Place:
    projection = getattr(embedding, "proj", None)
    is_stem = embedding.num_convs > 0 if isinstance(embedding, ConvPatchEmbed) else hasattr(embedding, "stem")
    if not is_stem or not isinstance(projection, nn.Conv2d):
        raise ModulationError(
            f"{_name(model)}'s {_name(embedding)} has no convolutional stem before its projection; choose "
            "placement='first', or a model with one, such as LV-ViT"
        )
    return _Place(embedding, "proj", projection.in_channels, ModulatedStem)


def _block_places(model: nn.Module, numbers: Sequence[int]) -> list[_Place]:
    if not isinstance(numbers, Sequence):
        raise ValueError(f"blocks must be a sequence of numbers, such as (0, 1), got {numbers!r}")
    if not numbers:
        return []
    if not isinstance(model, VisionTransformer):
        raise ModulationError(
            f"blocks are those of a ViT, DeiT, LV-ViT or T2T-ViT, got {_name(model)}; leave blocks out"
        )
    depth = len(model.blocks)
    if len(set(numbers)) != len(numbers) or not all(number in range(depth) for number in numbers):
        raise ValueError(f"blocks must be different numbers in 0..{depth - 1}, got {[*numbers]}")
    if model.dynamic_img_size or not isinstance(model.patch_drop, nn.Identity):
        raise ModulationError(
            f"the patch tokens of {_name(model)}'s blocks must stay on one grid; build it with dynamic_img_size=False "
            "and patch_drop_rate=0, or leave blocks out"
        )
    # the wrapped one: it is there before and after, whatever the order of the places
    embedding, num_prefix_tokens = cast(nn.Module, model.patch_embed), model.num_prefix_tokens

    def wrap(block: nn.Module, modulation: nn.Module) -> nn.Module:
        return ModulatedBlock(block, modulation, embedding, num_prefix_tokens)

    return [_Place(model.blocks, str(number), model.embed_dim, wrap) for number in sorted(numbers)]


def _name(module: object) -> str:
    return type(module).__name__
