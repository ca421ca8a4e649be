"""Labels through attention (TL-Align, equation 9): the mean of all heads' attention, times the labels of the keys.

Three backends give the same numbers:

* explicit: the attention matrix is made, used for values and labels, and kept for backward;
* second_call: `scaled_dot_product_attention` runs once more without gradients, with the labels as its values;
* padded: the labels are one more column of the values, in a wider head, so that one call does both.

Legend: B sequences (images or windows), h heads, Q queries, M keys, D channels of a head, C columns of labels (1: the
share of the own image, say).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tokenlabels.precision import without_autocast

Backend = Literal["explicit", "second_call", "padded"]

DEFAULTS: dict[str, Backend] = {"cpu": "second_call"}
"""By type of device: the fastest whose memory stays within 2 % of the plain model's, from `tokenlabels bench align`;
docs/align.md has the figures. Devices that were not measured take "second_call", which leaves the main path alone."""

_COLUMN_GROUP = 8
"""Fused kernels want heads of a multiple of this many channels."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    labels: Tensor,
    *,
    scale: float,
    fused: bool,
    backend: Backend | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    centred: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of the main path, and the labels that it brings to the queries.

    Labels see the attention before dropout, as published.

    Args:
        q: [B, h, Q, D].
        k, v: [B, h, M, D].
        labels: float32 [B, M, C], of the keys.
        scale: of the products of q and k.
        fused: whether the plain model calls `scaled_dot_product_attention`.
        backend: None takes `DEFAULTS` for fused attention, and "explicit" otherwise, where the matrix exists anyway.
        bias: added to the products, broadcast to [B, h, Q, M].
        dropout: probability, of the attention of the main path. "padded" then works as "second_call", because labels
            would be dropped too.
        centred: whether half precision carries the labels' differences from their mean alone. Not for columns that are
            divided by each other afterwards: those need a small relative error.

    Returns:
        [B, h, Q, D], and float32 [B, Q, C] without gradient.
    """
    if backend is None:
        backend = DEFAULTS.get(q.device.type, "second_call") if fused else "explicit"
    if backend == "explicit":
        weights = _weights(q, k, scale, bias)
        return functional.dropout(weights, dropout) @ v, _through(weights, labels)
    if backend == "padded" and not dropout:
        return _padded(q, k, v, labels, scale, bias, centred)
    return _attended(q, k, v, scale, bias, dropout, fused), _second_call(q, k, labels, scale, bias, centred)


def _weights(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    products = (q * scale) @ k.transpose(-2, -1)
    return (products if bias is None else products + bias).softmax(dim=-1)


def _attended(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, dropout: float, fused: bool
) -> Tensor:
    if fused:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    return functional.dropout(_weights(q, k, scale, bias), dropout) @ v


@torch.no_grad()
def _through(weights: Tensor, labels: Tensor) -> Tensor:
    """The labels that weights [B, h, Q, M] bring."""
    with without_autocast(labels.device):
        return weights.mean(dim=1).to(labels.dtype) @ labels


@torch.no_grad()
def _second_call(q: Tensor, k: Tensor, labels: Tensor, scale: float, bias: Tensor | None, centred: bool) -> Tensor:
    # As wide as the heads, so that the kernel of the main path takes it, unless there are more labels.
    values, mean = _values(labels, max(q.shape[-1], labels.shape[-1]), q, centred)
    bias = None if bias is None else bias.detach()
    moved = functional.scaled_dot_product_attention(q.detach(), k.detach(), values, attn_mask=bias, scale=scale)
    return _of_all_heads(moved[..., : labels.shape[-1]], mean)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, labels: Tensor, scale: float, bias: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor]:
    num_channels, num_columns = v.shape[-1], labels.shape[-1]
    width = -(-num_columns // _COLUMN_GROUP) * _COLUMN_GROUP
    values, mean = _values(labels, width, v, centred)
    q, k = functional.pad(q, (0, width)), functional.pad(k, (0, width))
    v = torch.cat([v, values.to(v.dtype)], dim=-1)
    both = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    moved = both[..., num_channels : num_channels + num_columns].detach()
    return both[..., :num_channels], _of_all_heads(moved, mean)


def _values(labels: Tensor, width: int, like: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Labels as values [B, h, M, width] of a head, and what was taken off, [B, 1, C]: the mean, or nothing.

    Weights sum to one, so that means may be taken off before and added afterwards.
    """
    mean = labels.mean(dim=1, keepdim=True) if centred else torch.zeros_like(labels[:, :1])
    values = functional.pad(labels - mean, (0, width - labels.shape[-1])).to(like.dtype)
    return values[:, None].expand(-1, like.shape[1], -1, -1), mean


def _of_all_heads(moved: Tensor, mean: Tensor) -> Tensor:
    return moved.to(mean.dtype).mean(dim=1) + mean
