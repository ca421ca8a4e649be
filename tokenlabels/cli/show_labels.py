"""tokenlabels show LABELS: images beside their labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tokenlabels.cli.common import shard_progress
from tokenlabels.cli.label_inputs import names_for
from tokenlabels.cli.show_choices import find_class, parse_cell, parse_crop
from tokenlabels.cli.show_inputs import check_picture, save
from tokenlabels.cli.show_keys import LabelledSample, find_labelled

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokenlabels.geometry import Box
    from tokenlabels.store import LabelStore
    from tokenlabels.views.crop import StudentCrop
    from tokenlabels.views.labelled import Labelled

VECTOR_FORMATS = (".svg", ".pdf")


@dataclass(frozen=True)
class LabelChoice:
    """The options that say which labels are drawn, and what of them."""

    labels: Path
    images: list[str]
    keys: list[str]
    num: int | None
    class_names: str | None
    cell: str | None
    class_name: str | None
    crop: str | None
    flip: bool

    def __post_init__(self) -> None:
        if self.flip and self.crop is None:
            raise ValueError("--flip mirrors a crop: give --crop too, such as --crop 0,0,1,1")


def write_labels(choice: LabelChoice, out: Path) -> None:
    """Draw the images below each other into a file whose ending is the format."""
    from tokenlabels.views.figure import down, draw
    from tokenlabels.views.labelled import labelled_figure

    is_vector = out.suffix.lower() in VECTOR_FORMATS
    check_picture(out, VECTOR_FORMATS)
    only = _vector_font(out) if is_vector else None
    labelled = _labelled(choice)
    figure = down([labelled_figure(one, only=only, scale=2 if is_vector else 1) for one in labelled], 0)
    if is_vector:
        from tokenlabels.files import replace_file
        from tokenlabels.views.vector import encode

        replace_file(out, encode(figure, out.suffix.lower().removeprefix(".")))
    else:
        save(draw(figure), out)
    typer.echo(f"picture: {out}")


def draw_epoch(choice: LabelChoice, epoch: int, **training: Any) -> "Image":
    """The one image as the trainer sees it in an epoch; `training` as in `draw_replay`."""
    from tokenlabels.cli.show_replay import draw_replay
    from tokenlabels.store import open_store

    if len(choice.keys) != 1:
        raise ValueError(f"--epoch draws one image: give one --key, got {len(choice.keys)}")
    store = open_store(choice.labels)
    names = names_for(store, choice.class_names)
    if choice.images:  # what is wrong with the key is said before a loader is made
        find_labelled(store, choice.images, choice.keys, None, lambda _: None)
    return draw_replay(choice.labels, choice.images, choice.keys[0], epoch=epoch, names=names, **training)


def print_labels(choice: LabelChoice, out: Path | None) -> None:
    """Draw into the terminal."""
    from rich.console import Console

    from tokenlabels.views.terminal import block_map, image_fits

    if out is not None or choice.crop is not None or choice.class_name is not None:
        raise ValueError("--out, --crop and --class are for files: leave them out, or leave --terminal out")
    console = Console()
    for index, one in enumerate(_labelled(choice)):
        if index:
            console.print()
        has_room = console.color_system is not None and image_fits(one.score_map, console.width)
        console.print(block_map(one.score_map, one.names, one.image if has_room else None, one.cell))


def _labelled(choice: LabelChoice) -> "list[Labelled]":
    from tokenlabels.store import open_store
    from tokenlabels.views.labelled import Labelled

    store = open_store(choice.labels)
    names = names_for(store, choice.class_names)
    cell = parse_cell(choice.cell, store.info.grid) if choice.cell is not None else None
    class_id = find_class(choice.class_name, names) if choice.class_name is not None else None
    box = parse_crop(choice.crop) if choice.crop is not None else None
    with shard_progress(choice.labels, "looking for keys in") as on_shard:
        samples = find_labelled(store, choice.images, choice.keys, choice.num, on_shard)
    images = [_decoded(sample) for sample in samples]
    crops = [None for _ in samples] if box is None else _crops(images, samples, box, choice.flip, len(names))
    return [
        Labelled(
            image=image,
            score_map=sample.score_map,
            names=names,
            label=_label_of(sample, len(names)),
            source=_settings(store, sample),
            cell=cell,
            class_id=class_id,
            crop=crop,
        )
        for sample, image, crop in zip(samples, images, crops, strict=True)
    ]


def _crops(
    images: "Sequence[Image]", samples: Sequence[LabelledSample], box: "Box", flip: bool, num_classes: int
) -> "Sequence[StudentCrop]":
    """The crop of every image. Takes three seconds to import torch and torchvision: pictures have none by default."""
    from rich.console import Console

    with Console(stderr=True).status("making the targets of the crop"):
        from tokenlabels.cli.show_crop import student_crop

        return [
            student_crop(image, sample.score_map, box, flip, num_classes)
            for image, sample in zip(images, samples, strict=True)
        ]


def _label_of(sample: LabelledSample, num_classes: int) -> int | None:
    label = sample.image.label
    if label is not None and label >= num_classes:
        raise ValueError(
            f"{sample.path}: {sample.image.key!r} is of class {label}, but the labels have {num_classes} classes: "
            "labels of another data set, or by a teacher of other classes"
        )
    return label


def _decoded(sample: LabelledSample) -> "Image":
    from tokenlabels.images.decode import UndecodableImageError, decode_rgb

    assert sample.image.data is not None, "samples with problems are refused"
    try:
        return decode_rgb(sample.image.data)
    except UndecodableImageError as error:
        raise ValueError(f"{sample.path}: sample {sample.image.key!r}: {error}") from error


def _settings(store: "LabelStore", sample: LabelledSample) -> str:
    from tokenlabels.summary import describe_teacher

    info = store.info
    kept = f"{info.k} of {info.num_classes:,} classes kept"
    return f"{describe_teacher(store)}; {info.resize}; {kept}; {Path(sample.path).name}"


def _vector_font(out: Path) -> str:
    from tokenlabels.views.typeface import matplotlib_font

    font = matplotlib_font()
    if font is None:
        raise ValueError(f"{out}: {out.suffix} is drawn by matplotlib: pip install 'tokenlabels[viz]', or use .png")
    return str(font)
