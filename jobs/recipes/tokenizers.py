"""The runs of "What Makes for Good Tokenizers in Vision Transformer?" (arXiv 2212.11115): MoTo, TokenProp, tokenizers.

Tables are the paper's. It trains every model by the recipe of its own paper, with hard labels: DeiT and Swin as in
Table 17, PVT and T2T-ViT as their published scripts do. Not here: images that are repeated within a batch (DeiT, PVT),
the smaller batch of Swin-S, whose size Table 17 does not tell, and the ten epochs at the lowest learning rate that end
T2T-ViT's 310 (its cosine takes all of them).
"""

from dataclasses import replace
from typing import Any

from jobs.config import DataConfig, ModelConfig, RunConfig, TokenizerConfig, TokenPropConfig
from jobs.recipes.registry import recipe
from tokenlabels.trainer import OptimizerConfig, ScheduleConfig, TrainerConfig

MOTO = TokenizerConfig(norm="moto")
TOKEN_PROP = TokenPropConfig(weight=1e-3)

_EMA_DECAY = 0.99996
_SGD_LR = 0.1
"""Of a batch of 256. The paper tunes learning rate and weight decay of every row and does not print them."""


def _plain(
    name: str,
    *,
    batch_size: int = 1024,
    drop_path: float = 0.1,
    epochs: int = 300,
    warmup_epochs: float = 5,
    clip_grad: float | None = None,
    ema_decay: float | None = None,
) -> RunConfig:
    """Hard labels, MixUp and CutMix in turns; 5e-4 is the learning rate of a batch of 512."""
    return RunConfig(
        ModelConfig(name, drop_path=drop_path),
        DataConfig(supervision="hard", mix="cutmix", mixup_alpha=0.8, batch_size=batch_size),
        TrainerConfig(
            optimizer=OptimizerConfig(base_lr=5e-4, lr_batch=512, clip_grad=clip_grad),
            schedule=ScheduleConfig(epochs=epochs, warmup_epochs=warmup_epochs),
            ema_decay=ema_decay,
        ),
    )


def _deit() -> RunConfig:
    return _plain("deit_small_patch16_224", ema_decay=_EMA_DECAY)


def _swin(size: str, drop_path: float) -> RunConfig:
    name = f"swin_{size}_patch4_window7_224"
    return _plain(name, batch_size=512, drop_path=drop_path, warmup_epochs=20, clip_grad=5.0)


PLAIN = {
    "deit_s": ("DeiT-S", _deit()),
    "t2t_vit_14": (
        "T2T-ViT-14",
        _plain("t2t_vit_14", batch_size=512, epochs=310, warmup_epochs=10, ema_decay=_EMA_DECAY),
    ),
    "pvt_small": ("PVT-Small", _plain("pvt_small")),
    "pvt_medium": ("PVT-Medium", _plain("pvt_medium", drop_path=0.3, clip_grad=1.0)),
    "pvt_v2_b2": ("PVTv2-B2", _plain("pvt_v2_b2")),
    "swin_t": ("Swin-T", _swin("tiny", 0.2)),
    "swin_s": ("Swin-S", _swin("small", 0.3)),
}
"""The models of Tables 2, 10 and 12 by name, with their titles."""

_RESULTS = {
    "deit_s": ("79.8 (Table 2)", "81.6 (Table 2)", "80.7 (Table 10)", "82.6 (Table 12)"),
    "t2t_vit_14": ("81.5 (Table 2)", "82.3 (Table 2)", "82.2 (Table 10)", "82.8 (Table 12)"),
    "pvt_small": ("79.8 (Table 2)", "81.0 (Table 2)", "80.9 (Table 10)", ""),
    "pvt_medium": ("81.2 (Table 2)", "82.1 (Table 2)", "81.8 (Table 10)", ""),
    "pvt_v2_b2": ("82.0 (Table 2)", "82.7 (Table 2)", "", ""),
    "swin_t": ("81.2 (Table 2)", "82.2 (Table 2)", "82.3 (Table 10)", "82.9 (Table 12)"),
    "swin_s": ("83.0 (Table 2)", "83.7 (Table 2)", "", ""),
}
"""Without, with MoTo, with TokenProp, with both; what is empty is not in the paper."""


def _add(name: str, config: RunConfig, what: str, result: str) -> None:
    def make() -> RunConfig:
        return config

    make.__name__ = name
    make.__module__ = __name__
    make.__doc__ = f"{what}: {result}." if result else f"{what}."
    recipe(make)


def _changed(config: RunConfig, *, moto: bool = False, token_prop: bool = False, **tokenizer: Any) -> RunConfig:
    config = replace(config, tokenizer=replace(MOTO if moto else TokenizerConfig(), **tokenizer))
    return replace(config, token_prop=TOKEN_PROP) if token_prop else config


