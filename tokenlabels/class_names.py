"""Names of classes, from whatever file people have them in: pictures and reports never show numbers alone."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

IMAGENET_1K = "imagenet-1k"
_WNID = re.compile(r"n[0-9]{8}")
_FORMS = (
    f"'{IMAGENET_1K}'; a text file with one name per line; JSON: a list of names, a list of objects with index and "
    'name (or wnid), {"0": "name"}, {"0": ["wnid", "name"]} or {"name": 0}'
)


def read_class_names(source: str | Path, num_classes: int | None = None) -> tuple[str, ...]:
    """The name of every class, in the order of their ids.

    WordNet ids of ImageNet ("n01440764") are replaced by their words ("tench, Tinca tinca").

    Args:
        source: "imagenet-1k", or a file: text with one name per line; or JSON with a list of names, a list of objects
            with "index" and "name" or "wnid", an object from ids to names or to [wnid, name] (Keras), or from names
            to ids (torchvision's class_to_idx).
        num_classes: how many there have to be; None takes what is there.

    Raises:
        ValueError: the file cannot be read or holds something else, ids are missing or there twice, or it has another
            number of names.
    """
    names = in_words(_read(source))
    if num_classes is not None and len(names) != num_classes:
        raise ValueError(f"{source}: {len(names)} class names for {num_classes} classes")
    if "" in names:
        raise ValueError(f"{source}: class {names.index('')} has no name; there is {_FORMS}")
    return names


def _read(source: str | Path) -> list[str]:
    if str(source) == IMAGENET_1K:
        return _timm_file("imagenet_synsets.txt").split()
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not a text file of class names ({error}); there is {_FORMS}") from error
    except OSError as error:
        raise ValueError(f"class names {source}: {error.strerror}; there is {_FORMS}") from error
    if text.lstrip()[:1] in ("[", "{"):
        return _from_json(text, source)
    return [line.strip() for line in text.splitlines()]


def in_words(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with words in the place of the WordNet ids that timm knows."""
    if not any(_WNID.fullmatch(name) for name in names):
        return tuple(names)
    words = _words_of_wnids()
    return tuple(words.get(name, name) for name in names)


def _words_of_wnids() -> dict[str, str]:
    lines = _timm_file("imagenet_synset_to_lemma.txt").splitlines()
    return dict(line.split("\t", 1) for line in lines)


def _timm_file(name: str) -> str:
    """One of timm's own lists. Found without an import of timm, which takes three seconds."""
    spec = find_spec("timm")
    assert spec is not None, "timm is installed beside this package"
    assert spec.origin is not None, "as a folder of files"
    return Path(spec.origin).with_name("data").joinpath("_info", name).read_text(encoding="utf-8")


def _from_json(text: str, source: str | Path) -> list[str]:
    try:
        content = json.loads(text)
        pairs = _pairs(content)
        ids = [int(index) for index, _ in pairs]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: not a list of class names ({error!r}); there is {_FORMS}") from error
    if sorted(ids) != list(range(len(ids))):
        missing = next(index for index in range(len(ids) + 1) if ids.count(index) != 1)
        raise ValueError(f"{source}: class {missing} is there {ids.count(missing)} times; every id has one name")
    return [str(name) for _, name in sorted(pairs, key=lambda pair: int(pair[0]))]


def _pairs(content: Any) -> list[tuple[Any, str]]:
    """(id, name) of every class."""
    if isinstance(content, Mapping):
        if all(isinstance(value, int) for value in content.values()):
            return [(index, name) for name, index in content.items()]
        return [(index, value if isinstance(value, str) else value[1]) for index, value in content.items()]
    if all(isinstance(value, str) for value in content):
        return list(enumerate(content))
    return [(value["index"], value["name"] if "name" in value else value["wnid"]) for value in content]
