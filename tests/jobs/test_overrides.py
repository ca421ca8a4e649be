"""Fields by path: what ``--set`` takes and refuses, and that a saved config is the config."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jobs import overrides
from jobs.config import Mix, RunConfig
from jobs.overrides import apply_overrides, as_dict, differences, from_dict
from jobs.recipes import RECIPES
from tokenlabels.trainer.config import Precision

CONFIG = RunConfig()


def value_at(config: RunConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def by_json(config: RunConfig) -> RunConfig:
    return from_dict(json.loads(json.dumps(as_dict(config))))


PARSED: dict[str, tuple[str, str, Any]] = {
    "int": ("data.batch_size", "512", 512),
    "int in hexadecimal": ("model.image_size", "0x100", 256),
    "int or none": ("data.threads", "4", 4),
    "none": ("data.threads", "none", None),
    "null": ("data.labels", "NULL", None),
    "None": ("trainer.ema_decay", "None", None),
    "float": ("trainer.optimizer.base_lr", "5e-6", 5e-6),
    "float from int": ("trainer.optimizer.base_lr", "1", 1.0),
    "float or none": ("data.crop_pct", ".9", 0.9),
    "true": ("trainer.compile", "true", True),
    "False": ("trainer.channels_last", "False", False),
    "text": ("model.name", "lvvit_m", "lvvit_m"),
    "text that is a number": ("model.name", "1e3", "1e3"),
    "text that is a word": ("model.name", "none", "none"),
    "text in quotes": ("model.name", "'lvvit_m'", "lvvit_m"),
    "text with equals": ("data.labels", "s3://b/labels?a=b", "s3://b/labels?a=b"),
    "text with odd escapes": ("data.labels", "'\\d'", "\\d"),
    "spaces around": ("data.labels", "  labels ", "labels"),
    "choice": ("trainer.precision", "fp16", "fp16"),
    "choice or none": ("data.mix", "none", None),
    "texts": ("data.images", "a.tar,b.tar", ("a.tar", "b.tar")),
    "one text": ("data.images", "a.tar", ("a.tar",)),
    "no text": ("data.images", "", ()),
    "texts that are numbers": ("data.images", "1, 2", ("1", "2")),
    "one text that is a number": ("data.images", "1", ("1",)),
    "texts as a literal": ("data.images", "['a.tar', 'b,c.tar']", ("a.tar", "b,c.tar")),
    "one text in quotes": ("data.images", "'a,b.tar'", ("a,b.tar",)),
    "braces": ("data.images", "t-{0,1}.tar,u-{0000..0009}.tar", ("t-{0,1}.tar", "u-{0000..0009}.tar")),
    "entry: int": ("model.args.depth", "12", 12),
    "entry: float": ("model.args.mlp_ratio", "4.0", 4.0),
    "entry: bool": ("model.args.aux_head", "false", False),
    "entry: none": ("model.args.proj_kernel", "none", None),
    "entry: tuple": ("model.args.stem_kernels", "(7, 3)", (7, 3)),
    "entry: list": ("model.args.stem_kernels", "[7, [3]]", (7, (3,))),
    "entry: dict": ("model.args.more", "{'a': [1]}", {"a": (1,)}),
    "entry: text": ("model.args.global_pool", "avg", "avg"),
    "entry: nothing that JSON holds": ("model.args.global_pool", "1j", "1j"),
    "dict": ("model.args", "{'depth': 12}", {"depth": 12}),
}


@pytest.mark.parametrize(("path", "text", "value"), PARSED.values(), ids=PARSED)
def test_values_are_read_by_the_type_of_the_field(path: str, text: str, value: Any) -> None:
    config = apply_overrides(CONFIG, [f"{path}={text}"])
    got = value_at(config, path)
    assert got == value
    assert type(got) is type(value)
    assert by_json(config) == config


REFUSED: dict[str, tuple[str, str]] = {
    "no equals": ("data.batch_size", "'data.batch_size' sets nothing; write path.to.field=value"),
    "no path": ("=1", "no field ''; a config has model, data, trainer"),
    "misspelt": (
        "data.batchsize=1",
        r"no field 'data.batchsize'; did you mean data.batch_size\? data has images, labels, .*batch_size, ",
    ),
    "misspelt above": (
        "modell.image_size=1",
        r"no field 'modell.image_size'; did you mean model.image_size\? a config has model, data",
    ),
    "too short": ("smoothing=0", r"no field 'smoothing'; did you mean trainer.loss.smoothing\? a config has"),
    "ambiguous": ("name=a", r"did you mean model.name or trainer.optimizer.name\?"),
    "nothing near": ("trainer.zzz=1", "no field 'trainer.zzz'; trainer has optimizer, schedule, loss, precision"),
    "in nothing": ("data.batch_size.x=1", "no field 'data.batch_size.x': data.batch_size is an integer"),
    "in an entry": ("model.args.a.b=1", "model.args is a dict .*; its entries are set as model.args.NAME"),
    "entry without name": ("model.args.=1", "its entries are set as model.args.NAME"),
    "a part": (
        "trainer.optimizer=adamw",
        "trainer.optimizer is made of fields; set one of them: name, base_lr, lr_batch, weight_decay",
    ),
    "int": ("data.batch_size=many", "data.batch_size must be an integer, got 'many'"),
    "int from float": ("data.batch_size=512.0", "data.batch_size must be an integer, got '512.0'"),
    "int from bool": ("data.batch_size=true", "data.batch_size must be an integer, got 'true'"),
    "int without value": ("data.batch_size=", "data.batch_size must be an integer, got ''"),
    "int or none": ("data.threads=all", "data.threads must be an integer or none, got 'all'"),
    "float": ("trainer.optimizer.base_lr=1e", "trainer.optimizer.base_lr must be a number, got '1e'"),
    "float from nan": ("model.drop_path=nan", "model.drop_path must be a number, got 'nan'"),
    "bool": ("trainer.compile=1", "trainer.compile must be true or false, got '1'"),
    "choice": ("trainer.precision=fp8", "trainer.precision must be one of 'fp32', 'bf16', 'fp16', got 'fp8'"),
    "choice or none": ("data.mix=cutmux", "data.mix must be one of 'mixtoken', .*'blockwise' or none, got 'cutmux'"),
    "dict": ("model.args=depth", "model.args must be a dict with names as keys, got 'depth'"),
    "not accepted": ("trainer.loss.smoothing=2", "^loss.smoothing must be a number in 0..1, got 2.0$"),
    "brackets": ("data.batch_size=" + 5000 * "(", "data.batch_size must be an integer"),
    "null byte": ("data.batch_size=\0", "data.batch_size must be an integer"),
}


@pytest.mark.parametrize(("assignment", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(assignment: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        apply_overrides(CONFIG, [assignment])


def test_nothing_else_is_changed() -> None:
    changed = apply_overrides(CONFIG, ["model.args.depth=12", "data.batch_size=64", "trainer.loss.smoothing=0"])
    assert RunConfig() == CONFIG, "the given config stays as it is"
    assert differences(CONFIG, changed) == [
        "data.batch_size: 1024 != 64",
        "model.args.depth: absent != 12",
        "trainer.loss.smoothing: 0.1 != 0.0",
    ]
    assert apply_overrides(CONFIG, []) == CONFIG


def test_fields_that_are_checked_together_are_set_together() -> None:
    with pytest.raises(ValueError, match=r"schedule\.warmup_epochs is 5, and all 3 epochs would be warm-up"):
        apply_overrides(CONFIG, ["trainer.schedule.epochs=3"])
    both = ["trainer.schedule.epochs=3", "trainer.schedule.warmup_epochs=1"]
    for assignments in (both, both[::-1]):
        assert apply_overrides(CONFIG, assignments).trainer.schedule.epochs == 3


def test_the_last_value_counts() -> None:
    config = apply_overrides(CONFIG, ["data.mix=cutmix", "model.args.a=1", "data.mix=mixup", "model.args={'b': 2}"])
    assert config.data.mix == "mixup"
    assert config.model.args == {"b": 2}
    assert apply_overrides(config, ["model.args.c=3"]).model.args == {"b": 2, "c": 3}


def test_tuples_of_numbers() -> None:
    """The configs have none yet."""
    sides, share = tuple[int, ...], tuple[float, float]
    assert overrides._parse("sides", "224", sides) == (224,)
    assert overrides._parse("sides", "224, 384", sides) == (224, 384)
    assert overrides._parse("share", "[0.5, 1]", share) == (0.5, 1.0)
    for text, hint in (("224,a", sides), ("1.5", sides), ("0.5", share)):
        with pytest.raises(ValueError, match=f"x must be a.*, or several with commas between them, got '{text}'"):
            overrides._parse("x", text, hint)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    config = RECIPES[name]()
    assert by_json(config) == from_dict(as_dict(config)) == config
    assert json.dumps(as_dict(by_json(config))) == json.dumps(as_dict(config)), "integers stay integers"
    assert apply_overrides(config, []) == config


text = st.text(max_size=5)
name = st.text("abc_", min_size=1, max_size=3)
number = st.floats(allow_nan=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | number | text,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(name, inner, max_size=3),
    max_leaves=6,
)
configs = st.builds(
    lambda args, images, labels, mix, mix_alpha, base_lr, precision, epochs: replace(
        CONFIG,
        model=replace(CONFIG.model, args=args),
        data=replace(CONFIG.data, images=images, labels=labels, mix=mix, mix_alpha=mix_alpha),
        trainer=replace(
            CONFIG.trainer,
            precision=precision,
            optimizer=replace(CONFIG.trainer.optimizer, base_lr=base_lr),
            schedule=replace(CONFIG.trainer.schedule, epochs=epochs),
        ),
    ),
    args=st.dictionaries(name, plain, max_size=3),
    images=st.lists(text, max_size=3).map(tuple),
    labels=st.none() | text,
    mix=st.none() | st.sampled_from(get_args(Mix)),
    mix_alpha=number,
    base_lr=st.floats(1e-9, 1e3) | st.integers(1, 9),
    precision=st.sampled_from(get_args(Precision)),
    epochs=st.integers(6, 10**6),
)


@settings(max_examples=60, deadline=None)
@given(config=configs, other=configs)
def test_every_config_survives_json(config: RunConfig, other: RunConfig) -> None:
    again = by_json(config)
    assert again == config
    assert repr(again) == repr(config)
    assert differences(config, again) == []
    assert bool(differences(config, other)) == (config != other)


@settings(max_examples=100, deadline=None)
@given(value=text.filter(lambda value: value.strip()))
def test_any_text_is_read_or_refused(value: str) -> None:
    """Nothing but a ValueError comes out, and texts that stand for nothing else stay as they are."""
    for path in ("data.batch_size", "data.images", "trainer.compile", "data.mix", "model.args.a"):
        try:
            config = apply_overrides(CONFIG, [f"{path}={value}"])
        except ValueError:
            continue
        assert by_json(config) == config
    assert apply_overrides(CONFIG, [f"model.name=x{value}"]).model.name == f"x{value}".strip()


@settings(max_examples=60, deadline=None)
@given(value=plain)
def test_literals_are_read_back(value: Any) -> None:
    """What Python prints of an entry can be set. Infinities are no literals, and texts are those of their letters."""
    assume("inf" not in repr(value))
    assert apply_overrides(CONFIG, [f"model.args.a={value!r}"]).model.args == {"a": value}


def test_lists_in_arguments_are_tuples_in_a_saved_config() -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, args={"stem_kernels": [7, 3]}))
    assert by_json(config).model.args == {"stem_kernels": (7, 3)}
    assert differences(config, by_json(config)) == []


@pytest.mark.parametrize("value", [Path("a"), int, {1: 2}, b"a"], ids=repr)
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, args={"act_layer": (1, value)}))
    with pytest.raises(ValueError, match=r"config\.model\.args\.act_layer must be made of text, numbers, .*got"):
        as_dict(config)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": 1}, r"no field 'seed'; did you mean trainer.seed\? a config has model, data, trainer"),
        ({"data": {"batchsize": 1}}, r"no field 'data.batchsize'; did you mean data.batch_size\?"),
        ({"data": {"batch_size": "1"}}, "data.batch_size must be an integer, got '1'"),
        ({"data": {"batch_size": True}}, "data.batch_size must be an integer, got True"),
        ({"data": {"images": "a.tar"}}, "data.images must be text, or several with commas .*, got 'a.tar'"),
        ({"data": {"mix": "both"}}, "data.mix must be one of 'mixtoken'"),
        ({"data": None}, "data must be a dict of fields, got None"),
        ({"trainer": {"loss": {"smoothing": 2}}}, "^loss.smoothing must be a number in 0..1, got 2$"),
        ([], "config must be a dict of fields"),
        ({"model": {"args": {1: 2}}}, "config.model.args must be made of text"),
    ],
    ids=str,
)
def test_saved_configs_that_are_refused(values: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_dict(values)


def test_what_a_saved_config_lacks_has_its_default() -> None:
    assert from_dict({}) == CONFIG
    assert from_dict({"data": {"batch_size": 2}}) == replace(CONFIG, data=replace(CONFIG.data, batch_size=2))
