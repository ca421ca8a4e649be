"""Keys that look like one that is not there, for error messages."""

from bisect import bisect
from collections.abc import Iterable
from difflib import get_close_matches

_NUM_NEIGHBOURS = 200


def nearest_keys(key: str, keys: Iterable[str]) -> list[str]:
    """Up to three keys that look like another one, the nearest first; the first key of all where none does.

    Capitals count as small letters. Only the neighbours in the order of the alphabet are compared, read forwards and
    backwards: a million keys would take minutes, and a slip leaves the beginning or the end as it is.
    """
    others = [other for other in keys if other != key]
    by_folded = {other.casefold(): other for other in others}
    wanted = key.casefold()
    candidates: dict[str, None] = {}
    for reading in (slice(None), slice(None, None, -1)):
        ordered = sorted(folded[reading] for folded in by_folded)
        place = bisect(ordered, wanted[reading])
        neighbours = ordered[max(0, place - _NUM_NEIGHBOURS) : place + _NUM_NEIGHBOURS]
        candidates |= dict.fromkeys(folded[reading] for folded in neighbours)
    return [by_folded[folded] for folded in get_close_matches(wanted, list(candidates))] or others[:1]
