"""Score maps for the tests of the audit."""

from collections.abc import Iterator, Sequence

import numpy as np

from tokenlabels.types import ScoreMap, ScoreMaps

WHOLE = (0.0, 0.0, 1.0, 1.0)
CENTRE = (0.15, 0.1, 0.85, 0.9)
WIDE, TALL = (0.0, -0.45, 1.0, 1.45), (-0.3, 0.0, 1.3, 1.0)  # letterboxed: padding above and below, left and right
VIEWS = (WHOLE, CENTRE, WIDE, TALL)


def maps_of(
    num: int,
    *,
    seed: int = 0,
    grid: tuple[int, int] = (5, 6),
    k: int = 3,
    num_classes: int = 20,
    views: Sequence[tuple[float, ...]] = VIEWS,
    prefix: str = "img",
) -> ScoreMaps:
    """Random maps; neighbouring rows have different views, and a few classes lead in most cells."""
    rng = np.random.default_rng(seed)
    cells = (num, *grid)
    first = np.where(rng.random((*cells, 1)) < 0.7, rng.integers(num_classes, size=(num, 1, 1, 1)), 0)
    steps = np.arange(k) * (num_classes // k)
    return ScoreMaps(
        tuple(f"{prefix}_{row:03d}" for row in range(num)),
        -np.sort(-rng.normal(3, 2, (*cells, k)), axis=-1).astype(np.float16),
        ((first + steps) % num_classes).astype(np.uint16),
        rng.uniform(0, 0.6, cells).astype(np.float16),
        np.array([views[row % len(views)] for row in range(num)], np.float32).reshape(num, 4),
    )


def cells_of_image(score_map: ScoreMap) -> Iterator[tuple[int, int, float, float]]:
    """Row, column and centre of every cell whose centre lies in the image."""
    x0, y0, x1, y1 = score_map.view.tolist()
    num_rows, num_columns = score_map.grid
    for row in range(num_rows):
        for column in range(num_columns):
            x = x0 + (x1 - x0) * (column + 0.5) / num_columns
            y = y0 + (y1 - y0) * (row + 0.5) / num_rows
            if -1e-6 <= x <= 1 + 1e-6 and -1e-6 <= y <= 1 + 1e-6:
                yield row, column, x, y


def probability(score_map: ScoreMap, row: int, column: int) -> dict[int, float]:
    """Of every stored class of a cell."""
    weights = np.exp(score_map.scores[row, column].astype(np.float64))
    shares = weights / weights.sum() * (1 - float(score_map.tail[row, column]))
    return dict(zip(score_map.classes[row, column].tolist(), shares.tolist(), strict=True))
