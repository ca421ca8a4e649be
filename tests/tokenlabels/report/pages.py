"""What is read from the page in a browser."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.tokenlabels.report.cases import HOSTILE_KEY, NAMES
from tokenlabels.report.contents import Contents
from tokenlabels.report.items import Item
from tokenlabels.types import ScoreMap

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

Open = Callable[..., "Page"]


def keys(page: "Page") -> list[str]:
    return page.locator(".tile h3 button").all_inner_texts()


def tile(page: "Page", key: str) -> "Locator":
    (place,) = [index for index, shown in enumerate(keys(page)) if shown == key]
    return page.locator(".tile").nth(place)


def item_with(contents: Contents, view: tuple[float, ...]) -> Item:
    wanted = pytest.approx(view, abs=1e-6)
    return next(item for item in contents.gallery.items if item.view == wanted and item.key != HOSTILE_KEY)


def told(score_map: ScoreMap, row: int, column: int) -> list[list[str]]:
    """The classes of a cell and its tail, as a table of names and per cent."""
    names = [NAMES[class_id] for class_id in score_map.classes[row, column]]
    shares = [*score_map.probabilities()[row, column].tolist(), float(score_map.tail[row, column])]
    return [
        [" ".join(name.split()), f"{share * 100:.1f}\N{NO-BREAK SPACE}%"]
        for name, share in zip([*names, "all other classes"], shares, strict=True)
    ]


def table(rows: "Locator") -> list[list[str]]:
    return [[" ".join(cell.split(" ")).strip() for cell in row.locator("td").all_inner_texts()] for row in rows.all()]


def centre_of(
    surface: "Locator", view: tuple[float, ...], grid: tuple[int, int], row: int, column: int
) -> tuple[float, float]:
    """Of a cell, on the screen, from the place of the photograph alone."""
    box = surface.locator("..").locator("img").bounding_box()
    assert box is not None
    x = view[0] + (view[2] - view[0]) * (column + 0.5) / grid[1]
    y = view[1] + (view[3] - view[1]) * (row + 0.5) / grid[0]
    return box["x"] + x * box["width"], box["y"] + y * box["height"]
