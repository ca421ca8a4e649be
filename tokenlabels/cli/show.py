"""tokenlabels show: pictures of labels."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tokenlabels.cli.common import DeviceOption, show_user_errors

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from tokenlabels.align import TLAlign
    from tokenlabels.aligned_pictures import AlignedPair
    from tokenlabels.images import EncodedImage, ImageShard
    from tokenlabels.mixing import MixPlan

MixName = Literal["cutmix", "mixup", "random", "blockwise"]

MODES = {"--aligned": "labels of mixed images as they follow the tokens through a model (TL-Align)"}
_NUM_IMAGES = 4
_PATCH_PX = 16  # of random and block-wise mixing, as published
_MAX_SIDE_PX, _MAX_SEED = 4096, 2**63 - 1
_MODEL_PANEL, _MIXING_PANEL = "Model", "Mixed images"


@show_user_errors
def show(
    aligned: Annotated[bool, typer.Option("--aligned", help=f"Draw {MODES['--aligned']}.")] = False,
    images: Annotated[list[str] | None, typer.Option("--images", help="The images; as in annotate.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="Draw this image; may come again.")] = None,
    num: Annotated[
        int | None, typer.Option(help="Draw that many, of all shards in turn.", min=1, show_default=str(_NUM_IMAGES))
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture, in the format of its ending.")] = Path("aligned.png"),
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
        MixName, typer.Option(help="How each image is mixed with the next.", rich_help_panel=_MIXING_PANEL)
    ] = "cutmix",
    seed: Annotated[int, typer.Option(help="Of the mixing.", min=0, max=_MAX_SEED, rich_help_panel=_MIXING_PANEL)] = 0,
) -> None:
    """Draw labels. One option says what: --aligned."""
    if not aligned:
        modes = "; ".join(f"{option}: {what}" for option, what in MODES.items())
        raise ValueError(f"say what to draw. There is {modes}")
    _check_writable(out)
    chosen_model = _ModelChoice(model, checkpoint, random_weights, image_size, device)
    chosen_images = _ImageChoice(images or [], key or [], num)
    _save(_draw_aligned(chosen_model, chosen_images, mix, seed), out)
    typer.echo(f"picture: {out}")


@dataclass(frozen=True)
class _ModelChoice:
    """The options that say which model a picture is about."""

    name: str | None
    checkpoint: Path | None
    random_weights: int | None
    image_size: int | None
    device: str

    def load(self) -> "nn.Module":
        """The model on the CPU in evaluation mode, with classes and weights of the checkpoint, or random weights.

        Raises:
            ValueError: no model is named, or timm has none of that name; it is not said where its weights are, or they
                do not fit; it takes no images of this size.
        """
        import timm
        import torch

        from tokenlabels.models import load_checkpoint
        from tokenlabels.models.features import probe_features

        if self.name is None:
            raise ValueError("name the model: --model deit_small_patch16_224")
        if (self.checkpoint is None) == (self.random_weights is None):
            raise ValueError("say where the weights are: --checkpoint FILE, or --random-weights 0 to try things out")
        if not timm.is_model(self.name):
            nearest = ", ".join(get_close_matches(self.name, timm.list_models()))
            raise ValueError(f"timm {timm.__version__} has no model {self.name!r}{nearest and f'; near it: {nearest}'}")
        default = timm.get_pretrained_cfg(self.name)
        is_fixed = self.image_size is not None and default is not None and default.fixed_input_size
        arguments: dict[str, Any] = {"img_size": self.image_size} if is_fixed else {}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.random_weights or 0)  # and not the generators of GPUs
            try:
                model: nn.Module = timm.create_model(self.name, **arguments)
            except (TypeError, ValueError, AssertionError) as error:
                raise ValueError(f"{self.name} cannot be built with {arguments}: {error}") from error
            if self.checkpoint is not None:
                load_checkpoint(model, self.checkpoint, take_classes=True)
        if self.image_size is not None:
            with torch.no_grad():
                probe_features(model.eval(), self.name, (self.image_size, self.image_size))
        return model.eval()

    def __str__(self) -> str:
        weights = f"random weights, seed {self.random_weights}" if self.checkpoint is None else str(self.checkpoint)
        return f"{self.name} ({weights})"


@dataclass(frozen=True)
class _ImageChoice:
    """The options that say which images."""

    patterns: list[str]
    keys: list[str]
    num: int | None

    def find(self) -> "list[EncodedImage]":
        """The samples of the keys in their order; without keys the first of every shard, then the second ones.

        Raises:
            ValueError: no images are named or found, a key is not among them, or a sample has no image.
        """
        from tokenlabels.images import find_shards

        if not self.patterns:
            raise ValueError("name the images: --images 'imagenet1k-train-{0000..1023}.tar'")
        if self.keys and self.num is not None:
            raise ValueError("give keys or a number of images: --num is for those that are not named")
        shards = find_shards(self.patterns)
        places = _places_of(shards, self.keys) if self.keys else _first_places(shards, self.num or _NUM_IMAGES)
        samples = [next(shard.read([key])) for shard, key in places]
        for (shard, key), sample in zip(places, samples, strict=True):
            if sample.problem is not None:
                raise ValueError(f"{shard.path}: sample {key!r}: {sample.problem}")
        return samples


def _draw_aligned(model: _ModelChoice, images: _ImageChoice, mix: MixName, seed: int) -> "Image":
    from tokenlabels.align import TLAlign
    from tokenlabels.aligned_pictures import draw_pairs
    from tokenlabels.trainer.ranks import join_ranks

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
    import torch
    from timm.data.config import resolve_model_data_config

    from tokenlabels.aligned_pictures import AlignedPair
    from tokenlabels.analysis import layer_shares

    config = resolve_model_data_config(aligned.backbone)  # type: ignore[no-untyped-call]
    size = config["input_size"][-2:] if image_size is None else (image_size, image_size)
    pixels = _crops(samples, size, config["crop_pct"]).permute(0, 3, 1, 2).float()
    plan = _neighbours_plan(mix, len(samples), size, seed)
    mean, std = (torch.tensor(config[name]).mul(255)[:, None, None] for name in ("mean", "std"))
    device = next(aligned.parameters()).device
    shares = layer_shares(aligned, ((pixels - mean) / std).to(device), plan.to(device))
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


def _places_of(shards: "Sequence[ImageShard]", keys: Sequence[str]) -> "list[tuple[ImageShard, str]]":
    found: dict[str, ImageShard] = {}
    others: list[str] = []
    for shard in shards:
        in_shard = shard.keys()
        for key in set(keys).intersection(in_shard):
            if key in found:
                raise ValueError(f"{key!r} is in {found[key].path} and in {shard.path}; give the images of one of them")
            found[key] = shard
        others.extend(in_shard)
    for key in keys:
        if key not in found:
            nearest = get_close_matches(key, others) or others[:1]
            raise ValueError(f"the images have no key {key!r}; near it are {', '.join(nearest) or 'none at all'}")
    return [(found[key], key) for key in keys]


def _first_places(shards: "Sequence[ImageShard]", num: int) -> "list[tuple[ImageShard, str]]":
    used = shards[:num]
    rounds = zip_longest(*(shard.keys() for shard in used))
    in_turn = ((shard, key) for keys in rounds for shard, key in zip(used, keys, strict=True) if key is not None)
    return list(islice(in_turn, num))


def _crops(samples: "Sequence[EncodedImage]", size: tuple[int, int], crop_pct: float) -> "Tensor":
    """The evaluation crops of the samples, uint8 [B, *size, 3]."""
    import torch

    from loaders.decode import get_decoder

    decoder = get_decoder("torchvision")
    crops = torch.empty((len(samples), *size, 3), dtype=torch.uint8)
    for crop, sample in zip(crops, samples, strict=True):
        assert sample.data is not None, "samples with problems are refused"
        try:
            image = decoder.decode(sample.data)
        except ValueError as error:
            raise ValueError(f"sample {sample.key!r}: {error}") from error
        decoder.center_into(image, crop, crop_pct, "bicubic")
    return crops


def _check_writable(out: Path) -> None:
    """Refuse a picture that cannot be written, as far as that is known before there is one."""
    from PIL import Image

    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{out}: pictures are written as .png, .webp, .jpg and what else Pillow writes, by the ending")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a picture")
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{out}: {folder} is no folder that can be written to")


def _save(picture: "Image", out: Path) -> None:
    from PIL import Image

    from tokenlabels.files import replace_file

    encoded = io.BytesIO()
    try:
        picture.save(encoded, Image.registered_extensions()[out.suffix.lower()])
    except (OSError, ValueError) as error:  # what a format cannot hold
        raise ValueError(f"{out}: this format cannot hold the picture ({error}); use .png") from error
    replace_file(out, encoded.getvalue())
