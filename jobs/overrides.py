"""Single fields of a run's config, by path: set from the command line, saved as JSON, compared."""

import ast
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from jobs.config import RunConfig
from tokenlabels import differences as nested

WORDS = {"none": None, "null": None, "true": True, "false": False}
"""Read in any case of letters, beside Python's literals."""

TYPE_NAMES: dict[object, str] = {
    NoneType: "none",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    dict: "a dict with names as keys",
}


def apply_overrides(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """The config with other values of some fields.

    They are set together, so that fields which are checked against each other may be changed in any order; of two
    values for a field the last one counts.

    Args:
        config: is not changed.
        assignments: ``path.to.field=value``. A tuple takes values with commas between them, or a Python literal;
            ``model.args.NAME=value`` sets one entry of a dict; "none" is None.

    Raises:
        ValueError: there is no such field, the value is not of its type, or the config does not accept it.
    """
    values = as_dict(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        path = path.strip()
        if not equals:
            raise ValueError(f"{assignment!r} sets nothing; write path.to.field=value")
        parent, name, hint = _find(path)
        inner = values
        for step in parent:
            inner = inner[step]
        inner[name] = _parse(path, text.strip(), hint)
    return from_dict(values)


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The config as nested dicts that JSON can hold, and `from_dict` reads. Lists in `model.args` become tuples.

    Raises:
        ValueError: `model.args` holds what JSON cannot.
    """
    values: dict[str, Any] = _plain("config", asdict(config))
    return values


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The config of `as_dict`, also by way of JSON. A field that is missing has its default.

    Raises:
        ValueError: a field is unknown, a value is not of its type, or the config does not accept it.
    """
    config: RunConfig = _build(RunConfig, _plain("config", values))
    return config


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Lines "path.to.field: old != new", sorted; none for equal configs."""
    before, after = as_dict(old), as_dict(new)
    for values in (before, after):
        if not values["model"]["args"]:
            del values["model"]["args"]  # so that its first entry is one difference and not two
    return nested.differences(before, after)


def _has_fields(hint: Any) -> bool:
    return is_dataclass(hint)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Fields of a dataclass and what they may hold."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def _paths(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in _hints(kind).items():
        if _has_fields(hint):
            yield from _paths(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _find(path: str) -> tuple[list[str], str, Any]:
    """Where the value of a path lies: the dicts around it, its name in the last of them, its type."""
    hint: Any = RunConfig
    names = path.split(".")
    for depth, name in enumerate(names):
        above = ".".join(names[:depth])
        if get_origin(hint) is dict and depth == len(names) - 1 and name.isidentifier():
            return names[:-1], name, get_args(hint)[1]
        if not _has_fields(hint):
            entry = f"; its entries are set as {above}.NAME" if get_origin(hint) is dict else ""
            raise ValueError(f"there is no field {path!r}: {above} is {_describe(hint)}{entry}")
        hints = _hints(hint)
        if name not in hints:
            raise _unknown(path, above, hints)
        hint = hints[name]
    if _has_fields(hint):
        raise ValueError(f"{path} is made of fields; set one of them: {', '.join(_hints(hint))}")
    return names[:-1], names[-1], hint


def _unknown(path: str, above: str, allowed: Mapping[str, Any]) -> ValueError:
    known = list(_paths(RunConfig))
    last = path.rpartition(".")[2]
    nearest = [other for other in known if other.rpartition(".")[2] == last]
    nearest = nearest or get_close_matches(path, known, cutoff=0.75)
    advice = f"; did you mean {' or '.join(nearest)}?" if nearest else ";"
    return ValueError(f"there is no field {path!r}{advice} {above or 'a config'} has {', '.join(allowed)}")


def _parse(path: str, text: str, hint: Any) -> Any:
    """The first reading of the text that is of this type, without conversions but from integer to float."""
    for reading in _readings(text):
        try:
            return _adapter(hint).validate_python(reading, strict=True)
        except ValidationError:
            continue
    raise ValueError(f"{path} must be {_describe(hint)}, got {text!r}")


def _readings(text: str) -> Iterator[Any]:
    """Whatever a text may stand for: a word, a literal, itself, several literals or texts with commas between them."""
    if text.lower() in WORDS:
        yield WORDS[text.lower()]
    if text.lower() in ("", "none", "null"):
        yield None
        yield ()
    yield from _literals(text)
    yield text
    yield from _literals(f"({text},)")
    # Not the commas within braces: they belong to the shards that a pattern names.
    parts = re.split(r",(?![^{]*})", text)
    yield tuple(part.strip() for part in parts if part.strip())


def _literals(text: str) -> Iterator[Any]:
    """The text as a Python literal that JSON can hold, if it is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes and numbers: such texts are no literals
            yield _plain("", ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return


def _build(kind: Any, values: object, path: str = "") -> Any:
    """A dataclass from nested dicts."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{path or 'the config'} must be a dict of fields, got {values!r}")
    hints = _hints(kind)
    prefix = f"{path}." if path else ""
    for name in values:
        if name not in hints:
            raise _unknown(f"{prefix}{name}", path, hints)
    return kind(**{name: _checked(f"{prefix}{name}", hints[name], value) for name, value in values.items()})


def _checked(path: str, hint: Any, value: Any) -> Any:
    if _has_fields(hint):
        return _build(hint, value, path)
    try:
        _adapter(hint).validate_python(value, strict=True)
    except ValidationError:
        raise ValueError(f"{path} must be {_describe(hint)}, got {value!r}") from None
    return value  # an integer in the place of a float stays one


def _plain(path: str, value: Any) -> Any:
    """The value with tuples for lists, if it is made of what JSON can hold."""
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _plain(f"{path}.{name}", item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(path, item) for item in value)
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{path} must be made of text, numbers, truth values, None, tuples and dicts, got {value!r}")
    return value


def _describe(hint: Any) -> str:
    """What a field may hold, in words."""
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return " or ".join(map(_describe, get_args(hint)))
    if kind is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if kind is tuple:
        return f"{_describe(get_args(hint)[0])}, or several with commas between them"
    return TYPE_NAMES.get(kind, str(hint))
