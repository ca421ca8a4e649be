"""Recipes by name."""

from collections.abc import Callable
from difflib import get_close_matches

from jobs.config import RunConfig

Recipe = Callable[[], RunConfig]

RECIPES: dict[str, Recipe] = {}
"""All runs by name."""

_FINE_TUNING: set[str] = set()


def recipe(make: Recipe) -> Recipe:
    """Register a run under the name of its function."""
    RECIPES[make.__name__] = make
    return make


def fine_tunes(make: Recipe) -> Recipe:
    """Register a run that goes on from a checkpoint."""
    _FINE_TUNING.add(make.__name__)
    return recipe(make)


def get_recipe(name: str) -> Recipe:
    """The run of this name.

    Raises:
        ValueError: there is none; the message has the nearest names.
    """
    if name not in RECIPES:
        nearest = ", ".join(get_close_matches(name, RECIPES, n=4, cutoff=0.5))
        raise ValueError(
            f"there is no recipe {name!r}{nearest and f'; the nearest names are {nearest}'}; "
            "`python -m jobs.train --list` prints all"
        )
    return RECIPES[name]


def needs_init(name: str) -> bool:
    """Whether a run goes on from a checkpoint, so that ``model.init``, which its recipe cannot know, must be set."""
    return name in _FINE_TUNING
