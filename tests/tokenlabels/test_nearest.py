from difflib import get_close_matches

import pytest

from tokenlabels.nearest import nearest_keys


class TestNearestKeys:
    KEYS = tuple(f"n{number:08d}_{number % 977}" for number in range(3000))

    @pytest.mark.parametrize("key", [KEYS[5] + "1", "x" + KEYS[2500], KEYS[1234][:-1], "N" + KEYS[77][1:]])
    def test_as_if_all_had_been_compared(self, key: str) -> None:
        assert nearest_keys(key, self.KEYS)[0] == get_close_matches(key, self.KEYS)[0]

    def test_capitals_are_no_difference(self) -> None:
        assert nearest_keys(self.KEYS[77].upper(), self.KEYS)[0] == self.KEYS[77]

    def test_nothing_is_like_it(self) -> None:
        assert nearest_keys("???", self.KEYS) == [self.KEYS[0]]
        assert nearest_keys("a", []) == []
