"""Keys that look like one that is not there, for error messages."""

from collections.abc import Iterable
from difflib import get_close_matches

_NUM_NEIGHBOURS = 200


def nearest_keys(key: str, keys: Iterable[str]) -> list[str]:
    """Up to three keys that look like another one, the nearest first; the first key of all where none does.

    Only the neighbours in the order of the alphabet are compared, read forwards and backwards: a million keys would
    take minutes, and a slip leaves the beginning or the end as it is.
    """
    others = [other for other in keys if other != key]
    candidates: dict[str, None] = {}
    for reading in (slice(None), slice(None, None, -1)):
        ordered = sorted([*(other[reading] for other in others), key[reading]])
        place = ordered.index(key[reading])
        neighbours = ordered[max(0, place - _NUM_NEIGHBOURS) : place + _NUM_NEIGHBOURS + 1]
        candidates |= dict.fromkeys(other[reading] for other in neighbours)
    candidates.pop(key, None)
    return get_close_matches(key, list(candidates)) or others[:1]
