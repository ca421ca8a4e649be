"""TransMix (arXiv 2111.09833): the target of a mixed image by where the class token looks in the last block.

Legend: B images, h heads, P prefix tokens, N = h x w patch tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tokenlabels.align.attention import Backend
from tokenlabels.align.families import Features
from tokenlabels.align.operations import first_labels
from tokenlabels.align.rules import AlignmentError
from tokenlabels.align.tl_align import TLAlign
from tokenlabels.checks import Grid, check_grid, check_share, check_tensor, check_values, describe
from tokenlabels.mixing import MixPlan

PUBLISHED_AREA_WEIGHT = 0.5


def transmix(
    attention: Tensor, plan: MixPlan, *, grid: Sequence[int] | None = None, area_weight: float = 0.0
) -> Tensor:
    """The share of the own image in what the class token attends to: ``sum(A * own) / sum(A)`` over patch tokens.

    Args:
        attention: floating, of the class token to the patch tokens, row-major: [B, N], or [B, h, N] of several heads,
            which are averaged. It need not sum to one. Without any, the share is that by area.
        plan: who is mixed with whom, and where.
        grid: rows and columns of the patch tokens; None is a square.
        area_weight: of the share by area, 0..1. The paper has none, its code 0.5. MixUp is not changed either way: all
            tokens have the same share.

    Returns:
        float32 [B], without gradient; for ``plan.mix_targets(targets, share)``.

    Raises:
        ValueError: the attention is not of this batch, device or grid.
    """
    check_tensor("attention", attention)
    check_share("area_weight", area_weight)
    if attention.ndim not in (2, 3) or not attention.is_floating_point() or len(attention) != len(plan):
        raise ValueError(
            f"attention must be floating [{len(plan)}, N] or [{len(plan)}, heads, N], as the plan is of {len(plan)} "
            f"samples, got {describe(attention)}"
        )
    check_values("attention", attention, lambda weights: weights >= 0, "must be 0 or more")
    if attention.device != plan.own.device:
        raise ValueError(f"attention must be on {plan.own.device} as the plan is, got {describe(attention)}")
    with torch.no_grad():
        weights = attention.float()
        weights = weights.mean(dim=1) if weights.ndim == 3 else weights
        own = plan.coverage(_grid(grid, weights.shape[1])).flatten(1)
        return _share((weights * own).sum(dim=1), weights.sum(dim=1), plan.share(), area_weight)


class TransMix(TLAlign):
    """TransMix around a ViT with a class token: the baseline of TL-Align's Tables 2 and 9.

    It is used as `TLAlign` is. Token targets, if there are any, are mixed by area.

    Args:
        model: ViT, DeiT or LV-ViT with a class token that is classified, or `DenseClassifier` around one.
        backend: see `TLAlign`.
        area_weight: see `transmix`; by default that of the published code.

    Raises:
        AlignmentError: the model has no class token that it classifies.
    """

    def __init__(
        self, model: nn.Module, *, backend: Backend | None = None, area_weight: float = PUBLISHED_AREA_WEIGHT
    ) -> None:
        super().__init__(model, backend=backend, layers=(-1,), normalize=False)
        self.alignment = replace(self.alignment, centred=False)  # shares are ratios here
        check_share("area_weight", area_weight)
        self.area_weight = area_weight
        if getattr(self.backbone, "global_pool", None) != "token":
            raise AlignmentError(
                f"TransMix reads the attention of a class token, and {type(self.backbone).__name__} classifies none; "
                "use TLAlign, or a ViT with global_pool='token'"
            )

    def _first_labels(self, plan: MixPlan, grid: Grid, num_prefix_tokens: int) -> Tensor:
        """Two columns, sums over patch tokens alone: of what is the own image's, and of everything."""
        labels = first_labels(plan, grid, num_prefix_tokens)
        labels = torch.cat([labels, torch.ones_like(labels)], dim=-1)
        labels[:, :num_prefix_tokens] = 0
        return labels

    def _shares(self, features: Features, plan: MixPlan) -> tuple[Tensor, Tensor]:
        own, everything = self.classified(features).unbind(dim=-1)
        share = _share(own, everything, plan.share(), self.area_weight)
        return share.detach().clamp(0, 1), plan.coverage(features.grid).flatten(1).detach()


def _share(own: Tensor, everything: Tensor, by_area: Tensor, area_weight: float) -> Tensor:
    share = torch.where(everything > 0, own / everything, by_area)
    return (1 - area_weight) * share + area_weight * by_area


def _grid(grid: Sequence[int] | None, num_tokens: int) -> Grid:
    if grid is None:
        side = math.isqrt(num_tokens)
        grid = (side, side)
    rows, columns = check_grid(grid)
    if rows * columns != num_tokens:
        raise ValueError(f"{num_tokens} patch tokens are not on the grid {(rows, columns)}; give grid=(h, w)")
    return rows, columns
