"""A label set, its page, and a browser."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.tokenlabels.report.cases import NAMES, Case, write_case
from tests.tokenlabels.report.pages import Open
from tokenlabels.report.contents import Contents, contents_of
from tokenlabels.report.gallery import read_gallery
from tokenlabels.report.page import render

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

REQUIRE_BROWSER_ENV = "TOKENLABELS_REQUIRE_BROWSER"


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """40 images in two tars and their labels, read only."""
    return write_case(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="session")
def contents(case: Case) -> Contents:
    """Of a page with 20 of them."""
    audit = case.audit()
    return contents_of(case.store, audit, read_gallery(audit, case.images, number=20, seed=0), NAMES)


@pytest.fixture(scope="session")
def html(contents: Contents) -> str:
    return render(contents)


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Headless Chromium; without it the test is skipped, unless TOKENLABELS_REQUIRE_BROWSER=1."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        if os.environ.get(REQUIRE_BROWSER_ENV) == "1":
            pytest.fail(f"no Chromium or no playwright, and {REQUIRE_BROWSER_ENV}=1")
        pytest.skip("no Chromium or no playwright")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def page_file(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture
def open_page(browser: "Browser", page_file: Path) -> Iterator[Open]:
    """open_page(hash="", **options of the context) -> the page; whatever it complains of fails the test."""
    complaints: list[str] = []
    contexts = []

    def complain(message: str) -> None:
        complaints.append(message)

    def open_it(fragment: str = "", **options: Any) -> "Page":
        contexts.append(
            browser.new_context(**{"viewport": {"width": 1400, "height": 900}, "reduced_motion": "reduce"} | options)
        )
        page = contexts[-1].new_page()
        page.set_default_timeout(5_000)
        page.on("console", lambda message: complain(f"console: {message.text}"))
        page.on("pageerror", lambda error: complain(f"error: {error}"))
        page.on("requestfailed", lambda request: complain(f"failed: {request.url[:80]}"))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or complain(request.url))
        page.goto(f"{page_file.as_uri()}{fragment}")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []
