"""How mixed images spread through a model: what TL-Align's paper (arXiv 2210.06455) measures beside accuracy.

Legend: B images, T tokens (prefix tokens first, then patch tokens in row-major order), S tokens of another image, D
channels, L blocks, h x w patch tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from tokenlabels.align import TLAlign, TransMix
from tokenlabels.align.operations import first_labels
from tokenlabels.checks import Grid, check_device, check_tensor, describe
from tokenlabels.mixing import MixPlan
from tokenlabels.precision import without_autocast

_MAX_PRODUCTS = 2**24
"""Cosines that exist at once, 64 MiB: Swin's 56 x 56 tokens of one image against another's are 10 million."""


@torch.no_grad()
def similarity_share(mixed: Tensor, own: Tensor, partner: Tensor) -> Tensor:
    """The share of the own image in every mixed token by likeness: the paper's "ground truth" (equation 13).

    The softmax of the largest cosine with any token of the own image, and with any of the partner's. It has no
    temperature, so that shares are within 0.12..0.88: what they rise and fall with counts, not their size.

    Args:
        mixed: floating [B, T, D], tokens of the mixed images behind some block.
        own: floating [B, S, D], tokens of the own images behind the same block; any number of them.
        partner: the same of the partners.

    Returns:
        float32 [B, T], without gradient.

    Raises:
        ValueError: no floating tokens [B, T, D], or of different batches, channels or devices.
    """
    for name, tokens in {"mixed": mixed, "own": own, "partner": partner}.items():
        check_tensor(name, tokens)
        if tokens.ndim != 3 or 0 in tokens.shape or not tokens.is_floating_point():
            raise ValueError(f"{name} must be floating [B, T, D] without empty sides, got {describe(tokens)}")
        if (len(tokens), tokens.shape[2]) != (len(mixed), mixed.shape[2]):
            wanted = f"[{len(mixed)}, T, {mixed.shape[2]}] as mixed is"
            raise ValueError(f"{name} must be {wanted}, got {describe(tokens)}")
        check_device(name, tokens, mixed)
    with without_autocast(mixed.device):
        unit_BTD = _unit(mixed)
        return (_largest_cosines(unit_BTD, _unit(own)) - _largest_cosines(unit_BTD, _unit(partner))).sigmoid()


def _unit(tokens: Tensor) -> Tensor:
    return functional.normalize(tokens.float(), dim=-1)


def _largest_cosines(unit_BTD: Tensor, other_BSD: Tensor) -> Tensor:
    """[B, T], some tokens at a time."""
    step = max(1, _MAX_PRODUCTS // (other_BSD.shape[0] * other_BSD.shape[1]))
    parts = (unit_BTD[:, start : start + step] for start in range(0, unit_BTD.shape[1], step))
    return torch.cat([(part @ other_BSD.mT).amax(dim=-1) for part in parts], dim=1)


@dataclass(frozen=True, eq=False)
class LayerShares:
    """Shares of the own image, 0..1, from the embedded patches to the last block (Figures 4, 5 and 8).

    Attributes:
        initial: float32 [B, h0, w0], of the embedded patches, by area (equation 5).
        similarity: of every token behind every block, by likeness (equation 13): L of float32 [B, T]. Models that
            merge patches have ever fewer tokens.
        aligned: the same by TL-Align.
        similarity_of_classified: float32 [L, B], of what would be classified behind every block: the class token, or
            the mean of the tokens.
        aligned_of_classified: the same by TL-Align; its last row is the share of the training target.
        grid: rows and columns of the patch tokens behind the last block, (h, w).
    """

    initial: Tensor
    similarity: tuple[Tensor, ...]
    aligned: tuple[Tensor, ...]
    similarity_of_classified: Tensor
    aligned_of_classified: Tensor
    grid: Grid

    @property
    def area(self) -> Tensor:
        """float32 [B], the share of the whole image: the target without alignment."""
        return self.initial.mean(dim=(1, 2))

    @property
    def final_map(self) -> Tensor:
        """float32 [B, h, w], by TL-Align, of the patch tokens behind the last block."""
        last, (rows, columns) = self.aligned[-1], self.grid
        return last[:, last.shape[1] - rows * columns :].reshape(-1, rows, columns)

    def __repr__(self) -> str:
        (num_blocks, num_samples), (rows, columns) = self.aligned_of_classified.shape, self.grid
        return f"LayerShares({num_samples} samples, {num_blocks} blocks, {rows}x{columns} tokens behind the last)"


@torch.no_grad()
def layer_shares(aligned: TLAlign, images: Tensor, plan: MixPlan) -> LayerShares:
    """Follow mixed images through a model block by block, by likeness to the images themselves and by TL-Align.

    The model runs in the mode that it is in, once on the images and once on the mixed ones. Evaluation mode is the
    meaningful one, ``aligned.eval()``: in training, dropout and stochastic depth make an image's tokens differ from
    run to run, which counts as unlikeness, and batch norms learn from the images.

    Args:
        aligned: the model; its settings (`layers`, `normalize`) hold here too.
        images: float [B, 3, H_px, W_px], normalised and not mixed.
        plan: mixes them.

    Returns:
        On the device of the images. The tokens of all blocks of the images are kept in between.

    Raises:
        ValueError: the plan does not fit the images, or `aligned` is `TransMix`, which labels no tokens.
    """
    if isinstance(aligned, TransMix):
        raise ValueError("TransMix gives tokens no labels that could be followed; use TLAlign around the model")
    plan.check_images(images)
    first: list[Tensor] = []
    unmixed: list[Tensor] = []
    similarity: list[Tensor] = []
    followed: list[Tensor] = []
    is_nhwc = getattr(aligned.backbone, "output_fmt", None) == "NHWC"

    def labels_of(grid: Grid, num_prefix_tokens: int) -> Tensor:
        first.append(plan.coverage(grid))
        return first_labels(plan, grid, num_prefix_tokens)

    def see_unmixed(x: Tensor, labels: Tensor) -> None:  # noqa: ARG001 - of images that are not mixed
        unmixed.append(_in_sequence(x, is_nhwc))

    def see_mixed(x: Tensor, labels: Tensor) -> None:
        own = unmixed[len(similarity)]
        similarity.append(similarity_share(_in_sequence(x, is_nhwc), own, own[plan.partner]))
        followed.append(labels[..., 0].flatten(1))

    aligned.features(images, labels_of, replace(aligned.alignment, seen=see_unmixed))
    features = aligned.align(plan.mix(images), plan, replace(aligned.alignment, seen=see_mixed))

    def of_classified(shares: list[Tensor]) -> Tensor:
        return torch.stack([aligned.classified(features._replace(labels=of[..., None]))[:, 0] for of in shares])

    return LayerShares(
        initial=first[0],
        similarity=tuple(similarity),
        aligned=tuple(followed),
        similarity_of_classified=of_classified(similarity),
        aligned_of_classified=of_classified(followed),
        grid=features.grid,
    )


def _in_sequence(x: Tensor, is_nhwc: bool) -> Tensor:
    """Tokens as a block lays them out, [B, T, D], [B, h, w, D] or [B, D, h, w] -> [B, T, D]."""
    if x.ndim == 3:
        return x
    return x.flatten(1, 2) if is_nhwc else x.flatten(2).mT


def label_rmse(initial: Tensor, aligned: Tensor) -> float:
    """Root mean square difference of shares, 0..1: how far alignment moves the targets (Figure 3).

    Of two images with different classes, two entries of the label vector differ, each by the difference of the shares.
    Over all entries of vectors of K classes it is therefore ``sqrt(2 / K)`` times this number.

    Args:
        initial, aligned: floating shares of the own image, of any one shape.

    Raises:
        ValueError: they are of different shapes or devices, or empty.
    """
    check_tensor("initial", initial)
    check_tensor("aligned", aligned)
    check_device("aligned", aligned, initial)
    if initial.shape != aligned.shape or not initial.numel():
        raise ValueError(f"shares must be of one shape and not empty, got {describe(initial)} and {describe(aligned)}")
    return float((initial.double() - aligned.double()).square().mean().sqrt())


def token_presence(weights: Tensor) -> Tensor:
    """How much of every token is left in what a spatial operation makes of all tokens (equation 2).

    Output j is ``sum over i of w[j, i] * token i``; token i contributes ``|w[j, i]| / sum over k of |w[j, k]|`` to it,
    and its presence is the sum of its contributions. (The paper's indices say both this and its transpose; the text
    means this: contributions to one output sum to one.) Of softmax attention these are the column sums. 1 says that a
    token counts as much as it did before, as all do within a depthwise convolution; 0 that it is lost.

    Args:
        weights: floating [..., outputs, tokens], of any sign. Outputs with weights of 0 alone read nothing.

    Returns:
        float32 [..., tokens], float64 of float64: with a mean of outputs / tokens, which is 1 for square matrices.

    Raises:
        ValueError: no such matrix.
    """
    check_tensor("weights", weights)
    if weights.ndim < 2 or not weights.is_floating_point():
        raise ValueError(f"weights must be floating [..., outputs, tokens], got {describe(weights)}")
    size = weights.abs() if weights.dtype == torch.float64 else weights.float().abs()
    total = size.sum(dim=-1, keepdim=True)
    return (size / total.masked_fill(total == 0, 1)).sum(dim=-2)
