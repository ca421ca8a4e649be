"""tokenlabels show: pictures of labels, and of what models make of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from tokenlabels.cli.common import ClassNames, DeviceOption, show_user_errors
from tokenlabels.cli.show_aligned import MixName, draw_aligned
from tokenlabels.cli.show_inputs import NUM_IMAGES, ImageChoice, ModelChoice, MoToChoice, check_picture, save
from tokenlabels.cli.show_labels import LabelChoice, draw_epoch, print_labels, write_labels
from tokenlabels.cli.show_layout import draw_layout

PlacementName = Literal["every", "first", "stem"]
PartitionName = Literal["soft", "hard"]

LABELS, ALIGNED, LAYOUT, EPOCH = "LABELS", "--aligned", "--layout", "LABELS --epoch"
MODES = {
    LABELS: "a label set, whose labels are drawn beside their images",
    ALIGNED: "labels of mixed images as they follow the tokens through a model (TL-Align)",
    LAYOUT: "the most probable entity of every position, as a model with MoTo finds them",
}
_NUM_ENTITIES = 8
_MAX_SIDE_PX, _MAX_SEED = 4096, 2**63 - 1
_LABELS_PANEL, _EPOCH_PANEL = "Labels (LABELS)", "What the trainer sees (--epoch)"
_MODEL_PANEL, _MIXING_PANEL, _MOTO_PANEL = "Model", "Mixed images (--aligned)", "MoTo (--layout)"
_MODES_OF: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("--cell", "--class", "--crop", "--flip", "--terminal"), (LABELS,)),
    **dict.fromkeys(("--recipe", "--run", "--set", "--world-size"), (EPOCH,)),
    **dict.fromkeys(("--model", "--checkpoint", "--random-weights", "--image-size"), (ALIGNED, LAYOUT)),
    **dict.fromkeys(("--placement", "--entities", "--partition"), (LAYOUT,)),
    "--mix": (ALIGNED,),
    "--seed": (ALIGNED, EPOCH),
    "--num": (LABELS, ALIGNED, LAYOUT),
    "--class-names": (LABELS, EPOCH),
    "--device": (ALIGNED, LAYOUT, EPOCH),
}


@show_user_errors
def show(
    labels: Annotated[
        Path | None, typer.Argument(help="Folder of a label set, to draw labels.", metavar="[LABELS]")
    ] = None,
    aligned: Annotated[bool, typer.Option("--aligned", help=f"Draw {MODES[ALIGNED]}.")] = False,
    layout: Annotated[bool, typer.Option("--layout", help=f"Draw {MODES[LAYOUT]}.")] = False,
    images: Annotated[list[str] | None, typer.Option("--images", help="The images; as in annotate.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="Draw this image; may come again.")] = None,
    num: Annotated[
        int | None,
        typer.Option(
            help="Draw that many, of all shards in turn.", min=1, show_default=f"1 of LABELS, else {NUM_IMAGES}"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The picture, in the format of its ending; labels also as .svg and .pdf.",
            show_default="labels.png, aligned.png or layout.png",
        ),
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option(
            help="List the classes of this cell, counted from 0.", metavar="ROW,COLUMN", rich_help_panel=_LABELS_PANEL
        ),
    ] = None,
    class_name: Annotated[
        str | None,
        typer.Option(
            "--class",
            help="Draw the probability of a class: its name, a part of it, or its id.",
            metavar="NAME",
            rich_help_panel=_LABELS_PANEL,
        ),
    ] = None,
    crop: Annotated[
        str | None,
        typer.Option(
            help="Draw this crop, in 0..1 of the image, as a student sees it, and its targets.",
            metavar="X0,Y0,X1,Y1",
            rich_help_panel=_LABELS_PANEL,
        ),
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror the crop.", rich_help_panel=_LABELS_PANEL)] = False,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Draw here, and no file.", rich_help_panel=_LABELS_PANEL)
    ] = False,
    class_names: ClassNames = None,
    epoch: Annotated[
        int | None,
        typer.Option(
            help="Draw --key as the trainer sees it in this epoch, counted from 0.",
            min=0,
            rich_help_panel=_EPOCH_PANEL,
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe of the training.", metavar="NAME", rich_help_panel=_EPOCH_PANEL)
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of a run, for its settings.", rich_help_panel=_EPOCH_PANEL)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a setting, such as data.batch_size=64; may come again.",
            metavar="KEY=VALUE",
            rich_help_panel=_EPOCH_PANEL,
        ),
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            help="Processes that train together.",
            min=1,
            show_default="1, or the run's own",
            rich_help_panel=_EPOCH_PANEL,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="timm model, such as deit_small_patch16_224.", rich_help_panel=_MODEL_PANEL)
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Its weights, such as best.pt of a run.", rich_help_panel=_MODEL_PANEL)
    ] = None,
    random_weights: Annotated[
        int | None,
        typer.Option(
            help="Random weights from this seed, to try things out.", min=0, max=_MAX_SEED, rich_help_panel=_MODEL_PANEL
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Side of its input in pixels.",
            min=1,
            max=_MAX_SIDE_PX,
            show_default="the model's own",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = None,
    device: DeviceOption = "auto",
    mix: Annotated[
        MixName | None,
        typer.Option(
            help="How each image is mixed with the next.", show_default="cutmix", rich_help_panel=_MIXING_PANEL
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of the mixing; with --epoch, of the training.",
            min=0,
            max=_MAX_SEED,
            show_default="0, or the run's own",
            rich_help_panel=_MIXING_PANEL,
        ),
    ] = None,
    placement: Annotated[
        PlacementName | None,
        typer.Option(
            help="After which patch embeddings the model is modulated.",
            show_default="every",
            rich_help_panel=_MOTO_PANEL,
        ),
    ] = None,
    entities: Annotated[
        int | None,
        typer.Option(help="Of every MoTo.", min=1, show_default=str(_NUM_ENTITIES), rich_help_panel=_MOTO_PANEL),
    ] = None,
    partition: Annotated[
        PartitionName | None,
        typer.Option(help="Into entities.", show_default="soft", rich_help_panel=_MOTO_PANEL),
    ] = None,
) -> None:
    """Draw labels beside their images: LABELS --images 'train-*.tar' --key KEY. Or what models make of images."""
    mode = _chosen_mode({LABELS: labels is not None, ALIGNED: aligned, LAYOUT: layout}, epoch)
    _refuse_others(
        mode,
        {
            "--num": num,
            "--cell": cell,
            "--class": class_name,
            "--crop": crop,
            "--flip": flip or None,
            "--terminal": terminal or None,
            "--class-names": class_names,
            "--device": None if device == "auto" else device,
            "--recipe": recipe,
            "--run": run,
            "--set": settings or None,
            "--world-size": world_size,
            "--model": model,
            "--checkpoint": checkpoint,
            "--random-weights": random_weights,
            "--image-size": image_size,
            "--mix": mix,
            "--seed": seed,
            "--placement": placement,
            "--entities": entities,
            "--partition": partition,
        },
    )
    if labels is not None:
        choice = LabelChoice(labels, images or [], key or [], num, class_names, cell, class_name, crop, flip)
    if mode == LABELS:
        if terminal:
            print_labels(choice, out)
        else:
            write_labels(choice, out or Path("labels.png"))
        return
    out = out or Path("labels.png" if mode == EPOCH else f"{mode.removeprefix('--')}.png")
    check_picture(out)
    if epoch is not None:
        picture = draw_epoch(
            choice,
            epoch,
            seed=seed,
            recipe=recipe,
            run=run,
            settings=settings or [],
            world_size=world_size,
            device=device,
        )
    elif mode == LAYOUT:
        moto = MoToChoice(placement or "every", entities or _NUM_ENTITIES, partition or "soft")
        chosen_model = ModelChoice(model, checkpoint, random_weights, image_size, device, moto)
        picture = draw_layout(chosen_model, ImageChoice(images or [], key or [], num), moto.num_entities)
    else:
        chosen_model = ModelChoice(model, checkpoint, random_weights, image_size, device)
        picture = draw_aligned(chosen_model, ImageChoice(images or [], key or [], num), mix or "cutmix", seed or 0)
    save(picture, out)
    typer.echo(f"picture: {out}")


def _chosen_mode(modes: Mapping[str, bool], epoch: int | None) -> str:
    chosen = [mode for mode, is_chosen in modes.items() if is_chosen]
    if len(chosen) != 1:
        choices = "; ".join(f"{option}: {what}" for option, what in MODES.items())
        raise ValueError(f"say what to draw, and one thing at a time. There is {choices}")
    if epoch is None:
        return chosen[0]
    if chosen != [LABELS]:
        raise ValueError(f"--epoch is for {LABELS}; leave it out with {chosen[0]}")
    return EPOCH


def _refuse_others(mode: str, options: Mapping[str, object]) -> None:
    """Refuse options that other modes alone use."""
    for option, value in options.items():
        if value is not None and mode not in _MODES_OF[option]:
            raise ValueError(f"{option} is for {' and '.join(_MODES_OF[option])}; leave it out with {mode}")
