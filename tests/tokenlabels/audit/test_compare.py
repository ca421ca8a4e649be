"""Two label sets, against a twin that looks at one point after the other."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loaders.photos import write_label_set
from tests.tokenlabels.audit.maps import TALL, VIEWS, WHOLE, WIDE, cells_of_image, maps_of, probability
from tokenlabels.audit.compare import Comparison, compare_stores, finer_grid, image_distributions, leading_at_points
from tokenlabels.store import open_store
from tokenlabels.types import ScoreMap, ScoreMaps

K = 20
NAMES = tuple(f"name {class_id}" for class_id in range(K))


def class_at(score_map: ScoreMap, x: float, y: float) -> int | None:
    """The leading class of the cell that a point of the image lies in."""
    x0, y0, x1, y1 = score_map.view.tolist()
    for row in range(score_map.grid[0]):
        for column in range(score_map.grid[1]):
            left, right = (x0 + (x1 - x0) * (column + step) / score_map.grid[1] for step in (0, 1))
            top, bottom = (y0 + (y1 - y0) * (row + step) / score_map.grid[0] for step in (0, 1))
            if left <= x < right and top <= y < bottom:
                return int(score_map.classes[row, column, 0])
    return None


def slow_points(first: ScoreMap, second: ScoreMap) -> list[tuple[int, int]]:
    """The leading classes of both maps at all points that count."""
    finer = second if np.prod(second.grid) > np.prod(first.grid) else first
    found = [(class_at(first, x, y), class_at(second, x, y)) for _, _, x, y in cells_of_image(finer)]
    return [(one, other) for one, other in found if one is not None and other is not None]


def slow_distribution(score_map: ScoreMap) -> Counter[int]:
    """Mean over the cells that show the image; -1 is the tail."""
    total: Counter[int] = Counter()
    cells = [*cells_of_image(score_map)]
    for row, column, _, _ in cells:
        total.update({**probability(score_map, row, column), -1: float(score_map.tail[row, column])})  # type: ignore[dict-item]
    return Counter({class_id: mass / len(cells) for class_id, mass in total.items()})  # type: ignore[misc]


def compared(folder: Path, first: Mapping[str, ScoreMaps], second: Mapping[str, ScoreMaps]) -> Comparison:
    sets = [write_label_set(folder / name, maps) for name, maps in (("first", first), ("second", second))]
    return compare_stores(open_store(sets[0]), open_store(sets[1]), NAMES)


@pytest.mark.parametrize("grids", [((5, 6), (5, 6)), ((5, 6), (3, 7)), ((3, 7), (5, 6)), ((2, 2), (5, 6))], ids=str)
def test_every_point_of_every_image(grids: tuple[tuple[int, int], tuple[int, int]], tmp_path: Path) -> None:
    num = 16
    first = maps_of(num, seed=1, grid=grids[0])
    second = maps_of(num, seed=2, grid=grids[1], k=2, views=[VIEWS[row // 4] for row in range(num)])
    second.classes[..., 0] = np.where(second.classes[..., 0] % 3, second.classes[..., 0], 0)
    result = compared(tmp_path, {"a": first}, {"a": second})
    points = [slow_points(one, other) for one, other in zip(first, second, strict=True)]
    assert result.keys == first.keys
    assert result.agreement == pytest.approx([np.mean([one == other for one, other in own]) for own in points])
    for known in result.classes:
        pairs = [pair for own in points for pair in own]
        expected = (
            sum(one == known.class_id for one, _ in pairs),
            sum(other == known.class_id for _, other in pairs),
            pairs.count((known.class_id, known.class_id)),
        )
        assert (known.num_first, known.num_second, known.num_both) == expected
    for row, (one, other) in enumerate(zip(first, second, strict=True)):
        mass, their_mass = slow_distribution(one), slow_distribution(other)
        variation = sum(abs(mass[c] - their_mass[c]) for c in mass.keys() | their_mass.keys()) / 2
        assert result.variation[row] == pytest.approx(variation, abs=1e-5)


@given(seed=st.integers(0, 2**32 - 1))
def test_distributions_sum_to_one(seed: int) -> None:
    mass = image_distributions(maps_of(5, seed=seed), K)
    assert mass.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert mass.min() >= 0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((2, 2), (3, 3), (3, 3)), ((4, 4), (3, 3), (4, 4)), ((2, 8), (8, 2), (2, 8)), ((8, 2), (2, 8), (8, 2))],
)
def test_the_finer_grid(first: tuple[int, int], second: tuple[int, int], expected: tuple[int, int]) -> None:
    assert finer_grid(first, second) == expected


def test_points_that_only_one_map_covers_do_not_count() -> None:
    whole, centre = (maps_of(1, grid=(10, 10), views=(view,)) for view in (WHOLE, (0.12, 0.22, 0.88, 0.78)))
    _, _, counts = leading_at_points(whole, centre, (10, 10))
    assert counts[0].any(axis=1).tolist() == [False] * 2 + [True] * 6 + [False] * 2
    assert counts[0].any(axis=0).tolist() == [False] + [True] * 8 + [False]


def test_padding_does_not_count() -> None:
    _, _, counts = leading_at_points(maps_of(1, grid=(8, 8), views=(WIDE,)), maps_of(1, grid=(2, 2)), (8, 8))
    assert counts[0].any(axis=1).tolist() == [False, False, True, True, True, True, False, False]


def test_a_set_is_itself(tmp_path: Path) -> None:
    result = compared(tmp_path, {"a": maps_of(5)}, {"a": maps_of(5)})
    assert (result.agreement.min(), result.variation.max()) == (1, 0)
    assert (result.num_only_first, result.num_only_second, result.num_broken, result.num_apart) == (0, 0, 0, 0)
    assert {known.agreement for known in result.classes} <= {1, None}


def test_other_shards_and_other_orders(tmp_path: Path) -> None:
    maps = maps_of(300, seed=3)
    turned = maps_of(300, seed=4)

    def part(maps: ScoreMaps, rows: list[int]) -> ScoreMaps:
        return ScoreMaps(
            tuple(maps.keys[row] for row in rows),
            maps.scores[rows],
            maps.classes[rows],
            maps.tail[rows],
            maps.views[rows],
        )

    shuffled = np.random.default_rng(0).permutation(300).tolist()
    straight = compared(tmp_path / "straight", {"a": maps}, {"a": turned})
    mixed = compared(
        tmp_path / "mixed",
        {"a": part(maps, [*range(100)]), "b": part(maps, [*range(100, 300)])},
        {"x": part(turned, shuffled[:140]), "y": part(turned, shuffled[140:])},
    )
    order = np.argsort(mixed.keys)
    assert tuple(np.array(mixed.keys)[order]) == straight.keys
    np.testing.assert_array_equal(mixed.agreement[order], straight.agreement)
    np.testing.assert_array_equal(mixed.variation[order], straight.variation)
    assert mixed.classes == straight.classes


def test_what_cannot_be_compared_is_counted(tmp_path: Path) -> None:
    first, second = maps_of(6, views=(WHOLE,)), maps_of(6, seed=1, views=(WHOLE,))
    first.scores[0, 0, 0, 0] = np.nan
    second.tail[1] = 2
    first.views[2], second.views[2] = (0, 0, 0.4, 1), (0.5, 0, 1, 1)
    second = replace(second, keys=(*second.keys[:5], "other"))
    result = compared(tmp_path, {"a": first}, {"a": second})
    assert (result.num_broken, result.num_apart, result.num_only_first, result.num_only_second) == (2, 1, 1, 1)
    assert result.keys == ("img_003", "img_004")
    assert len(result.agreement) == len(result.variation) == 2


def test_the_most_different_images() -> None:
    agreement, variation = (np.array(x, np.float32) for x in ([0.5, 0.1, 0.1, 0.9], [0.3, 0.2, 0.4, 0.9]))
    result = Comparison(0, 0, 0, 0, (1, 1), ("a", "b", "c", "d"), agreement, variation, ())
    assert result.most_different(3) == [2, 1, 0]


def test_sets_of_other_classes(tmp_path: Path) -> None:
    sets = [write_label_set(tmp_path / str(k), {"a": maps_of(2)}, num_classes=k) for k in (20, 30)]
    with pytest.raises(ValueError, match=r"has 20 classes, .* has 30; only labels of the same classes"):
        compare_stores(open_store(sets[0]), open_store(sets[1]), NAMES)


def test_sets_of_other_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"have no image in common; their keys look like 'x_000' and 'y_000'"):
        compared(tmp_path, {"a": maps_of(2, prefix="x")}, {"a": maps_of(2, prefix="y")})


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"second: key 'img_000' is in a and in b; `tokenlabels audit`"):
        compared(tmp_path, {"a": maps_of(2)}, {"a": maps_of(2), "b": maps_of(2)})


def test_tall_and_wide_maps_have_points_in_common(tmp_path: Path) -> None:
    result = compared(tmp_path, {"a": maps_of(1, views=(TALL,))}, {"a": maps_of(1, views=(WIDE,))})
    assert len(result.keys) == 1
