"""The runs of Token Labeling (arXiv 2104.10858).

Tables and figures are the paper's, Table S1 is the first of its supplement (also the paper's Table 7), and "published"
is what the README of https://github.com/zihangJiang/TokenLabeling has.

What is not changed here is the default of `RunConfig`: the column "Token labeling" of Table S1, with MixToken.
"""

from dataclasses import replace

from jobs.config import Mix, ModelConfig, RunConfig
from jobs.recipes.registry import Recipe, fine_tunes, recipe


def _fine_tuning(base: Recipe, image_size: int, result: str) -> None:
    """Register the fine-tuning of a run at another size, as ``lvvit_s_384``."""

    def make() -> RunConfig:
        return _fine_tuned(base(), image_size)

    title = f"LV-ViT-{base.__name__[-1].upper()}"
    make.__name__ = f"{base.__name__}_{image_size}"
    make.__doc__ = f"{title} fine-tuned at {image_size} px{result}."
    fine_tunes(make)


def _model(name: str, drop_path: float = 0.1, image_size: int = 224) -> RunConfig:
    return RunConfig(ModelConfig(name=name, drop_path=drop_path, image_size=image_size))


def _mixed(config: RunConfig, mix: Mix | None, mixup_alpha: float = 0.0) -> RunConfig:
    return replace(config, data=replace(config.data, mix=mix, mixup_alpha=mixup_alpha))


def _learning(config: RunConfig, base_lr: float, lr_batch: int) -> RunConfig:
    optimizer = replace(config.trainer.optimizer, base_lr=base_lr, lr_batch=lr_batch)
    return replace(config, trainer=replace(config.trainer, optimizer=optimizer))


def _with_tokens(config: RunConfig, share: float) -> RunConfig:
    loss = replace(config.trainer.loss, keep_tokens=share)
    return replace(config, trainer=replace(config.trainer, loss=loss))


def _relabel(config: RunConfig, mix: Mix) -> RunConfig:
    """Column "ReLabel" of Table S1."""
    config = _mixed(_learning(config, base_lr=1e-3, lr_batch=1024), mix)
    return replace(config, data=replace(config.data, supervision="relabel"))


def _hard(config: RunConfig, mix: Mix) -> RunConfig:
    """Column "Standard" of Table S1, which has MixUp too."""
    config = _mixed(_learning(config, base_lr=1e-3, lr_batch=1024), mix, mixup_alpha=0.8)
    return replace(config, data=replace(config.data, supervision="hard"))


def _fine_tuned(config: RunConfig, image_size: int) -> RunConfig:
    """Larger images, section 1 of the supplement. That the learning rate stays where it is (min_lr) is published.

    RandAugment and the rate of stochastic depth stay those of the training from scratch.
    """
    config = _learning(config, base_lr=5e-6, lr_batch=512)
    trainer = replace(
        config.trainer,
        optimizer=replace(config.trainer.optimizer, weight_decay=1e-8),
        schedule=replace(config.trainer.schedule, epochs=30, min_lr=5e-6),
    )
    model, data = replace(config.model, image_size=image_size), replace(config.data, batch_size=512)
    return replace(config, model=model, data=data, trainer=trainer)


# Tables 1 and 4: token labels and MixToken, from scratch. The rates of stochastic depth are published.


@recipe
def lvvit_t() -> RunConfig:
    """LV-ViT-T with token labels: 79.1 (Table 1)."""
    return _model("lvvit_t")


@recipe
def lvvit_s() -> RunConfig:
    """LV-ViT-S with token labels: 83.3 (Tables 1 to 4)."""
    return _model("lvvit_s")


@recipe
def lvvit_m() -> RunConfig:
    """LV-ViT-M with token labels: 84.1 (Tables 1 and 4)."""
    return _model("lvvit_m", drop_path=0.2)


@recipe
def lvvit_l() -> RunConfig:
    """LV-ViT-L with token labels at 288 px: 85.3 (Tables 1 and 4)."""
    # Published with 224 px, this learning rate and this RandAugment; the paper trains at 288.
    config = _learning(_model("lvvit_l", drop_path=0.3, image_size=288), base_lr=1e-3, lr_batch=1024)
    return replace(config, data=replace(config.data, rand_augment="rand-n3-m9-mstd0.5-inc1"))


# Table 4, fine-tuning. What has no number is neither in the paper nor published.

_FINE_TUNED = {
    lvvit_t: {384: "", 448: "", 512: ""},
    lvvit_s: {384: ": 84.4 (Table 4)", 448: "", 512: ""},
    lvvit_m: {384: ": 85.4 (Table 4)", 448: ": 85.5 (published)", 512: ""},
    lvvit_l: {
        384: "",
        448: ": 85.9 after training at 288 px, 86.2 after 448 px (Table 4)",
        512: ": 86.4 after training at 448 px (Table 4)",
    },
}
for _base, _results in _FINE_TUNED.items():
    for _size, _result in _results.items():
        _fine_tuning(_base, _size, _result)


