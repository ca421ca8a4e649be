"""The pages of the documentation: README and docs/, and what stands in their fenced blocks."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, from the top to the end; without a language it is ""."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> list[str]:
    """The blocks in these languages."""
    return [text for language, text in code_blocks(page) if language in languages]


def section(page: Path, heading: str) -> str:
    """The Python below a heading of the second level, its blocks joined."""
    text = page.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return "\n".join(code for language, code in _BLOCK.findall(text) if language == "python")
