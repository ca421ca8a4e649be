"""The token-labelling loss, from token logits or from token features and the classification layer.

Legend: B images; N tokens; K classes; D features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokenlabels.checks import check_count, check_generator, check_tensor, describe, is_number
from tokenlabels.cross_entropy import LOGITS_DTYPES, soft_cross_entropy
from tokenlabels.mixing import MixPlan
from tokenlabels.sparse_targets import TokenTargets


def token_label_loss(
    image_logits: Tensor,
    token_logits: Tensor | None,
    targets: TokenTargets,
    plan: MixPlan | None = None,
    *,
    image_weight: float = 1.0,
    dense_weight: float = 0.5,
    keep_tokens: float = 1.0,
    ground_truth: Tensor | None = None,
    ground_truth_weights: tuple[float, float] = (0.5, 0.1),
    generator: torch.Generator | None = None,
) -> Tensor:
    """The token-labelling loss: ``image_weight * H(image) + dense_weight * mean of H(token)`` (eq. 2-4; beta = 0.5).

    H is `soft_cross_entropy`. Both means are over the rows of the whole batch that have a target (`targets.valid`); a
    term without any such row is 0. Targets without tokens (ReLabel, hard labels) have the image term alone.

    Args:
        image_logits: floating [B, K].
        token_logits: floating [B, N, K], tokens row-major; None for targets without tokens or with dense_weight 0.
        targets: of the B images before mixing.
        plan: how the images of the batch were mixed; the targets are mixed alike.
        image_weight: 0 or more.
        dense_weight: 0 or more, beta of the paper.
        keep_tokens: the paper's token participation rate (Figure 4), above 0 and at most 1: of every sample
            round(keep_tokens * N) random tokens with a target, at least one, take part (all, if it has fewer).
        ground_truth: integer [B], the data set's labels of the unmixed images; None trusts the teacher alone.
        ground_truth_weights: weight of that label in the image-level row where it is the teacher's most probable class,
            and elsewhere. The published code has the same weights (as 0.5 and 0.9 for the teacher's row) but decides
            on mixed targets; here it is decided image by image, before mixing.
        generator: draws the tokens that take part, on its device; None takes the default one of the targets' device.

    Returns:
        Scalar; float32, or float64 if logits are.

    Raises:
        ValueError: a tensor whose shape, dtype or device does not fit the targets, or a number out of its range.
    """
    terms = _Terms(image_weight, dense_weight, keep_tokens, generator)
    targets = _supervision(targets, plan, ground_truth, ground_truth_weights)
    _check_match("image_logits", image_logits, [targets.classes.shape[0], targets.num_classes], targets)
    if token_logits is None and targets.num_tokens and dense_weight != 0:
        raise ValueError(
            f"token_logits is None, but {targets!r} has {targets.num_tokens} tokens per image; give their logits, or "
            "dense_weight=0 for the image term alone"
        )
    token_losses = None if token_logits is None else _token_losses("token_logits", token_logits, targets)
    return terms.total(image_logits, token_losses, targets)


def chunked_token_label_loss(
    image_logits: Tensor,
    token_features: Tensor,
    classifier: Callable[[Tensor], Tensor],
    targets: TokenTargets,
    plan: MixPlan | None = None,
    *,
    images_per_chunk: int = 8,
    image_weight: float = 1.0,
    dense_weight: float = 0.5,
    keep_tokens: float = 1.0,
    ground_truth: Tensor | None = None,
    ground_truth_weights: tuple[float, float] = (0.5, 0.1),
    generator: torch.Generator | None = None,
) -> Tensor:
    """`token_label_loss` of ``classifier(token_features)`` without ever holding the B x N x K token logits.

    The logits of a few images are made, used and dropped, and made again in backward: the classifier runs twice, on
    all tokens whatever keep_tokens says.

    Args:
        image_logits: floating [B, K].
        token_features: floating [B, N, D], tokens row-major.
        classifier: makes [b, N, K] of [b, N, D] for any b, each image by itself (`nn.Linear`, say). It may draw random
            numbers (dropout): backward repeats them.
        targets: with tokens, of the B images before mixing.
        plan: and all that `token_label_loss` describes.
        images_per_chunk: images whose token logits exist at a time.

    Returns:
        Scalar, with the value and the gradients of `token_label_loss`.

    Raises:
        ValueError: as `token_label_loss`, and for targets without tokens.
    """
    terms = _Terms(image_weight, dense_weight, keep_tokens, generator)
    targets = _supervision(targets, plan, ground_truth, ground_truth_weights)
    _check_match("image_logits", image_logits, [targets.classes.shape[0], targets.num_classes], targets)
    check_tensor("token_features", token_features)
    if token_features.ndim != 3:
        raise ValueError(f"token_features must be floating [B, N, D], got {describe(token_features)}")
    _check_match("token_features", token_features, [*targets.valid[:, 1:].shape, *token_features.shape[2:]], targets)
    check_count("images_per_chunk", images_per_chunk)
    if not callable(classifier):
        raise ValueError(f"classifier must be a module or a function, got {type(classifier).__name__}; not its weight")

    def classified_losses(features: Tensor, first: int) -> Tensor:
        images = slice(first, first + len(features))
        return _token_losses("the classifier's output", classifier(features), targets, images)

    # Split, not sliced: every slice would make a gradient of the size of all features.
    token_losses = [
        checkpoint(classified_losses, features, i * images_per_chunk, use_reentrant=False)
        for i, features in enumerate(torch.split(token_features, images_per_chunk))
    ]
    return terms.total(image_logits, torch.cat(token_losses), targets)


@dataclass(frozen=True)
class _Terms:
    """How the terms of the loss are weighed, and which share of the tokens takes part."""

    image_weight: float
    dense_weight: float
    keep_tokens: float
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        for name in ("image_weight", "dense_weight"):
            weight = getattr(self, name)
            if not is_number(weight) or not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be a finite number of 0 or more, got {weight!r}")
        if not is_number(self.keep_tokens) or not 0 < self.keep_tokens <= 1:
            raise ValueError(f"keep_tokens must be a number above 0 and at most 1 (all), got {self.keep_tokens!r}")
        check_generator(self.generator)

    def total(self, image_logits: Tensor, token_losses_BN: Tensor | None, targets: TokenTargets) -> Tensor:
        image_losses = soft_cross_entropy(
            image_logits[:, None], targets.classes, targets.weights[:, :1], targets.background[:, :1]
        )
        loss = _weighted_mean(self.image_weight, image_losses, targets.valid[:, :1])
        if token_losses_BN is None:
            return loss
        return loss + _weighted_mean(self.dense_weight, token_losses_BN, self._taking_part(targets.valid[:, 1:]))

    def _taking_part(self, valid_BN: Tensor) -> Tensor:
        num_tokens = valid_BN.shape[1]
        num_kept = max(1, round(self.keep_tokens * num_tokens))
        if num_kept == num_tokens:
            return valid_BN
        device = valid_BN.device if self.generator is None else self.generator.device
        noise = torch.rand(valid_BN.shape, generator=self.generator, device=device)
        noise = noise.to(valid_BN.device, non_blocking=True).masked_fill(~valid_BN, -1)
        kept = noise.topk(num_kept, dim=1).indices
        return torch.zeros_like(valid_BN).scatter_(1, kept, True) & valid_BN


def _weighted_mean(weight: float, losses: Tensor, taking_part: Tensor) -> Tensor:
    """The weight times the mean of what takes part; without weight nothing does, so that no infinity is left."""
    left_out = ~taking_part if weight else torch.ones_like(taking_part)
    return weight * losses.masked_fill(left_out, 0).sum() / taking_part.sum().clamp(min=1)


def _supervision(
    targets: TokenTargets, plan: MixPlan | None, ground_truth: Tensor | None, weights: tuple[float, float]
) -> TokenTargets:
    if not isinstance(targets, TokenTargets):
        raise ValueError(
            f"targets must be TokenTargets, got {type(targets).__name__}; token_targets makes them from score maps, "
            "TokenTargets.from_dense and .from_labels from probabilities and labels"
        )
    if not isinstance(plan, MixPlan | None):
        raise ValueError(f"plan must be a MixPlan or None, got {type(plan).__name__}; MixPlan.mixtoken draws one")
    if not _is_pair(weights):
        raise ValueError(f"ground_truth_weights must be two numbers (agree, disagree) in 0..1, got {weights!r}")
    if ground_truth is not None:
        targets = targets.blend_labels(ground_truth, agree=weights[0], disagree=weights[1])
    return targets if plan is None else plan.mix_targets(targets)


def _is_pair(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2


def _token_losses(name: str, logits: Tensor, targets: TokenTargets, images: slice = slice(None)) -> Tensor:
    classes = targets.classes[images]
    _check_match(name, logits, [len(classes), targets.num_tokens, targets.num_classes], targets)
    return soft_cross_entropy(logits, classes, targets.weights[images, 1:], targets.background[images, 1:])


def _check_match(name: str, tensor: Tensor, shape: list[int], targets: TokenTargets) -> None:
    check_tensor(name, tensor)
    if 0 in shape:
        lacks = "tokens; give None for token_logits" if len(targets) else "images"
        raise ValueError(f"{name} is {describe(tensor)}, but {targets!r} has no {lacks}")
    if list(tensor.shape) != shape or tensor.dtype not in LOGITS_DTYPES:
        raise ValueError(f"{name} must be floating {shape} to match {targets!r}, got {describe(tensor)}")
    if tensor.device != targets.device:
        raise ValueError(f"{name} must be on {targets.device} as targets are, got {describe(tensor)}; move one")
