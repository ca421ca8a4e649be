"""Which cells a mixed sample keeps: the random numbers of a plan, and the pure functions that make masks of them.

All functions work on S parameter sets at once, on any device. Masks are float32 [S, h, w] with 1 where the sample keeps
itself and 0 where its partner shows. Numbers called `uniform` are floating, in 0..1, the 1 excluded.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokenlabels.checks import Grid, check_generator, check_share, is_number

Per = Literal["sample", "pair", "batch"]
"""Who shares one parameter set. sample: nobody. pair: two samples, each the other's partner. batch: everybody."""

Pairing = Literal["permutation", "flip"]
"""permutation: random partners. flip: sample i mixes with B - 1 - i, as in timm and in the published code."""

MIN_BLOCK_CELLS = 16
"""Smallest area that a block is drawn with while at least as many cells are left to fill (as BEiT has it)."""

MIN_ASPECT = 0.3
"""Blocks have height / width between this and its inverse (as BEiT has it)."""

BLOCK_ROUNDS = 32
"""Blocks that are tried per mask. With lam uniform on a 14 x 14 grid a fifth of a cell stays unfilled on average."""


class MixDraw:
    """The random numbers of one plan: who is mixed with whom, and one value per parameter set for each call.

    All come from the generator, on its device, in the order of the calls.

    Args:
        batch_size: B, at least 2.
        per: who shares a parameter set; there are S = B, B / 2 or 1 of them.
        prob: probability that a parameter set mixes at all.
        pairing: how partners are found.
        generator: None is torch's default generator of the CPU.
    """

    def __init__(
        self, batch_size: int, *, per: Per, prob: float, pairing: Pairing, generator: torch.Generator | None
    ) -> None:
        _check_pairs(batch_size, per, pairing)
        check_share("prob", prob)
        check_generator(generator)
        self._generator = generator
        self._device = torch.device("cpu") if generator is None else generator.device
        index = torch.arange(batch_size, device=self._device)
        if pairing == "flip":
            self._partner = batch_size - 1 - index
            pair = torch.minimum(index, self._partner)
        else:
            order = torch.randperm(batch_size, generator=generator, device=self._device)
            place = order.argsort()
            # Neighbours in the order: two by two, or each the next one in a single cycle.
            self._partner = order[place ^ 1] if per == "pair" else order[(place + 1) % batch_size]
            pair = place // 2
        self._set_of_sample = {"sample": index, "pair": pair, "batch": torch.zeros_like(index)}[per]
        self._num_sets = {"sample": batch_size, "pair": batch_size // 2, "batch": 1}[per]
        self._mixes = self.uniform() < prob

    def uniform(self, *size: int) -> Tensor:
        """float64 [S, *size] in 0..1, the 1 excluded."""
        size = (self._num_sets, *size)
        return torch.rand(size, generator=self._generator, device=self._device, dtype=torch.float64)

    def lam(self, alpha: float, name: str = "alpha") -> Tensor:
        """float64 [S], the share to keep: from Beta(alpha, alpha), or 1 in a set that does not mix at all."""
        if not is_number(alpha) or not 0 < alpha < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {alpha!r}; prob=0.0 mixes nothing")
        return symmetric_beta(alpha, self.uniform(2)).masked_fill(~self._mixes, 1.0)

    def cutmix_masks(self, lam: Tensor, size: Grid) -> Tensor:
        """Masks of CutMix boxes [S, h, w] with centres anywhere in an area of `size` (h, w)."""
        height, width = size
        center_y, center_x = (self.uniform() * height).long(), (self.uniform() * width).long()
        return box_masks(cutmix_boxes(lam, center_y, center_x, size), size)

    def share_out(self, own_Shw: Tensor, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        """Partner int64 [B] and own float32 [B, h, w], on the device (None: where they were drawn)."""
        own = own_Shw if len(own_Shw) == len(self._partner) else own_Shw[self._set_of_sample]
        device = self._device if device is None else device
        return self._partner.to(device, non_blocking=True), own.float().to(device, non_blocking=True)


def symmetric_beta(alpha: float, uniform_S2: Tensor) -> Tensor:
    """Values of Beta(alpha, alpha), each from two uniform numbers.

    L. Devroye, "Random variate generation in one line of code" (1996), from Bailey's polar method for Student's t.
    In contrast to a ratio of gamma values it cannot end in 0 / 0 for a small alpha, and it needs no rejection.

    Args:
        alpha: above 0.
        uniform_S2: float64 [S, 2].

    Returns:
        lam float64 [S] in 0..1.
    """
    radius = torch.expm1(-torch.log(uniform_S2[:, 0]) / alpha)
    cosine = torch.cos(2 * math.pi * uniform_S2[:, 1])
    # Both infinities that float arithmetic can meet here, of the radius and of its inverse, end in lam = 0, 1/2 or 1.
    spread = torch.rsqrt(1 + 1 / (radius * cosine.square()))
    return (1 + spread.copysign(cosine)) / 2


def cutmix_boxes(lam: Tensor, center_y: Tensor, center_x: Tensor, size: Grid) -> Tensor:
    """The boxes of CutMix with the roundings of `timm.data.mixup.rand_bbox`.

    The cut has the sides ``int(side * sqrt(1 - lam))`` around its centre and is clipped to the image, so it takes
    at most the share 1 - lam.

    Args:
        lam: floating [S] in 0..1; the sides are computed in its dtype.
        center_y: int64 [S] in 0..height-1.
        center_x: int64 [S] in 0..width-1.
        size: (height, width) in pixels or cells.

    Returns:
        boxes_xyxy int64 [S, 4] in pixels or cells, the end excluded.
    """
    ratio = (1 - lam).sqrt()
    height, width = size
    cut_h, cut_w = (height * ratio).long(), (width * ratio).long()
    return torch.stack(
        [
            (center_x - cut_w // 2).clamp(0, width),
            (center_y - cut_h // 2).clamp(0, height),
            (center_x + (cut_w + 1) // 2).clamp(0, width),
            (center_y + (cut_h + 1) // 2).clamp(0, height),
        ],
        dim=1,
    )


def box_masks(boxes_xyxy: Tensor, size: Grid) -> Tensor:
    """0 inside the box, 1 outside.

    Args:
        boxes_xyxy: [S, 4] in pixels or cells, the end excluded.
        size: (height, width).
    """
    return _inside(boxes_xyxy, size).logical_not().float()


def random_patch_masks(lam: Tensor, uniform_SN: Tensor, grid: Grid) -> Tensor:
    """0 in exactly round((1 - lam) * N) cells in random places (MAE's masking, with a partner in place of nothing).

    Args:
        lam: floating [S] in 0..1.
        uniform_SN: [S, N], the smallest of which name the cells.
        grid: (h, w) with h * w = N.
    """
    rank_SN = uniform_SN.argsort(dim=1).argsort(dim=1)
    return (rank_SN >= _num_taken(lam, grid)[:, None]).float().reshape(-1, *grid)


def blockwise_masks(lam: Tensor, uniform_SR4: Tensor, grid: Grid) -> Tensor:
    """0 in about, and never more than, round((1 - lam) * N) cells that form rectangular blocks.

    As in BEiT's block-wise masking (arXiv 2106.08254, algorithm 1) blocks of random area and aspect ratio are placed
    anywhere, may overlap, and are dropped when they would take more new cells than are left. It differs in this:

    * the number of tries is fixed (R), so that all samples go together; a few cells can remain unfilled;
    * areas go up to what is left divided by the share of cells still free, because the rest of a block falls on cells
      that are taken already: masks that are nearly full would hardly be completed otherwise;
    * areas are at least what is left, or 16, where BEiT with fewer than 16 left draws between the two;
    * a block too high or too wide for the grid is cut to its size, where BEiT draws another.

    Args:
        lam: floating [S] in 0..1.
        uniform_SR4: [S, R, 4], per try the area, the aspect ratio, the row and the column.
        grid: (h, w) with h * w = N.
    """
    height, width = grid
    num_cells = height * width
    left = _num_taken(lam, grid)
    free_Shw = torch.ones((len(lam), height, width), dtype=torch.bool, device=lam.device)
    for area, aspect, row, column in uniform_SR4.permute(1, 2, 0):
        share_free = free_Shw.sum(dim=(1, 2)).clamp(min=1) / num_cells
        smallest = left.clamp(max=MIN_BLOCK_CELLS)
        cells = smallest + area * (left / share_free - smallest)
        root_aspect = torch.exp((aspect - 0.5) * math.log(1 / MIN_ASPECT))
        block_h = (cells.sqrt() * root_aspect).round().clamp(1, height)
        block_w = (cells.sqrt() / root_aspect).round().clamp(1, width)
        top = (row * (height - block_h + 1)).floor()
        start = (column * (width - block_w + 1)).floor()
        block_Shw = _inside(torch.stack([start, top, start + block_w, top + block_h], dim=1), grid) & free_Shw
        num_new = block_Shw.sum(dim=(1, 2))
        fits = num_new <= left
        free_Shw = free_Shw & ~(block_Shw & fits[:, None, None])
        left = left - num_new * fits
    return free_Shw.float()


def _inside(boxes_xyxy: Tensor, size: Grid) -> Tensor:
    """Which cells lie in the box, bool [S, h, w]."""
    x0, y0, x1, y1 = boxes_xyxy[:, :, None].unbind(dim=1)
    rows, columns = (torch.arange(side, device=boxes_xyxy.device) for side in size)
    in_rows, in_columns = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    return in_rows[:, :, None] & in_columns[:, None, :]


def _num_taken(lam: Tensor, grid: Grid) -> Tensor:
    return ((1 - lam) * (grid[0] * grid[1])).round().long()


def _check_pairs(batch_size: Any, per: Per, pairing: Pairing) -> None:
    if per not in get_args(Per):
        raise ValueError(f"per must be one of {', '.join(get_args(Per))}, got {per!r}")
    if pairing not in get_args(Pairing):
        raise ValueError(f"pairing must be one of {', '.join(get_args(Pairing))}, got {pairing!r}")
    if not isinstance(batch_size, int) or batch_size < 0:
        raise ValueError(f"batch_size must be an integer of at least 2, got {batch_size!r}")
    if batch_size < 2:
        samples = "an empty batch" if batch_size == 0 else "a batch of one"
        raise ValueError(f"{samples} has no partner to mix with, got batch_size {batch_size}; leave it unmixed")
    if batch_size % 2 == 1 and per == "pair":
        raise ValueError(f"per='pair' needs an even batch, got {batch_size}; use per='sample', or drop the last sample")
    if batch_size % 2 == 1 and pairing == "flip":
        raise ValueError(
            f"pairing='flip' needs an even batch, got {batch_size}: the middle sample would be its own partner; "
            "use pairing='permutation'"
        )
