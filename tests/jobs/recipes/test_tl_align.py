"""The runs of TL-Align: every number against the tables, written down once more."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import timm

from jobs.build import build_model
from jobs.config import AlignConfig, AlignMethod, DataConfig, Mix, ModelConfig, RunConfig
from jobs.overrides import apply_overrides
from jobs.recipes import RECIPES, get_recipe, needs_init, tl_align
from tokenlabels.align import TLAlign, TransMix
from tokenlabels.trainer import TrainerConfig


class Row(NamedTuple):
    """What tables and published scripts say of a run. The defaults are those of DeiT-S with CutMix (Table 9)."""

    model: str = "deit_small_patch16_224"
    method: AlignMethod | None = "tl_align"
    layers: tuple[int, ...] | None = None
    normalize: bool = True
    mix: Mix | None = "cutmix"
    mixup_alpha: float = 0.0
    drop_path: float = 0.1
    lr: float = 1e-3
    weight_decay: float = 0.05
    clip_grad: float | None = None
    epochs: int = 300
    warmup_epochs: float = 5
    min_lr: float = 1e-5


def row_of(config: RunConfig) -> Row:
    model, data, trainer, align = config.model, config.data, config.trainer, config.align
    return Row(
        model=model.name,
        method=align.method,
        layers=align.layers,
        normalize=align.normalize,
        mix=data.mix,
        mixup_alpha=data.mixup_alpha,
        drop_path=model.drop_path,
        lr=trainer.optimizer.lr(data.batch_size),
        weight_decay=trainer.optimizer.weight_decay,
        clip_grad=trainer.optimizer.clip_grad,
        epochs=trainer.schedule.epochs,
        warmup_epochs=trainer.schedule.warmup_epochs,
        min_lr=trainer.schedule.min_lr,
    )


FINE_TUNED = {"lr": 1e-5, "weight_decay": 1e-8, "epochs": 40, "warmup_epochs": 0, "min_lr": 1e-5}
SWIN = {"warmup_epochs": 20, "clip_grad": 5.0}
TABLE_1 = {
    "deit_t": Row("deit_tiny_patch16_224"),
    "deit_s": Row(),
    "deit_b": Row("deit_base_patch16_224", **FINE_TUNED),
    "swin_t": Row("swin_tiny_patch4_window7_224", drop_path=0.2, **SWIN),
    "swin_s": Row("swin_small_patch4_window7_224", drop_path=0.3, **SWIN),
    "swin_b": Row("swin_base_patch4_window7_224", drop_path=0.5, **(SWIN | FINE_TUNED)),
    "pvt_v2_b1": Row("pvt_v2_b1"),
    "pvt_v2_b2": Row("pvt_v2_b2"),
}
ROWS = {
    **{f"{name}_tl_align": row for name, row in TABLE_1.items()},
    **{f"{name}_cutmix": row._replace(method=None) for name, row in TABLE_1.items()},
    "deit_t_transmix": TABLE_1["deit_t"]._replace(method="transmix"),
    "deit_s_transmix": Row(method="transmix"),
    "deit_s_no_mix": Row(method=None, mix=None),
    "deit_s_mixup_cutmix": Row(method=None, mixup_alpha=0.8),
    "deit_s_mixup_cutmix_tl_align": Row(mixup_alpha=0.8),
    "deit_s_random": Row(method=None, mix="random"),
    "deit_s_random_tl_align": Row(mix="random"),
    "deit_s_blockwise": Row(method=None, mix="blockwise"),
    "deit_s_blockwise_tl_align": Row(mix="blockwise"),
    "deit_s_tl_align_layer_12": Row(layers=(11,)),
    "deit_s_tl_align_layers_2_4_6_8": Row(layers=(1, 3, 5, 7)),
    "deit_s_tl_align_no_norm": Row(normalize=False),
}
OURS = [name for name, make in RECIPES.items() if make.__module__ == tl_align.__name__]
each_recipe = pytest.mark.parametrize("name", OURS)


def test_every_run_is_in_a_table_and_every_row_is_a_run() -> None:
    assert sorted(OURS) == sorted(ROWS)
    assert {name for name in OURS if needs_init(name)} == {
        f"{model}_b_{method}" for model in ("deit", "swin") for method in ("tl_align", "cutmix")
    }


@each_recipe
def test_numbers_are_those_of_the_tables(name: str) -> None:
    row, expected = row_of(get_recipe(name)()), ROWS[name]
    assert row == expected._replace(lr=row.lr)
    assert row.lr == pytest.approx(expected.lr, rel=1e-12)


@each_recipe
def test_what_all_runs_share(name: str) -> None:
    config = get_recipe(name)()
    data, trainer = config.data, config.trainer
    assert (config.model.image_size, data.batch_size, data.supervision) == (224, 1024, "hard")
    assert (data.rand_augment, data.erase_prob, data.mix_alpha, data.mix_prob) == ("rand-m9-mstd0.5-inc1", 0.25, 1, 1)
    assert (trainer.optimizer.name, trainer.ema_decay, trainer.loss.smoothing) == ("adamw", None, 0.1)
    assert trainer.schedule.warmup_lr == 1e-6
    assert timm.is_model(config.model.name)
    line = RECIPES[name].__doc__
    assert line is not None
    assert "\n" not in line
    assert "Table" in line


@pytest.mark.parametrize(
    "name", ["deit_t_tl_align", "deit_s_tl_align_layer_12", "swin_t_tl_align", "pvt_v2_b1_tl_align"]
)
def test_models_that_labels_follow(name: str) -> None:
    config = get_recipe(name)()
    model = build_model(config, 10)
    assert type(model) is TLAlign
    assert model.num_classes == 10
    assert model.alignment.layers == (None if config.align.layers is None else frozenset(config.align.layers))


def test_models_whose_class_token_is_asked() -> None:
    assert type(build_model(get_recipe("deit_t_transmix")(), 10)) is TransMix


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({"method": "attention"}, "align.method must be one of 'tl_align', 'transmix'", id="method"),
        pytest.param({"layers": (1,)}, "are of align.method=tl_align, got method None", id="layers of nothing"),
        pytest.param({"method": "transmix", "normalize": False}, "got method 'transmix'", id="TransMix"),
    ],
)
def test_configurations_that_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignConfig(**config)  # type: ignore[arg-type]


@pytest.mark.parametrize("mix", [None, "mixtoken"])
def test_pixels_have_to_be_mixed(mix: Mix | None) -> None:
    with pytest.raises(ValueError, match=f"follows pixels that are mixed, and data.mix is {mix!r}"):
        RunConfig(ModelConfig(), DataConfig(mix=mix), TrainerConfig(), AlignConfig("tl_align"))


def test_layers_from_the_command_line() -> None:
    config = apply_overrides(get_recipe("deit_t_tl_align")(), ["align.layers=1,3"])
    assert config.align == AlignConfig("tl_align", (1, 3))
    assert apply_overrides(config, ["align.layers=-1"]).align.layers == (-1,)
    cutmix = replace(config, align=AlignConfig())
    assert apply_overrides(config, ["align.layers=none", "align.method=none"]) == cutmix


def test_a_model_without_a_rule_is_refused_before_training() -> None:
    config = apply_overrides(get_recipe("deit_t_tl_align")(), ["model.name=test_resnet"])
    with pytest.raises(ValueError, match=r"cannot follow the tokens through timm\.models\.resnet\.ResNet"):
        build_model(config, 10)
