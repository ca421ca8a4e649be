import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabels.geometry import view_letterbox
from tokenlabels.store import (
    ImageLevelRecord,
    LabelSet,
    LabelStore,
    ModelRecord,
    SkippedRecord,
    SourceRecord,
    TeacherRecord,
    claim_shard,
    create_label_set,
    open_store,
)
from tokenlabels.summary import (
    as_json,
    class_name,
    describe_teacher,
    image_level_class,
    num_distinct_classes,
    summarise_map,
    summarise_store,
)
from tokenlabels.types import ScoreMap, ScoreMaps

WHOLE = (0.0, 0.0, 1.0, 1.0)


def model(name: str, **changes: Any) -> ModelRecord:
    fields = {
        "weights": "pretrained",
        "digest": "m",
        "image_size": (64, 96),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        **changes,
    }
    return ModelRecord(name=name, **fields)


TEACHER = TeacherRecord(models=(model("net"),), flip=False, amp="none", digest="t")
INFO = LabelSet(
    grid=(3, 4),
    k=3,
    num_classes=9,
    class_names=None,
    teacher=TEACHER,
    resize="squash",
    tars=("a.tar", "b.tar", "c.tar"),
)


def random_maps(num_maps: int, *, seed: int = 0, prefix: str = "k", view: Sequence[float] = WHOLE) -> ScoreMaps:
    """Maps of 3 to 8 of the 9 classes; the first four hold all of them."""
    random = np.random.default_rng(seed)
    cells = (num_maps, *INFO.grid)
    classes = np.zeros((*cells, 3), np.uint16)
    for row in range(num_maps):
        in_map = random.choice(9, size=9 if row < 4 else random.integers(3, 9), replace=False)
        classes[row] = random.permuted(np.tile(in_map, (*INFO.grid, 1)), axis=-1)[..., :3]
    return ScoreMaps(
        tuple(f"{prefix}{row}" for row in range(num_maps)),
        -np.sort(random.normal(scale=3, size=(*cells, 3)), axis=-1).astype(np.float16),
        classes,
        random.random(cells).astype(np.float16),
        np.tile(np.array(view, np.float32), (num_maps, 1)),
    )


def map_of(cells: Sequence[Sequence[tuple[int, float, float]]], view: Sequence[float] = WHOLE) -> ScoreMap:
    """Rows of cells with k=2; each cell is (leading class, its probability, tail), and class 0 has the rest."""
    scores = [[(math.log(best), math.log(1 - best - tail)) for _, best, tail in row] for row in cells]
    classes = [[(leading, 0) for leading, _, _ in row] for row in cells]
    tails = [[tail for _, _, tail in row] for row in cells]
    return ScoreMap(
        "key",
        np.array(scores, np.float16),
        np.array(classes, np.uint16),
        np.array(tails, np.float16),
        np.array(view, np.float32),
    )


def obvious_probabilities(score_map: ScoreMap, num_classes: int) -> dict[tuple[int, int], list[float]]:
    """The slow twin: for each cell of the image, its row and column, the stored probability of each class."""
    (num_rows, num_columns), (x0, y0, x1, y1) = score_map.grid, score_map.view.tolist()
    rows: dict[tuple[int, int], list[float]] = {}
    for row in range(num_rows):
        for column in range(num_columns):
            x = x0 + (column + 0.5) * (x1 - x0) / num_columns
            y = y0 + (row + 0.5) * (y1 - y0) / num_rows
            if not (0 <= x <= 1 and 0 <= y <= 1):
                continue
            weights = [math.exp(score) for score in score_map.scores[row, column].tolist()]
            kept = 1 - float(score_map.tail[row, column])
            rows[row, column] = [0.0] * num_classes
            for class_id, weight in zip(score_map.classes[row, column].tolist(), weights, strict=True):
                rows[row, column][class_id] = kept * weight / sum(weights)
    return rows


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    """Two of three shards are there: a with 300 maps, b with 2; of b's five images three were skipped."""
    create_label_set(tmp_path, INFO)
    for stem, num_maps, num_skipped, agreeing in (("a", 300, 0, (250, 100)), ("b", 2, 3, (1, 1))):
        with claim_shard(tmp_path, stem, INFO) as writer:
            writer.write(
                random_maps(num_maps, seed=num_maps, prefix=stem),
                source=SourceRecord(name=f"{stem}.tar", size_bytes=10_240, num_samples=num_maps + num_skipped),
                image_level=ImageLevelRecord(num_labelled=agreeing[0], num_agreeing=agreeing[1]),
                skipped=[SkippedRecord(key=f"s{number}", reason="broken") for number in range(num_skipped)],
                versions={},
            )
    return open_store(tmp_path)


