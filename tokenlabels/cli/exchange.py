"""tokenlabels import, tokenlabels export: labels in the layout that others publish, one .pt file per image."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from tokenlabels.cli.common import ClassNames, LabelsFolder, OutFolder, show_user_errors


@show_user_errors
def import_labels(
    archive: Annotated[Path, typer.Argument(help="Folder, .tar or .zip of .pt files.", metavar="ARCHIVE")],
    out: OutFolder,
    images: Annotated[list[str], typer.Option("--images", help="The images that the labels are for; as in annotate.")],
    axes: Annotated[
        Literal["hw", "wh"], typer.Option(help="Axes of the maps in the files; wh for transposed ones.")
    ] = "hw",
    view: Annotated[
        Literal["center", "squash"], typer.Option(help="What each map shows: the centre square, or the whole image.")
    ] = "center",
    crop_pct: Annotated[float, typer.Option(help="Centre square over the shorter side, 0..1.", min=0, max=1)] = 1.0,
    num_classes: Annotated[int, typer.Option(help="Classes of the teacher.", min=1)] = 1000,
    class_names: ClassNames = None,
    max_skip: Annotated[float, typer.Option(help="Share of a shard's images without labels.", min=0, max=1)] = 0.001,
) -> None:
    """Bring published labels (.pt, float16 [2, k, H, W]) into a label set."""
    from annotate.published import import_published
    from tokenlabels.class_names import read_class_names
    from tokenlabels.images import find_shards

    console = Console(stderr=True)
    with console.status("matching names") as status:
        report = import_published(
            archive,
            find_shards(images),
            out,
            axes=axes,
            view=view,
            crop_pct=crop_pct,
            num_classes=num_classes,
            class_names=None if class_names is None else read_class_names(class_names),
            max_skip=max_skip,
            on_shard=lambda stem: status.update(f"importing {stem}"),
        )
    typer.echo(
        f"{out}: {report.num_images} images in {report.num_shards} shards imported, "
        f"{report.num_finished_before} shards were finished before, {report.num_skipped} images without labels, "
        f"{report.num_turned} maps turned upright with their image, {report.num_unused_files} label files without image"
    )


@show_user_errors
def export_labels(
    labels: LabelsFolder,
    out: Annotated[Path, typer.Argument(help="Folder to make, or a new .tar or .zip.", metavar="OUT")],
) -> None:
    """Write a label set in the published layout, one .pt per image, for other people's trainers."""
    from annotate.published_write import export_published

    with Console(stderr=True).status("exporting") as status:
        report = export_published(labels, out, on_shard=lambda stem: status.update(f"exporting {stem}"))
    without = f"; {report.num_without} images have no labels" if report.num_without else ""
    typer.echo(f"{out}: {report.num_files} files, {report.num_bytes / 1e6:.1f} MB{without}")
    if report.resize != "squash":
        typer.echo(
            f"note: these maps show the {report.resize} view; published trainers read every map as the whole image"
        )
