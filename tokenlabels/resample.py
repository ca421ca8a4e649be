"""RoIAlign and point sampling as small linear operators on the cells of a map.

Interpolating a map of U values per cell is linear in the map, and the same for all U values. For a box the operator is
the product of one along y and one along x; a general affine map needs one matrix from all cells to all tokens.

Legend: B maps, H x W cells, h x w tokens (N = h * w), S samples per token along one axis.
"""

import math

import torch
from torch import Tensor

from tokenlabels.geometry import BORDER_TOLERANCE


def box_operator(low: Tensor, high: Tensor, num_tokens: int, num_cells: int, first: Tensor, last: Tensor) -> Tensor:
    """One axis of RoIAlign: the weight of every cell in every token.

    As `torchvision.ops.roi_align(aligned=True, sampling_ratio=-1)`: a token is the mean of ceil(its extent in cells)
    evenly spaced samples, a sample is interpolated between the two nearest cell centres, and samples beyond the
    outermost centres take the outermost cell.

    Args:
        low: float64 [B], where the box begins, 0..1 of the map.
        high: float64 [B], where it ends.
        num_tokens: tokens along this axis.
        num_cells: cells along this axis.
        first: int64 [B], the first cell that may be read.
        last: int64 [B], the last cell that may be read.

    Returns:
        float64 [B, num_tokens, num_cells]; rows sum to 1. A box of NaN gives NaN.
    """
    start, end = low * num_cells - 0.5, high * num_cells - 0.5
    extent = (end - start) / num_tokens
    max_samples = math.ceil(num_cells / num_tokens)
    num_samples = extent.ceil().clamp(1, max_samples)[:, None, None]
    token = torch.arange(num_tokens, device=low.device)[:, None]
    sample = torch.arange(max_samples, device=low.device)
    positions_BNS = start[:, None, None] + (token + (sample + 0.5) / num_samples) * extent[:, None, None]
    share_BNS = (sample < num_samples) / num_samples
    return (_interpolate(positions_BNS, num_cells, first, last) * share_BNS[..., None]).sum(dim=2)


def affine_operator(
    output_to_map: Tensor, grid: tuple[int, int], cells: tuple[int, int], region: Tensor, cell_range: Tensor
) -> tuple[Tensor, Tensor]:
    """Point sampling under an affine map: the weight of every cell in every token.

    The samples of a token lie as those of RoIAlign in the output image, as many as its extent in cells asks for, up to
    those of an output that shows the whole map. An affine map that only crops and mirrors gives what `box_operator`
    gives.

    Args:
        output_to_map: float64 [B, 2, 3], from the output image to the map, both 0..1.
        grid: rows and columns of tokens (h, w).
        cells: rows and columns of cells (H, W).
        region: float64 [B, 4], xyxy, the part of the map that holds labels.
        cell_range: int64 [B, 4], first column, first row, last column and last row of cells that may be read.

    Returns:
        operator: float64 [B, N, H * W]. A row is the mean over the samples of its token that lie inside the region, or
            over all of them where none does; it sums to 1.
        any_inside: bool [B, N], whether a sample of the token lies inside the region.
    """
    along_x, along_y = output_to_map[:, 0, :2] * cells[1], output_to_map[:, 1, :2] * cells[0]
    extent_xy = torch.hypot(along_x, along_y)
    points_x, share_x = _sample_places(extent_xy[:, 0], grid[1], cells[1])
    points_y, share_y = _sample_places(extent_xy[:, 1], grid[0], cells[0])
    # Every sample of every token: [B, h, w, Sy, Sx].
    x, y = points_x[:, None, :, None, :], points_y[:, :, None, :, None]
    m = output_to_map[:, :, :, None, None, None, None]
    u, v = (m[:, row, 0] * x + m[:, row, 1] * y + m[:, row, 2] for row in range(2))
    low_x, low_y, high_x, high_y = region[:, :, None, None, None, None].unbind(dim=1)
    inside = (u >= low_x - BORDER_TOLERANCE) & (u <= high_x + BORDER_TOLERANCE)
    inside &= (v >= low_y - BORDER_TOLERANCE) & (v <= high_y + BORDER_TOLERANCE)
    all_samples = _samples_last((share_x[:, None, None, None, :] * share_y[:, None, None, :, None]).expand_as(u))
    share = all_samples * _samples_last(inside)
    columns = _interpolate(_samples_last(u) * cells[1] - 0.5, cells[1], cell_range[:, 0], cell_range[:, 2])
    rows = _interpolate(_samples_last(v) * cells[0] - 0.5, cells[0], cell_range[:, 1], cell_range[:, 3])
    total = share.sum(dim=2, keepdim=True)
    # No sample inside makes 0 / 0, which is not chosen.
    share = torch.where(total > 0, share / total, all_samples)
    return ((rows * share[..., None]).mT @ columns).flatten(2), total[..., 0] > 0


def _samples_last(points: Tensor) -> Tensor:
    """[B, h, w, Sy, Sx] to [B, N, Sy * Sx]."""
    return points.flatten(3).flatten(1, 2)


def _sample_places(extent: Tensor, num_tokens: int, num_cells: int) -> tuple[Tensor, Tensor]:
    """Places of the samples along one axis of the output, [B, num_tokens, S] in 0..1, and their shares, [B, S]."""
    max_samples = math.ceil(num_cells / num_tokens)
    num_samples = (extent / num_tokens).ceil().clamp(1, max_samples)[:, None]
    token = torch.arange(num_tokens, device=extent.device)[:, None]
    sample = torch.arange(max_samples, device=extent.device)
    places = (token + ((sample + 0.5) / num_samples)[:, None]) / num_tokens
    return places, (sample < num_samples) / num_samples


def _interpolate(positions: Tensor, num_cells: int, first: Tensor, last: Tensor) -> Tensor:
    """Linear interpolation weights [B, ..., num_cells] of positions [B, ...] in cells, the first centre being 0."""
    shape = (-1,) + (1,) * (positions.ndim - 1)
    positions = torch.minimum(torch.maximum(positions, first.view(shape)), last.view(shape))
    cells = torch.arange(num_cells, device=positions.device)
    return (1 - (positions[..., None] - cells).abs()).clamp(min=0)
