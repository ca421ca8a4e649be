"""Soft cross-entropy straight from sparse targets: all that the loss computes with the logits.

Legend: B images; R rows of an image; U listed classes per image; K classes.
"""

from typing import Any

import torch
from torch import Tensor

from tokenlabels.checks import check_tensor, describe, for_autograd, has_values

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
    sparse = (for_autograd(tensor) for tensor in (classes, weights, background))
    losses: Tensor = _SoftCrossEntropy.apply(logits, *sparse)
    return losses


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
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None, None]:
        return _Gradient.apply(grad_losses, *ctx.saved_tensors), None, None, None


class _Gradient(torch.autograd.Function):
    """The gradient of the logits; a function of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(grad_losses: Tensor, logits: Tensor, classes: Tensor, weights: Tensor, background: Tensor) -> Tensor:
        """``grad * (mass * softmax - target)``, where mass is what the target sums to.

        Rows without gradient get zeros, whatever their logits: tokens without target may hold anything.
        """
        grad_logits = torch.empty_like(logits)
        mass = logits.shape[-1] * background + weights.sum(dim=-1)
        scale, shift = (grad_losses * mass)[..., None], (grad_losses * background)[..., None]
        without_gradient = (grad_losses == 0)[..., None]
        for here in _pieces(logits):
            probs = torch.softmax(logits[here], dim=-1, dtype=grad_losses.dtype).mul_(scale[here])
            probs.scatter_add_(2, _slots(classes, weights, here), -grad_losses[here][..., None] * weights[here])
            probs.sub_(shift[here]).masked_fill_(without_gradient[here], 0)
            grad_logits[here] = probs
        return grad_logits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError("soft_cross_entropy has no second derivative")


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
    check_tensor("logits", logits)
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
    if has_values(classes) and classes.numel():
        low, high = (int(value) for value in classes.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"classes must be in 0..{num_classes - 1} as logits have them, got {low}..{high}")
