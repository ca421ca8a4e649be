"""Of which model and which images `tokenlabels show` draws pictures, and where they go."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenlabels.cli.common import check_place
from tokenlabels.nearest import nearest_keys

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from tokenlabels.images import EncodedImage, ImageShard
    from tokenlabels.models.modulation import Placement
    from tokenlabels.models.moto import Partition

NUM_IMAGES = 4


@dataclass(frozen=True)
class MoToChoice:
    """The options that say how a model was modulated, see `tokenlabels.models.modulation.modulate`."""

    placement: "Placement"
    num_entities: int
    partition: "Partition"

    def put_into(self, model: "nn.Module") -> None:
        """Modulate the model.

        Raises:
            ValueError: it has no such place.
        """
        from tokenlabels.models.modulation import modulate

        modulate(model, "moto", placement=self.placement, num_entities=self.num_entities, partition=self.partition)


@dataclass(frozen=True)
class ModelChoice:
    """The options that say which model a picture is about. `moto` is None for a model without."""

    name: str | None
    checkpoint: Path | None
    random_weights: int | None
    image_size: int | None
    device: str
    moto: MoToChoice | None = None

    def load(self) -> "nn.Module":
        """The model on the CPU in evaluation mode, with classes and weights of the checkpoint, or random weights.

        Raises:
            ValueError: no model is named, or timm has none of that name; it is not said where its weights are, or they
                do not fit; it takes no images of this size.
        """
        import timm
        import torch

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
            if self.moto is not None:
                self.moto.put_into(model)
            if self.checkpoint is not None:
                self._read(model, self.checkpoint)
        if self.image_size is not None:
            with torch.no_grad():
                probe_features(model.eval(), self.name, (self.image_size, self.image_size))
        return model.eval()

    def _read(self, model: "nn.Module", checkpoint: Path) -> None:
        """The weights. Where they do not fit, MoTo is the first to be asked for."""
        from tokenlabels.models import CheckpointError, load_checkpoint
        from tokenlabels.models.checkpoints import read_state_dict

        if self.moto is None:
            load_checkpoint(model, checkpoint, take_classes=True)
            return
        if not any(".modulation." in name for name in read_state_dict(checkpoint)):
            raise ValueError(f"{checkpoint} holds a model without MoTo, which finds no layouts; train one with it")
        try:
            load_checkpoint(model, checkpoint, take_classes=True)
        except CheckpointError as error:
            raise ValueError(
                f"{error}. Is the model modulated otherwise? --placement and --entities say how (here "
                f"{self.moto.placement}, {self.moto.num_entities}). Runs with model.args, refinements or MoTo in "
                "blocks cannot be built by the name of their model"
            ) from error

    def __str__(self) -> str:
        weights = f"random weights, seed {self.random_weights}" if self.checkpoint is None else str(self.checkpoint)
        return f"{self.name} ({weights})"


@dataclass(frozen=True)
class ImageChoice:
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
        places = _places_of(shards, self.keys) if self.keys else _first_places(shards, self.num or NUM_IMAGES)
        samples = [next(shard.read([key])) for shard, key in places]
        for (shard, key), sample in zip(places, samples, strict=True):
            if sample.problem is not None:
                raise ValueError(f"{shard.path}: sample {key!r}: {sample.problem}")
        return samples


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
            nearest = nearest_keys(key, others)
            raise ValueError(f"the images have no key {key!r}; near it are {', '.join(nearest) or 'none at all'}")
    return [(found[key], key) for key in keys]


def _first_places(shards: "Sequence[ImageShard]", num: int) -> "list[tuple[ImageShard, str]]":
    used = shards[:num]
    rounds = zip_longest(*(shard.keys() for shard in used))
    in_turn = ((shard, key) for keys in rounds for shard, key in zip(used, keys, strict=True) if key is not None)
    return list(islice(in_turn, num))


def pixels_of(
    model: "nn.Module", samples: "Sequence[EncodedImage]", image_size: int | None
) -> "tuple[Tensor, Callable[[Tensor], Tensor]]":
    """The samples as the model sees them in an evaluation, and what normalises them and puts them onto its device.

    Args:
        model: of timm.
        samples: without problems.
        image_size: side in pixels; None is the model's own.

    Returns:
        Pixels float32 [B, 3, H, W], whole numbers in 0..255, and a function of such pixels.
    """
    import torch
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    size = config["input_size"][-2:] if image_size is None else (image_size, image_size)
    mean, std = (torch.tensor(config[name]).mul(255)[:, None, None] for name in ("mean", "std"))
    device = next(model.parameters()).device
    pixels = _crops(samples, size, config["crop_pct"]).permute(0, 3, 1, 2).float()
    return pixels, lambda mixed: ((mixed - mean) / std).to(device)


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


def check_picture(out: Path, other_formats: Sequence[str] = ()) -> None:
    """Refuse a picture that cannot be written, as far as that is known before there is one.

    Args:
        out: the file.
        other_formats: endings of formats that are written without Pillow.
    """
    from PIL import Image

    ending = out.suffix.lower()
    if ending not in other_formats and Image.registered_extensions().get(ending) not in Image.SAVE:
        formats = ", ".join((".png", ".webp", ".jpg", *other_formats))
        raise ValueError(f"{out}: pictures are written as {formats} and what else Pillow writes, by the ending")
    check_place(out)


def save(picture: "Image", out: Path) -> None:
    from PIL import Image

    from tokenlabels.files import replace_file

    encoded = io.BytesIO()
    try:
        picture.save(encoded, Image.registered_extensions()[out.suffix.lower()])
    except (OSError, ValueError) as error:  # what a format cannot hold
        raise ValueError(f"{out}: this format cannot hold the picture ({error}); use .png") from error
    replace_file(out, encoded.getvalue())
