"""Which classes each map of a batch mentions, and where they stand in its list.

Legend: B maps, H x W cells, k stored classes per cell, K classes, U listed classes per map.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from tokenlabels.checks import check_count, check_tensor, describe, has_values, is_integer


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The distinct classes of every map of a batch.

    Attributes:
        classes: int64 [B, U], the ids of each map in ascending order; slots that are not needed hold 0.
        num_distinct: int64 [B], how many of the U slots are needed, 1..U.
        slots: int16 [B, H, W, k], where each stored class stands in the list of its map (int32 above 32,767).
        num_classes: K.
    """

    classes: Tensor
    num_distinct: Tensor
    slots: Tensor
    num_classes: int

    @property
    def num_listed(self) -> int:
        """Slots per map, U: the largest number of distinct classes of the batch, padded to one of a few sizes."""
        return self.classes.shape[1]

    def is_listed(self) -> Tensor:
        """Which slots are needed, bool [B, U]."""
        return torch.arange(self.num_listed, device=self.classes.device) < self.num_distinct[:, None]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same lists on another device."""
        names = ("classes", "num_distinct", "slots")
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        return replace(self, **moved)

    def check(self, classes: Tensor, num_classes: int) -> None:
        """Refuse maps that these lists cannot be of: another shape, device or number of classes."""
        if self.slots.shape != classes.shape or self.num_classes != num_classes:
            raise ValueError(
                f"the vocabulary is of maps {list(self.slots.shape)} of {self.num_classes} classes, got "
                f"{list(classes.shape)} of {num_classes}; find it from these maps"
            )
        if self.slots.device != classes.device:
            raise ValueError(f"the vocabulary is on {self.slots.device}, the maps on {classes.device}; move it there")
        if has_values(classes):
            if bool((self.slots >= self.num_listed).any()):
                raise ValueError(f"slots must be below {self.num_listed}, got {int(self.slots.max())}")
            of_these_maps = self.classes.gather(1, self.slots.flatten(1).long()) == classes.long().flatten(1)
            if not bool(of_these_maps.all()):
                raise ValueError("the vocabulary lists other classes than the maps hold; find it from these maps")

    def __repr__(self) -> str:
        return f"Vocabulary({len(self.classes)} maps, {self.num_listed} of {self.num_classes} classes listed)"


def find_vocabulary(classes: Tensor, num_classes: int) -> Vocabulary:
    """List the distinct classes of every map.

    The size of the lists is data: on an accelerator the host has to wait for it. Find them on the CPU, where the maps
    are read, and move them with the maps.

    Args:
        classes: integer [B, H, W, k], ids in 0..num_classes-1.
        num_classes: K.

    Raises:
        ValueError: another shape or dtype, an empty side, or (seen on the CPU alone) an id outside 0..num_classes-1 or
            twice in a cell.
    """
    check_tensor("classes", classes)
    check_count("num_classes", num_classes)
    if classes.ndim != 4 or not is_integer(classes) or 0 in classes.shape:
        raise ValueError(f"classes must be integer [B, H, W, k] without empty sides, got {describe(classes)}")
    if classes.shape[3] > num_classes:
        raise ValueError(f"a cell cannot store {classes.shape[3]} of {num_classes} classes, got {describe(classes)}")
    ids = classes.long().flatten(1)
    if has_values(ids):
        _check_ids(ids, num_classes)
    mentioned_BK = torch.zeros(len(ids), num_classes, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
    place_BK = mentioned_BK.cumsum(dim=1).sub_(1)
    num_distinct = place_BK[:, -1] + 1
    num_listed = padded_size(int(num_distinct.max()), num_classes)
    # Classes that are not mentioned all go to one slot more, which is cut off.
    target = place_BK.where(mentioned_BK, num_listed)
    every_id = torch.arange(num_classes, device=ids.device).expand_as(target)
    listed = torch.zeros(len(ids), num_listed + 1, dtype=torch.int64, device=ids.device).scatter_(1, target, every_id)
    slots = place_BK.to(torch.int16 if num_listed <= 32_767 else torch.int32).gather(1, ids).view(classes.shape)
    if has_values(slots):
        _check_distinct(slots, classes)
    return Vocabulary(listed[:, :num_listed].contiguous(), num_distinct, slots, num_classes)


def padded_size(num_distinct: int, num_classes: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds this many, at most K: few sizes, few compilations."""
    size = 16
    while size < num_distinct:
        size = size * 3 // 2 if size.bit_count() == 1 else size * 4 // 3
    return min(size, num_classes)


def _check_ids(ids: Tensor, num_classes: int) -> None:
    lowest, highest = (int(bound) for bound in ids.aminmax())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"class ids must be in 0..{num_classes - 1}, got {lowest}..{highest}; num_classes is the number "
            f"of classes of the label set, and an id of all ones marks a cell that was never written"
        )


def _check_distinct(slots: Tensor, classes: Tensor) -> None:
    # Every pair of a cell stands some places apart; for the few classes of a cell that is quicker than sorting them.
    for apart in range(1, slots.shape[3]):
        again = slots[..., apart:] == slots[..., :-apart]
        if not bool(again.any()):
            continue
        image, row, column = again.nonzero()[0, :3].tolist()
        ids = classes[image, row, column].tolist()
        raise ValueError(f"classes must be distinct within a cell, got {ids} in cell ({row}, {column}) of map {image}")
