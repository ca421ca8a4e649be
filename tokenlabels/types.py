"""The values that travel between the packages: the score map of one image, and of many.

Legend: n images, H x W cells of the map, k stored classes per cell.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ClassIds = NDArray[np.unsignedinteger[Any]]


def class_dtype(num_classes: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest id type whose all-ones value stays free to mean "nothing stored": uint16 or uint32."""
    return np.dtype(np.uint16 if num_classes <= 65_535 else np.uint32)


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """What a teacher said about one image: its k best classes at every cell.

    Attributes:
        key: WebDataset key of the image.
        scores: float16 [H, W, k], teacher logits, descending along k.
        classes: uint16 or uint32 [H, W, k], the ids that belong to the scores.
        tail: float16 [H, W], softmax mass of the classes that are not stored, 0..1.
        view: float32 [4], the part of the image that the map covers, xyxy, normalised to 0..1 of the image. A
            letterboxed map reaches outside 0..1.
    """

    key: str
    scores: NDArray[np.float16]
    classes: ClassIds
    tail: NDArray[np.float16]
    view: NDArray[np.float32]

    def __post_init__(self) -> None:
        _check_shapes(self.scores, self.classes, self.tail, self.view, num_leading=0)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells, (H, W)."""
        return self.tail.shape[0], self.tail.shape[1]

    @property
    def k(self) -> int:
        """Stored classes per cell."""
        return int(self.scores.shape[-1])

    def probabilities(self) -> NDArray[np.float32]:
        """Softmax probability of each stored class, float32 [H, W, k]; with `tail` they sum to 1 in every cell."""
        return _probabilities(self.scores, self.tail)

    def __repr__(self) -> str:
        height, width = self.grid
        return f"ScoreMap({self.key!r}, {height}x{width} cells, k={self.k}, view={self.view.tolist()})"


@dataclass(frozen=True, eq=False)
class ScoreMaps:
    """The score maps of n images, in the order of `keys`. Fields as in `ScoreMap`, with n in front."""

    keys: tuple[str, ...]
    scores: NDArray[np.float16]
    classes: ClassIds
    tail: NDArray[np.float16]
    views: NDArray[np.float32]

    def __post_init__(self) -> None:
        _check_shapes(self.scores, self.classes, self.tail, self.views, num_leading=1)
        if len(self.keys) != len(self.scores):
            raise ValueError(f"got {len(self.keys)} keys for {len(self.scores)} maps; give one key per map")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells, (H, W)."""
        return self.tail.shape[1], self.tail.shape[2]

    @property
    def k(self) -> int:
        """Stored classes per cell."""
        return int(self.scores.shape[-1])

    @property
    def num_bytes(self) -> int:
        """Raw bytes of the four arrays."""
        return self.scores.nbytes + self.classes.nbytes + self.tail.nbytes + self.views.nbytes

    def probabilities(self) -> NDArray[np.float32]:
        """Softmax probability of each stored class, float32 [n, H, W, k]; with `tail` they sum to 1 in every cell."""
        return _probabilities(self.scores, self.tail)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> ScoreMap:
        """Copies, so that one kept row does not pin the whole stack in memory."""
        return ScoreMap(
            self.keys[row],
            self.scores[row].copy(),
            self.classes[row].copy(),
            self.tail[row].copy(),
            self.views[row].copy(),
        )

    def __iter__(self) -> Iterator[ScoreMap]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        height, width = self.grid
        return f"ScoreMaps({len(self)} maps, {height}x{width} cells, k={self.k}, {self.classes.dtype} ids)"


def _probabilities(scores: NDArray[np.float16], tail: NDArray[np.float16]) -> NDArray[np.float32]:
    weights = np.exp(scores.astype(np.float32) - scores[..., :1].astype(np.float32))
    kept = 1 - tail.astype(np.float32)
    return np.asarray(weights * (kept / weights.sum(axis=-1))[..., None], dtype=np.float32)


def _check_shapes(
    scores: NDArray[np.float16],
    classes: ClassIds,
    tail: NDArray[np.float16],
    views: NDArray[np.float32],
    *,
    num_leading: int,
) -> None:
    lead = scores.shape[:num_leading]
    if scores.ndim != num_leading + 3 or scores.dtype != np.float16:
        raise ValueError(f"scores must be float16 [..., H, W, k], got {scores.dtype} {scores.shape}")
    if classes.shape != scores.shape or classes.dtype not in (np.uint16, np.uint32):
        raise ValueError(f"classes must be uint16 or uint32 {scores.shape}, got {classes.dtype} {classes.shape}")
    if tail.shape != scores.shape[:-1] or tail.dtype != np.float16:
        raise ValueError(f"tail must be float16 {scores.shape[:-1]}, got {tail.dtype} {tail.shape}")
    if views.shape != (*lead, 4) or views.dtype != np.float32:
        raise ValueError(f"views must be float32 {(*lead, 4)}, got {views.dtype} {views.shape}")
