"""Maps in a real browser: where their cells lie, and what pointers and keys find in them."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from tests.tokenlabels.audit.maps import TALL, WHOLE, WIDE
from tests.tokenlabels.report.cases import NAMES, Case
from tests.tokenlabels.report.pages import Open, centre_of, item_with, keys, table, tile, told
from tokenlabels.geometry import valid_cells
from tokenlabels.report.contents import Contents

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("view", [WHOLE, WIDE, TALL], ids=["whole", "wide", "tall"])
def test_pointing_at_a_cell_shows_its_classes(
    open_page: Open, contents: Contents, case: Case, view: tuple[float, ...]
) -> None:
    page = open_page()
    item = item_with(contents, view)
    score_map = case.map_of(item.key)
    surface = tile(page, item.key).locator(".map")
    surface.scroll_into_view_if_needed()
    for row, column in np.argwhere(valid_cells(score_map.view, score_map.grid))[::4].tolist():
        x, y = centre_of(surface, item.view, score_map.grid, row, column)
        page.mouse.move(x, y)
        cursor = surface.locator(".cursor").bounding_box()
        assert cursor is not None
        assert (cursor["x"] + cursor["width"] / 2, cursor["y"] + cursor["height"] / 2) == pytest.approx((x, y), abs=0.1)
        assert page.locator("#card p").inner_text() == f"Cell {row},{column}"
        assert table(page.locator("#card tr")) == told(score_map, row, column)
    page.mouse.move(1, 1)
    assert page.locator("#card").is_hidden()


@pytest.mark.parametrize("view", [WHOLE, WIDE, TALL], ids=["whole", "wide", "tall"])
def test_cells_lie_where_the_image_has_them(
    open_page: Open, contents: Contents, case: Case, view: tuple[float, ...], tmp_path: Path
) -> None:
    page = open_page(device_scale_factor=2)
    item = item_with(contents, view)
    score_map = case.map_of(item.key)
    tile(page, item.key).locator("h3 button").click()
    page.add_style_tag(content="#large img { filter: brightness(0) !important } .cursor, .lines { display: none }")
    page.evaluate("document.documentElement.style.setProperty('--opacity', 1)")
    photo, canvas = (page.locator(f"#large {name}").bounding_box() for name in ("img", "canvas"))
    assert photo is not None
    assert canvas is not None
    assert photo["width"] / photo["height"] == pytest.approx(item.width / item.height, rel=0.01)
    page.screenshot(path=tmp_path / "large.png")
    pixels = np.asarray(Image.open(tmp_path / "large.png").convert("RGB"), np.int64)
    valid = valid_cells(score_map.view, score_map.grid)
    colours = {known.class_id: [int(known.colour[i : i + 2], 16) for i in (1, 3, 5)] for known in item.leading}
    shares = score_map.probabilities()[..., 0]
    height, width = canvas["height"] / score_map.grid[0], canvas["width"] / score_map.grid[1]
    for row, column in np.argwhere(valid).tolist():
        x0, y0 = canvas["x"] + column * width, canvas["y"] + row * height
        for x in (x0 + 1.5, x0 + width - 1.5):
            for y in (y0 + 1.5, y0 + height - 1.5):
                is_inside = photo["x"] < x - 8 and x + 8 < photo["x"] + photo["width"]
                if is_inside and photo["y"] < y - 8 and y + 8 < photo["y"] + photo["height"]:  # rounded corners
                    expected = np.array(colours[int(score_map.classes[row, column, 0])]) * shares[row, column]
                    assert pixels[int(2 * y), int(2 * x)] == pytest.approx(expected, abs=4), (row, column)
    assert canvas["x"] == pytest.approx(photo["x"] + item.view[0] * photo["width"], abs=0.1)
    assert canvas["y"] == pytest.approx(photo["y"] + item.view[1] * photo["height"], abs=0.1)
    assert canvas["width"] == pytest.approx((item.view[2] - item.view[0]) * photo["width"], abs=0.1)
    assert canvas["height"] == pytest.approx((item.view[3] - item.view[1]) * photo["height"], abs=0.1)


def test_arrow_keys_move_and_announce(open_page: Open, contents: Contents, case: Case) -> None:
    page = open_page()
    item = item_with(contents, WIDE)
    score_map = case.map_of(item.key)
    rows, columns = np.nonzero(valid_cells(score_map.view, score_map.grid))
    surface = tile(page, item.key).locator(".map")
    surface.focus()
    row, column = (rows[0] + rows[-1]) // 2, (columns[0] + columns[-1]) // 2
    steps = {"ArrowRight": (0, 1), "ArrowDown": (1, 0), "ArrowLeft": (0, -1), "ArrowUp": (-1, 0)}
    for key, times in (("ArrowRight", 7), ("ArrowDown", 5), ("ArrowLeft", 2), ("ArrowUp", 9)):
        for _ in range(times):
            page.keyboard.press(key)
            row = int(np.clip(row + steps[key][0], rows[0], rows[-1]))  # padding is not entered
            column = int(np.clip(column + steps[key][1], columns[0], columns[-1]))
            parts = [" ".join(part) for part in told(score_map, row, column)]
            words = f"Cell {row},{column}: {'; '.join(parts)}"
            assert " ".join(page.locator("#said").inner_text().split(" ")) == words
            assert table(page.locator("#card tr")) == told(score_map, row, column)
    page.keyboard.press("Escape")
    assert page.locator("#card").is_hidden()
    page.keyboard.press("Enter")
    assert page.locator("#large").is_visible()


def test_the_large_view(open_page: Open, contents: Contents, case: Case) -> None:
    page = open_page()
    shown = keys(page)
    opener = tile(page, shown[1]).locator("h3 button")
    opener.click()
    large = page.locator("#large")
    assert large.get_by_role("heading", level=2).inner_text() == shown[1]
    item = next(item for item in contents.gallery.items if item.key == shown[1])
    names = large.locator("#leading-rows td:first-child").all_inner_texts()
    assert names == [" ".join(NAMES[known.class_id].split()) for known in item.leading]
    score_map = case.map_of(item.key)
    row, column = np.argwhere(valid_cells(score_map.view, score_map.grid))[-1].tolist()
    page.mouse.move(*centre_of(large.locator(".map"), item.view, score_map.grid, row, column))
    assert table(large.locator("#cell-rows tr")) == told(score_map, row, column)
    large.locator(".map").focus()
    page.keyboard.press("ArrowUp")
    assert large.locator("#large-said").inner_text().startswith(f"Cell {row - 1},{column}: ")
    large.get_by_label("Map", exact=True).uncheck()
    assert large.locator("canvas").is_hidden()
    page.get_by_role("button", name="Next").click()
    assert large.get_by_role("heading", level=2).inner_text() == shown[2]
    page.keyboard.press("Escape")
    assert large.is_hidden()
    assert opener.evaluate("button => button === document.activeElement")
    opener.click()
    large.locator("#leading-rows button").first.click()
    assert large.is_hidden()
    class_id = item.leading[0].class_id
    assert {*keys(page)} == {other.key for other in contents.gallery.items if class_id in other.shows}


def test_only_a_click_beside_the_large_view_closes_it(open_page: Open) -> None:
    page = open_page()
    page.locator(".tile h3 button").first.click()
    large = page.locator("#large")
    box = large.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 8, box["y"] + 8)
    assert large.is_visible()
    page.mouse.click(box["x"] - 8, box["y"] + 8)
    assert large.is_hidden()


def test_the_last_image_keeps_the_focus_in_the_large_view(open_page: Open) -> None:
    page = open_page()
    page.locator(".tile h3 button").nth(len(keys(page)) - 2).click()
    page.get_by_role("button", name="Next").click()
    assert page.get_by_role("button", name="Next").is_disabled()
    assert page.evaluate("new Promise(requestAnimationFrame).then(() => document.activeElement.id)") == "previous"


def test_a_finger_looks_and_does_not_open(open_page: Open) -> None:
    page = open_page(has_touch=True, viewport={"width": 360, "height": 800})
    surface = page.locator(".tile .map").first
    surface.scroll_into_view_if_needed()
    surface.tap()
    assert page.locator("#card").is_visible()
    assert page.locator("#large").is_hidden()


def test_every_image_tells_what_it_shows(open_page: Open, contents: Contents) -> None:
    page = open_page()
    alternatives = page.locator(".tile img").evaluate_all("images => images.map((image) => image.alt)")
    assert {*alternatives} == {
        f"{item.key}: {'; '.join(NAMES[known.class_id] for known in item.leading[:3])}"
        for item in contents.gallery.items
    }
    assert page.locator(".tile img").evaluate_all(
        "images => images.every((image) => image.decode() && image.naturalWidth)"
    )
