"""Samples that are mixed from two, and their targets: MixToken, CutMix, MixUp, and patches at random or in blocks.

A plan is drawn once and then applied to images, tokens and targets; only the drawing is random.
Legend: B samples; S parameter sets, each drawn once and shared by one sample, a pair or the batch; [h, w] the plan's
grid; N tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from tokenlabels.checks import check_grid, check_share, check_tensor, check_values, describe, for_autograd, has_values
from tokenlabels.masks import (
    BLOCK_ROUNDS,
    MixDraw,
    Pairing,
    Per,
    blockwise_masks,
    random_patch_masks,
)
from tokenlabels.sparse_targets import TokenTargets

SHARE_TOLERANCE = 1e-6
"""Shares nearer than this to 0 and 1 are those of unmixed rows."""


@dataclass(frozen=True, eq=False)
class MixPlan:
    """Who is mixed with whom, and where: sample i keeps `own` of itself and takes the rest from ``partner[i]``.

    The constructors (`mixtoken`, `cutmix`, `mixup`, `random_patches`, `blockwise`) share these arguments:

    * batch_size: B, at least 2.
    * alpha: above 0; the share to keep is lam ~ Beta(alpha, alpha).
    * per: "sample" draws parameters for each sample, "pair" one set for two samples that are each other's partner
      (B even), "batch" one set for all.
    * prob: probability, 0..1, that a parameter set mixes at all; `own` is 1 everywhere otherwise.
    * pairing: "permutation" draws partners at random, all samples in one cycle or, per pair, in disjoint pairs;
      "flip" takes B - 1 - i (B even). No sample is its own partner.
    * generator: every number comes from it, on its device; the plan depends on nothing but its state. None takes
      torch's default generator of the CPU.
    * device: where the plan goes; None leaves it on the generator's device.

    They raise ValueError for arguments that are not allowed.

    Attributes:
        partner: int64 [B], in 0..B-1; i itself only where own is 1 everywhere.
        own: float32 [B, h, w] in 0..1, on a grid laid over the image: pixels (CutMix), tokens (MixToken, patches) or
            the image as a whole (MixUp, 1 x 1). 1 everywhere leaves a sample unmixed.
    """

    partner: Tensor
    own: Tensor

    def __post_init__(self) -> None:
        check_tensor("partner", self.partner)
        check_tensor("own", self.own)
        if self.partner.ndim != 1 or self.partner.dtype != torch.int64 or self.partner.shape[0] == 0:
            raise ValueError(f"partner must be int64 [B] with B above 0, got {describe(self.partner)}")
        own = self.own
        if own.ndim != 3 or own.dtype != torch.float32 or own.shape[0] != self.partner.shape[0] or 0 in own.shape:
            wanted = f"float32 [{len(self.partner)}, h, w] with a row for every partner and h, w above 0"
            raise ValueError(f"own must be {wanted}, got {describe(own)}")
        if own.device != self.partner.device:
            raise ValueError(f"own must be on {self.partner.device} as partner is, got {describe(own)}; move it there")
        if has_values(own):
            self._check_values()

    def _check_values(self) -> None:
        last = len(self) - 1
        if int(self.partner.min()) < 0 or int(self.partner.max()) > last:
            raise ValueError(f"partner must be in 0..{last}, got {int(self.partner.min())}..{int(self.partner.max())}")
        index = torch.arange(len(self), device=self.partner.device)
        with_itself = (self.partner == index) & (self.own != 1).flatten(1).any(dim=1)
        if bool(with_itself.any()):
            samples = with_itself.nonzero().flatten().tolist()
            raise ValueError(
                f"samples {samples} are mixed with themselves; give them other partners, or own = 1 to stay unmixed"
            )
        low, high = (float(value) for value in self.own.aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"own must be in 0..1 (the share of itself that a sample keeps), got {low:g}..{high:g}")

    @classmethod
    def mixtoken(
        cls,
        batch_size: int,
        *,
        grid: Sequence[int] = (14, 14),
        alpha: float = 1.0,
        per: Per = "sample",
        prob: float = 1.0,
        pairing: Pairing = "permutation",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """MixToken (Token Labeling, section 3.3): the box of CutMix drawn on the grid of tokens.

        Apply it to the output of the patch embedding, before class token and position embedding are added; every
        token then belongs to one image.

        Args:
            batch_size: and the other arguments: see the class.
            grid: rows and columns of tokens.
        """
        draw = MixDraw(batch_size, per=per, prob=prob, pairing=pairing, generator=generator)
        return cls(*draw.share_out(draw.cutmix_masks(draw.lam(alpha), check_grid(grid)), device))

    @classmethod
    def cutmix(
        cls,
        batch_size: int,
        *,
        image_size: int | Sequence[int] = 224,
        alpha: float = 1.0,
        mixup_alpha: float = 0.0,
        switch_prob: float = 0.5,
        per: Per = "sample",
        prob: float = 1.0,
        pairing: Pairing = "permutation",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """CutMix on pixels (arXiv 1905.04899), alone or in turns with MixUp as `timm.data.Mixup` has it.

        Args:
            batch_size: and the other arguments: see the class.
            image_size: (height, width) in pixels, or the side of a square.
            mixup_alpha: above 0, a parameter set is MixUp with lam ~ Beta(mixup_alpha, mixup_alpha) where it is not
                CutMix; 0 is CutMix alone.
            switch_prob: probability of CutMix, 0..1, where mixup_alpha is above 0.
        """
        draw = MixDraw(batch_size, per=per, prob=prob, pairing=pairing, generator=generator)
        check_share("switch_prob", switch_prob)
        size = check_grid((image_size, image_size) if isinstance(image_size, int) else image_size, "image_size")
        own_Shw = draw.cutmix_masks(draw.lam(alpha), size)
        if mixup_alpha != 0:
            is_cutmix, lam = draw.uniform() < switch_prob, draw.lam(mixup_alpha, name="mixup_alpha")
            own_Shw = torch.where(is_cutmix[:, None, None], own_Shw, lam[:, None, None].float())
        return cls(*draw.share_out(own_Shw, device))

    @classmethod
    def mixup(
        cls,
        batch_size: int,
        *,
        alpha: float = 0.8,
        per: Per = "sample",
        prob: float = 1.0,
        pairing: Pairing = "permutation",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """MixUp (arXiv 1710.09412): the share lam of every pixel or token; h = w = 1. Arguments: see the class."""
        draw = MixDraw(batch_size, per=per, prob=prob, pairing=pairing, generator=generator)
        return cls(*draw.share_out(draw.lam(alpha)[:, None, None], device))

    @classmethod
    def random_patches(
        cls,
        batch_size: int,
        *,
        grid: Sequence[int] = (14, 14),
        alpha: float = 1.0,
        per: Per = "sample",
        prob: float = 1.0,
        pairing: Pairing = "permutation",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The random mixing of TL-Align (appendix B): round((1 - lam) * N) patches of the partner in random places.

        Args:
            batch_size: and the other arguments: see the class.
            grid: rows and columns of patches.
        """
        draw = MixDraw(batch_size, per=per, prob=prob, pairing=pairing, generator=generator)
        lam, grid = draw.lam(alpha), check_grid(grid)
        return cls(*draw.share_out(random_patch_masks(lam, draw.uniform(grid[0] * grid[1]), grid), device))

    @classmethod
    def blockwise(
        cls,
        batch_size: int,
        *,
        grid: Sequence[int] = (14, 14),
        alpha: float = 1.0,
        per: Per = "sample",
        prob: float = 1.0,
        pairing: Pairing = "permutation",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The block-wise mixing of TL-Align (appendix B): rectangles of the partner's patches, as BEiT masks them.

        At most round((1 - lam) * N) patches, and rarely some less; `tokenlabels.masks.blockwise_masks` tells how the
        blocks are drawn and where that differs from BEiT.

        Args:
            batch_size: and the other arguments: see the class.
            grid: rows and columns of patches.
        """
        draw = MixDraw(batch_size, per=per, prob=prob, pairing=pairing, generator=generator)
        lam, grid = draw.lam(alpha), check_grid(grid)
        return cls(*draw.share_out(blockwise_masks(lam, draw.uniform(BLOCK_ROUNDS, 4), grid), device))

    def mix(self, x: Tensor) -> Tensor:
        """``x * own + x[partner] * (1 - own)`` (Token Labeling eq. 5), in the dtype of x.

        Half precision is mixed in float32 and rounded once; where own is 0 or 1, finite values are those of one
        sample.

        Args:
            x: floating [B, C, H, W] with H, W whole multiples of h, w, or tokens [B, N, D] in row-major order with
                N = h * w (any N for a 1 x 1 plan).
        """
        self._check_mixable(x)
        num_samples, height, width = self.own.shape
        own, partner = for_autograd(self.own), for_autograd(self.partner)
        if x.ndim == 3:
            cells, own = x, own.reshape(num_samples, height * width, 1)
        else:
            # One cell of the plan covers a block of pixels: own is broadcast over it and never repeated in memory.
            _, channels, image_height, image_width = x.shape
            cells = x.reshape(num_samples, channels, height, image_height // height, width, image_width // width)
            own = own[:, None, :, None, :, None]
        return (cells * own + cells[partner] * (1 - own)).to(x.dtype).reshape(x.shape)

    def share(self) -> Tensor:
        """float32 [B], the share of itself that each sample keeps.

        The mean of the mask (Token Labeling eq. 7) and lambda of TL-Align (eq. 1); of boxes clipped by the border it
        is the share that was really kept, timm's corrected lambda.
        """
        return self.own.mean(dim=(1, 2))

    def coverage(self, grid: Sequence[int]) -> Tensor:
        """float32 [B, h', w'], the share of itself that each sample keeps in every token of another grid.

        Both grids cover the whole image; shares are exact areas, also where cells straddle the borders of tokens.

        Args:
            grid: rows and columns of tokens (h', w').
        """
        rows, columns = check_grid(grid)
        _, height, width = self.own.shape
        if height % rows == 0 and width % columns == 0:
            return self.own.reshape(-1, rows, height // rows, columns, width // columns).mean(dim=(2, 4))
        # float64 is left alone by autocast and by the settings that let float32 products be rounded (TF32, bfloat16).
        over_rows = _overlaps(rows, height, self.own.device)
        over_columns = _overlaps(columns, width, self.own.device)
        return (over_rows @ self.own.double() @ over_columns.T / (height * width)).float()

    def mix_targets(
        self, targets: TokenTargets, share: Tensor | None = None, token_share: Tensor | None = None
    ) -> TokenTargets:
        """The targets of the mixed samples: of tokens by what covers them (Token Labeling eq. 6), of images by `share`
        (eq. 7), or both by what `TLAlign` found.

        Each image lists its own classes and those of its partner. A row that takes a positive share from a row
        without a target has none itself.

        Args:
            targets: of B images, on the plan's device.
            share: float32 [B] in 0..1, of the own image in what is classified; None is `share()`.
            token_share: float32 [B, N] in 0..1, the same of every token; None is `coverage` of the targets' grid.
        """
        if not isinstance(targets, TokenTargets):
            raise ValueError(f"targets must be TokenTargets, got {type(targets).__name__}; see TokenTargets.from_dense")
        if targets.classes.shape[0] != self.partner.shape[0] or targets.device != self.partner.device:
            raise ValueError(
                f"the plan mixes {len(self)} samples on {self.partner.device}, got targets of {len(targets)} on "
                f"{targets.device}; draw a plan for this batch, and move one with .to(device)"
            )
        share = self._row_shares(targets, share, token_share)
        partner, valid = self.partner, targets.valid
        # Means of ones are 1 up to rounding.
        valid = (valid | (share < SHARE_TOLERANCE)) & (valid[partner] | (share > 1 - SHARE_TOLERANCE))
        from_own, from_partner = share * valid, (1 - share) * valid
        return replace(
            targets,
            classes=torch.cat([targets.classes, targets.classes[partner]], dim=1),
            weights=torch.cat(
                [targets.weights * from_own[..., None], targets.weights[partner] * from_partner[..., None]], dim=2
            ),
            background=targets.background * from_own + targets.background[partner] * from_partner,
            valid=valid,
        )

    def _row_shares(self, targets: TokenTargets, share: Tensor | None, token_share: Tensor | None) -> Tensor:
        """[B, R], of the rows of the targets."""
        share = self.share() if share is None else self._checked("share", share, [len(self)])
        if targets.grid is None:
            if token_share is not None:
                raise ValueError(f"there is a token_share, but {targets!r} has no tokens; leave it out")
            return share[:, None]
        if token_share is None:
            token_share = self.coverage(targets.grid).flatten(1)
        token_share = self._checked("token_share", token_share, [len(self), targets.num_tokens])
        return torch.cat([share[:, None], token_share], dim=1)

    def _checked(self, name: str, share: Tensor, shape: list[int]) -> Tensor:
        check_tensor(name, share)
        if list(share.shape) != shape or share.dtype != torch.float32 or share.device != self.own.device:
            raise ValueError(f"{name} must be float32 {shape} on {self.own.device}, got {describe(share)}")
        check_values(name, share, lambda values: (values >= 0) & (values <= 1), "must be in 0..1")
        return share.detach()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same plan on another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in ("partner", "own")}
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.partner)

    def __repr__(self) -> str:
        num_samples, height, width = self.own.shape
        share = f", mean share {float(self.own.mean()):.3f}" if has_values(self.own) else ""
        return f"MixPlan({num_samples} samples, own {height}x{width}{share}, on {self.own.device})"

    def check_images(self, images: Tensor) -> None:
        """Refuse images that this plan cannot have mixed.

        Raises:
            ValueError: they are of another batch, size, layout or device.
        """
        check_tensor("images", images)
        if images.ndim != 4 or len(images) != len(self):
            raise ValueError(f"{self._named()} cannot have mixed {describe(images)}; give [{len(self)}, C, H, W]")
        self._check_mixable(images)

    def _check_mixable(self, x: Tensor) -> None:
        check_tensor("x", x)
        num_samples, height, width = self.own.shape
        if x.ndim not in (3, 4) or 0 in x.shape or len(x) != num_samples:
            wanted = f"images [{num_samples}, C, H, W] or tokens [{num_samples}, N, D]"
            raise ValueError(f"{self._named()} mixes {wanted} without empty sides, got {describe(x)}")
        if not x.is_floating_point():
            raise ValueError(f"only floating values can be mixed, got {describe(x)}; convert and normalise them first")
        if x.device != self.own.device:
            raise ValueError(f"the plan is on {self.own.device}, got {describe(x)}; move one of them with .to(device)")
        if x.ndim == 4 and x.shape[1:3] == (height, width) != x.shape[2:] and (height, width) != (1, 1):
            raise ValueError(
                f"{self._named()} mixes images with channels first, got {describe(x)}, which looks like channels last; "
                "flatten tokens [B, h, w, D] to [B, N, D], or permute"
            )
        if x.ndim == 4 and (x.shape[2] % height or x.shape[3] % width):
            raise ValueError(
                f"{self._named()} mixes images whose sides are whole multiples of {height} and {width}, got "
                f"{describe(x)}; draw the plan for this size"
            )
        if x.ndim == 3 and (height, width) != (1, 1) and x.shape[1] != height * width:
            class_token = x.shape[1] == height * width + 1
            other_grid = "draw the plan on the grid of the tokens (MixPlan.mixtoken), or mix the images"
            advice = "mix before the class token is added" if class_token else other_grid
            raise ValueError(f"{self._named()} mixes {height * width} tokens, got {describe(x)}; {advice}")

    def _named(self) -> str:
        """For messages; made for them alone, because compiled code would be made anew for every number in it."""
        num_samples, height, width = self.own.shape
        return f"a plan of {num_samples} samples with own {height}x{width}"


def _overlaps(num_tokens: int, num_cells: int, device: torch.device) -> Tensor:
    """How much of each cell lies in each token along one side: float64 [num_tokens, num_cells].

    In whole units of 1 / (num_tokens * num_cells) of the side, so that no rounding happens here; a token has num_cells
    of them, a cell has num_tokens.
    """
    token_start = torch.arange(num_tokens, device=device)[:, None] * num_cells
    cell_start = torch.arange(num_cells, device=device) * num_tokens
    end = torch.minimum(token_start + num_cells, cell_start + num_tokens)
    return (end - torch.maximum(token_start, cell_start)).clamp(min=0).double()
