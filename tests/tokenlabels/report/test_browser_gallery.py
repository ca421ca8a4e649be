"""The gallery and the tables in a real browser: what is left of them, and in which order."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.tokenlabels.report.cases import HOSTILE_KEY, HOSTILE_NAME
from tests.tokenlabels.report.pages import Open, keys, tile
from tokenlabels.report.contents import Contents
from tokenlabels.report.items import Item

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["all", "disagrees", "objects", "confident", "uncertain", "random"])
def test_filters_leave_the_right_images(open_page: Open, contents: Contents, name: str) -> None:
    is_wanted: dict[str, Callable[[Item], bool]] = {
        "all": lambda _: True,
        "disagrees": lambda item: item.label is not None and item.label != item.predicted,
        "objects": lambda item: item.num_objects >= 2,
    }
    wanted = is_wanted.get(name, lambda item: name in item.reasons)
    expected = {item.key for item in contents.gallery.items if wanted(item)}
    page = open_page()
    page.locator(f"input[value={name}]").check(force=True)
    assert {*keys(page)} == expected
    assert page.locator("#status").inner_text() == f"{len(expected)} of 20 images"
    assert page.locator(f"[data-count={name}]").inner_text() == str(len(expected))


def test_search_and_what_is_found_together(open_page: Open, contents: Contents) -> None:
    page = open_page()
    page.get_by_label("Search").fill("  STRASSE ")
    assert keys(page) == []
    assert page.get_by_text("No image of the gallery is like that.").is_visible()
    page.get_by_label("Search").fill("straße")
    assert {*keys(page)} == {item.key for item in contents.gallery.items if 2 in item.shows}
    page.get_by_label("Search").fill("b_00")
    page.locator("input[value=random]").check(force=True)
    expected = {item.key for item in contents.gallery.items if "b_00" in item.key and "random" in item.reasons}
    assert {*keys(page)} == expected
    page.get_by_role("button", name="Show all").click()
    assert len(keys(page)) == 20
    assert page.get_by_label("Search").input_value() == ""


ORDERS: dict[str, Callable[[Item], float]] = {
    "confident": lambda item: -item.top1,
    "uncertain": lambda item: -item.entropy,
    "objects": lambda item: -item.num_objects,
    "disagreement": lambda item: np.inf if item.disagreement is None else -item.disagreement,
}


@pytest.mark.parametrize("name", [*ORDERS, "key"])
def test_sorting_sorts(open_page: Open, contents: Contents, name: str) -> None:
    page = open_page()
    page.locator("select[name=sort]").select_option(name)
    items = {item.key: item for item in contents.gallery.items}
    if name == "key":
        assert keys(page) == [HOSTILE_KEY, *sorted({*items} - {HOSTILE_KEY})]
    else:
        values = [ORDERS[name](items[key]) for key in keys(page)]
        assert values == sorted(values)
    assert {*keys(page)} == {*items}


def test_a_class_of_the_table_filters(open_page: Open, contents: Contents) -> None:
    page = open_page()
    for row in [row for row in contents.classes if row.num_shown][:3]:
        page.locator(f"#class-table [data-class='{row.audit.class_id}']").click()
        expected = {item.key for item in contents.gallery.items if row.audit.class_id in item.shows}
        assert {*keys(page)} == expected
        assert len(expected) == row.num_shown
    first = next(item for item in contents.gallery.items if item.label not in (None, item.predicted))
    page.locator(f"[data-pair='{first.label}-{first.predicted}']").click()
    same = [item for item in contents.gallery.items if (item.label, item.predicted) == (first.label, first.predicted)]
    assert {*keys(page)} == {item.key for item in same}
    page.locator("#pair").click()
    assert page.evaluate("document.activeElement.id") == "gallery"
    assert len(keys(page)) == 20


def test_tables_sort(open_page: Open, contents: Contents) -> None:
    page = open_page()
    head = page.locator("#class-table th").filter(has_text=re.compile("^predicted$"))
    expected = sorted((row.audit.num_predicted for row in contents.classes), reverse=True)
    for direction, numbers in (("descending", expected), ("ascending", expected[::-1])):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        shown = page.locator("#class-table tbody tr td:nth-child(4)").all_inner_texts()
        assert list(map(int, shown)) == numbers


def test_hostile_text_is_shown_and_not_run(open_page: Open) -> None:
    page = open_page()
    tile(page, HOSTILE_KEY).locator("h3 button").click()
    assert page.locator("#large h2").inner_text() == HOSTILE_KEY
    assert page.locator("#class-table").get_by_text(HOSTILE_NAME).count() == 1
    assert page.title().endswith("/labels: token labels")


def test_maps_can_be_made_paler_and_put_away(open_page: Open) -> None:
    page = open_page()
    canvas = page.locator(".tile canvas").first
    page.get_by_label("Opacity").fill("35")
    assert canvas.evaluate("canvas => getComputedStyle(canvas).opacity") == "0.35"
    page.get_by_label("Maps").uncheck()
    assert canvas.is_hidden()


def test_links_to_sections_keep_what_is_chosen(open_page: Open) -> None:
    page = open_page("#show=disagrees")
    shown = keys(page)
    page.locator("nav a[href='#measures']").click()
    page.wait_for_function("location.hash.includes('show=disagrees')")
    assert keys(page) == shown


def test_the_address_keeps_what_is_chosen(open_page: Open, contents: Contents) -> None:
    page = open_page("#show=disagrees&sort=key&class=99&pair=x&text=")
    expected = [item.key for item in contents.gallery.items if item.label not in (None, item.predicted)]
    assert {*keys(page)} == {*expected}
    page.get_by_label("Search").fill("b_")
    page.reload()
    assert {*keys(page)} == {key for key in expected if "b_" in key}
    assert page.locator("select[name=sort]").input_value() == "key"
