"""The page: one file of HTML that needs nothing else.

What comes from the label set is text wherever it stands: the templates escape it, the script puts it in as text, and
the data that the script reads cannot end their element. A policy in the page forbids all requests.
"""

import json
from dataclasses import asdict
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tokenlabels.report.contents import Contents
from tokenlabels.report.sample import REASONS

_SCRIPTS = ("maps.js", "cells.js", "gallery.js", "dialog.js", "report.js")


def render(contents: Contents) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("tokenlabels.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "thousands": thousands, "bytes": in_bytes, "number": number}

    def source(name: str) -> Markup:
        assert environment.loader is not None
        return Markup(environment.loader.get_source(environment, name)[0])

    return environment.get_template("report.html").render(
        contents=contents,
        meanings=REASONS,
        style=source("report.css"),
        script=Markup("\n").join(source(name) for name in _SCRIPTS),
        data=Markup(embedded(_data(contents))),
    )


def embedded(value: Any) -> str:
    """JSON that may stand in a script element: no character of it has a meaning in HTML."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def percent(share: float | None) -> str:
    """12.3 %, or a dash where there is nothing to measure."""
    return "–" if share is None else f"{share:.1%}".replace("%", "\N{NO-BREAK SPACE}%")


def thousands(number: int) -> str:
    """12,345."""
    return f"{number:,}"


def in_bytes(size: int) -> str:
    """12.3 MB, in steps of 1000."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def number(value: float) -> str:
    """As few digits as tell it: 0.5, 12, 12.3."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _data(contents: Contents) -> dict[str, Any]:
    info = contents.description.info
    return {
        "grid": info.grid,
        "k": info.k,
        "names": contents.names,
        "items": [asdict(item) for item in contents.gallery.items],
    }
