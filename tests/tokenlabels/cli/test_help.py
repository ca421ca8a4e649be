"""What a user can read without running anything."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer
from typer.testing import Result

from tokenlabels.cli import app

Run = Callable[..., Result]

COMMANDS = {"demo", "annotate", "verify", "inspect", "import", "export", "bench", "doctor"}
HEAVY = ("torch", "torchvision", "timm", "ray", "zarr", "fsspec", "webdataset")


def walk(command: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of the program with the words that call it."""
    yield names, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, *names, name)


PROGRAM = typer.main.get_command(app)
ALL = dict(walk(PROGRAM))


def test_the_commands_that_are_promised_are_there() -> None:
    assert {names[0] for names in ALL if names} >= COMMANDS
    assert {names[1] for names in ALL if names[:1] == ("bench",) and len(names) == 2} >= {
        "annotate",
        "store",
        "targets",
    }


@pytest.mark.parametrize("names", ALL, ids=lambda names: " ".join(names) or "tokenlabels")
def test_the_help_of_a_command_is_complete(names: tuple[str, ...], run: Run) -> None:
    command = ALL[names]
    result = run(*names, "--help")
    assert result.exit_code == 0
    assert command.help
    for parameter in command.params:
        assert parameter.help, f"{parameter.name} has no help"
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in result.stdout


@pytest.mark.parametrize("names", [(), ("bench",)], ids=["tokenlabels", "bench"])
def test_no_arguments_show_the_help(names: tuple[str, ...], run: Run) -> None:
    result = run(*names)
    assert "Usage" in result.output
    assert all(name in result.output for name in ALL[names].commands)


@pytest.mark.parametrize("arguments", [("anotate",), ("inspect",), ("inspect", "a", "--kee", "b")])
def test_wrong_use_exits_with_2(arguments: tuple[str, ...], run: Run) -> None:
    assert run(*arguments).exit_code == 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from tokenlabels.cli import app\n"
        f"for names in {[list(names) for names in ALL]}:\n"
        "    app([*names, '--help'], standalone_mode=False)\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stderr.strip() == "[]"
    assert process.stdout.count("Usage") == len(ALL)
