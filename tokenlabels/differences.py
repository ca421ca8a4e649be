"""What two nested records differ in, said field by field."""

from collections.abc import Mapping

MAX_SHOWN_LETTERS = 120


def differences(mine: Mapping[str, object], others: Mapping[str, object]) -> list[str]:
    """Lines "path.to.field: mine != other", sorted. Tuples count as lists, as JSON knows no other."""
    flat_mine, flat_others = _flatten(mine), _flatten(others)
    return [
        f"{field}: {_shortened(flat_mine.get(field, 'absent'))} != {_shortened(flat_others.get(field, 'absent'))}"
        for field in sorted(flat_mine.keys() | flat_others.keys())
        if flat_mine.get(field, "absent") != flat_others.get(field, "absent")
    ]


def _shortened(value: object) -> str:
    """A thousand class names would bury the other lines."""
    text = str(value)
    return text if len(text) <= MAX_SHOWN_LETTERS else f"{text[:MAX_SHOWN_LETTERS]}..."


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists of scalars stay whole, so that a difference reads as one line."""
    if isinstance(value, Mapping) and (value or not prefix):
        items = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        items = {str(index): item for index, item in enumerate(value)}.items()
    else:
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, object] = {}
    for name, item in items:
        flat |= _flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return flat
