"""tokenlabels audit, tokenlabels compare: what stands out in a label set, and where two sets differ."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokenlabels.cli.common import FOUND, ClassNames, LabelsFolder, shard_progress, show_user_errors
from tokenlabels.cli.label_inputs import SetImages, names_for

if TYPE_CHECKING:
    from tokenlabels.audit.compare import Comparison
    from tokenlabels.store import LabelStore, ShardReader

NUM_LISTED, NUM_PICTURES = 10, 8
BOXES_IN_JSON = "json"
_FORBIDDEN_IN_NAMES = re.compile(r"[^\w.-]+")
_MAX_NAME = 80


@show_user_errors
def audit(
    labels: LabelsFolder,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", help="The images: for the data set's own classes, and copies among them."),
    ] = None,
    boxes: Annotated[
        str | None,
        typer.Option(
            help="Boxes of the images by key, x0, y0, x1, y1 in pixels: a JSON file, where x1 and y1 lie inside; or "
            f"'{BOXES_IN_JSON}', box_xyxy in the json of every sample, where they lie outside.",
            metavar=f"FILE|{BOXES_IN_JSON}",
        ),
    ] = None,
    class_names: ClassNames = None,
    num: Annotated[
        int | None,
        typer.Option(
            help="List that many of each kind; all are counted.", min=0, show_default=f"{NUM_LISTED}, with --json all"
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="JSON on stdout: counts by kind, findings, classes, confusions, localisation. What was not asked for "
            "is null.",
        ),
    ] = False,
) -> None:
    """Find what stands out in a label set; exit 1 if that makes the labels unfit to train with.

    Unfit: broken or constant maps, keys that are there twice. The rest is worth a look, and exits with 0.
    """
    from tokenlabels.audit.audit import audit_store
    from tokenlabels.audit.box_files import boxes_from_file, boxes_from_json
    from tokenlabels.cli.audit_pages import audit_json, audit_page
    from tokenlabels.store import open_store

    store = open_store(labels)
    names = names_for(store, class_names)
    if boxes is not None and not images:
        raise ValueError("--boxes needs --images too: for the size of every image and the class that its box is of")
    given = SetImages(images or [], store)
    boxes_of = None
    if boxes is not None:
        boxes_of = boxes_from_json(given) if boxes == BOXES_IN_JSON else boxes_from_file(Path(boxes), given)
    with shard_progress(labels, "auditing", num_passes=2 if images else 1) as on_shard:
        found = audit_store(
            store,
            given.labels,
            names,
            images=given if images else None,
            boxes_of=boxes_of,
            num_listed=num if as_json or num is not None else NUM_LISTED,
            on_shard=on_shard,
        )
    if as_json:
        typer.echo(json.dumps(audit_json(found, store), indent=1))
    else:
        Console(highlight=False).print(audit_page(found, store, NUM_LISTED if num is None else num))
    if not found.is_usable:
        raise typer.Exit(FOUND)


@show_user_errors
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a label set.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Folder of another one, of the same classes.", metavar="B")],
    images: Annotated[
        list[str] | None, typer.Option("--images", help="The images, to draw the most different ones.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the pictures, made if it is not there.")] = None,
    num: Annotated[
        int, typer.Option(help="How many of the most different images are listed and drawn.", min=1)
    ] = NUM_PICTURES,
    class_names: ClassNames = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout: numbers of images, agreement, classes, different images.")
    ] = False,
) -> None:
    """Compare two label sets of the same images, cell by cell; differences are no fault: exit 0.

    Leading classes are compared at the centres of the cells of the finer grid.
    """
    from tokenlabels.audit.compare import compare_stores
    from tokenlabels.cli.audit_pages import comparison_json, comparison_page
    from tokenlabels.store import open_store

    if bool(images) != bool(out):
        raise ValueError("pictures need both --images and --out FOLDER")
    stores = open_store(first), open_store(second)
    names = _common_names(*stores, class_names)
    given = SetImages(images or [], stores[0])
    if out is not None:
        _make_folder(out)
    with shard_progress(first, "comparing") as on_shard:
        comparison = compare_stores(*stores, names, on_shard)
    # before anything is printed, as images may turn out to be others or unreadable
    num_drawn = 0 if out is None else _draw_differences(comparison, stores, given, names, out, num)
    if as_json:
        typer.echo(json.dumps(comparison_json(comparison, *stores, num), indent=1))
    else:
        Console(highlight=False).print(comparison_page(comparison, *stores, num))
    if out is not None:
        typer.echo(f"{num_drawn} pictures: {out}", err=as_json)


def _common_names(first: "LabelStore", second: "LabelStore", given: str | None) -> tuple[str, ...]:
    """Names of the classes that both sets have.

    Raises:
        ValueError: nothing names them, or the sets name them differently and no names are given.
    """
    if first.info.num_classes != second.info.num_classes or given is not None:
        return names_for(first, given)
    named = [store for store in (first, second) if store.info.class_names is not None]
    names = [names_for(store, None) for store in named or [first]]
    for class_id, (ours, theirs) in enumerate(zip(names[0], names[-1], strict=True)):
        if ours != theirs:
            raise ValueError(
                f"class {class_id} is {ours!r} in {first.path} and {theirs!r} in {second.path}; only labels of the "
                "same classes can be compared. If they are the same, say their names: --class-names FILE"
            )
    return names[0]


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out}: cannot be made a folder for pictures ({error.strerror})") from error
    if not os.access(out, os.W_OK):
        raise ValueError(f"{out}: this folder cannot be written to")


def _draw_differences(
    comparison: "Comparison",
    stores: "tuple[LabelStore, LabelStore]",
    images: SetImages,
    names: tuple[str, ...],
    out: Path,
    num: int,
) -> int:
    """Draw the most different ones of the images that are at hand; returns their number."""
    from tokenlabels.audit.pictures import draw_difference
    from tokenlabels.images.decode import decode_rgb

    at_hand = {key: (shard, row) for shard in stores[0].shards if shard in images for row, key in enumerate(shard.keys)}
    order = comparison.most_different(len(comparison.keys))
    chosen = [row for row in order if comparison.keys[row] in at_hand][:num]
    for rank, row in enumerate(chosen, start=1):
        key = comparison.keys[row]
        data = _encoded(images, *at_hand[key])
        try:
            image = decode_rgb(data)
        except ValueError as error:
            raise ValueError(f"{images.source(at_hand[key][0]).path}: {key!r}: {error}") from error
        picture = draw_difference(
            image,
            stores[0][key],
            stores[1][key],
            names,
            titles=(f"A: {stores[0].path.name}", f"B: {stores[1].path.name}"),
            lines=(
                f"the same leading class at {comparison.agreement[row]:.0%} of the points",
                f"total variation of the mean distributions {comparison.variation[row]:.2f}",
            ),
        )
        picture.save(out / f"{rank:02d}-{_FORBIDDEN_IN_NAMES.sub('_', key)[-_MAX_NAME:]}.png")
    return len(chosen)


def _encoded(images: SetImages, shard: "ShardReader", row: int) -> bytes:
    (data,) = images.read(shard, [row])
    return data
