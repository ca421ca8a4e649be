"""What the options of `tokenlabels show LABELS` say: a cell, a crop, a class."""

import math
from collections.abc import Sequence
from difflib import get_close_matches

_MAX_SHOWN = 4


def parse_cell(text: str, grid: tuple[int, int]) -> tuple[int, int]:
    """ "7,9" as row and column.

    Raises:
        ValueError: it is something else, or not in the grid.
    """
    numbers = [number.strip() for number in text.split(",")]
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--cell is ROW,COLUMN, counted from 0, such as 7,9; got {text!r}")
    row, column = (int(number) for number in numbers)
    if row >= grid[0] or column >= grid[1]:
        raise ValueError(
            f"--cell {row},{column} is outside the map of {grid[0]} rows and {grid[1]} columns: give 0,0 to "
            f"{grid[0] - 1},{grid[1] - 1}"
        )
    return row, column


def parse_crop(text: str) -> tuple[float, float, float, float]:
    """ "0.1,0.2,0.8,0.9" as a box, xyxy in 0..1 of the image.

    Raises:
        ValueError: it is something else, empty, or reaches outside the image.
    """
    try:
        left, top, right, bottom = (float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"--crop is X0,Y0,X1,Y1 in 0..1 of the image, such as 0.1,0.2,0.8,0.9; got {text!r}") from None
    if not all(map(math.isfinite, (left, top, right, bottom))) or not (left < right and top < bottom):
        raise ValueError(f"--crop {text} is empty: X0 has to be below X1, and Y0 below Y1")
    if min(left, top) < 0 or max(right, bottom) > 1:
        raise ValueError(
            f"--crop {text} reaches outside the image: all four are in 0..1 of it, so divide pixels by its sides"
        )
    return left, top, right, bottom


def find_class(text: str, names: Sequence[str]) -> int:
    """The class that a name, one of its synonyms, a unique part of its name, or an id means.

    Raises:
        ValueError: no class, or several.
    """
    wanted = text.strip().casefold()
    synonyms = [[part.strip() for part in (name, *name.split(","))] for name in names]
    if wanted:
        exact = [index for index, own in enumerate(synonyms) if wanted in map(str.casefold, own)]
        matches = exact or [index for index, name in enumerate(names) if wanted in name.casefold()]
        if not exact and wanted.isdecimal() and int(wanted) < len(names):
            return int(wanted)
        if len(matches) == 1:
            return matches[0]
        if matches:
            listed = "; ".join(f"{index}: {names[index]}" for index in matches[:_MAX_SHOWN])
            more = f"; and {len(matches) - _MAX_SHOWN} more" if len(matches) > _MAX_SHOWN else ""
            raise ValueError(f"--class {text!r} may be several classes, say which by its id: {listed}{more}")
    if wanted.lstrip("-").isdecimal():
        raise ValueError(f"--class {text!r}: ids are 0 to {len(names) - 1}")
    owners = {own.casefold(): index for index, all_own in reversed(list(enumerate(synonyms))) for own in all_own}
    near = dict.fromkeys(owners[name] for name in get_close_matches(wanted, owners, n=_MAX_SHOWN, cutoff=0.5))
    listed = "; ".join(f"{index}: {names[index]}" for index in near) or f"0: {names[0]}"
    raise ValueError(f"--class {text!r}: there is no such class among {len(names)}; near it are {listed}")
