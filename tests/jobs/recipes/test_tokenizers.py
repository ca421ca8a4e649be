"""The runs of MoTo, TokenProp and other tokenizers: every number against the tables, written down once more."""

from typing import Any, NamedTuple

import pytest
import timm

import tokenlabels.models  # noqa: F401 - registers T2T-ViT and PVT
from jobs.build import build_model
from jobs.config import DataConfig, RunConfig, TokenizerConfig, TokenPropConfig
from jobs.overrides import apply_overrides
from jobs.recipes import RECIPES, get_recipe, needs_init, tokenizers
from tokenlabels.models.modulation import modulations
from tokenlabels.models.moto import MoTo
from tokenlabels.models.tokenprop import TokenProp


class Row(NamedTuple):
    """What the paper and the models' own papers say of a run. The defaults are those of DeiT-S (Table 17)."""

    model: str = "deit_small_patch16_224"
    tokenizer: TokenizerConfig = TokenizerConfig()
    weight: float = 0.0
    batch_size: int = 1024
    lr: float = 1e-3
    drop_path: float = 0.1
    epochs: int = 300
    warmup_epochs: float = 5
    clip_grad: float | None = None
    ema_decay: float | None = 0.99996
    optimizer: str = "adamw"
    fraction: float = 1.0


def row_of(config: RunConfig) -> Row:
    trainer = config.trainer
    return Row(
        model=config.model.name,
        tokenizer=config.tokenizer,
        weight=config.token_prop.weight,
        batch_size=config.data.batch_size,
        lr=trainer.optimizer.lr(config.data.batch_size),
        drop_path=config.model.drop_path,
        epochs=trainer.schedule.epochs,
        warmup_epochs=trainer.schedule.warmup_epochs,
        clip_grad=trainer.optimizer.clip_grad,
        ema_decay=trainer.ema_decay,
        optimizer=trainer.optimizer.name,
        fraction=config.data.fraction,
    )


MOTO = TokenizerConfig(norm="moto")
PVT: dict[str, Any] = {"ema_decay": None}
SWIN: dict[str, Any] = {"batch_size": 512, "lr": 5e-4, "warmup_epochs": 20, "clip_grad": 5.0, "ema_decay": None}
SWIN_T = Row("swin_tiny_patch4_window7_224", drop_path=0.2, **SWIN)
PLAIN = {
    "deit_s": Row(),
    "t2t_vit_14": Row("t2t_vit_14", batch_size=512, lr=5e-4, epochs=310, warmup_epochs=10),
    "pvt_small": Row("pvt_small", **PVT),
    "pvt_medium": Row("pvt_medium", drop_path=0.3, clip_grad=1.0, **PVT),
    "pvt_v2_b2": Row("pvt_v2_b2", **PVT),
    "swin_t": SWIN_T,
    "swin_s": Row("swin_small_patch4_window7_224", drop_path=0.3, **SWIN),
}


def refined(*refinements: str, **changes: Any) -> Row:
    return Row(tokenizer=TokenizerConfig(refinements=refinements), **changes)  # type: ignore[arg-type]


SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.4}
ROWS = {
    **PLAIN,
    **{f"{name}_moto": row._replace(tokenizer=MOTO) for name, row in PLAIN.items()},
    **{f"{name}_token_prop": row._replace(weight=1e-3) for name, row in PLAIN.items()},
    **{f"{name}_moto_token_prop": row._replace(tokenizer=MOTO, weight=1e-3) for name, row in PLAIN.items()},
    "deit_s_frozen": refined("frozen"),
    "deit_s_intra": refined("intra"),
    "deit_s_intra_local": refined("intra", "local"),
    "deit_s_intra_local_inter": refined("intra", "local", "inter"),
    **{f"deit_s_moto_{n}_soft": Row(tokenizer=TokenizerConfig(norm="moto", num_entities=n)) for n in (2, 4, 16)},
    **{
        f"deit_s_moto_{n}_hard": Row(tokenizer=TokenizerConfig(norm="moto", num_entities=n, partition="hard"))
        for n in (16, 32)
    },
    **{
        f"deit_s_moto_blocks_1_{last}": Row(tokenizer=TokenizerConfig(norm="moto", blocks=tuple(range(last))))
        for last in (4, 8, 12)
    },
    "deit_s_layer_norm": Row(tokenizer=TokenizerConfig(norm="layer_norm")),
    "deit_s_batch_norm": Row(tokenizer=TokenizerConfig(norm="batch_norm")),
    "deit_s_instance_norm": Row(tokenizer=TokenizerConfig(norm="instance_norm")),
    "deit_s_sgd": Row(**SGD),
    "deit_s_frozen_sgd": refined("frozen", **SGD),
    "deit_s_conv_stem_sgd": refined("conv_stem", **SGD),
    "deit_s_token_prop_sgd": Row(weight=1e-3, **SGD),
    "deit_s_conv_stem_token_prop_sgd": refined("conv_stem", weight=1e-3, **SGD),
    **{f"swin_t_data_{percent}": SWIN_T._replace(epochs=100, fraction=percent / 100) for percent in (50, 40, 20, 10)},
    **{
        f"swin_t_moto_token_prop_data_{percent}": SWIN_T._replace(
            epochs=100, fraction=percent / 100, tokenizer=MOTO, weight=1e-3
        )
        for percent in (50, 40, 20, 10)
    },
}
OURS = [name for name, make in RECIPES.items() if make.__module__ == tokenizers.__name__]
each_recipe = pytest.mark.parametrize("name", OURS)


