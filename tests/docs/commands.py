"""Command lines in the pages: found, and parsed as the command line parses them.

A block marked `bash` is run by tests/docs/test_pages.py. One marked `sh` needs a network, a GPU or a cluster, and one
without a mark shows how something is called. What calls `tokenlabels` or `jobs.train` is parsed in all of them, and
between backquotes in the text.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typer.main import get_command

from jobs.overrides import apply_overrides
from jobs.recipes import get_recipe
from tests.docs.pages import blocks
from tokenlabels.cli import app

_INLINE = re.compile(r"(?<!`)`((?:tokenlabels|python -m jobs\.train|torchrun) [^`]*)`(?!`)")
_CALL = re.compile(r"(?:srun )?(?:(tokenlabels)|(?:python|torchrun\b.*) -m jobs\.(train)) (.*)")
_OF_THE_SHELL = {"|", "||", ">", "&", "&&", ";"}


@dataclass(frozen=True)
class Call:
    """One call of the command line.

    Attributes:
        arguments: what follows `tokenlabels`; for jobs.train, with the command in front.
        is_whole: whether no "..." stands for the rest, and the text means more than to name a command.
    """

    arguments: tuple[str, ...]
    is_whole: bool


def lines_of(block: str) -> Iterator[str]:
    """The commands of a block: continued lines joined, comments left out."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def calls(page: Path) -> Iterator[Call]:
    """All calls of a page."""
    for block in blocks(page, "bash", "sh", ""):
        yield from (call for line in lines_of(block) if (call := call_in(line)))
    for line in _INLINE.findall(page.read_text(encoding="utf-8")):
        if call := call_in(line):
            yield Call(call.arguments, is_whole=False)


def call_in(line: str) -> Call | None:
    """The call that a line is, or None."""
    if not (match := _CALL.fullmatch(line)):
        return None
    words = shlex.split(match[3], comments=True)
    end = next((place for place, word in enumerate(words) if word in _OF_THE_SHELL), len(words))
    words = ([match[2]] if match[2] else []) + words[:end]
    is_whole = words[-1] != "..."
    return Call(tuple(words if is_whole else words[:-1]), is_whole)


def parse(call: Call) -> None:
    """Parse a call and run nothing; recipes and settings of `train` are looked up too.

    Raises:
        Exception: a command, an option, a value, a recipe or a setting that does not exist, or a missing argument.
    """
    command, arguments = get_command(app), list(call.arguments)
    while hasattr(command, "commands") and arguments:
        name = arguments.pop(0)
        if name not in command.commands:
            raise ValueError(f"there is no command {name!r}")
        command = command.commands[name]
    if hasattr(command, "commands"):
        return
    try:
        context = command.make_context(command.name, arguments)
    except Exception as error:
        # by name: typer has a click of its own
        if type(error).__name__ == "MissingParameter" and not call.is_whole:
            return
        raise
    if call.arguments[0] == "train" and context.params["recipe"]:
        apply_overrides(get_recipe(context.params["recipe"])(), context.params["settings"] or [])
