"""Where a run is in its data, for checkpoints."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Position:
    """The next batch of a run.

    Attributes:
        seed, epoch: what the order is a function of.
        batch: number of the next batch, counted from `start`.
        start: samples of the epoch that all ranks together had seen before batch 0; above 0 after resuming in the
            middle of an epoch with another number of ranks.
        batch_size: per rank.
        world_size: number of ranks.
        shuffle_shards: shards per window of the shuffling.
        dataset: digest of the images.
    """

    seed: int
    epoch: int
    batch: int
    start: int
    batch_size: int
    world_size: int
    shuffle_shards: int
    dataset: str

    @classmethod
    def from_state(cls, state: object) -> Self:
        """Read what `state` wrote.

        Raises:
            ValueError: it is something else.
        """
        names = list(cls.__dataclass_fields__)
        if not isinstance(state, dict) or set(state) != set(names):
            got = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"not the state of a TokenLabelLoader: it has {', '.join(names)}; got {got}")
        position = cls(**state)
        for name, lowest in (("seed", -math.inf), ("epoch", 0), ("batch", 0), ("start", 0), ("world_size", 1)):
            value = getattr(position, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"not the state of a TokenLabelLoader: its {name} is {value!r}")
        return position

    def state(self) -> dict[str, Any]:
        """Plain numbers and strings, for `torch.save` or JSON."""
        return asdict(self)

    def refuse_others(self, present: "Position") -> None:
        """Refuse to go on where the samples seen so far cannot be told from the others.

        Raises:
            ValueError: the state is of other images, another batch size or another way of shuffling.
        """
        for name, what, advice in (
            ("dataset", "data set", "give the same shards in the same order"),
            ("batch_size", "batch size", "use that one, or begin an epoch anew with set_epoch"),
            ("shuffle_shards", "shuffle_shards", "use that one, or begin an epoch anew with set_epoch"),
        ):
            saved, current = getattr(self, name), getattr(present, name)
            if saved != current:
                raise ValueError(f"the state is of another {what}: {saved!r}, this loader has {current!r}; {advice}")