class TestStore:
    def test_every_figure(self, store: LabelStore, tmp_path: Path) -> None:
        stems: list[str] = []
        summary = summarise_store(store, stems.append)
        maps = [score_map for shard in store.shards for score_map in shard.read()]
        distinct = sorted(len(set(score_map.classes.ravel().tolist())) for score_map in maps)
        tails = [tail for score_map in maps for tail in score_map.tail.astype(float).ravel().tolist()]
        size_bytes = sum(path.stat().st_size for path in tmp_path.glob("?.zarr/**/*") if path.is_file())
        place = 0.99 * 301  # between two of the 302 images, numbered from 0
        p99 = distinct[int(place)] + (place - int(place)) * (distinct[int(place) + 1] - distinct[int(place)])
        assert stems == ["a", "b"]
        assert dataclasses.asdict(summary) == {
            "path": str(tmp_path),
            "teacher": "net (pretrained, 64x96 px)",
            "grid": (3, 4),
            "k": 3,
            "num_classes": 9,
            "resize": "squash",
            "num_images": 302,
            "num_shards": 2,
            "num_missing_shards": 1,
            "num_skipped": 3,
            "size_bytes": size_bytes,
            "bytes_per_image": size_bytes / 302,
            "distinct_classes_median": (distinct[150] + distinct[151]) / 2,
            "distinct_classes_p99": pytest.approx(p99),
            "tail_mean": pytest.approx(sum(tails) / len(tails), rel=1e-6),
            "num_labelled": 251,
            "image_level_agreement": 101 / 251,
        }

    def test_the_page_has_a_line_per_figure(self, store: LabelStore) -> None:
        lines = dict(line.split("  ", 1) for line in str(summarise_store(store)).splitlines())
        page = {name: value.strip() for name, value in lines.items()}
        assert len(page) == len(dataclasses.fields(summarise_store(store)))
        assert (page["grid"], page["num images"], page["image level agreement"]) == ("3 x 4", "302", "0.4024")
        assert page["teacher"] == "net (pretrained, 64x96 px)"

    def test_large_numbers_are_grouped(self, store: LabelStore) -> None:
        summary = dataclasses.replace(summarise_store(store), size_bytes=5_200_000_000, bytes_per_image=4051.25)
        assert "5,200,000,000" in str(summary)
        assert "4,051.2" in str(summary)

    def test_a_set_without_a_shard(self, tmp_path: Path) -> None:
        create_label_set(tmp_path, INFO)
        summary = summarise_store(open_store(tmp_path))
        assert (summary.num_images, summary.num_shards, summary.num_missing_shards) == (0, 0, 3)
        assert (summary.size_bytes, summary.bytes_per_image, summary.tail_mean) == (0, 0, 0)
        assert math.isnan(summary.distinct_classes_median)
        assert summary.image_level_agreement is None
        assert "unknown" in str(summary)
        plain = json.loads(json.dumps(as_json(summary), allow_nan=False))
        assert (plain["distinct_classes_median"], plain["distinct_classes_p99"], plain["num_images"]) == (None, None, 0)

    def test_json_holds_the_same(self, store: LabelStore) -> None:
        summary = summarise_store(store)
        plain = json.loads(json.dumps(as_json(summary), allow_nan=False))
        assert plain == dataclasses.asdict(summary) | {"grid": [3, 4]}


class TestMap:
    def test_by_hand(self) -> None:
        score_map = map_of([[(7, 0.5, 0.25), (7, 0.5, 0.25)], [(7, 0.75, 0.125), (4, 0.5, 0.25)]])
        summary = summarise_map(score_map, None)
        assert (summary.key, summary.grid, summary.k, summary.view) == ("key", (2, 2), 2, WHOLE)
        assert (summary.tail_mean, summary.num_distinct_classes) == (0.21875, 3)
        assert [(share.class_id, share.name, share.share_of_cells) for share in summary.classes] == [
            (7, "class 7", 0.75),
            (4, "class 4", 0.25),
            (0, "class 0", 0.0),
        ]
        assert [share.mean_probability for share in summary.classes] == pytest.approx(
            [1.75 / 4, 0.5 / 4, (0.25 + 0.25 + 0.125 + 0.25) / 4], rel=1e-3
        )

    def test_equal_shares_are_ordered_by_probability_and_then_by_id(self) -> None:
        score_map = map_of([[(3, 0.5, 0.25), (8, 0.5, 0.25), (6, 0.75, 0.125), (5, 0.5, 0.25)]])
        assert [share.class_id for share in summarise_map(score_map, None).classes] == [6, 3, 5, 8, 0]

    def test_names(self) -> None:
        score_map = map_of([[(1, 0.5, 0.25)]])
        assert [share.name for share in summarise_map(score_map, ("cat", "dog")).classes] == ["dog", "cat"]

    def test_padding_does_not_count(self) -> None:
        # Twice as wide as high: the image is the middle half of the canvas.
        view = view_letterbox(80, 40, (4, 4))
        rows = [[(8, 0.5, 0.25)] * 4, [(1, 0.75, 0.125)] * 4, [(2, 0.5, 0.375)] * 4, [(8, 0.5, 0.25)] * 4]
        summary = summarise_map(map_of(rows, view), None)
        assert [(share.class_id, share.share_of_cells) for share in summary.classes] == [(1, 0.5), (2, 0.5), (0, 0.0)]
        assert (summary.num_distinct_classes, summary.tail_mean) == (3, 0.25)

    @pytest.mark.parametrize(
        "view", [WHOLE, (0.1, 0.2, 0.9, 0.8), (0.0, -0.5, 1.0, 1.5), (-1.0, 0.0, 2.0, 1.0)], ids=str
    )
    def test_against_the_slow_twin(self, view: tuple[float, ...]) -> None:
        for score_map in random_maps(6, seed=3, view=view):
            cells = obvious_probabilities(score_map, 9)
            summary = summarise_map(score_map, None)
            assert {share.class_id for share in summary.classes} == {
                class_id for cell in cells for class_id in score_map.classes[cell].tolist()
            }
            assert summary.num_distinct_classes == len(summary.classes)
            for share in summary.classes:
                led = [cell for cell in cells if score_map.classes[cell][0] == share.class_id]
                mean = sum(probabilities[share.class_id] for probabilities in cells.values()) / len(cells)
                assert share.share_of_cells == pytest.approx(len(led) / len(cells))
                assert share.mean_probability == pytest.approx(mean, rel=1e-5)
            total = sum(share.mean_probability for share in summary.classes)
            assert total + summary.tail_mean == pytest.approx(1, abs=1e-5)

    def test_json_has_no_nan(self) -> None:
        score_map = map_of([[(1, 0.5, 0.25), (2, 0.5, 0.25)]])
        score_map.scores[0, 0] = np.nan
        plain = json.loads(json.dumps(as_json(summarise_map(score_map, None)), allow_nan=False))
        probabilities = {share["class_id"]: share["mean_probability"] for share in plain["classes"]}
        assert (plain["key"], plain["grid"], probabilities[1]) == ("key", [1, 2], None)
        assert probabilities[2] == pytest.approx(0.25, rel=1e-3)


