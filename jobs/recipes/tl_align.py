"""The runs of TL-Align (arXiv 2210.06455), and its baselines: hard labels, CutMix, 300 epochs.

Tables are the paper's. It keeps the recipes of DeiT, Swin and PVT, whose papers and published scripts have the numbers
that are not in Table 9, and mixes by CutMix alone, whatever those mix by. Images are not repeated within a batch here,
as DeiT's are, and boxes are drawn on pixels for every sample, where the published code draws one for all on the grid of
patches.
"""

from dataclasses import replace
from typing import Any

from jobs.config import AlignConfig, DataConfig, Mix, ModelConfig, RunConfig
from jobs.recipes.registry import fine_tunes, recipe
from tokenlabels.trainer import OptimizerConfig, ScheduleConfig, TrainerConfig

TL_ALIGN = AlignConfig("tl_align")


def _deit(size: str) -> RunConfig:
    """Table 9, the rows without moving average: 5e-4 is the learning rate of a batch of 512."""
    return _hard(f"deit_{size}_patch16_224", drop_path=0.1, warmup_epochs=5)


def _swin(size: str, drop_path: float) -> RunConfig:
    return _hard(f"swin_{size}_patch4_window7_224", drop_path=drop_path, warmup_epochs=20, clip_grad=5.0)


def _pvt(size: str) -> RunConfig:
    """PVT v2 in the place of the paper's PVT, which timm has not."""
    return _hard(f"pvt_v2_{size}", drop_path=0.1, warmup_epochs=5)


def _hard(name: str, *, drop_path: float, warmup_epochs: float, clip_grad: float | None = None) -> RunConfig:
    return RunConfig(
        ModelConfig(name, drop_path=drop_path),
        DataConfig(supervision="hard", mix="cutmix"),
        TrainerConfig(
            optimizer=OptimizerConfig(base_lr=5e-4, lr_batch=512, clip_grad=clip_grad),
            schedule=ScheduleConfig(warmup_epochs=warmup_epochs),
            ema_decay=None,
        ),
    )


def _fine_tuned(config: RunConfig) -> RunConfig:
    """Section 4.1: the base models go on from released weights, 40 epochs at a constant learning rate.

    Weights with timm's names, such as timm's own files; Swin's first release names them otherwise.
    """
    rate = 1e-5
    trainer = replace(
        config.trainer,
        optimizer=replace(config.trainer.optimizer, base_lr=rate, lr_batch=config.data.batch_size, weight_decay=1e-8),
        schedule=ScheduleConfig(epochs=40, warmup_epochs=0, min_lr=rate),
    )
    return replace(config, trainer=trainer)


def _aligned(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, align=replace(TL_ALIGN, **changes))


def _mixed(config: RunConfig, mix: Mix | None, mixup_alpha: float = 0.0) -> RunConfig:
    return replace(config, data=replace(config.data, mix=mix, mixup_alpha=mixup_alpha))


# Table 1: TL-Align.


@recipe
def deit_t_tl_align() -> RunConfig:
    """DeiT-T with TL-Align: 73.2 (Table 1)."""
    return _aligned(_deit("tiny"))


@recipe
def deit_s_tl_align() -> RunConfig:
    """DeiT-S with TL-Align: 80.6 (Tables 1, 2, 7, 8 and 9)."""
    return _aligned(_deit("small"))


@fine_tunes
def deit_b_tl_align() -> RunConfig:
    """DeiT-B, trained already, fine-tuned with TL-Align: 82.3 (Table 1)."""
    return _aligned(_fine_tuned(_deit("base")))


@recipe
def swin_t_tl_align() -> RunConfig:
    """Swin-T with TL-Align: 81.4 (Table 1)."""
    return _aligned(_swin("tiny", 0.2))


@recipe
def swin_s_tl_align() -> RunConfig:
    """Swin-S with TL-Align: 83.4 (Table 1)."""
    return _aligned(_swin("small", 0.3))


@fine_tunes
def swin_b_tl_align() -> RunConfig:
    """Swin-B, trained already, fine-tuned with TL-Align: 83.7 (Table 1)."""
    return _aligned(_fine_tuned(_swin("base", 0.5)))


@recipe
def pvt_v2_b1_tl_align() -> RunConfig:
    """PVTv2-B1 with TL-Align; the paper's PVT-T has 75.5 (Table 1)."""
    return _aligned(_pvt("b1"))


@recipe
def pvt_v2_b2_tl_align() -> RunConfig:
    """PVTv2-B2 with TL-Align; the paper's PVT-S has 80.4 (Table 1)."""
    return _aligned(_pvt("b2"))


