"""The command line. Each command imports what it needs when it runs, so that `--help` is instant.

Exit codes: 0 done, 1 something was found or could not be done (the lines say what), 2 wrong use.
"""

import typer

from tokenlabels.cli.annotate import annotate
from tokenlabels.cli.audit import audit, compare
from tokenlabels.cli.bench import bench
from tokenlabels.cli.demo import demo
from tokenlabels.cli.doctor import doctor
from tokenlabels.cli.exchange import export_labels, import_labels
from tokenlabels.cli.labels import inspect, verify
from tokenlabels.cli.report import report
from tokenlabels.cli.show import show
from tokenlabels.cli.train import train

app = typer.Typer(
    name="tokenlabels",
    help="Dense token labels for vision transformers: make them, check them, look at them.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command()(demo)
app.command()(annotate)
app.command()(verify)
app.command()(inspect)
app.command()(show)
app.command()(audit)
app.command()(compare)
app.command()(report)
app.command("import")(import_labels)
app.command("export")(export_labels)
app.command()(train)
app.add_typer(bench, name="bench")
app.command()(doctor)

__all__ = ["app"]
