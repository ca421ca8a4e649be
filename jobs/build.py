"""From a `RunConfig` to the model and the loaders that it names."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

import tokenlabels.models  # noqa: F401 - registers LV-ViT
from jobs.config import DataConfig, RunConfig
from loaders import EvaluationLoader, TokenLabelLoader
from loaders.options import PATCH_SIZE_PX, num_threads
from tokenlabels.align import TLAlign, TransMix
from tokenlabels.checks import Grid
from tokenlabels.images import find_shards
from tokenlabels.models import DenseClassifier, LVViT, load_checkpoint
from tokenlabels.models.modulation import modulate
from tokenlabels.models.tokenizers import tokenizer
from tokenlabels.models.tokenprop import TokenProp
from tokenlabels.models.wrapper import student
from tokenlabels.store import LabelStore, open_store
from tokenlabels.trainer.ranks import rank_and_world_size


@dataclass(frozen=True)
class Run:
    """What a configuration names, ready to train.

    Attributes:
        model: on its device.
        train: training batches, on the device.
        val: validation batches, or None.
        store: the label set, or None.
    """

    model: nn.Module
    train: TokenLabelLoader
    val: EvaluationLoader | None
    store: LabelStore | None


def build_run(config: RunConfig, device: torch.device) -> Run:
    """Open the labels, make the model, find the images.

    Raises:
        ValueError: something is missing or does not fit; nothing has been trained.
    """
    store = open_labels(config)
    num_classes = config.data.num_classes if store is None else store.info.num_classes
    if num_classes is None:
        raise ValueError("hard labels need data.num_classes (--num-classes), or a label set that tells it (--labels)")
    torch.manual_seed(config.trainer.seed)
    model = build_model(config, num_classes).to(device)
    train = train_loader(config, model, store, device)
    return Run(model, train, _val_loader(config, model, device), store)


def open_labels(config: RunConfig) -> LabelStore | None:
    """The label set of a run. Without one only hard labels are trained, and never by mistake.

    Raises:
        ValueError: none is named where one is needed, or it cannot be opened.
    """
    data = config.data
    if data.labels is not None:
        return open_store(data.labels)
    if data.supervision != "hard":
        raise ValueError(
            f"supervision {data.supervision!r} needs labels: give their folder (--labels), made by tokenlabels "
            "annotate, or choose a recipe with hard labels"
        )
    return None


def build_model(config: RunConfig, num_classes: int) -> nn.Module:
    """The student, on the CPU: with a classifier for tokens where there are labels for them.

    Raises:
        ValueError: timm has no such model, it does not take the arguments or the size, it cannot mix tokens, or the
            checkpoint is of another one.
    """
    model = _timm_model(config, num_classes)
    tokens = config.tokenizer
    if tokens.norm is not None:
        modulate(
            model,
            tokens.norm,
            placement=tokens.placement,
            blocks=tokens.blocks,
            num_entities=tokens.num_entities,
            partition=tokens.partition,
        )
    wants_tokens = config.data.supervision == "token"
    if wants_tokens and not isinstance(model, LVViT):
        model = DenseClassifier(model, config.model.image_size)
    elif config.data.mix == "mixtoken" and not isinstance(model, LVViT):
        raise ValueError(
            f"{config.model.name} mixes tokens with token labels only; use data.mix=cutmix for "
            f"{config.data.supervision!r} labels"
        )
    if config.model.init is not None:
        load_checkpoint(model, config.model.init)
    align = config.align
    if align.method == "tl_align":
        return TLAlign(model, layers=align.layers, normalize=align.normalize)
    if align.method == "transmix":
        return TransMix(model)
    prop = config.token_prop
    if prop.weight > 0:
        return TokenProp(
            model, config.model.image_size, weight=prop.weight, loss=prop.loss, scale=prop.scale, width=prop.width
        )
    return model


def batch_size_per_rank(config: RunConfig, world_size: int | None = None) -> int:
    """Samples per batch of one of `world_size` ranks; None is as many as train together here.

    Raises:
        ValueError: the batch cannot be shared out evenly.
    """
    if world_size is None:
        _, world_size = rank_and_world_size()
    size, rest = divmod(config.data.batch_size, world_size * config.trainer.accumulate)
    if rest or not size:
        raise ValueError(
            f"data.batch_size {config.data.batch_size} cannot be shared out evenly among {world_size} ranks and "
            f"trainer.accumulate={config.trainer.accumulate} batches; make it a multiple of both"
        )
    return size


def _timm_model(config: RunConfig, num_classes: int) -> nn.Module:
    name, size = config.model.name, config.model.image_size
    if not timm.is_model(name):
        raise ValueError(f"model.name: timm {timm.__version__} has no model {name!r}; timm.list_models() has the names")
    default = timm.get_pretrained_cfg(name)
    arguments: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": config.model.drop_path}
    if default is not None and default.fixed_input_size and tuple(default.input_size[-2:]) != (size, size):
        arguments["img_size"] = size
    if timm.model_entrypoint(name).__module__ == LVViT.__module__:
        arguments["aux_head"] = config.data.supervision == "token"
    if config.tokenizer.refinements:
        arguments["embed_layer"] = tokenizer(*config.tokenizer.refinements)
    try:
        model: nn.Module = timm.create_model(name, **(arguments | config.model.args))
    except (TypeError, ValueError, AssertionError) as error:
        refined = "tokenizer.refinements are for ViT and DeiT of timm; " if config.tokenizer.refinements else ""
        raise ValueError(
            f"model.name {name!r} cannot be built with {arguments | config.model.args}: {refined}{error}"
        ) from error
    return model


def train_loader(
    config: RunConfig,
    model: nn.Module,
    store: LabelStore | None,
    device: torch.device,
    *,
    rank: int | None = None,
    world_size: int | None = None,
) -> TokenLabelLoader:
    """The training batches of a run.

    Args:
        config: of the run.
        model: of `build_model`, for the grid of its tokens and the normalisation of its pixels.
        store: of `open_labels`.
        device: where batches go.
        rank, world_size: None for both takes those of torch.distributed.

    Raises:
        ValueError: there are no images, they are others than those of the labels, or something does not fit.
    """
    data = config.data
    pixels = resolve_model_data_config(_described(model))  # type: ignore[no-untyped-call]
    return TokenLabelLoader(
        images_of(data),
        store,
        image_size=config.model.image_size,
        batch_size=batch_size_per_rank(config, world_size),
        grid=_grid(config, model),
        supervision=data.supervision,
        num_classes=data.num_classes,
        interpolate=data.interpolate,
        seed=config.trainer.seed,
        rank=rank,
        world_size=world_size,
        shuffle_shards=data.shuffle_shards,
        rand_augment=data.rand_augment,
        erase_prob=data.erase_prob,
        mix=data.mix,
        mix_alpha=data.mix_alpha,
        mix_prob=data.mix_prob,
        mixup_alpha=data.mixup_alpha,
        mix_targets=config.align.method is None,
        mean=pixels["mean"],
        std=pixels["std"],
        device=device,
        threads=_threads(config),
        index_dir=data.index_dir,
    )


def images_of(data: DataConfig) -> tuple[str, ...]:
    """Patterns of the training images, or the tars that make up the part of them that is used (`data.fraction`).

    Raises:
        ValueError: the part is less than a tar, or of a tree, whose shards are classes.
    """
    if data.fraction == 1:
        return data.images
    tars = [shard.path for shard in find_shards(data.images)]
    num_used = round(data.fraction * len(tars))
    if not all(tar.endswith(".tar") for tar in tars) or num_used == 0:
        what = "class folders, which would leave classes out" if num_used else f"{len(tars)} tars, less than one"
        raise ValueError(
            f"data.fraction {data.fraction} of the training images is of {what}; use more and smaller tars"
        )
    places = np.linspace(0, len(tars), num_used, endpoint=False).astype(int)
    return tuple(tars[place] for place in places)


def _grid(config: RunConfig, model: nn.Module) -> Grid | None:
    """Of the model's tokens. Without any nobody asks for it but patches that are mixed, which are of 16 pixels then."""
    grid: Grid | None = getattr(model, "grid", None)
    if grid is not None or config.model.image_size % PATCH_SIZE_PX == 0:
        return grid
    if config.data.mix in ("random", "blockwise"):
        raise ValueError(
            f"data.mix={config.data.mix} mixes patches of {PATCH_SIZE_PX} pixels, which images of "
            f"{config.model.image_size} pixels have no whole number of; use a multiple (model.image_size), or cutmix"
        )
    return 1, 1


def _val_loader(config: RunConfig, model: nn.Module, device: torch.device) -> EvaluationLoader | None:
    data = config.data
    if not data.val:
        return None
    pixels = resolve_model_data_config(_described(model))  # type: ignore[no-untyped-call]
    return EvaluationLoader(
        data.val,
        image_size=config.model.image_size,
        batch_size=batch_size_per_rank(config),
        crop_pct=pixels["crop_pct"] if data.crop_pct is None else data.crop_pct,
        mean=pixels["mean"],
        std=pixels["std"],
        device=device,
        threads=_threads(config),
        index_dir=data.index_dir,
    )


def _threads(config: RunConfig) -> int:
    if config.data.threads is not None:
        return config.data.threads
    return max(1, num_threads(None) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _described(model: nn.Module) -> nn.Module:
    """The timm model, whose configuration says how pixels are normalised."""
    model = student(model)
    return model.model if isinstance(model, DenseClassifier) else model
