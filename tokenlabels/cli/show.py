"""tokenlabels show: pictures of labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tokenlabels.cli.common import DeviceOption, show_user_errors
from tokenlabels.cli.show_inputs import (
    NUM_IMAGES,
    ImageChoice,
    ModelChoice,
    MoToChoice,
    check_writable,
    pixels_of,
    save,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokenlabels.align import TLAlign
    from tokenlabels.images import EncodedImage
    from tokenlabels.mixing import MixPlan
    from tokenlabels.views.aligned import AlignedPair

MixName = Literal["cutmix", "mixup", "random", "blockwise"]
PlacementName = Literal["every", "first", "stem"]
PartitionName = Literal["soft", "hard"]

MODES = {
    "--aligned": "labels of mixed images as they follow the tokens through a model (TL-Align)",
    "--layout": "the most probable entity of every position, as a model with MoTo finds them",
}
_NUM_ENTITIES = 8
_PATCH_PX = 16  # of random and block-wise mixing, as published
_MAX_SIDE_PX, _MAX_SEED = 4096, 2**63 - 1
_MODEL_PANEL, _MIXING_PANEL, _MOTO_PANEL = "Model", "Mixed images (--aligned)", "MoTo (--layout)"


@show_user_errors
def show(
    aligned: Annotated[bool, typer.Option("--aligned", help=f"Draw {MODES['--aligned']}.")] = False,
    layout: Annotated[bool, typer.Option("--layout", help=f"Draw {MODES['--layout']}.")] = False,
    images: Annotated[list[str] | None, typer.Option("--images", help="The images; as in annotate.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="Draw this image; may come again.")] = None,
    num: Annotated[
        int | None, typer.Option(help="Draw that many, of all shards in turn.", min=1, show_default=str(NUM_IMAGES))
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The picture, in the format of its ending.", show_default="aligned.png or layout.png"),
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
        typer.Option(help="Of the mixing.", min=0, max=_MAX_SEED, show_default="0", rich_help_panel=_MIXING_PANEL),
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
    """Draw what models make of images. One option says what: --aligned or --layout."""
    mode = _chosen_mode({"--aligned": aligned, "--layout": layout})
    _refuse_others(
        mode,
        {
            "--aligned": {"--mix": mix, "--seed": seed},
            "--layout": {"--placement": placement, "--entities": entities, "--partition": partition},
        },
    )
    out = Path(f"{mode.removeprefix('--')}.png") if out is None else out
    check_writable(out)
    chosen_images = ImageChoice(images or [], key or [], num)
    if mode == "--layout":
        moto = MoToChoice(placement or "every", entities or _NUM_ENTITIES, partition or "soft")
        chosen_model = ModelChoice(model, checkpoint, random_weights, image_size, device, moto)
        picture = _draw_layout(chosen_model, chosen_images, moto.num_entities)
    else:
        chosen_model = ModelChoice(model, checkpoint, random_weights, image_size, device)
        picture = _draw_aligned(chosen_model, chosen_images, mix or "cutmix", seed or 0)
    save(picture, out)
    typer.echo(f"picture: {out}")


def _chosen_mode(modes: Mapping[str, bool]) -> str:
    chosen = [mode for mode, is_chosen in modes.items() if is_chosen]
    if len(chosen) != 1:
        choices = "; ".join(f"{option}: {what}" for option, what in MODES.items())
        raise ValueError(f"say what to draw, and one thing at a time. There is {choices}")
    return chosen[0]


def _refuse_others(mode: str, options_of: Mapping[str, Mapping[str, object]]) -> None:
    """Refuse options that other modes alone use."""
    for other, options in options_of.items():
        for option, value in options.items():
            if other != mode and value is not None:
                raise ValueError(f"{option} is for {other}; leave it out with {mode}")


def _draw_layout(model: ModelChoice, images: ImageChoice, num_entities: int) -> "Image":
    from tokenlabels.analysis import entity_maps
    from tokenlabels.trainer.ranks import join_ranks
    from tokenlabels.views.layout import ImageLayouts, draw_layouts, entity_colours

    entity_colours(num_entities)  # refuses more than there are
    network = model.load().to(join_ranks(model.device))
    samples = images.find()
    pixels, normalised = pixels_of(network, samples, model.image_size)
    maps = {name: entities.cpu().numpy() for name, entities in entity_maps(network, normalised(pixels)).items()}
    shown = pixels.byte().permute(0, 2, 3, 1).numpy()
    layouts = [
        ImageLayouts(image, tuple(of_all[index] for of_all in maps.values()), sample.key)
        for index, (image, sample) in enumerate(zip(shown, samples, strict=True))
    ]
    titles = [f"{name}, {entities.shape[1]} x {entities.shape[2]}" for name, entities in maps.items()]
    height, width, _ = layouts[0].image.shape
    return draw_layouts(layouts, titles, num_entities, f"{model}, {height} x {width} px, {num_entities} entities")


def _draw_aligned(model: ModelChoice, images: ImageChoice, mix: MixName, seed: int) -> "Image":
    from tokenlabels.align import TLAlign
    from tokenlabels.trainer.ranks import join_ranks
    from tokenlabels.views.aligned import draw_pairs

    if len(images.keys) == 1 or images.num == 1:
        raise ValueError("an image is mixed with another one: give two at least (--key A --key B, or --num 2)")
    twice = [key for key in images.keys if images.keys.count(key) > 1]
    if twice:
        raise ValueError(f"--key {twice[0]} is given twice; an image is not mixed with itself")
    aligned = TLAlign(model.load()).to(join_ranks(model.device)).eval()
    samples = images.find()
    if len(samples) < 2:
        raise ValueError(f"an image is mixed with another one, but {', '.join(images.patterns)} has {len(samples)}")
    pairs = _aligned_pairs(aligned, samples, model.image_size, mix, seed)
    for pair in pairs:
        area, names = float(pair.initial.mean()), " with ".join(pair.names)
        typer.echo(f"{names}: own {area:.1%} of the image, {pair.target:.1%} of what is classified")
    height, width, _ = pairs[0].own.shape
    return draw_pairs(pairs, f"{model}, {height} x {width} px, {mix}")


def _aligned_pairs(
    aligned: "TLAlign", samples: "Sequence[EncodedImage]", image_size: int | None, mix: MixName, seed: int
) -> "list[AlignedPair]":
    """Every sample mixed with the next one, the last with the first."""
    from tokenlabels.analysis import layer_shares
    from tokenlabels.views.aligned import AlignedPair

    pixels, normalised = pixels_of(aligned.backbone, samples, image_size)
    plan = _neighbours_plan(mix, len(samples), (pixels.shape[2], pixels.shape[3]), seed)
    inputs = normalised(pixels)
    shares = layer_shares(aligned, inputs, plan.to(inputs.device))
    own, mixed = (x.round().byte().permute(0, 2, 3, 1).numpy() for x in (pixels, plan.mix(pixels)))
    initial, final = (shares_of.clamp(0, 1).cpu().numpy() for shares_of in (shares.initial, shares.final_map))
    return [
        AlignedPair(
            own=own[index],
            partner=own[other],
            mixed=mixed[index],
            initial=initial[index],
            aligned=final[index],
            target=float(shares.aligned_of_classified[-1, index]),
            names=(samples[index].key, samples[other].key),
        )
        for index, other in enumerate(plan.partner.tolist())
    ]


def _neighbours_plan(mix: MixName, num_images: int, size: tuple[int, int], seed: int) -> "MixPlan":
    import torch

    from tokenlabels.mixing import MixPlan

    generator = torch.Generator().manual_seed(seed)
    if mix in ("random", "blockwise"):
        if size[0] % _PATCH_PX or size[1] % _PATCH_PX:
            raise ValueError(
                f"--mix {mix} mixes patches of {_PATCH_PX} pixels, which images of {size[0]} x {size[1]} pixels have "
                f"no whole number of; give a multiple (--image-size), or mix otherwise"
            )
        draw = MixPlan.random_patches if mix == "random" else MixPlan.blockwise
        plan = draw(num_images, grid=(size[0] // _PATCH_PX, size[1] // _PATCH_PX), generator=generator)
    elif mix == "mixup":
        plan = MixPlan.mixup(num_images, generator=generator)
    else:
        plan = MixPlan.cutmix(num_images, image_size=size, generator=generator)
    return MixPlan((torch.arange(num_images) + 1) % num_images, plan.own)