# What these are compared with: the same runs with targets mixed by area, and others of Tables 2 and 9.


@recipe
def deit_t_cutmix() -> RunConfig:
    """DeiT-T with CutMix, the baseline of Table 1 (72.2 there, with MixUp too)."""
    return _deit("tiny")


@recipe
def deit_s_cutmix() -> RunConfig:
    """DeiT-S with CutMix: 79.8 (Tables 2, 7 and 9)."""
    return _deit("small")


@fine_tunes
def deit_b_cutmix() -> RunConfig:
    """DeiT-B, trained already, fine-tuned with CutMix: a control of deit_b_tl_align that Table 1 has not."""
    return _fine_tuned(_deit("base"))


@recipe
def swin_t_cutmix() -> RunConfig:
    """Swin-T with CutMix, the baseline of Table 1 (81.2 there, with MixUp too)."""
    return _swin("tiny", 0.2)


@recipe
def swin_s_cutmix() -> RunConfig:
    """Swin-S with CutMix, the baseline of Table 1 (83.0 there, with MixUp too)."""
    return _swin("small", 0.3)


@fine_tunes
def swin_b_cutmix() -> RunConfig:
    """Swin-B, trained already, fine-tuned with CutMix: a control of swin_b_tl_align that Table 1 has not."""
    return _fine_tuned(_swin("base", 0.5))


@recipe
def pvt_v2_b1_cutmix() -> RunConfig:
    """PVTv2-B1 with CutMix; the PVT-T of Table 1 has 75.1, with MixUp too."""
    return _pvt("b1")


@recipe
def pvt_v2_b2_cutmix() -> RunConfig:
    """PVTv2-B2 with CutMix; the PVT-S of Table 1 has 79.8, with MixUp too."""
    return _pvt("b2")


@recipe
def deit_t_transmix() -> RunConfig:
    """DeiT-T with TransMix, by the recipe of deit_s_transmix (Table 9)."""
    return replace(_deit("tiny"), align=AlignConfig("transmix"))


@recipe
def deit_s_transmix() -> RunConfig:
    """DeiT-S with TransMix, trained as the others: 80.1 (Tables 2 and 9)."""
    return replace(_deit("small"), align=AlignConfig("transmix"))


@recipe
def deit_s_no_mix() -> RunConfig:
    """DeiT-S without mixing: 76.4 (Tables 2, 7 and 9)."""
    return _mixed(_deit("small"), None)


# Table 7: other ways of mixing.


@recipe
def deit_s_mixup_cutmix() -> RunConfig:
    """DeiT-S with MixUp and CutMix in turns: 79.8 (Tables 7 and 9)."""
    return _mixed(_deit("small"), "cutmix", mixup_alpha=0.8)


@recipe
def deit_s_mixup_cutmix_tl_align() -> RunConfig:
    """DeiT-S with MixUp and CutMix in turns and TL-Align: 80.2 (Table 7)."""
    return _aligned(deit_s_mixup_cutmix())


@recipe
def deit_s_random() -> RunConfig:
    """DeiT-S with patches mixed at random: 79.7 (Table 7)."""
    return _mixed(_deit("small"), "random")


@recipe
def deit_s_random_tl_align() -> RunConfig:
    """DeiT-S with patches mixed at random and TL-Align: 80.2 (Table 7)."""
    return _aligned(deit_s_random())


@recipe
def deit_s_blockwise() -> RunConfig:
    """DeiT-S with patches mixed in blocks: 80.0 (Table 7)."""
    return _mixed(_deit("small"), "blockwise")


@recipe
def deit_s_blockwise_tl_align() -> RunConfig:
    """DeiT-S with patches mixed in blocks and TL-Align: 80.3 (Table 7)."""
    return _aligned(deit_s_blockwise())


# Table 8: parts of TL-Align. The paper counts layers from 1.


@recipe
def deit_s_tl_align_layer_12() -> RunConfig:
    """DeiT-S with TL-Align in the last layer alone: 80.1 (Table 8)."""
    return _aligned(_deit("small"), layers=(11,))


@recipe
def deit_s_tl_align_layers_2_4_6_8() -> RunConfig:
    """DeiT-S with TL-Align in layers 2, 4, 6 and 8: 80.2 (Table 8)."""
    return _aligned(_deit("small"), layers=(1, 3, 5, 7))


@recipe
def deit_s_tl_align_no_norm() -> RunConfig:
    """DeiT-S with TL-Align without normalisation: 80.3 (Table 8)."""
    return _aligned(_deit("small"), normalize=False)
