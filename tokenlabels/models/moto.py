"""Modulation across Tokens, MoTo (arXiv 2212.11115, section 5.1): normalisation by the statistics of soft regions.

Every position belongs to each of n entities with a probability, the layout. Each entity has a mean and a standard
deviation of every channel, and a position is normalised by those of its entities.

Legend: B images, C channels, H x W positions, P = H * W, n entities.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenlabels.checks import Grid, check_choice, check_count, check_tensor, describe, is_number
from tokenlabels.precision import without_autocast

Partition = Literal["soft", "hard"]
"""Probabilities of entities (equation 4), or the most probable entity alone (section 5.2.3)."""

EPSILON = 1e-5
"""Added to standard deviations in equation 5; the paper names no value, this is that of torch's normalisations."""

_LEAST_WEIGHT = 1e-12
"""Entities that are not there have no mean; their sums are divided by this instead of 0."""


class MoTo(nn.Module):
    """[B, C, H, W] -> the same shape and dtype, modulated by the layout that it finds itself.

    Of equation 3, f, k and q are convolutions with padding (C to n channels each), and k is read at n points only,
    see `sampling_grid`. The dictionary u begins standard normal as that of `nn.Embedding`. "Selected" mean and standard
    deviation of equation 5 are weighted by the layout: of entity i, the mean is sum(L_i X) / sum(L_i) over positions.

    Time and memory are O(n C H W) and O(C H W + n H W): moments and results are products of matrices, and the n
    normalised copies of equation 5 are never made. Moments are taken around the mean of the channel and in float64: an
    entity that is flat and far from that mean (sky, padding, an erased box) would lose its variance to rounding, and
    its values be multiplied by up to 1e5. Equation 3 multiplies activations by one another: in the layout an offset
    costs digits, squared.

    Args:
        channels: C.
        num_entities: n, at most H * W of the maps to come.
        partition: "soft", or "hard" for one entity per position. Which one is most probable has no gradient: with
            "hard" f, k, q and u stay as they were initialised (they do not require gradients, so that neither weight
            decay nor distributed training touch them), and x, beta and alpha alone have gradients.
        temperature: tau of equation 4, by which activations are multiplied.

    Attributes:
        f, k, q: convolutions of weight [n, C, 3, 3].
        u: [n].
        beta, alpha: scale and shift of each entity and channel, [n, C]; 1 and 0 in the beginning.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self, channels: int, num_entities: int = 8, partition: Partition = "soft", temperature: float = 0.1
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("num_entities", num_entities)
        check_choice("partition", partition, Partition)
        if not is_number(temperature) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a number above 0 (the paper has 0.1), got {temperature!r}")
        self.channels, self.num_entities = channels, num_entities
        self.partition, self.temperature = partition, float(temperature)
        self.f, self.k, self.q = (nn.Conv2d(channels, num_entities, 3, padding=1) for _ in range(3))
        self.u = nn.Parameter(torch.randn(num_entities))
        self.beta = nn.Parameter(torch.ones(num_entities, channels))
        self.alpha = nn.Parameter(torch.zeros(num_entities, channels))
        if partition == "hard":
            for parameter in (self.u, *self.f.parameters(), *self.k.parameters(), *self.q.parameters()):
                parameter.requires_grad_(False)

    def extra_repr(self) -> str:
        """What `print(model)` says besides the parts."""
        return f"{self.channels}, {self.num_entities}, partition={self.partition!r}, temperature={self.temperature}"

    def forward(self, x: Tensor) -> Tensor:
        """Equation 5: [B, C, H, W] -> the same shape and dtype; the layout in float32 at least, the moments in float64.

        Raises:
            ValueError: x is no floating [B, C, H, W] with these channels and at least as many positions as entities.
        """
        self._check(x)
        with without_autocast(x.device):
            layout = self._layout(x.to(_wide(x.dtype)))
            return self._modulate(x.double(), layout.double()).to(x.dtype)

    def layout(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> float32 [B, n, H, W]: how much each entity has of a position, in sum 1. "hard" has 0 and 1.

        Raises:
            ValueError: as of `forward`.
        """
        self._check(x)
        with without_autocast(x.device):
            layout = self._layout(x.to(_wide(x.dtype)))
            return layout.float().reshape(len(x), self.num_entities, *x.shape[2:])

    def _layout(self, x: Tensor) -> Tensor:
        """Equations 3 and 4: [B, C, H, W] -> L [B, n, P]."""
        weights = torch.cat([self.f.weight, self.q.weight]).to(x.dtype)
        biases = torch.cat([_bias(self.f), _bias(self.q)]).to(x.dtype)
        features, queries = functional.conv2d(x, weights, biases, padding=1).flatten(2).chunk(2, dim=1)
        correlation = self._keys(x).transpose(1, 2) @ queries
        activation = torch.addcmul(features, self.u.to(x.dtype)[:, None], correlation)
        if self.partition == "hard":
            entities = torch.arange(self.num_entities, device=x.device)[:, None]
            return (activation.argmax(dim=1, keepdim=True) == entities).to(x.dtype)
        return (self.temperature * activation).softmax(dim=1)

    def _keys(self, x: Tensor) -> Tensor:
        """k_n of equation 3: [B, C, H, W] -> [B, d = n, n]. The convolution is worked out at its n points alone."""
        height, width = x.shape[2:]
        rows, columns = sampling_grid(self.num_entities, (height, width))
        row_indices, are_rows = _neighbours(rows, height, x)
        column_indices, are_columns = _neighbours(columns, width, x)
        patches = x.index_select(2, row_indices).index_select(3, column_indices)
        patches = patches * (are_rows[:, None] * are_columns)
        return functional.conv2d(patches, self.k.weight.to(x.dtype), _bias(self.k).to(x.dtype), stride=3).flatten(2)

    def _modulate(self, x: Tensor, layout: Tensor) -> Tensor:
        """Equation 5 with (X - mu) * beta / (sigma + eps) + alpha written as X * scale + shift."""
        x_bcp = x.flatten(2)
        # the result is the same around any pivot, so that none of its gradient comes by way of it
        centred_bcp = x_bcp - x_bcp.detach().mean(dim=2, keepdim=True)
        weights = layout.sum(dim=2, keepdim=True).clamp(min=_LEAST_WEIGHT)
        mean = layout @ centred_bcp.transpose(1, 2) / weights
        square = layout @ centred_bcp.square().transpose(1, 2) / weights
        scale = self.beta.to(x.dtype) / (_root(square - mean.square()) + EPSILON)
        shift = torch.addcmul(self.alpha.to(x.dtype), mean, scale, value=-1)
        # in the order of the channels in memory, so that nothing is copied
        if x.is_contiguous(memory_format=torch.channels_last):
            scaled = centred_bcp.transpose(1, 2) * (layout.transpose(1, 2) @ scale)
            return torch.baddbmm(scaled, layout.transpose(1, 2), shift).transpose(1, 2).reshape(x.shape)
        scaled = centred_bcp * (scale.transpose(1, 2) @ layout)
        return torch.baddbmm(scaled, shift.transpose(1, 2), layout).reshape(x.shape)

    def _check(self, x: Tensor) -> None:
        check_tensor("x", x)
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"x must be a floating map [B, {self.channels}, H, W], got {describe(x)}; tokens [B, N, C] go back to "
                "their grid first: tokens.transpose(1, 2).unflatten(2, (H, W))"
            )
        if x.shape[1] != self.channels:
            is_last = x.shape[3] == self.channels
            advice = "x.permute(0, 3, 1, 2) puts the last first" if is_last else f"build MoTo({x.shape[1]}) for it"
            raise ValueError(
                f"x must have {self.channels} channels, [B, {self.channels}, H, W], got {describe(x)}; {advice}"
            )
        height, width = x.shape[2:]
        if height * width < self.num_entities:
            raise ValueError(
                f"{self.num_entities} entities are more than the {height} x {width} positions of {describe(x)}; "
                "give fewer num_entities, or larger images"
            )


