"""Soft cross-entropy straight from sparse targets, and the token-labelling loss that is made of it.

Legend: B images; R rows of an image; N tokens; U listed classes per image; K classes; D features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tokenlabels.checks import describe
from tokenlabels.sparse_targets import TokenTargets

if TYPE_CHECKING:
    from tokenlabels.mixing import MixPlan

# Logits that are worked on at a time. On the CPU their temporaries (4 MiB in float32) stay in the caches; an
# accelerator gets enough (128 MiB) to run at full speed with few kernels.
CPU_PIECE = 2**20
ACCELERATOR_PIECE = 2**25
Piece = tuple[slice, slice]
LOGITS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def soft_cross_entropy(logits: Tensor, classes: Tensor, weights: Tensor, background: Tensor) -> Tensor:
    """Cross-entropy of every row with its sparse target, ``-sum_c target_c * log softmax(logits)_c``.

    The target of class c is ``background`` plus the weights of the slots that list c, as in `TokenTargets`; it need not
    sum to 1. Autograd keeps the inputs and nothing else, and of size B x R x K only the gradient of the logits is ever
    allocated: both passes go through pieces of a few images. Targets are constants and get no gradient, and there is no
    second derivative.

    Half-precision logits are computed in float32; the gradient is rounded once, at its end. A class whose logit is -inf
    costs nothing in rows where its background or weight is 0, and infinity elsewhere.

    Args:
        logits: float16, bfloat16, float32 or float64 [B, R, K], of any strides.
        classes: int64 [B, U], ids in 0..K-1.
        weights: float32 [B, R, U].
        background: float32 [B, R].

    Returns:
        float32 [B, R] (float64 for float64 logits).

    Raises:
        ValueError: a tensor of another shape, dtype or device, ids outside 0..K-1, or targets that require gradients.
    """
    _check_sparse(logits, classes, weights, background)
    losses: Tensor = _SoftCrossEntropy.apply(logits, classes, weights, background)
    return losses


def token_label_loss(
    image_logits: Tensor,
    token_logits: Tensor | None,
    targets: TokenTargets,
    plan: "MixPlan | None" = None,
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
            round(keep_tokens * N) random tokens, at least one, take part.
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
    _check_match("image_logits", image_logits, [len(targets), targets.num_classes], targets)
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
    plan: "MixPlan | None" = None,
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

    The logits of a few images are made, used and dropped, and made again in backward: the classifier runs twice.

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
    _check_match("image_logits", image_logits, [len(targets), targets.num_classes], targets)
    _check_match("token_features", token_features, [*targets.valid[:, 1:].shape, *token_features.shape[2:]], targets)
    if images_per_chunk < 1:
        raise ValueError(f"images_per_chunk must be at least 1, got {images_per_chunk}")

    def classified_losses(features: Tensor, first: int) -> Tensor:
        images = slice(first, first + len(features))
        return _token_losses("the classifier's output", classifier(features), targets, images)

    # Split, not sliced: every slice would make a gradient of the size of all features.
    token_losses = [
        checkpoint(classified_losses, features, i * images_per_chunk, use_reentrant=False)
        for i, features in enumerate(torch.split(token_features, images_per_chunk))
    ]
    return terms.total(image_logits, torch.cat(token_losses), targets)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, classes: Tensor, weights: Tensor, background: Tensor) -> Tensor:
        losses = torch.empty(
            background.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device
        )
        absent = weights == 0
        for here in _pieces(logits):
            log_probs = torch.log_softmax(logits[here], dim=-1, dtype=losses.dtype)
            listed = log_probs.gather(2, _slots(classes, weights, here)).mul_(weights[here])
            losses[here] = -listed.masked_fill_(absent[here], 0).sum(dim=-1)
            losses[here] -= log_probs.sum(dim=-1).mul_(background[here]).masked_fill_(background[here] == 0, 0)
        return losses

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None, None]:
        """``grad * (mass * softmax - target)`` for the logits, where mass is what the target sums to."""
        logits, classes, weights, background = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        mass = logits.shape[-1] * background + weights.sum(dim=-1)
        scale, shift = (grad_losses * mass)[..., None], (grad_losses * background)[..., None]
        for here in _pieces(logits):
            probs = torch.softmax(logits[here], dim=-1, dtype=grad_losses.dtype).mul_(scale[here])
            probs.scatter_add_(2, _slots(classes, weights, here), -grad_losses[here][..., None] * weights[here])
            torch.sub(probs, shift[here], out=grad_logits[here])
        return grad_logits, None, None, None


@dataclass(frozen=True)
class _Terms:
    """How the terms of the loss are weighed, and which share of the tokens takes part."""

    image_weight: float
    dense_weight: float
    keep_tokens: float
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        for name in ("image_weight", "dense_weight"):
            if not 0 <= (weight := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be finite and 0 or more, got {weight}")
        if not 0 < self.keep_tokens <= 1:
            raise ValueError(f"keep_tokens must be above 0 and at most 1 (all tokens), got {self.keep_tokens}")

    def total(self, image_logits: Tensor, token_losses_BN: Tensor | None, targets: TokenTargets) -> Tensor:
        image_losses = soft_cross_entropy(
            image_logits[:, None], targets.classes, targets.weights[:, :1], targets.background[:, :1]
        )
        loss = self.image_weight * _masked_mean(image_losses, targets.valid[:, :1])
        if token_losses_BN is None:
            return loss
        return loss + self.dense_weight * _masked_mean(token_losses_BN, self._taking_part(targets.valid[:, 1:]))

    def _taking_part(self, valid_BN: Tensor) -> Tensor:
        num_tokens = valid_BN.shape[1]
        num_kept = max(1, round(self.keep_tokens * num_tokens))
        if num_kept == num_tokens:
            return valid_BN
        device = valid_BN.device if self.generator is None else self.generator.device
        noise = torch.rand(valid_BN.shape, generator=self.generator, device=device)
        kept = noise.topk(num_kept, dim=1).indices.to(valid_BN.device, non_blocking=True)
        return torch.zeros_like(valid_BN).scatter_(1, kept, True) & valid_BN


def _masked_mean(losses: Tensor, taking_part: Tensor) -> Tensor:
    return torch.where(taking_part, losses, 0).sum() / taking_part.sum().clamp(min=1)


def _supervision(
    targets: TokenTargets, plan: "MixPlan | None", ground_truth: Tensor | None, weights: tuple[float, float]
) -> TokenTargets:
    if not isinstance(targets, TokenTargets):
        raise ValueError(
            f"targets must be TokenTargets, got {type(targets).__name__}; token_targets makes them from score maps, "
            "TokenTargets.from_dense and .from_labels from probabilities and labels"
        )
    if ground_truth is not None:
        targets = targets.blend_labels(ground_truth, agree=weights[0], disagree=weights[1])
    return targets if plan is None else plan.mix_targets(targets)


def _token_losses(name: str, logits: Tensor, targets: TokenTargets, images: slice = slice(None)) -> Tensor:
    classes = targets.classes[images]
    _check_match(name, logits, [len(classes), targets.num_tokens, targets.num_classes], targets)
    return soft_cross_entropy(logits, classes, targets.weights[images, 1:], targets.background[images, 1:])


def _slots(classes: Tensor, weights: Tensor, here: Piece) -> Tensor:
    return classes[here[0], None].expand(weights[here].shape)


def _pieces(logits: Tensor) -> list[Piece]:
    """Slices of images and of their rows, so that no temporary is larger than one piece (or row)."""
    if torch.compiler.is_compiling():
        return [(slice(None), slice(None))]
    num_images, num_rows, num_classes = logits.shape
    num_affordable = max(1, (CPU_PIECE if logits.device.type == "cpu" else ACCELERATOR_PIECE) // num_classes)
    image_step, row_step = max(1, num_affordable // num_rows), min(num_rows, num_affordable)
    return [
        (slice(image, image + image_step), slice(row, row + row_step))
        for image in range(0, num_images, image_step)
        for row in range(0, num_rows, row_step)
    ]


def _check_sparse(logits: Tensor, classes: Tensor, weights: Tensor, background: Tensor) -> None:
    if logits.ndim != 3 or logits.dtype not in LOGITS_DTYPES or 0 in logits.shape:
        raise ValueError(f"logits must be floating [B, R, K] without empty sides, got {describe(logits)}")
    num_images, num_rows, num_classes = logits.shape
    num_listed = classes.shape[-1] if classes.ndim else 0
    for name, tensor, dtype, shape in (
        ("classes", classes, torch.int64, (num_images, num_listed)),
        ("weights", weights, torch.float32, (num_images, num_rows, num_listed)),
        ("background", background, torch.float32, (num_images, num_rows)),
    ):
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != logits.device:
            wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)} on {logits.device}"
            raise ValueError(f"{name} must be {wanted} beside logits {describe(logits)}, got {describe(tensor)}")
        if tensor.requires_grad:
            raise ValueError(f"{name} requires gradients, but targets are constants here; detach() it")
    if classes.device.type == "cpu" and classes.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in classes.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"classes must be in 0..{num_classes - 1} as logits have them, got {low}..{high}")


def _check_match(name: str, tensor: Tensor, shape: list[int], targets: TokenTargets) -> None:
    if 0 in shape:
        lacks = "tokens; give None for token_logits" if len(targets) else "images"
        raise ValueError(f"{name} is {describe(tensor)}, but {targets!r} has no {lacks}")
    if list(tensor.shape) != shape or tensor.dtype not in LOGITS_DTYPES:
        raise ValueError(f"{name} must be floating {shape} to match {targets!r}, got {describe(tensor)}")
    if tensor.device != targets.device:
        raise ValueError(f"{name} must be on {targets.device} as targets are, got {describe(tensor)}; move one")
