"""tokenlabels show --aligned: labels of mixed images as they follow the tokens through a model (TL-Align)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import typer

from tokenlabels.cli.show_inputs import ImageChoice, ModelChoice, pixels_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokenlabels.align import TLAlign
    from tokenlabels.images import EncodedImage
    from tokenlabels.mixing import MixPlan
    from tokenlabels.views.aligned import AlignedPair

MixName = Literal["cutmix", "mixup", "random", "blockwise"]
_PATCH_PX = 16  # of random and block-wise mixing, as published


def draw_aligned(model: ModelChoice, images: ImageChoice, mix: MixName, seed: int) -> "Image":
    """One row per image, mixed with the next one."""
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
