"""The page as text: what stands in it, and that nothing in it can act or be fetched."""

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.tokenlabels.report.cases import HOSTILE_KEY, HOSTILE_NAME, NAMES, Case
from tokenlabels.audit.boxes import Localisation
from tokenlabels.report.contents import Contents, contents_of
from tokenlabels.report.gallery import Gallery, Unreadable, read_gallery
from tokenlabels.report.page import embedded, in_bytes, number, percent, render, thousands

VOID = {"meta", "link", "input", "img", "br"}
BLOCKS = {"p", "dt", "dd", "li", "th", "td", "h1", "h2", "h3", "option", "label"}


class Outline(HTMLParser):
    """Elements in their order, their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag in self.raw:
            self.raw[tag].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in BLOCKS:
            self.texts.append(" ")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]][-1] += data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def outline(html: str) -> Outline:
    return Outline(html)


def test_the_data_is_read_back(outline: Outline, contents: Contents) -> None:
    data, _ = outline.raw["script"]
    read = json.loads(data)
    assert read["grid"] == [5, 6]
    assert read["k"] == 3
    assert read["names"] == list(NAMES)
    assert read["items"] == json.loads(json.dumps([asdict(item) for item in contents.gallery.items]))
    assert not set("<>&") & set(data)


def test_names_and_keys_are_text(html: str, outline: Outline) -> None:
    assert [script.get("type") for script in outline.all("script")] == ["application/json", "module"]
    assert "<script>document" not in html
    assert "<img" not in html
    assert outline.all("img") == []
    assert HOSTILE_NAME in outline.text
    assert {attributes["data-key"] for attributes in outline.all("td") if "data-key" in attributes} >= {"b_003"}


def test_a_hostile_key_stands_as_it_is(contents: Contents) -> None:
    page = Outline(render(replace(contents, gallery=Gallery((), 40, (Unreadable(HOSTILE_KEY, "a", "<b>bad</b>"),)))))
    assert f"{HOSTILE_KEY} of a: <b>bad</b>" in page.text
    assert page.all("b") == []


def test_nothing_is_fetched(html: str, outline: Outline) -> None:
    for tag, attributes in outline.elements:
        for name in ("src", "href", "action", "srcset", "poster", "data", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
        assert "url(" not in (attributes.get("style") or "")
    for source in (*outline.raw["style"], outline.raw["script"][1]):
        assert not re.search(r"url\(|@import|\bimport\b|fetch\(|XMLHttpRequest|WebSocket|innerHTML|eval\(", source)
    assert re.findall(r"https?://[^\s\"']+", html) == ["http://www.w3.org/2000/svg"]  # the name of a namespace
    policy = next(meta for meta in outline.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")


def test_every_control_has_a_name_and_every_id_is_one(outline: Outline) -> None:
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len({*ids})
    for _, attributes in outline.elements:
        for name in ("aria-labelledby", "for"):
            assert {*(attributes.get(name) or "").split()} <= {*ids}
        if attributes.get("tabindex") == "0":
            assert attributes.get("aria-label")
        if str(attributes.get("href", "")).startswith("#"):
            assert str(attributes["href"])[1:] in ids


def test_what_was_not_measured_is_said(case: Case) -> None:
    audit = case.audit(lambda shard: np.full(len(shard), -1))
    gallery = read_gallery(audit, case.images, number=10, seed=0)
    page = Outline(render(contents_of(case.store, audit, gallery, NAMES)))
    assert "the images given have no class of their own (no cls)" in page.text
    assert "&amp;nbsp;" not in render(contents_of(case.store, audit, gallery, NAMES))
    unknown = "identical images, never predicted, low agreement, disagrees"
    assert f"Not looked for, as images, or classes of their own, were not given: {unknown}." in page.text
    assert page.text.count("not measured no boxes were given (--boxes)") == 2
    assert "Confusions" not in page.text
    assert not [radio for radio in page.all("input") if radio.get("value") == "disagrees"]


def test_what_was_measured_is_said(outline: Outline, contents: Contents) -> None:
    text = outline.text
    assert f"{contents.num_agreeing} of {contents.num_labelled} images" in text
    assert "20 of 40 images, chosen to be worth a look: no random sample of the set." in text
    assert "1 map is broken; no number of this section counts it." in text
    assert "unfit to train with: broken or constant maps" in text


def test_boxes_are_told_with_what_chance_scores(contents: Contents) -> None:
    found = Localisation(num_boxed=1234, num_hits=617, mass_inside=0.625, cells_inside=0.25)
    text = Outline(render(replace(contents, localisation=found))).text
    assert "50.0 % 617 of 1,234 images with a box" in text
    assert "62.5 % of the own class’s probability; 25.0 % without any knowledge of the place" in text
    unknown = replace(found, num_hits=0, mass_inside=None)
    assert "Mass inside of boxes – of" in Outline(render(replace(contents, localisation=unknown))).text


def test_an_empty_gallery_and_no_usable_map(contents: Contents) -> None:
    nothing = replace(
        contents,
        gallery=Gallery((), 0, ()),
        num_broken=40,
        num_labelled=0,
        num_agreeing=0,
        histograms=(),
        confusions=(),
    )
    text = Outline(render(nothing)).text
    assert "no map can be used" in text
    assert "Chosen among the 0 images" in text


def test_two_hundred_images_of_the_largest_kind_fit(contents: Contents) -> None:
    """24 x 24 cells of five classes in two bytes, and photographs that WebP cannot shrink to less than 22 kB."""
    values = 24 * 24 * 5
    item = replace(
        contents.gallery.items[0],
        cells="A" * (values * 2 * 4 // 3),
        permille="A" * (values * 2 * 4 // 3),
        tails="A" * (24 * 24 * 2 * 4 // 3),
        photo="A" * (22_000 * 4 // 3),
    )
    page = render(replace(contents, gallery=Gallery((item,) * 200, 200, ())))
    assert len(page.encode()) < 15e6


def test_json_cannot_end_its_element() -> None:
    value = {"a": "</script><!--", "b": ["&amp;", "\u2028", "é", 1.5, None]}
    text = embedded(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028") & set(text)
    with pytest.raises(ValueError, match="JSON"):
        embedded(float("nan"))


def test_numbers_in_words() -> None:
    assert percent(0.1234) == "12.3\N{NO-BREAK SPACE}%"
    assert percent(None) == "–"
    assert thousands(1234567) == "1,234,567"
    assert [in_bytes(size) for size in (0, 999, 1000, 22_100_000, 5 * 10**15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "22.1 MB",
        "5000.0 TB",
    ]
    assert [number(value) for value in (0.0, 0.25, 12.0, 12345.0)] == ["0", "0.25", "12", "12,345"]