def _by_sgd(config: RunConfig) -> RunConfig:
    optimizer = replace(config.trainer.optimizer, name="sgd", base_lr=_SGD_LR, lr_batch=256, weight_decay=1e-4)
    return replace(config, trainer=replace(config.trainer, optimizer=optimizer))


def _limited(config: RunConfig, fraction: float) -> RunConfig:
    """Table 13: 100 epochs on a part of ImageNet."""
    schedule = replace(config.trainer.schedule, epochs=100)
    data = replace(config.data, fraction=fraction)
    return replace(config, data=data, trainer=replace(config.trainer, schedule=schedule))


def _add_tables_2_10_12() -> None:
    for name, (title, config) in PLAIN.items():
        plain, moto, token_prop, both = _RESULTS[name]
        _add(name, config, title, plain)
        _add(f"{name}_moto", _changed(config, moto=True), f"{title} with MoTo", moto)
        _add(f"{name}_token_prop", _changed(config, token_prop=True), f"{title} with TokenProp", token_prop)
        config = _changed(config, moto=True, token_prop=True)
        _add(f"{name}_moto_token_prop", config, f"{title} with MoTo and TokenProp", both)


def _add_table_1() -> None:
    for refinements, result in (
        (("frozen",), "79.4"),
        (("intra",), "80.5"),
        (("intra", "local"), "80.9"),
        (("intra", "local", "inter"), "82.0"),
    ):
        config = _changed(_deit(), refinements=refinements)
        _add(
            f"deit_s_{'_'.join(refinements)}", config, f"DeiT-S, tokens {', '.join(refinements)}", f"{result} (Table 1)"
        )


def _add_tables_4_to_6() -> None:
    for num_entities, partition, result in (
        (2, "soft", "80.8"),
        (4, "soft", "81.1"),
        (16, "soft", "81.7"),
        (16, "hard", "80.5"),
        (32, "hard", "80.8"),
    ):
        config = _changed(_deit(), moto=True, num_entities=num_entities, partition=partition)
        what = f"DeiT-S with MoTo, {num_entities} entities, {partition} partition"
        _add(f"deit_s_moto_{num_entities}_{partition}", config, what, f"{result} (Table 4)")
    for last, result in ((4, "81.8"), (8, "81.9"), (12, "81.4")):
        config = _changed(_deit(), moto=True, blocks=tuple(range(last)))
        what = f"DeiT-S with MoTo in the tokenizer and blocks 1 to {last}"
        _add(f"deit_s_moto_blocks_1_{last}", config, what, f"{result} (Table 5)")
    for norm, title, result in (
        ("layer_norm", "layer norm", "79.6"),
        ("batch_norm", "batch norm", "79.5"),
        ("instance_norm", "instance norm", "80.1"),
    ):
        config = _changed(_deit(), norm=norm)
        _add(f"deit_s_{norm}", config, f"DeiT-S with {title} in the tokenizer", f"{result} (Table 6)")


def _add_table_11() -> None:
    deit = _deit()
    # the stem takes the place of a block (arXiv 2106.14881)
    shallow = replace(deit, model=replace(deit.model, args={"depth": 11}))
    for name, config, what, result in (
        ("deit_s_sgd", deit, "DeiT-S", "76.7"),
        ("deit_s_frozen_sgd", _changed(deit, refinements=("frozen",)), "DeiT-S, tokens frozen,", "76.0"),
        (
            "deit_s_conv_stem_sgd",
            _changed(shallow, refinements=("conv_stem",)),
            "DeiT-S with a convolutional stem",
            "78.2",
        ),
        ("deit_s_token_prop_sgd", _changed(deit, token_prop=True), "DeiT-S with TokenProp", "78.9"),
        (
            "deit_s_conv_stem_token_prop_sgd",
            _changed(shallow, token_prop=True, refinements=("conv_stem",)),
            "DeiT-S with a convolutional stem and TokenProp",
            "79.6",
        ),
    ):
        _add(name, _by_sgd(config), f"{what} by SGD", f"{result} (Table 11)")


def _add_table_13() -> None:
    for percent, plain, ours in (
        (50, "73.7", "75.1"),
        (40, "71.6", "73.2"),
        (20, "61.2", "63.9"),
        (10, "43.5", "46.5"),
    ):
        config = _limited(PLAIN["swin_t"][1], percent / 100)
        both = _changed(config, moto=True, token_prop=True)
        _add(f"swin_t_data_{percent}", config, f"Swin-T on {percent} % of the data", f"{plain} (Table 13)")
        what = f"Swin-T with MoTo and TokenProp on {percent} % of the data"
        _add(f"swin_t_moto_token_prop_data_{percent}", both, what, f"{ours} (Table 13)")


_add_tables_2_10_12()
_add_table_1()
_add_tables_4_to_6()
_add_table_11()
_add_table_13()