# Table 2: what supervises, and what mixes. lvvit_s is its first row.


@recipe
def relabel() -> RunConfig:
    """LV-ViT-S with ReLabel and MixToken: 83.0 (Table 2)."""
    return _relabel(lvvit_s(), "mixtoken")


@recipe
def relabel_cutmix() -> RunConfig:
    """LV-ViT-S with ReLabel and CutMix: 82.8 (Table 2)."""
    return _relabel(lvvit_s(), "cutmix")


@recipe
def hard_labels() -> RunConfig:
    """LV-ViT-S with ImageNet's labels and MixToken: 82.5 (Table 2)."""
    return _hard(lvvit_s(), "mixtoken")


@recipe
def hard_labels_cutmix() -> RunConfig:
    """LV-ViT-S with ImageNet's labels and CutMix: 82.4 (Table 2)."""
    return _hard(lvvit_s(), "cutmix")


# Table 3: what augments. lvvit_s is its first row.


@recipe
def lvvit_s_no_mix() -> RunConfig:
    """LV-ViT-S with token labels, without MixToken: 81.3 (Table 3)."""
    return _mixed(lvvit_s(), None)


@recipe
def lvvit_s_mixtoken_mixup() -> RunConfig:
    """LV-ViT-S with token labels, MixToken and MixUp: 83.1 (Table 3)."""
    # The paper has one alpha of MixUp, that of the column "Standard" of Table S1.
    return _mixed(lvvit_s(), "mixtoken", mixup_alpha=0.8)


@recipe
def lvvit_s_no_erasing() -> RunConfig:
    """LV-ViT-S with token labels, without Random Erasing ("CutOut"): 83.0 (Table 3)."""
    config = lvvit_s()
    return replace(config, data=replace(config.data, erase_prob=0.0))


@recipe
def lvvit_s_no_rand_augment() -> RunConfig:
    """LV-ViT-S with token labels, without RandAugment: 82.8 (Table 3)."""
    config = lvvit_s()
    return replace(config, data=replace(config.data, rand_augment=None))


# Figure 4, left: the token participation rate. lvvit_s is 100 %; LV-ViT-M is lvvit_m with another loss.keep_tokens.


@recipe
def lvvit_s_tokens_20() -> RunConfig:
    """LV-ViT-S with token labels for 20 % of the tokens: 0.5 below all of them (Figure 4)."""
    return _with_tokens(lvvit_s(), 0.2)


@recipe
def lvvit_s_tokens_40() -> RunConfig:
    """LV-ViT-S with token labels for 40 % of the tokens (Figure 4)."""
    return _with_tokens(lvvit_s(), 0.4)


@recipe
def lvvit_s_tokens_60() -> RunConfig:
    """LV-ViT-S with token labels for 60 % of the tokens (Figure 4)."""
    return _with_tokens(lvvit_s(), 0.6)


@recipe
def lvvit_s_tokens_80() -> RunConfig:
    """LV-ViT-S with token labels for 80 % of the tokens (Figure 4)."""
    return _with_tokens(lvvit_s(), 0.8)


# Figure 5 and Table 11: other models. A ResNeSt has no patch embedding whose output could be mixed.


@recipe
def deit_s_token_labels() -> RunConfig:
    """DeiT-S with token labels (Figure 5)."""
    return _model("deit_small_patch16_224")


@recipe
def mixer_s16_token_labels() -> RunConfig:
    """Mixer-S/16 with token labels: 76.1 (Table 11)."""
    return _model("mixer_s16_224")


@recipe
def mixer_s16_hard_labels() -> RunConfig:
    """Mixer-S/16 with ImageNet's labels: 75.6 (Table 11)."""
    return _hard(_model("mixer_s16_224"), "cutmix")


@recipe
def mixer_b16_token_labels() -> RunConfig:
    """Mixer-B/16 with token labels: 79.5 (Table 11)."""
    return _model("mixer_b16_224")


@recipe
def mixer_b16_hard_labels() -> RunConfig:
    """Mixer-B/16 with ImageNet's labels: 78.3 (Table 11)."""
    return _hard(_model("mixer_b16_224"), "cutmix")


@recipe
def mixer_l16_token_labels() -> RunConfig:
    """Mixer-L/16 with token labels: 80.1 (Table 11)."""
    return _model("mixer_l16_224")


@recipe
def mixer_l16_hard_labels() -> RunConfig:
    """Mixer-L/16 with ImageNet's labels: 77.7 (Table 11)."""
    return _hard(_model("mixer_l16_224"), "cutmix")


@recipe
def resnest50_token_labels() -> RunConfig:
    """ResNeSt-50 with token labels: 81.5 (Table 11)."""
    return _mixed(_model("resnest50d"), "cutmix")


@recipe
def resnest50_hard_labels() -> RunConfig:
    """ResNeSt-50 with ImageNet's labels: 80.9 (Table 11)."""
    return _hard(_model("resnest50d"), "cutmix")
