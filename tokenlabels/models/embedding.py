"""MixToken (Token Labeling, arXiv 2104.10858, section 3.3) behind the patch embedding of a model.

The embeddings of two images are mixed before class token and position embedding are added, so that every token belongs
to one image while the position embedding is that of a whole one.

Legend: B images, N = h x w tokens of the patch embedding, D channels.
"""

from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor, nn

from tokenlabels.checks import Grid, check_choice, check_tensor, describe
from tokenlabels.mixing import MixPlan
from tokenlabels.models.features import FeatureFormat, Layout

_CORNER = 8
"""One over this of each side is the corner of the image that is changed to find the channels."""


def mix_embedding(plan: MixPlan, embedding: Tensor, layout: Layout, grid: Grid) -> Tensor:
    """`plan.mix` of the output of a patch embedding.

    Args:
        plan: on the grid of the embedding, on a coarser one whose sides divide it (Swin embeds 56 x 56, its last
            stage has 7 x 7), or 1 x 1.
        embedding: floating, tokens [B, N, D] in row-major order ("NLC") or maps [B, h, w, D] ("NHWC") or [B, D, h, w]
            ("NCHW").
        layout: which of them.
        grid: (h, w).

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: the embedding is not of this layout and grid, or the plan does not fit it.
    """
    check_choice("layout", layout, Layout)
    check_tensor("embedding", embedding)
    height, width = grid
    sides = (height * width,) if layout == "NLC" else (height, width)
    shape = tuple(embedding.shape)
    if embedding.ndim != len(layout) or (shape[2:] if layout == "NCHW" else shape[1:-1]) != sides:
        raise ValueError(f"a patch embedding {layout} on {height}x{width} was expected, got {describe(embedding)}")
    rows, columns = plan.own.shape[1:]
    if height % rows or width % columns:
        raise ValueError(
            f"the plan is on {rows}x{columns}, the patch embedding has {height}x{width} tokens; draw the plan on a "
            f"grid whose sides divide them, such as MixPlan.mixtoken(..., grid=({height}, {width}))"
        )
    if layout == "NCHW":
        return plan.mix(embedding)
    if layout == "NHWC":
        return plan.mix(embedding.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    if (rows, columns) in (grid, (1, 1)):
        return plan.mix(embedding)
    return mix_embedding(plan, embedding.reshape(shape[0], height, width, shape[2]), "NHWC", grid).flatten(1, 2)


def find_patch_embedding(model: nn.Module) -> nn.Module | None:
    """The patch embedding of a timm model: its `patch_embed`, the first of its `patch_embeds` (Twins), or its `stem`
    where that is one (MLP-Mixer)."""
    embedding, stem = getattr(model, "patch_embed", None), getattr(model, "stem", None)
    if isinstance(embedding, nn.Module):
        return embedding
    stages = getattr(model, "patch_embeds", None)
    if isinstance(stages, nn.ModuleList) and len(stages):
        return stages[0]
    return stem if isinstance(stem, PatchEmbed) else None


def embedding_format(embedding: nn.Module, images: Tensor, output: object) -> FeatureFormat:
    """How the output of a patch embedding is laid out.

    Args:
        embedding: of a timm model, in evaluation mode.
        images: of noise, float [B, 3, H_px, W_px].
        output: what it makes of them.

    Raises:
        ValueError: the output is no tensor (or a tuple that begins with one), or its layout cannot be told.
    """
    tokens = _tokens(output)
    size = images.shape[2], images.shape[3]
    if tokens.ndim == 3:
        return FeatureFormat("NLC", _grid_of_tokens(embedding, tokens.shape[1], size), tokens.shape[2], 0)
    if tokens.ndim != 4:
        raise ValueError(f"the layout of its output {list(tokens.shape)} is unknown")
    named = getattr(embedding, "output_fmt", None)
    is_last = named == "NHWC" if named is not None else _channels_are_last(embedding, images, tokens)
    layout: Layout = "NHWC" if is_last else "NCHW"
    channels, height, width = (tokens.shape[layout.index(axis)] for axis in "CHW")
    return FeatureFormat(layout, (height, width), channels, num_prefix_tokens=0)


class PlanHook:
    """A forward hook that mixes the output of a patch embedding if it was given a plan.

    It stays registered: `torch.compile` traces it, and a hook that came and went would make it compile again.

    Attributes:
        format: of the output.
        plan: for the next output alone; None leaves it as it is.
    """

    def __init__(self, embedding_format: FeatureFormat) -> None:
        self.format = embedding_format
        self.plan: MixPlan | None = None

    def __call__(self, _embedding: nn.Module, _args: object, output: Any) -> Any:
        """What torch calls behind the embedding. Some return a tuple, the tokens and their grid."""
        plan, self.plan = self.plan, None  # which tells that it was used
        if plan is None:
            return output
        mixed = mix_embedding(plan, _tokens(output), self.format.layout, self.format.grid)
        return mixed if isinstance(output, Tensor) else (mixed, *output[1:])


def _tokens(output: object) -> Tensor:
    tokens = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(tokens, Tensor):
        raise ValueError(f"its output is a {type(output).__name__}, not one tensor")
    return tokens


def _channels_are_last(embedding: nn.Module, images: Tensor, tokens: Tensor) -> bool:
    """Where the embedding does not say so and shapes may mislead (32 channels on 32 x 32).

    A corner of the image is changed: that shows in every channel, but not at every position.
    """
    if tokens.is_meta:
        raise ValueError("the layout of its output cannot be told on the meta device")
    height, width = (max(1, side // _CORNER) for side in images.shape[2:])
    changed = images.clone()
    changed[:, :, :height, :width] += 1
    differs = (_tokens(embedding(changed)) != tokens).any(dim=0)
    share_first, share_last = (
        float(differs.flatten(1).any(dim=1).float().mean()),
        float(differs.flatten(0, 1).any(dim=0).float().mean()),
    )
    if share_first == share_last:
        raise ValueError(f"the layout of its output {list(tokens.shape)} cannot be told")
    return share_last > share_first


def _grid_of_tokens(embedding: nn.Module, num_tokens: int, image_size: Grid) -> Grid:
    """The grid that the embedding names for this size, or that of square patches."""
    grid = getattr(embedding, "grid_size", None)
    if grid is not None and getattr(embedding, "img_size", None) == image_size and grid[0] * grid[1] == num_tokens:
        return grid[0], grid[1]
    for stride in range(1, max(image_size) + 1):
        # both sides shrink as the stride grows, so that no other stride gives another grid of as many tokens
        rows, columns = -(-image_size[0] // stride), -(-image_size[1] // stride)
        if rows * columns == num_tokens:
            return rows, columns
    raise ValueError(
        f"its {num_tokens} tokens are no grid of square patches of a {image_size[0]} x {image_size[1]} image"
    )
