"""The runs of Token Labeling: every number against the tables, written down once more."""

from typing import NamedTuple

import pytest
import timm

import tokenlabels.models  # noqa: F401 - registers LV-ViT
from jobs.config import Mix, RunConfig, Supervision
from jobs.recipes import RECIPES, get_recipe, needs_init, token_labeling
from loaders.device import choose_mixing
from loaders.rand_augment import RandAugment


class Row(NamedTuple):
    """What tables and commands say of a run. The defaults are the column "Token labeling" of Table S1."""

    model: str = "lvvit_s"
    image_size: int = 224
    drop_path: float = 0.1
    supervision: Supervision = "token"
    mix: Mix | None = "mixtoken"
    mixup_alpha: float = 0.0
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    erase_prob: float = 0.25
    keep_tokens: float = 1.0
    batch_size: int = 1024
    lr: float = 1e-3 * 1024 / 640
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    epochs: int = 300
    warmup_epochs: float = 5


def row_of(config: RunConfig) -> Row:
    model, data, trainer = config.model, config.data, config.trainer
    return Row(
        model=model.name,
        image_size=model.image_size,
        drop_path=model.drop_path,
        supervision=data.supervision,
        mix=data.mix,
        mixup_alpha=data.mixup_alpha,
        rand_augment=data.rand_augment,
        erase_prob=data.erase_prob,
        keep_tokens=trainer.loss.keep_tokens,
        batch_size=data.batch_size,
        lr=trainer.optimizer.lr(data.batch_size),
        min_lr=trainer.schedule.min_lr,
        weight_decay=trainer.optimizer.weight_decay,
        epochs=trainer.schedule.epochs,
        warmup_epochs=trainer.schedule.warmup_epochs,
    )


S, M = Row("lvvit_s"), Row("lvvit_m", drop_path=0.2)
L = Row("lvvit_l", 288, 0.3, rand_augment="rand-n3-m9-mstd0.5-inc1", lr=1e-3)
STANDARD = Row(supervision="hard", mix="cutmix", mixup_alpha=0.8, lr=1e-3)
RELABEL = Row(supervision="relabel", lr=1e-3)


def fine_tuned(row: Row, image_size: int) -> Row:
    """Section 1 of the supplement."""
    return row._replace(image_size=image_size, batch_size=512, lr=5e-6, min_lr=5e-6, weight_decay=1e-8, epochs=30)


TABLES: dict[str, dict[str, Row]] = {
    "Table 1": {"lvvit_t": Row("lvvit_t"), "lvvit_s": S, "lvvit_m": M, "lvvit_l": L},
    "Table 4": {
        f"lvvit_{letter}_{size}": fine_tuned(row, size)
        for letter, row in (("t", Row("lvvit_t")), ("s", S), ("m", M), ("l", L))
        for size in (384, 448, 512)
    },
    "Table 2": {
        "relabel": RELABEL,
        "relabel_cutmix": RELABEL._replace(mix="cutmix"),
        "hard_labels": STANDARD._replace(mix="mixtoken"),
        "hard_labels_cutmix": STANDARD,
    },
    "Table 3": {
        "lvvit_s_no_mix": S._replace(mix=None),
        "lvvit_s_mixtoken_mixup": S._replace(mixup_alpha=0.8),
        "lvvit_s_no_erasing": S._replace(erase_prob=0.0),
        "lvvit_s_no_rand_augment": S._replace(rand_augment=None),
    },
    "Figure 4": {f"lvvit_s_tokens_{percent}": S._replace(keep_tokens=percent / 100) for percent in (20, 40, 60, 80)},
    "Figure 5": {"deit_s_token_labels": Row("deit_small_patch16_224")},
    "Table 11": {
        "mixer_s16_token_labels": Row("mixer_s16_224"),
        "mixer_b16_token_labels": Row("mixer_b16_224"),
        "mixer_l16_token_labels": Row("mixer_l16_224"),
        "resnest50_token_labels": Row("resnest50d", mix="cutmix"),
        "mixer_s16_hard_labels": STANDARD._replace(model="mixer_s16_224"),
        "mixer_b16_hard_labels": STANDARD._replace(model="mixer_b16_224"),
        "mixer_l16_hard_labels": STANDARD._replace(model="mixer_l16_224"),
        "resnest50_hard_labels": STANDARD._replace(model="resnest50d"),
    },
}
ROWS = {name: row for table in TABLES.values() for name, row in table.items()}
OF_TABLE = {name: title for title, table in TABLES.items() for name in table}

