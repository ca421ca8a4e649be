"""Whole label sets with planted faults: each is found, and nothing else."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.loaders.photos import encode, smooth_image, write_label_set, write_tar
from tests.tokenlabels.audit.maps import WHOLE, maps_of
from tokenlabels.audit.audit import Audit, audit_store
from tokenlabels.audit.box_files import boxes_from_file
from tokenlabels.audit.findings import KINDS, Finding
from tokenlabels.audit.measures import measure
from tokenlabels.cli.label_inputs import SetImages
from tokenlabels.images import TarShard
from tokenlabels.store import open_store
from tokenlabels.types import ScoreMaps

K = 6
NAMES = ("cat", "dog", "cow", "owl", "hen", "bee")
Labels = dict[str, NDArray[np.int64]]


def sure_maps(stem: str, num: int, seed: int) -> ScoreMaps:
    """Row i shows class i % K nearly everywhere."""
    maps = maps_of(num, seed=seed, num_classes=K, k=3, prefix=stem, views=(WHOLE,))
    classes = (np.arange(num)[:, None, None, None] + np.array([0, 2, 4])) % K
    noise = np.random.default_rng(seed).uniform(0, 1, maps.tail.shape)
    scores = np.stack([8 + noise, 2 + noise, np.zeros_like(noise)], axis=-1)
    return replace(
        maps,
        scores=scores.astype(np.float16),
        classes=np.broadcast_to(classes, maps.classes.shape).astype(np.uint16),
        tail=np.full_like(maps.tail, 0.01),
    )


@pytest.fixture
def maps() -> dict[str, ScoreMaps]:
    """Shards a and b, which agree with `labels`; the first is read in two parts."""
    return {"a": sure_maps("a", 300, 0), "b": sure_maps("b", 12, 1)}


@pytest.fixture
def labels(maps: Mapping[str, ScoreMaps]) -> Labels:
    return {stem: np.arange(len(of_shard)) % K for stem, of_shard in maps.items()}


@pytest.fixture
def audited(tmp_path: Path) -> Callable[..., Audit]:
    def run(maps: Mapping[str, ScoreMaps], labels: Labels, **options: object) -> Audit:
        store = open_store(write_label_set(tmp_path / "labels", maps, num_classes=K))
        return audit_store(store, lambda shard: labels[shard.stem], NAMES, **options)  # type: ignore[arg-type]

    return run


def found(audit: Audit) -> list[tuple[str, str]]:
    assert {kind: count for kind, count in audit.counts.items() if count} == {
        kind: sum(finding.kind == kind for finding in audit.findings)
        for kind in KINDS
        if any(finding.kind == kind for finding in audit.findings)
    }
    return [(finding.kind, finding.key) for finding in audit.findings]


def test_a_good_set(audited: Callable[..., Audit], maps: dict[str, ScoreMaps], labels: Labels) -> None:
    seen: list[str] = []
    audit = audited(maps, labels, on_shard=seen.append)
    assert audit.findings == ()
    assert audit.counts == dict.fromkeys(KINDS, 0) | {"identical images": None}
    assert [*audit.counts] == [*KINDS]
    assert audit.is_usable
    assert audit.agreement == 1
    assert audit.confusions == ()
    assert (audit.boxes, audit.localisation) == (None, None)
    assert [known.num_images for known in audit.classes] == [52] * 6
    assert seen == ["a", "b"]


def test_measures_are_in_the_order_of_the_set(
    audited: Callable[..., Audit], maps: dict[str, ScoreMaps], labels: Labels
) -> None:
    audit = audited(maps, labels)
    together = np.concatenate([measure(maps[stem], labels[stem], K).top1 for stem in ("a", "b")])
    np.testing.assert_array_equal(audit.measures.top1, together)
    assert audit.starts.tolist() == [0, 300]
    assert [audit.key(row) for row in (0, 299, 300, 311)] == ["a_000", "a_299", "b_000", "b_011"]
    shard, row = audit.locate(305)
    assert (shard.stem, row) == ("b", 5)


def nan_score(maps: dict[str, ScoreMaps], _: Labels) -> None:
    maps["a"].scores[257, 1, 1, 1] = np.nan


def same_cells(maps: dict[str, ScoreMaps], _: Labels) -> None:
    maps["b"].scores[3] = maps["b"].scores[3, 0, 0]


def undecided(maps: dict[str, ScoreMaps], _: Labels) -> None:
    maps["b"].scores[4] = np.random.default_rng(0).uniform(0, 0.1, (5, 6, 1)) + np.array([0.1, 0, 0])
    maps["b"].tail[4] = 0.5


def other_label(_: dict[str, ScoreMaps], labels: Labels) -> None:
    labels["a"][7] = 5


def same_key(maps: dict[str, ScoreMaps], _: Labels) -> None:
    keys = list(maps["b"].keys)
    keys[2] = "a_290"
    maps["b"] = replace(maps["b"], keys=tuple(keys))


def same_map(maps: dict[str, ScoreMaps], _: Labels) -> None:
    maps["b"].scores[1] = maps["a"].scores[7]


@pytest.mark.parametrize(
    ("plant", "expected", "is_usable"),
    [
        (nan_score, [("broken", "a_257")], False),
        (same_cells, [("constant", "b_003")], False),
        (undecided, [("near uniform", "b_004")], True),
        (other_label, [("disagrees", "a_007")], True),
        (same_key, [("duplicate key", "a_290")], False),
        (same_map, [("identical maps", "b_001")], True),
    ],
)
def test_a_planted_fault_is_found_and_nothing_else(
    plant: Callable[[dict[str, ScoreMaps], Labels], None],
    expected: list[tuple[str, str]],
    is_usable: bool,
    audited: Callable[..., Audit],
    maps: dict[str, ScoreMaps],
    labels: Labels,
) -> None:
    plant(maps, labels)
    audit = audited(maps, labels)
    assert found(audit) == expected
    assert audit.is_usable == is_usable
    assert audit.findings[0].shard == expected[0][1][0] if plant is not same_key else "b"


def test_a_class_that_is_never_predicted(
    audited: Callable[..., Audit], maps: dict[str, ScoreMaps], labels: Labels
) -> None:
    maps["b"].classes[[5, 11]] = (maps["b"].classes[[5, 11]] + 1) % K
    audit = audited({"b": maps["b"]}, labels)
    assert found(audit) == [("never predicted", ""), ("disagrees", "b_005"), ("disagrees", "b_011")]
    assert audit.findings[0].detail == "bee: 0 of 2"
    assert [(pair.label, pair.predicted, pair.count) for pair in audit.confusions] == [(5, 0, 2)]


def test_a_class_that_agrees_seldom(audited: Callable[..., Audit], maps: dict[str, ScoreMaps], labels: Labels) -> None:
    dogs = np.flatnonzero(labels["a"] == 1)
    maps["a"].classes[dogs[10:]] = (maps["a"].classes[dogs[10:]] + 1) % K
    audit = audited({"a": maps["a"]}, labels)
    low, *others = audit.findings
    assert low == Finding("low agreement", "", "", "dog: 10 of 50, 86.7% of all images")
    assert [finding.kind for finding in others] == ["disagrees"] * 40
    assert [(pair.label, pair.predicted, pair.count) for pair in audit.confusions] == [(1, 2, 40)]


def test_the_worst_disagreement_comes_first(
    audited: Callable[..., Audit], maps: dict[str, ScoreMaps], labels: Labels
) -> None:
    for row, tail in ((3, 0.3), (4, 0.0), (5, 0.6)):
        maps["b"].tail[row] = tail
        labels["b"][row] = 0
    audit = audited(maps, labels)
    assert [finding.key for finding in audit.findings] == ["b_004", "b_003", "b_005"]
    top1, own = audit.measures.top1[304], audit.measures.own_mass[304]
    detail = f"labelled cat with {own:.3f}, predicted hen, leading classes with {top1:.3f}"
    assert audit.findings[0] == Finding("disagrees", "b_004", "b", detail)


def test_what_is_not_listed_is_counted(
    audited: Callable[..., Audit], maps: dict[str, ScoreMaps], labels: Labels
) -> None:
    labels["b"] = (labels["b"] + 1) % K
    audit = audited(maps, labels, num_listed=5)
    assert len(audit.findings) == 5
    assert audit.counts["disagrees"] == 12


def test_without_labels(audited: Callable[..., Audit], maps: dict[str, ScoreMaps]) -> None:
    audit = audited(maps, {stem: np.full(len(of_shard), -1) for stem, of_shard in maps.items()})
    assert audit.findings == ()
    assert audit.agreement is None
    unknown = {kind for kind, count in audit.counts.items() if count is None}
    assert unknown == {"disagrees", "never predicted", "low agreement", "identical images"}


def opened(folder: Path, maps: Mapping[str, ScoreMaps], images: Mapping[str, Sequence[bytes]]) -> SetImages:
    for stem, of_shard in maps.items():
        samples = zip(of_shard.keys, images[stem], strict=True)
        write_tar(
            folder / f"{stem}.tar",
            {key: {"jpg": data, "cls": str(row % K).encode()} for row, (key, data) in enumerate(samples)},
        )
    store = open_store(write_label_set(folder / "labels", maps, num_classes=K))
    return SetImages([str(folder / "*.tar")], store)


def audit_images(folder: Path, images: SetImages, **options: object) -> Audit:
    return audit_store(open_store(folder / "labels"), images.labels, NAMES, images=images, **options)  # type: ignore[arg-type]


@pytest.fixture
def small() -> dict[str, ScoreMaps]:
    return {"a": sure_maps("a", 7, 0), "b": sure_maps("b", 6, 1)}


@pytest.fixture
def pixels(small: Mapping[str, ScoreMaps]) -> dict[str, list[bytes]]:
    rng = np.random.default_rng(0)
    return {stem: [encode(smooth_image(rng, 20, 20)) for _ in of_shard] for stem, of_shard in small.items()}


def test_an_image_that_is_there_twice(
    small: dict[str, ScoreMaps], pixels: dict[str, list[bytes]], tmp_path: Path
) -> None:
    pixels["b"][0] = pixels["a"][6]
    small["b"].scores[0] = small["a"].scores[6]  # the same image has the same map, which is no finding of its own
    seen: list[str] = []
    audit = audit_images(tmp_path, opened(tmp_path, small, pixels), on_shard=seen.append)
    assert audit.findings == (Finding("identical images", "b_000", "b", "the same as a_006 of a"),)
    assert audit.is_usable
    assert seen == ["a", "b", "a", "b"]


def test_one_map_for_two_images(small: dict[str, ScoreMaps], pixels: dict[str, list[bytes]], tmp_path: Path) -> None:
    small["b"].scores[0] = small["a"].scores[6]
    audit = audit_images(tmp_path, opened(tmp_path, small, pixels))
    assert audit.findings == (Finding("identical maps", "b_000", "b", "the same as a_006 of a"),)


def test_boxes_over_all_and_by_class(
    small: dict[str, ScoreMaps], pixels: dict[str, list[bytes]], tmp_path: Path
) -> None:
    small["a"].scores[0, 2, 3] = (20, 0, 0)
    small["a"].scores[1, 0, 0] = (20, 0, 0)
    images = opened(tmp_path, small, pixels)
    (tmp_path / "boxes.json").write_text('{"a_000": [5, 5, 14, 14], "a_001": [5, 5, 14, 14]}')
    audit = audit_images(tmp_path, images, boxes_of=boxes_from_file(tmp_path / "boxes.json", images))
    assert audit.localisation is not None
    assert (audit.localisation.num_boxed, audit.localisation.num_hits) == (2, 1)
    assert [known.pointing_hits for known in audit.classes] == [1, 0, 0, 0, 0, 0]
    assert [known.num_boxed for known in audit.classes] == [1, 1, 0, 0, 0, 0]
    assert audit.boxes is not None
    assert audit.boxes.is_boxed.tolist() == [True, True] + [False] * 11


def test_boxes_of_other_images(small: dict[str, ScoreMaps], pixels: dict[str, list[bytes]], tmp_path: Path) -> None:
    images = opened(tmp_path, small, pixels)
    (tmp_path / "boxes.json").write_text('{"stranger": [5, 5, 14, 14]}')
    with pytest.raises(ValueError, match=r"none of the boxes is of an image of .* that has a class"):
        audit_images(tmp_path, images, boxes_of=boxes_from_file(tmp_path / "boxes.json", images))


def test_an_empty_set(audited: Callable[..., Audit]) -> None:
    with pytest.raises(ValueError, match="no labels yet"):
        audited({"a": sure_maps("a", 0, 0)}, {"a": np.zeros(0, np.int64)})


def test_a_shard_without_rows(audited: Callable[..., Audit], maps: dict[str, ScoreMaps], labels: Labels) -> None:
    audit = audited({**maps, "aa": sure_maps("aa", 0, 0)}, {**labels, "aa": np.zeros(0, np.int64)})
    assert len(audit.measures) == 312
    assert audit.key(300) == "b_000"


def map_from_box(label: int, box: Sequence[int]) -> NDArray[np.uint16]:
    """Classes [8, 8] of an image of 64 pixels: its own where the pixel at the centre of a cell lies in the box."""
    x0, y0, x1, y1 = box
    classes = np.full((8, 8), (label + 1) % 50, np.uint16)
    for row in range(8):
        for column in range(8):
            if x0 <= 8 * column + 4 <= x1 and y0 <= 8 * row + 4 <= y1:
                classes[row, column] = label
    if not (classes == label).any():
        classes[(y0 + y1 + 1) // 16, (x0 + x1 + 1) // 16] = label
    return classes


def test_labels_that_know_where_things_are(tiny_imagenet: Path, tmp_path: Path) -> None:
    shard = TarShard(str(tiny_imagenet / "tiny-val-0000.tar"))
    samples = [*shard.read(shard.keys()[:100])]
    boxes = json.loads((tiny_imagenet / "boxes.json").read_text())
    leading = np.stack([map_from_box(sample.label or 0, boxes[sample.key]) for sample in samples])
    knowing = ScoreMaps(
        tuple(sample.key for sample in samples),
        np.tile(np.array([20, 0], np.float16), (100, 8, 8, 1)),
        np.stack([leading, (leading + 2) % 50], axis=-1),
        np.zeros((100, 8, 8), np.float16),
        np.tile(np.array(WHOLE, np.float32), (100, 1)),
    )
    write_tar(
        tmp_path / "t.tar",
        {one.key: {"jpg": one.data or b"", "cls": str(one.label).encode()} for one in samples},
    )
    store = open_store(write_label_set(tmp_path / "labels", {"t": knowing}, num_classes=50))
    images = SetImages([str(tmp_path / "t.tar")], store)
    boxes_of = boxes_from_file(tiny_imagenet / "boxes.json", images)
    audit = audit_store(store, images.labels, [str(class_id) for class_id in range(50)], boxes_of=boxes_of)
    assert audit.localisation is not None
    assert (audit.localisation.num_boxed, audit.localisation.num_hits) == (100, 100)
    assert audit.localisation.mass_inside == pytest.approx(1, abs=1e-5)
    own = np.array([sample.label for sample in samples])
    assert audit.localisation.cells_inside == pytest.approx((leading == own[:, None, None]).mean())
    assert [known.num_boxed for known in audit.classes] == [known.num_images for known in audit.classes]


def test_constant_maps_are_no_copies(audited: Callable[..., Audit], maps: dict[str, ScoreMaps], labels: Labels) -> None:
    same_cells(maps, labels)
    for column in (maps["b"].scores, maps["b"].classes):
        column[9] = column[3]
    assert found(audited(maps, labels)) == [("constant", "b_003"), ("constant", "b_009")]


def test_the_most_uniform_map_comes_first(
    audited: Callable[..., Audit], maps: dict[str, ScoreMaps], labels: Labels
) -> None:
    for row, lead in ((2, 1.0), (5, 0.2)):
        maps["b"].scores[row] = np.random.default_rng(row).uniform(0, 0.1, (5, 6, 1)) + np.array([lead, 0, 0])
        maps["b"].tail[row] = 0.5
    assert found(audited(maps, labels)) == [("near uniform", "b_005"), ("near uniform", "b_002")]


def test_boxes_of_the_second_part_of_a_shard(
    audited: Callable[..., Audit], maps: dict[str, ScoreMaps], labels: Labels
) -> None:
    everywhere = np.array([[0.0, 0.0, 1.0, 1.0]])
    boxes = [everywhere if row == 260 else everywhere[:0] for row in range(300)]
    audit = audited({"a": maps["a"]}, labels, boxes_of=lambda _: boxes)
    assert audit.boxes is not None
    assert np.flatnonzero(audit.boxes.is_boxed).tolist() == [260]