class TestImageLevelClass:
    def test_by_hand(self) -> None:
        # Class 7 leads in two cells of three; class 4 has more mass.
        score_map = map_of([[(7, 0.375, 0.5), (7, 0.375, 0.5), (4, 0.875, 0.0625)]])
        assert image_level_class(stack([score_map])).tolist() == [4]

    def test_padding_does_not_count(self) -> None:
        rows = [[(8, 0.9, 0.05)] * 4, [(1, 0.5, 0.4)] * 4, [(1, 0.5, 0.4)] * 4, [(8, 0.9, 0.05)] * 4]
        inside, whole = map_of(rows, view_letterbox(80, 40, (4, 4))), map_of(rows)
        assert image_level_class(stack([inside, whole])).tolist() == [1, 8]

    @given(seed=st.integers(0, 2**32 - 1), high=st.floats(1.0, 2.0), right=st.floats(1.0, 2.0))
    @settings(max_examples=30, deadline=None)
    def test_against_the_slow_twin(self, seed: int, high: float, right: float) -> None:
        maps = random_maps(4, seed=seed, view=(1 - right, 1 - high, right, high))
        expected = []
        for score_map in maps:
            cells = obvious_probabilities(score_map, 9)
            totals = [sum(probabilities[class_id] for probabilities in cells.values()) for class_id in range(9)]
            expected.append(totals.index(max(totals)))
        assert image_level_class(maps).tolist() == expected

    def test_no_maps(self) -> None:
        assert image_level_class(random_maps(0)).shape == (0,)


class TestNumDistinctClasses:
    def test_against_sets(self) -> None:
        maps = random_maps(50, seed=1)
        maps.classes[0] = 4
        expected = [len(set(score_map.classes.ravel().tolist())) for score_map in maps]
        assert num_distinct_classes(maps).tolist() == expected
        assert expected[0] == 1

    def test_no_maps(self) -> None:
        assert num_distinct_classes(random_maps(0)).shape == (0,)


def stack(maps: Sequence[ScoreMap]) -> ScoreMaps:
    sides = ([getattr(score_map, name) for score_map in maps] for name in ("scores", "classes", "tail", "view"))
    return ScoreMaps(tuple(score_map.key for score_map in maps), *(np.stack(side) for side in sides))


@pytest.mark.parametrize(
    ("teacher", "line"),
    [
        pytest.param(TEACHER, "net (pretrained, 64x96 px)", id="one"),
        pytest.param(
            TeacherRecord(
                models=(model("a"), model("b", weights="random, seed 1", image_size=(32, 32))),
                flip=True,
                amp="bf16",
                digest="t",
            ),
            "a (pretrained, 64x96 px) + b (random, seed 1, 32x32 px), mirrored views averaged, bf16",
            id="two-mirrored",
        ),
        pytest.param(
            TeacherRecord(models=(), flip=False, amp="none", digest="t", origin="imported from x.zip"),
            "imported from x.zip",
            id="imported",
        ),
    ],
)
def test_the_teacher_in_words(teacher: TeacherRecord, line: str, tmp_path: Path) -> None:
    create_label_set(tmp_path, INFO.model_copy(update={"teacher": teacher}))
    assert describe_teacher(open_store(tmp_path)) == line


@pytest.mark.parametrize(("names", "name"), [(("cat", "dog"), "dog"), (None, "class 1")])
def test_names_of_classes(names: tuple[str, ...] | None, name: str) -> None:
    assert class_name(names, 1) == name
