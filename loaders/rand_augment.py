"""RandAugment (Cubuk et al., arXiv 1909.13719) as timm's strings name it, drawn for a whole batch on the CPU.

What is drawn is small: which operation each layer gives each sample, and with what argument. `loaders.color_ops`
applies the colour operations; the geometric ones of a sample are folded into one affine map, for `loaders.warp` and for
the labels alike. Two things differ from timm: all colour operations come before all geometric ones, whatever the layers
say, so that pixels are resampled once; and resampling is bilinear, where timm draws bilinear or bicubic.

Legend: B samples; L layers.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from loaders.augment_ops import COLOR_OPS, LEVEL_SCALE, OPS, Op
from loaders.upload import upload
from tokenlabels.affine import compose_affine, rotation, shear, translation
from tokenlabels.checks import check_count, check_share, check_tensor, describe, is_number

NOT_APPLIED = -1
"""Stands in `AugmentDraw.ops` where a layer leaves a sample alone."""

UNIFORMS_PER_LAYER = 4
"""For the choice of the operation, whether it is applied, its magnitude and its sign, in this order."""


_SECTION = re.compile(r"(m|n|mmax|inc)\d+|(p|mstd)\d+(?:\.\d*)?|(t)(?:weights|3aw?)")


class ColorRun(NamedTuple):
    """Samples to which a layer gives the same colour operation: ``color_rows[start:stop]`` of an `AugmentDraw`."""

    layer: int
    op: Op
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class AugmentDraw:
    """What happens to each sample of a batch, drawn; `from_ops` builds it.

    Attributes:
        ops: int64 [B, L], values of `Op` or `NOT_APPLIED`.
        arguments: float32 [B, L], in the unit that `Op` says; 0 where there is none.
        color_runs: which samples share a colour operation, layer by layer. Numbers of the host, so that applying
            them waits for no device.
        color_rows: int64 [sum of the runs], samples.
        geometric_rows: int64 [<= B], the samples that any geometric operation touches, ascending.
    """

    ops: Tensor
    arguments: Tensor
    color_runs: tuple[ColorRun, ...]
    color_rows: Tensor
    geometric_rows: Tensor

    @classmethod
    def from_ops(cls, ops: Tensor, arguments: Tensor) -> Self:
        """From operations int64 [B, L] and arguments float32 [B, L], both on the CPU."""
        _check_draw(ops, arguments)
        runs, rows, start = [], [ops.new_empty(0)], 0
        for layer, ops_B in enumerate(ops.unbind(1)):
            for op in COLOR_OPS:
                same = (ops_B == op).nonzero().flatten()
                if len(same):
                    runs.append(ColorRun(layer, op, start, start + len(same)))
                    rows.append(same)
                    start += len(same)
        geometric_rows = (ops >= Op.ROTATE).any(dim=1).nonzero().flatten()
        return cls(ops, arguments, tuple(runs), torch.cat(rows), geometric_rows)

    def __len__(self) -> int:
        return self.ops.shape[0]

    @property
    def is_geometric(self) -> Tensor:
        """bool [B], on the device of `ops`: whether a geometric operation touches the sample."""
        return (self.ops >= Op.ROTATE).any(dim=1)

    def affine(self, size_px: Sequence[int]) -> Tensor:
        """All geometric operations of each sample as one map from the output image to the input image.

        Args:
            size_px: of every image, (H, W), pixels.

        Returns:
            float32 [B, 2, 3] as in `tokenlabels.affine`, on the device of `ops`; the identity where there is none.
            It is made of many small steps: take it before `to`, and move the result.
        """
        return _fold(self.ops, self.arguments, size_px)

    def sample_affine(self, row: int, width_px: int, height_px: int) -> Tensor:
        """The map of one sample, float32 [2, 3], of an image of its own size: for use before cropping."""
        return _fold(self.ops[row : row + 1], self.arguments[row : row + 1], (height_px, width_px))[0]

    def to(self, device: torch.device | str) -> "AugmentDraw":
        """The same draw with its tensors on `device`, which is not waited for."""
        return replace(
            self,
            ops=upload(self.ops, device),
            arguments=upload(self.arguments, device),
            color_rows=upload(self.color_rows, device),
            geometric_rows=upload(self.geometric_rows, device),
        )


@dataclass(frozen=True)
class RandAugment:
    """What may be drawn, and how; `parse` reads timm's strings.

    Attributes:
        op_names: timm's names of the operations to choose from.
        num_layers: how many operations a sample is given, one after the other.
        prob: probability that a layer's operation is applied, 0..1.
        magnitude: strength, 0 and above; 10 is the widest argument.
        magnitude_std: standard deviation of the strength; infinity draws it evenly from 0..magnitude.
        magnitude_max: the strength is clipped to 0..this.
        weights: chance of each operation, at least 0, not all 0; a sample is then given no operation twice.
            None gives all the same chance, every layer for itself.
    """

    op_names: tuple[str, ...]
    num_layers: int = 2
    prob: float = 0.5
    magnitude: float = LEVEL_SCALE
    magnitude_std: float = 0.0
    magnitude_max: float = LEVEL_SCALE
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.op_names if name not in OPS]
        if unknown or not self.op_names:
            raise ValueError(f"RandAugment has no {', '.join(unknown) or 'operations'}; it knows {', '.join(OPS)}")
        check_count("num_layers (n)", self.num_layers)
        check_share("prob (p)", self.prob)
        for name in ("magnitude", "magnitude_std", "magnitude_max"):
            value = getattr(self, name)
            if not is_number(value) or not value >= 0 or (math.isinf(value) and name != "magnitude_std"):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if self.weights is not None:
            self._check_weights(self.weights)

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        if len(weights) != len(self.op_names) or not all(is_number(w) and 0 <= w < math.inf for w in weights):
            raise ValueError(f"weights must be {len(self.op_names)} numbers, one per operation, got {weights!r}")
        if sum(weight > 0 for weight in weights) < self.num_layers:
            raise ValueError(
                f"num_layers (n) must be at most the number of operations with a weight above 0, of which no sample"
                f" is given one twice; got {self.num_layers} layers and weights {weights!r}"
            )

    @classmethod
    def parse(cls, config: str) -> Self:
        """From a string such as ``rand-m9-mstd0.5-inc1``; timm reads it.

        Sections, in any order: m (magnitude, 10), n (layers, 2), p (probability, 0.5), mstd (standard deviation of
        the magnitude, 0; above 100 the magnitude is uniform), mmax (its bound, 10), inc1 (operations that are the
        stronger the higher the magnitude), tweights (choice by weight, without replacement).

        Raises:
            ValueError: anything else: timm passes over sections that it does not know.
        """
        _check_config(config)
        policy = rand_augment_transform(config)
        ops: list[Any] = policy.ops
        weights = policy.choice_weights
        return cls(
            op_names=tuple(op.name for op in ops),
            num_layers=policy.num_layers,
            prob=ops[0].prob,
            magnitude=float(ops[0].magnitude),
            magnitude_std=float(ops[0].magnitude_std),
            magnitude_max=float(ops[0].magnitude_max or LEVEL_SCALE),
            weights=None if weights is None else tuple(map(float, weights)),
        )

    @property
    def num_uniforms(self) -> int:
        """How many random numbers a sample takes."""
        return self.num_layers * UNIFORMS_PER_LAYER

    def draw(self, uniforms: Tensor) -> AugmentDraw:
        """What happens to each sample, from its own random numbers.

        Args:
            uniforms: float64 [B, num_uniforms] in 0..1 without 1, on the CPU; layer by layer, see UNIFORMS_PER_LAYER.
        """
        check_uniforms(uniforms, self.num_uniforms)
        choice, apply, strength, sign = uniforms.reshape(-1, self.num_layers, UNIFORMS_PER_LAYER).unbind(2)
        chosen = self._choose(choice)
        magnitude = self._magnitude(strength)
        sign = torch.where(sign > 0.5, -1.0, 1.0).to(torch.float64)
        ops, arguments = torch.empty_like(chosen), torch.empty_like(magnitude)
        for index, name in enumerate(self.op_names):
            op, level = OPS[name]
            here = chosen == index
            ops.masked_fill_(here, int(op))
            arguments = torch.where(here, level(magnitude, sign), arguments)
        skipped = apply >= self.prob
        ops.masked_fill_(skipped, NOT_APPLIED)
        return AugmentDraw.from_ops(ops, arguments.masked_fill_(skipped, 0).float())

    def _choose(self, uniforms: Tensor) -> Tensor:
        """Places in `op_names`, int64 [B, L], from float64 [B, L]."""
        num_ops = len(self.op_names)
        if self.weights is None:
            return (uniforms * num_ops).long()
        left = torch.tensor(self.weights, dtype=torch.float64).repeat(len(uniforms), 1)
        chosen = []
        for uniform in uniforms[..., None].unbind(1):
            bounds = left.cumsum(dim=1)
            place = torch.searchsorted(bounds, uniform * bounds[:, -1:], right=True).clamp_(max=num_ops - 1)
            left.scatter_(1, place, 0.0)
            chosen.append(place)
        return torch.cat(chosen, dim=1)

    def _magnitude(self, uniforms: Tensor) -> Tensor:
        """Strengths from float64 uniforms of the same shape."""
        if math.isinf(self.magnitude_std):
            magnitude = self.magnitude * uniforms
        elif self.magnitude_std > 0:
            magnitude = self.magnitude + self.magnitude_std * torch.special.ndtri(uniforms)
        else:
            magnitude = torch.full_like(uniforms, self.magnitude)
        return magnitude.clamp(0, self.magnitude_max)


def check_uniforms(uniforms: Tensor, num: int) -> None:
    """Refuse what is not float64 [B, num] on the CPU, or outside 0..1."""
    check_tensor("uniforms", uniforms)
    if (
        uniforms.dtype != torch.float64
        or uniforms.ndim != 2
        or uniforms.shape[1] != num
        or uniforms.device.type != "cpu"
    ):
        raise ValueError(f"uniforms must be float64 [B, {num}] on cpu, got {describe(uniforms)}")
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError("uniforms must be in 0..1 without 1, got others")


def _fold(ops: Tensor, arguments: Tensor, size_px: Sequence[int]) -> Tensor:
    """The geometric operations of samples as one map each, float32 [B, 2, 3]; the last layer is next to the output."""
    none = arguments.new_zeros(len(ops), dtype=torch.float64)
    folded = translation(none, none)
    for ops_B, arguments_B in zip(ops.unbind(1), arguments.double().unbind(1), strict=True):
        degrees, shear_x, shear_y, shift_x, shift_y = (
            torch.where(ops_B == op, arguments_B, 0.0) for op in Op if op >= Op.ROTATE
        )
        # At most one of the three is not the identity.
        for step in (rotation(degrees, size_px), shear(shear_x, shear_y, size_px), translation(shift_x, shift_y)):
            folded = compose_affine(output_to_middle=step, middle_to_source=folded)
    return folded.float()


def _check_config(config: str) -> None:
    first, *sections = str(config).split("-")
    allowed = "'rand' and, joined by '-', any of m9, n2, p0.5, mstd0.5, mmax10, inc1, tweights, each once"
    if first != "rand":
        raise ValueError(
            f"rand_augment must be {allowed}, got {config!r}; AutoAugment, AugMix and 3-Augment are not built here"
        )
    seen = set()
    for section in sections:
        match = _SECTION.fullmatch(section)
        if match is None:
            raise ValueError(f"rand_augment must be {allowed}, got {section!r} in {config!r}")
        key = match[match.lastindex or 0]
        if key in seen:
            raise ValueError(f"rand_augment must be {allowed}, got {key} twice in {config!r}")
        seen.add(key)


def _check_draw(ops: Tensor, arguments: Tensor) -> None:
    check_tensor("ops", ops)
    check_tensor("arguments", arguments)
    if ops.dtype != torch.int64 or ops.ndim != 2 or ops.device.type != "cpu":
        raise ValueError(f"ops must be int64 [B, L] on cpu, got {describe(ops)}")
    if arguments.dtype != torch.float32 or arguments.shape != ops.shape or arguments.device != ops.device:
        raise ValueError(f"arguments must be float32 {list(ops.shape)} on cpu, got {describe(arguments)}")
    if ops.numel() and not NOT_APPLIED <= int(ops.min()) <= int(ops.max()) < len(Op):
        raise ValueError(f"ops must be in {NOT_APPLIED}..{len(Op) - 1}, got {int(ops.min())}..{int(ops.max())}")
