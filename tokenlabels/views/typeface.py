"""Type in pictures: text is fitted into its room and never shown as empty boxes.

Pillow's own font knows ASCII alone. Texts with other characters are set in the first font at hand that has them all;
characters that no font has are written as escapes (\\u9bc9).
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PILLOW = ""
"""In the place of a path: the font that comes with Pillow."""

_FONT_FILES = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "Arial.ttf", "msgothic.ttc")
_NO_CHARACTER = "\uffff"  # drawn as what stands for missing glyphs


def typeset(text: str, size_px: int, width_px: float, only: str | None = None) -> tuple[str, Font]:
    """A text as it can be shown, and the font for it.

    Args:
        text: whatever; white space becomes single spaces.
        size_px: of the font.
        width_px: the room; longer text is cut with an ellipsis.
        only: path of the one font to use; None takes what fits best.
    """
    text = " ".join(text.split())[: max(int(width_px), 1)]  # hardly a glyph is narrower than a pixel
    characters = set(text)
    paths: tuple[str, ...] = (PILLOW if only is None else only,)
    if only is None and not all(has_glyph(PILLOW, character) for character in characters):
        paths += other_fonts()
    best = min(paths, key=lambda path: sum(not has_glyph(path, character) for character in characters))
    shown = "".join(c if has_glyph(best, c) else c.encode("unicode_escape").decode() for c in text)
    font = load_font(best, size_px)
    return fitted(shown, width_px, font), font


def fitted(text: str, width_px: float, font: Font) -> str:
    """The text, cut with an ellipsis where it would be wider."""
    if font.getlength(text) <= width_px:
        return text
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if font.getlength(f"{text[:middle].rstrip()}…") <= width_px:
            fits = middle
        else:
            too_long = middle
    return f"{text[:fits].rstrip()}…"


@cache
def load_font(path: str, size_px: int) -> Font:
    """The font of a file."""
    return ImageFont.truetype(path, size_px) if path else ImageFont.load_default(size_px)


@cache
def has_glyph(path: str, character: str) -> bool:
    """Whether a font has something to draw for a character."""
    if not character.isprintable():
        return False
    font = load_font(path, 16)
    return bytes(font.getmask(character)) != bytes(font.getmask(_NO_CHARACTER))


@cache
def other_fonts() -> tuple[str, ...]:
    """Fonts at hand with more than ASCII: DejaVu Sans of matplotlib, then what the system has."""
    own = matplotlib_font()
    return (*([str(own)] if own else []), *(name for name in _FONT_FILES if _is_there(name)))


def matplotlib_font() -> Path | None:
    """DejaVu Sans as matplotlib brings it along, which is not imported for that."""
    spec = find_spec("matplotlib")
    font = Path(str(spec.origin)).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf" if spec else None
    return font if font and font.is_file() else None


def _is_there(name: str) -> bool:
    try:
        load_font(name, 16)
    except OSError:
        return False
    return True
