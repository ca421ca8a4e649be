"""The looks of the page in a real browser: colours that can be read, and room for everything."""

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.tokenlabels.report.pages import Open

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_changes_and_can_be_read(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    paper = "getComputedStyle(document.body).backgroundColor"
    backgrounds = [page.evaluate(paper)]
    check_contrasts(page)
    page.locator("#theme").click()
    backgrounds.append(page.evaluate(paper))
    brightness = [int(re.findall(r"\d+", colour)[0]) for colour in backgrounds]
    assert (brightness[0] > 200, brightness[1] > 200) == (scheme == "light", scheme == "dark")
    assert page.locator("#theme").inner_text() == f"{scheme.capitalize()} theme"
    check_contrasts(page)


def check_contrasts(page: "Page") -> None:
    """All text has the contrast that WCAG 2.1 AA asks for, 4.5."""
    pairs = page.evaluate(
        """() => {
          const behind = (element) => {
            for (let at = element; at; at = at.parentElement) {
              const colour = getComputedStyle(at).backgroundColor;
              if (colour !== "rgba(0, 0, 0, 0)") return colour;
            }
          };
          const texts = [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility() &&
            [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
          return texts.map((element) => {
            const style = getComputedStyle(element);
            const ink = element instanceof SVGElement ? style.fill : style.color;
            return [ink, behind(element), element.outerHTML.slice(0, 80)];
          });
        }"""
    )
    assert len(pairs) > 100

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb(colour)]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    def rgb(colour: str) -> list[float]:
        return [int(channel) / 255 for channel in re.findall(r"\d+", colour)[:3]]

    for ink, paper, where in pairs:
        bright, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, where


@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_reaches_beyond_the_screen(open_page: Open, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 800})
    for summary in page.locator("summary").all():
        summary.click()
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) == 0
    page.locator(".tile h3 button").first.click()
    assert (
        page.evaluate("(({ scrollWidth, clientWidth }) => scrollWidth - clientWidth)(document.getElementById('large'))")
        == 0
    )
    # long names are cut or wrapped where they stand, and never lie over each other
    boxes = page.evaluate(
        "[...document.querySelectorAll('.tile')].map((tile) => tile.getBoundingClientRect().toJSON())"
    )
    assert all(box["left"] >= 0 and box["right"] <= width for box in boxes)
