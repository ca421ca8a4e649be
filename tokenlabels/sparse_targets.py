"""The soft targets of a batch of crops, without the classes that nobody mentions.

Legend: B images; R = 1 + N rows, the image-level row first, then N tokens row-major; U listed classes per image;
K classes.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from tokenlabels.checks import (
    Grid,
    check_count,
    check_grid,
    check_labels,
    check_share,
    check_tensor,
    check_values,
    describe,
)


@dataclass(frozen=True, eq=False)
class TokenTargets:
    """Soft targets of B images as few numbers per row, in place of K.

    The target of class c in row r of image b is ``background[b, r]`` plus the sum of ``weights[b, r, u]`` over the
    slots u with ``classes[b, u] == c``. In this additive form mixing and smoothing are exact and touch no class list:
    a class may be listed twice (the two sides of a mixed image), and a slot of weight 0 (padding) changes nothing.

    Attributes:
        classes: int64 [B, U], ids in 0..K-1 of the listed classes.
        weights: float32 [B, R, U], what a listed class has above the background; may be negative.
        background: float32 [B, R], the probability of every class that is not listed.
        valid: bool [B, R], false where a row has no target (a token outside the image): it is all zero and takes no
            part in the loss.
        grid: rows and columns of tokens (h, w) with h * w = N, or None with the image-level row alone (R = 1).
        num_classes: K.
    """

    classes: Tensor
    weights: Tensor
    background: Tensor
    valid: Tensor
    grid: Grid | None
    num_classes: int

    def __post_init__(self) -> None:
        if self.grid is not None:
            check_grid(self.grid)
        check_count("num_classes", self.num_classes)
        rows = 1 + self.num_tokens
        for name in ("classes", "weights", "background", "valid"):
            check_tensor(name, getattr(self, name))
        if self.classes.ndim != 2 or self.classes.dtype != torch.int64 or 0 in self.classes.shape:
            raise ValueError(f"classes must be int64 [B, U] without empty sides, got {describe(self.classes)}")
        check_values(
            "classes",
            self.classes,
            lambda ids: (ids >= 0) & (ids < self.num_classes),
            f"must be in 0..{self.num_classes - 1}",
        )
        num_images, num_listed = self.classes.shape
        for name, dtype, shape in (
            ("weights", torch.float32, (num_images, rows, num_listed)),
            ("background", torch.float32, (num_images, rows)),
            ("valid", torch.bool, (num_images, rows)),
        ):
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.shape != shape or tensor.device != self.classes.device:
                wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)} on {self.classes.device}"
                raise ValueError(f"{name} must be {wanted}, got {describe(tensor)}")

    @classmethod
    def from_dense(cls, target: Tensor, grid: Grid | None = None) -> Self:
        """Targets from all K probabilities of every row.

        The value that more than half of the classes of a row share becomes its background, so that sparse targets
        stay sparse; targets without such a value are kept whole (U = K). A row of zeros is one without target.

        Args:
            target: floating [B, 1 + N, K], image-level row first.
            grid: (h, w) with h * w = N; None takes a square grid.
        """
        check_tensor("target", target)
        if target.ndim != 3 or not target.is_floating_point() or 0 in target.shape:
            raise ValueError(f"target must be floating [B, 1 + N, K] without empty sides, got {describe(target)}")
        check_values("target", target, torch.isfinite, "must be finite")
        num_images, num_rows, num_classes = target.shape
        target = target.float()
        background = target.median(dim=-1).values
        weights_BRK = target - background[..., None]
        listed_BK = weights_BRK.ne(0).any(dim=1)
        num_listed = max(1, int(listed_BK.sum(dim=1).max()))
        # A stable sort brings the listed classes to the front, in order of their ids; the rest have weight 0.
        classes = listed_BK.logical_not().sort(dim=1, stable=True).indices[:, :num_listed]
        weights = weights_BRK.gather(2, classes[:, None].expand(num_images, num_rows, num_listed))
        valid = target.ne(0).any(dim=-1)
        return cls(
            classes,
            weights,
            background,
            valid,
            _square_grid(num_rows - 1) if grid is None else check_grid(grid),
            num_classes,
        )

    @classmethod
    def from_labels(cls, labels: Tensor, num_classes: int) -> Self:
        """Plain hard labels: the image-level row alone, with all mass on one class.

        Args:
            labels: integer [B], ids in 0..num_classes-1.
            num_classes: K.
        """
        check_count("num_classes", num_classes)
        check_labels(labels, num_classes)
        classes = labels.long()[:, None]
        weights = torch.ones(classes.shape, dtype=torch.float32, device=labels.device)[:, None]
        return cls(classes, weights, torch.zeros_like(weights[..., 0]), weights[..., 0] > 0, None, num_classes)

    @property
    def num_tokens(self) -> int:
        """Tokens per image, N."""
        return 0 if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.classes.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the four tensors."""
        return sum(tensor.nbytes for tensor in (self.classes, self.weights, self.background, self.valid))

    def dense(self) -> Tensor:
        """All classes of every row, float32 [B, 1 + N, K]."""
        num_images, num_rows, num_listed = self.weights.shape
        target = self.background[..., None].repeat(1, 1, self.num_classes)
        index = self.classes[:, None].expand(num_images, num_rows, num_listed)
        return target.scatter_add_(2, index, self.weights)

    def smooth(self, eps: float) -> Self:
        """Label smoothing: ``(1 - eps) * target + eps / K``, so that rows that sum to 1 still do (up to rounding).

        The rows of the published code sum to 1 + eps / K after its smoothing.

        Args:
            eps: share that is spread over all classes, 0..1.
        """
        check_share("eps", eps)
        background = self.background * (1 - eps) + self.valid * (eps / self.num_classes)
        return replace(self, weights=self.weights * (1 - eps), background=background)

    def blend_labels(self, labels: Tensor, *, agree: float = 0.5, disagree: float = 0.1) -> Self:
        """Mix the dataset's label into the image-level row, as the published loss with ground truth does.

        Args:
            labels: integer [B], ids in 0..K-1.
            agree: weight of the label, 0..1, where it is the most probable class of the row.
            disagree: its weight elsewhere. The defaults are those of the published code.

        Mix images afterwards: whether teacher and label agree is asked image by image, not of their mixture.
        """
        check_share("agree", agree)
        check_share("disagree", disagree)
        check_labels(labels, self.num_classes, num_images=len(self), device=self.device)
        labels = labels.long()[:, None]
        row_BU = self.weights[:, 0]
        label_weight = (row_BU * (self.classes == labels)).sum(dim=1)
        # The background is a candidate too (weight 0): teachers can find all listed classes unlikely.
        agrees = label_weight >= row_BU.amax(dim=1).clamp(min=0)
        share = torch.full_like(label_weight, disagree).masked_fill(agrees, agree).masked_fill(~self.valid[:, 0], 1.0)
        keep = torch.ones_like(self.background)
        keep[:, 0] -= share
        added = torch.zeros_like(self.weights[..., :1])
        added[:, 0, 0] = share
        valid = self.valid.clone()
        valid[:, 0] = True
        return replace(
            self,
            classes=torch.cat([self.classes, labels], dim=1),
            weights=torch.cat([self.weights * keep[..., None], added], dim=2),
            background=self.background * keep,
            valid=valid,
        )

    def check_model(self, name: str, *, grid: Grid | None, num_classes: int) -> None:
        """Refuse a model that these are no targets for.

        Args:
            name: of the model, for the message.
            grid: rows and columns of its tokens.
            num_classes: that it tells apart.

        Raises:
            ValueError: the targets are on another grid, or of another number of classes.
        """
        if self.grid != grid:
            raise ValueError(
                f"targets must be on the grid {grid} of {name}'s tokens, got {self.grid}; make them with grid={grid}"
            )
        if self.num_classes != num_classes:
            raise ValueError(
                f"targets must be of the {num_classes} classes of {name}, got {self.num_classes}; build the model with "
                f"num_classes={self.num_classes}"
            )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same targets on another device."""
        names = ("classes", "weights", "background", "valid")
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.classes)

    def __repr__(self) -> str:
        num_images, _, num_listed = self.weights.shape
        rows = "image-level row" if self.grid is None else f"1 + {self.grid[0]}x{self.grid[1]} rows"
        return (
            f"TokenTargets({num_images} images, {rows}, {num_listed} listed of {self.num_classes} classes, "
            f"{self.num_bytes / 1e6:.1f} MB on {self.device})"
        )


def _square_grid(num_tokens: int) -> Grid | None:
    if num_tokens == 0:
        return None
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"{num_tokens} tokens are no square grid; give grid=(h, w) with h * w = {num_tokens}")
    return side, side
