"""tokenlabels report: a label set as one page of HTML."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from tokenlabels.cli.audit import BOXES_IN_JSON
from tokenlabels.cli.common import ClassNames, LabelsFolder, check_place, shard_progress, show_user_errors
from tokenlabels.cli.label_inputs import SetImages, names_for

if TYPE_CHECKING:
    from tokenlabels.audit.audit import Audit
    from tokenlabels.report.gallery import Gallery

NUM_IMAGES = 200


@show_user_errors
def report(
    labels: LabelsFolder,
    images: Annotated[
        list[str] | None, typer.Option("--images", help="The images that were labelled; as in annotate.")
    ] = None,
    sample: Annotated[int, typer.Option(help="How many of them the page shows.", min=1)] = NUM_IMAGES,
    out: Annotated[Path, typer.Option("--out", help="The page, one file that opens anywhere.")] = Path("report.html"),
    class_names: ClassNames = None,
    boxes: Annotated[
        str | None,
        typer.Option(
            help="Boxes of the images, to measure whether labels know the place; as in audit.",
            metavar=f"FILE|{BOXES_IN_JSON}",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random part of the sample.", min=0)] = 0,
) -> None:
    """Make a page that shows a label set: measures, findings, classes, and a gallery to look into.

    The gallery is a fifth each of the most confident and the most uncertain images, of those of which the teacher
    disagrees with the data set, and of those with several objects; the rest is random.
    """
    from tokenlabels.audit.audit import audit_store
    from tokenlabels.audit.box_files import boxes_from_file, boxes_from_json
    from tokenlabels.files import replace_file
    from tokenlabels.report.contents import NUM_LISTED, contents_of
    from tokenlabels.report.page import render
    from tokenlabels.store import open_store

    store = open_store(labels)
    names = names_for(store, class_names)
    if not images:
        raise ValueError("the page shows photographs: name the images that were labelled, --images 'train-*.tar'")
    check_place(out)
    given = SetImages(images, store)
    boxes_of = None
    if boxes is not None:
        boxes_of = boxes_from_json(given) if boxes == BOXES_IN_JSON else boxes_from_file(Path(boxes), given)
    with shard_progress(labels, "auditing", num_passes=2) as on_shard:
        audit = audit_store(
            store, given.labels, names, images=given, boxes_of=boxes_of, num_listed=NUM_LISTED, on_shard=on_shard
        )
    gallery = _read_gallery(audit, given, sample, seed)
    for image in gallery.unreadable:
        typer.echo(f"not shown: {image.key!r} of {image.shard} cannot be read ({image.reason})", err=True)
    page = render(contents_of(store, audit, gallery, names)).encode()
    replace_file(out, page)
    typer.echo(f"page of {len(gallery.items)} images, {len(page) / 1e6:.1f} MB: {out}")


def _read_gallery(audit: "Audit", images: SetImages, sample: int, seed: int) -> "Gallery":
    from tokenlabels.report.gallery import read_gallery

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading photographs", total=min(sample, len(audit.measures)))
        return read_gallery(audit, images, number=sample, seed=seed, on_image=lambda: bar.advance(task))
