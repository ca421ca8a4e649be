"""tokenlabels demo: the main job on generated images, from nothing to verified labels."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from tokenlabels.cli.annotate import BackendName, run_with_progress
from tokenlabels.cli.common import FOUND, fail, show_user_errors


@show_user_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for images, teacher, labels and picture.")] = Path("demo"),
    backend: Annotated[BackendName, typer.Option(help="inline: this process. ray: a local Ray.")] = "inline",
) -> None:
    """Draw scenes, train a small teacher, label them, verify, and compare with the truth. Takes minutes, offline."""
    from annotate.demo import draw_example, label_accuracy, make_material
    from annotate.demo_teacher import DEFAULT_STEPS
    from tokenlabels.store import open_store, verify_store
    from tokenlabels.summary import summarise_store

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training a teacher on generated scenes", total=DEFAULT_STEPS)
        material = make_material(out, lambda step, _: bar.update(task, completed=step + 1))
    typer.echo(f"teacher: {material.teacher_accuracy:.1%} of the cells of held-out scenes right")
    labels = material.job.labels
    report = run_with_progress(material.shards, material.job, backend=backend)
    findings = [*map(str, report.failures), *map(str, verify_store(labels))]
    if findings:
        fail("\n".join(findings), FOUND)
    typer.echo(f"verify: {len(open_store(labels))} maps, no findings\n")
    typer.echo(f"{summarise_store(open_store(labels))}\n")
    correct, counted = label_accuracy(labels, material.scenes)
    typer.echo(f"labels against the truth: {correct} of {counted} object cells right ({correct / counted:.1%})")
    key = draw_example(labels, material, out / "overlay.png")
    typer.echo(f"picture: {out / 'overlay.png'}\n\nNow try:")
    typer.echo(
        f"  tokenlabels inspect {labels} --key {key}\n  tokenlabels verify {labels} --images '{out}/images/*.tar'"
    )
