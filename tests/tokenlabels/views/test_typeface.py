"""Text in pictures: it fits, and is never drawn as empty boxes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenlabels.views import typeface
from tokenlabels.views.typeface import PILLOW, fitted, has_glyph, load_font, matplotlib_font, other_fonts, typeset

NAMES = {
    "accents": "Karpfen für Bären – 3 × 4",
    "Greek": "δελφίνι",
    "Cyrillic": "карась",
    "Arabic": "سمكة",
    "Chinese": "鯉",
    "an emoji": "🐟 fish",
    "control characters": "a\x00b\x1b[1m\u202ec",
    "half a surrogate": "fish \ud83d",
}


def is_readable(text: str, path: str) -> bool:
    return all(has_glyph(path, character) for character in text)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("fonts", ["all at hand", "Pillow's alone"])
def test_no_empty_boxes(name: str, fonts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fonts there are: every character that is shown has a glyph in the font that is chosen."""
    paths = other_fonts() if fonts == "all at hand" else ()
    monkeypatch.setattr(typeface, "other_fonts", lambda: paths)
    shown, font = typeset(name, 14, 1000)
    (path,) = (path for path in (PILLOW, *paths) if load_font(path, 14) is font)
    assert is_readable(shown, path)
    if path == PILLOW:
        assert shown == " ".join(name.split()).encode("unicode_escape", "surrogatepass").decode()


def test_ascii_is_set_in_the_font_of_pillow_without_looking_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typeface, "other_fonts", lambda: pytest.fail("looked for other fonts"))
    shown, font = typeset("  tench,\n Tinca tinca ", 14, 300)
    assert shown == "tench, Tinca tinca"
    assert font is load_font(PILLOW, 14)


def test_matplotlib_brings_a_font_for_most_of_europe() -> None:
    path = str(matplotlib_font())
    assert Path(path).is_file()
    assert all(has_glyph(path, character) for character in "éßłαжش…×–→")
    assert not has_glyph(path, "鯉")
    assert typeset("δελφίνι", 14, 300)[0] == "δελφίνι"


def test_one_font_alone() -> None:
    path = str(matplotlib_font())
    shown, font = typeset("鯉 tench", 14, 300, path)
    assert shown == r"\u9bc9 tench"
    assert font is load_font(path, 14)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typeface, "find_spec", lambda _: None)
    assert matplotlib_font() is None


@given(st.text(max_size=200), st.integers(1, 300))
def test_text_fits(text: str, width_px: int) -> None:
    shown, font = typeset(text, 14, width_px)
    assert font.getlength(shown) <= max(width_px, font.getlength("…"))
    assert "\n" not in shown


def test_text_that_fits_is_left_as_it_is_and_longer_text_is_cut() -> None:
    font = load_font(PILLOW, 16)
    assert fitted("tench", font.getlength("tench"), font) == "tench"
    assert fitted("tench", font.getlength("tench") - 1, font) in ("tenc…", "ten…")