# Neither the paper nor the published README has a number for them.
WITHOUT_NUMBER = (
    "lvvit_t_384",
    "lvvit_t_448",
    "lvvit_t_512",
    "lvvit_s_448",
    "lvvit_s_512",
    "lvvit_m_512",
    "lvvit_l_384",
)

OURS = [name for name, make in RECIPES.items() if make.__module__ == token_labeling.__name__]

each_recipe = pytest.mark.parametrize("name", OURS)


def test_every_run_is_in_a_table_and_every_row_is_a_run() -> None:
    assert sorted(OURS) == sorted(ROWS)


@each_recipe
def test_numbers_are_those_of_the_tables(name: str) -> None:
    row, expected = row_of(get_recipe(name)()), ROWS[name]
    assert row == expected._replace(lr=row.lr)
    assert row.lr == pytest.approx(expected.lr, rel=1e-12)


@each_recipe
def test_what_all_runs_share(name: str) -> None:
    config = get_recipe(name)()
    assert config.trainer.optimizer.name == "adamw"
    assert config.trainer.loss.dense_weight == 0.5
    assert config.data.mix_alpha == config.data.mix_prob == 1.0
    assert config.align.method is None
    assert config.data.images == config.data.val == ()
    assert (config.data.labels, config.data.num_classes, config.model.init, config.model.args) == (None, None, None, {})


@each_recipe
def test_the_loader_takes_how_a_run_augments(name: str) -> None:
    config = get_recipe(name)()
    data, size = config.data, (config.model.image_size, config.model.image_size)
    mixing = choose_mixing(data.mix, (14, 14), size, data.mix_alpha, data.mix_prob, data.batch_size, data.mixup_alpha)
    assert (mixing is None) == (data.mix is None)
    if data.rand_augment is not None:
        RandAugment.parse(data.rand_augment)


@each_recipe
def test_the_model_is_known(name: str) -> None:
    config = get_recipe(name)()
    assert timm.is_model(config.model.name)
    assert config.model.image_size % 32 == 0, "patches of 16 pixels, and the stride of ResNeSt"


@each_recipe
def test_the_list_has_one_line_that_cites(name: str) -> None:
    line = RECIPES[name].__doc__
    assert line is not None
    assert "\n" not in line
    assert line.endswith(".")
    if name not in WITHOUT_NUMBER:
        title = "published" if name == "lvvit_m_448" else OF_TABLE[name]
        number = title.removeprefix("Table ")
        assert title in line or f"Tables {number} " in line, "it is of another table"


def test_fine_tuning_needs_a_checkpoint() -> None:
    assert {name for name in OURS if needs_init(name)} == set(TABLES["Table 4"])


@each_recipe
def test_runs_are_named_after_their_functions(name: str) -> None:
    assert RECIPES[name].__name__ == name
    assert get_recipe(name)() == get_recipe(name)(), "another one every time"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lvit_s", "no recipe 'lvit_s'; the nearest names are lvvit_s, .*--list` prints all"),
        ("lvvit_s_383", "the nearest names are lvvit_s_384, "),
        ("LVVIT", "no recipe 'LVVIT'; `python -m jobs.train --list` prints all"),
        ("", "no recipe ''; `python"),
    ],
)
def test_unknown_names_are_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get_recipe(name)