def test_every_run_is_in_a_table_and_every_row_is_a_run() -> None:
    assert sorted(OURS) == sorted(ROWS)
    assert not any(map(needs_init, OURS))


@each_recipe
def test_numbers_are_those_of_the_tables(name: str) -> None:
    row, expected = row_of(get_recipe(name)()), ROWS[name]
    assert row == expected._replace(lr=row.lr)
    assert row.lr == pytest.approx(expected.lr, rel=1e-12)


@each_recipe
def test_what_all_runs_share(name: str) -> None:
    config = get_recipe(name)()
    data = config.data
    assert (config.model.image_size, data.supervision, data.mix, data.mixup_alpha) == (224, "hard", "cutmix", 0.8)
    assert (data.rand_augment, data.erase_prob) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (config.align.method, config.token_prop.loss, config.token_prop.scale) == (None, "l2", 64)
    assert timm.is_model(config.model.name)
    line = RECIPES[name].__doc__
    assert line is not None
    assert "\n" not in line
    assert line.endswith(".")


def test_models_are_built_as_they_say() -> None:
    swin = build_model(get_recipe("swin_t_moto")(), 10)
    assert [type(norm) for norm in modulations(swin)] == [MoTo] * 4
    both = build_model(get_recipe("pvt_v2_b2_moto_token_prop")(), 10)
    assert type(both) is TokenProp
    assert len(modulations(both.model)) == 4
    blocks = build_model(get_recipe("deit_s_moto_blocks_1_4")(), 10)
    assert len(modulations(blocks)) == 5
    stem = build_model(get_recipe("deit_s_conv_stem_sgd")(), 10)
    assert type(stem.patch_embed).__name__ == "ConvStemEmbed"
    assert len(stem.blocks) == 11, "the stem takes the place of one"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: DataConfig(fraction=0.0), "data.fraction is 0", id="no data"),
        pytest.param(lambda: TokenizerConfig(blocks=(1,)), "tokenizer.norm acts, which is None", id="blocks"),
        pytest.param(lambda: TokenizerConfig(placement="stem"), "tokenizer.norm acts, which is None", id="placement"),
        pytest.param(lambda: TokenizerConfig(num_entities=16), "are of tokenizer.norm=moto, got None", id="no MoTo"),
        pytest.param(
            lambda: TokenizerConfig(norm="layer_norm", partition="hard"), "moto, got 'layer_norm'", id="partition"
        ),
        pytest.param(lambda: TokenPropConfig(scale=128), "token_prop.weight is 0; set it", id="no reconstruction"),
        pytest.param(lambda: TokenizerConfig(num_entities=0), "num_entities must be an integer", id="entities"),
        pytest.param(lambda: TokenPropConfig(weight=-1.0), "weight must be a finite number of 0 or more", id="weight"),
        pytest.param(
            lambda: apply_overrides(get_recipe("deit_s_tl_align")(), ["token_prop.weight=0.001"]),
            "align.method and token_prop.weight are not trained together",
            id="TL-Align and TokenProp",
        ),
        pytest.param(
            lambda: build_model(apply_overrides(get_recipe("lvvit_t")(), ["tokenizer.refinements=intra"]), 10),
            "model.name 'lvvit_t' cannot be built .*refinements are for ViT and DeiT",
            id="refinements of LV-ViT",
        ),
    ],
)
def test_configurations_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