def sampling_grid(num_points: int, size: Grid) -> Grid:
    """Rows and columns (rows * columns = num_points) of the cells, at whose centres k is read.

    Of all factorisations it is the one with the squarest cells on a map of this size (the wider one of two), and one
    that the map has positions for if there is any. A prime number of points is a single row or column; where the map is
    too small for that, neighbouring cells share a position.
    """
    height, width = int(size[0]), int(size[1])  # compiled code cannot compare pairs of unknown sizes

    def badness(rows: int) -> tuple[bool, float]:
        columns = num_points // rows
        cell = rows * width, columns * height
        return rows > height or columns > width, max(cell) / min(cell)

    rows = min((rows for rows in range(1, num_points + 1) if num_points % rows == 0), key=badness)
    return rows, num_points // rows


def _neighbours(num_cells: int, side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Along one side, each cell's centre and the positions before and after: indices [3 * num_cells], and 1 or, beyond
    the border, where the padding is, 0."""
    centres = (2 * torch.arange(num_cells, device=like.device) + 1) * side // (2 * num_cells)
    indices = (centres[:, None] + torch.arange(-1, 2, device=like.device)).flatten()
    inside = (indices >= 0) & (indices < side)
    return indices.clamp(0, side - 1), inside.to(like.dtype)


def _root(variance: Tensor) -> Tensor:
    """The square root, 0 for what rounding made negative; at 0 its gradient is 0 instead of infinite."""
    is_positive = variance > 0
    return torch.where(is_positive, variance, 1).sqrt() * is_positive


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
