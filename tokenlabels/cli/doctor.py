"""tokenlabels doctor: what is installed here, and does it fit together."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenlabels.cli.common import FOUND, show_user_errors


@show_user_errors
def doctor(
    path: Annotated[Path, typer.Argument(help="Where labels are to be written: its free space is shown.")] = Path(),
) -> None:
    """Show versions, devices and free disk, and warn of combinations that are known to fail."""
    from tokenlabels.doctor import examine

    checks = examine(path)
    table = Table(box=None, header_style="dim")
    for header in ("what", "found", "advice"):
        table.add_column(header, overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "bad": "bold red"}
    for check in checks:
        table.add_row(check.name, f"[{colours[check.status]}]{escape(check.value)}[/]", escape(check.advice))
    Console().print(table)
    if any(check.status == "bad" for check in checks):
        raise typer.Exit(FOUND)
