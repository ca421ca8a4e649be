"""Runs the blocks of a page, from its top to its end, in the present folder."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tests.docs.commands import call_in, lines_of
from tests.docs.pages import code_blocks
from tokenlabels.cli import app

_REST_OF_THE_SHELL = re.compile(r"\s([|>])\s*(.*)")


def run_page(page: Path) -> dict[str, Any]:
    """Run what is marked `bash`, line by line, and what is marked `python`, one block after the other.

    The command line runs in this process: importing torch for every line would be most of the time.

    Returns:
        The names that the Python blocks left.
    """
    names: dict[str, Any] = {"__name__": page.stem}
    for language, text in code_blocks(page):
        if language == "bash":
            for line in lines_of(text):
                run_line(line)
        elif language == "python":
            exec(compile(text, str(page), "exec"), names)
    return names


def run_line(line: str) -> str:
    """Run one line; its standard output.

    Raises:
        AssertionError: it does not end with exit code 0.
    """
    call = call_in(line)
    if call is None:
        return subprocess.run(["bash", "-euc", line], check=True, capture_output=True, text=True).stdout
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "FORCE_COLOR": None})
    result = runner.invoke(app, list(call.arguments), catch_exceptions=False)
    assert result.exit_code == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    if rest := _REST_OF_THE_SHELL.search(line):
        command = f"cat > {shlex.quote(rest[2])}" if rest[1] == ">" else rest[2]
        return subprocess.run(
            ["bash", "-euc", command], input=result.stdout, check=True, capture_output=True, text=True
        ).stdout
    return result.stdout
