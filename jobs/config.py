"""A whole training run as one value: model, data, trainer. Recipes make them, `--set` changes single fields."""

from dataclasses import dataclass, field
from typing import Any, Literal

from tokenlabels.checks import check_choice, check_count, check_share
from tokenlabels.models.modulation import Modulation, Placement
from tokenlabels.models.moto import Partition
from tokenlabels.models.tokenizers import Refinement
from tokenlabels.trainer.config import TrainerConfig

Supervision = Literal["token", "relabel", "hard"]
Mix = Literal["mixtoken", "cutmix", "mixup", "random", "blockwise"]
AlignMethod = Literal["tl_align", "transmix"]


@dataclass(frozen=True)
class ModelConfig:
    """The student.

    Attributes:
        name: as `timm.create_model` knows it; LV-ViT (lvvit_t, s, m, l) is registered.
        image_size: side in pixels of training crops and of evaluation.
        drop_path: rate of stochastic depth, 0..1.
        init: checkpoint to begin with (fine-tuning), see `tokenlabels.models.load_checkpoint`; None is random weights.
        args: further arguments of `timm.create_model`.
    """

    name: str = "lvvit_s"
    image_size: int = 224
    drop_path: float = 0.1
    init: str | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_count("model.image_size", self.image_size)
        check_share("model.drop_path", self.drop_path)


@dataclass(frozen=True)
class DataConfig:
    """Images and labels, see `loaders.TokenLabelLoader`.

    Attributes:
        images: training images: tars or trees, by name, glob or braces.
        labels: folder of their label set. Needed for "token" and "relabel".
        val: images to evaluate on after every epoch; None evaluates nothing.
        real: file of ImageNet-ReaL labels (real.json) for `val`.
        num_classes: for "hard" without a label set; otherwise the label set knows.
        supervision: what targets are made of.
        interpolate: rule from maps to targets.
        batch_size: samples per optimizer step, over all ranks.
        mix: "mixtoken" in the model; the others on pixels; None for neither.
        mix_alpha, mix_prob: of its Beta distribution, and how often.
        mixup_alpha: above 0 adds MixUp of pixels: in turns with mix="cutmix", as timm does, and as well as
            mix="mixtoken" (Table 3).
        rand_augment: timm's string, or None.
        erase_prob: of Random Erasing.
        shuffle_shards: shards that are shuffled together.
        crop_pct: of evaluation; None takes the model's own.
        min_agreement: share of the first images whose label map names the image's own class, below which the run is
            refused: such labels are of other classes. None asks for a tenth of the way from chance to all.
        threads: that read and decode, per rank; None shares out the cores of a machine among its ranks.
        index_dir: where indexes of tars are kept; None is beside them.
        fraction: share of the training tars that is used, evenly from the first to the last; above 0 and at most 1.
    """

    images: tuple[str, ...] = ()
    labels: str | None = None
    val: tuple[str, ...] = ()
    real: str | None = None
    num_classes: int | None = None
    supervision: Supervision = "token"
    interpolate: Literal["logits", "probs"] = "logits"
    batch_size: int = 1024
    mix: Mix | None = "mixtoken"
    mix_alpha: float = 1.0
    mix_prob: float = 1.0
    mixup_alpha: float = 0.0
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    erase_prob: float = 0.25
    shuffle_shards: int = 8
    crop_pct: float | None = None
    min_agreement: float | None = None
    threads: int | None = None
    index_dir: str | None = None
    fraction: float = 1.0

    def __post_init__(self) -> None:
        check_choice("data.supervision", self.supervision, Supervision)
        if self.mix is not None:
            check_choice("data.mix", self.mix, Mix)
        check_count("data.batch_size", self.batch_size)
        check_share("data.fraction", self.fraction)
        if self.fraction == 0:
            raise ValueError("data.fraction is 0, and nothing would be trained on; give a share above 0, at most 1")
        if self.min_agreement is not None:
            check_share("data.min_agreement", self.min_agreement)


@dataclass(frozen=True)
class AlignConfig:
    """How the shares of mixed images are found, see `tokenlabels.align`.

    Attributes:
        method: None mixes targets by area.
        layers: numbers of the blocks that labels follow with "tl_align", from 0, negative ones from the end; None is
            all.
        normalize: whether labels are averaged with the residual of "tl_align".
    """

    method: AlignMethod | None = None
    layers: tuple[int, ...] | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.method is not None:
            check_choice("align.method", self.method, AlignMethod)
        if self.method != "tl_align" and (self.layers is not None or not self.normalize):
            raise ValueError(
                f"align.layers and align.normalize are of align.method=tl_align, got method {self.method!r}; leave "
                "them out"
            )


@dataclass(frozen=True)
class TokenizerConfig:
    """How images become tokens (arXiv 2212.11115), beside what the model does by itself.

    Attributes:
        refinements: of the patch embedding of a ViT, see `tokenlabels.models.tokenizers`.
        norm: normalisation of the patch embeddings, see `tokenlabels.models.modulation`; None is none.
        placement: after which of them.
        blocks: numbers of blocks at whose end it acts too.
        num_entities, partition: of "moto".
    """

    refinements: tuple[Refinement, ...] = ()
    norm: Modulation | None = None
    placement: Placement = "every"
    blocks: tuple[int, ...] = ()
    num_entities: int = 8
    partition: Partition = "soft"

    def __post_init__(self) -> None:
        check_count("tokenizer.num_entities", self.num_entities)
        if self.norm is None and (self.blocks or self.placement != "every"):
            raise ValueError("tokenizer.placement and blocks say where tokenizer.norm acts, which is None; set it")
        if self.norm != "moto" and (self.num_entities, self.partition) != (8, "soft"):
            raise ValueError(
                f"tokenizer.num_entities and partition are of tokenizer.norm=moto, got {self.norm!r}; leave them out"
            )


@dataclass(frozen=True)
class TokenPropConfig:
    """Reconstruction of the image from its tokens as a second objective, see `tokenlabels.models.tokenprop`.

    Attributes:
        weight: of the reconstruction (the paper has 0.001); 0 reconstructs nothing.
        loss, scale, width: of the decoder, see there.
    """

    weight: float = 0.0
    loss: Literal["l1", "l2"] = "l2"
    scale: Literal[64, 128, 256] = 64
    width: Literal[1, 2, 4] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"token_prop.weight must be a finite number of 0 or more, got {self.weight!r}")
        if self.weight == 0 and (self.loss, self.scale, self.width) != ("l2", 64, 1):
            raise ValueError(
                "token_prop.loss, scale and width are of a reconstruction, and token_prop.weight is 0; set it"
            )


@dataclass(frozen=True)
class RunConfig:
    """A run. `jobs.recipes` has the papers'; ``python -m jobs.train NAME`` runs them.

    Attributes:
        model, data, trainer, align, tokenizer, token_prop: see there.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    token_prop: TokenPropConfig = field(default_factory=TokenPropConfig)

    def __post_init__(self) -> None:
        if self.align.method is not None and self.data.mix in (None, "mixtoken"):
            raise ValueError(
                f"align.method={self.align.method} follows pixels that are mixed, and data.mix is {self.data.mix!r}; "
                "use data.mix=cutmix, mixup, random or blockwise"
            )
        if self.align.method is not None and self.token_prop.weight > 0:
            raise ValueError("align.method and token_prop.weight are not trained together; set one of them")
