"""What the page says of a set, counted by hand."""

from pathlib import Path

import numpy as np
import pytest

from tests.loaders.photos import write_label_set
from tests.tokenlabels.audit.maps import maps_of
from tests.tokenlabels.report.cases import BROKEN, HOSTILE_KEY, LENGTHS, NAMES, NUM_CLASSES, Case, write_case
from tokenlabels.audit.audit import audit_store
from tokenlabels.audit.findings import IDENTICAL_IMAGES, NEED_CLASSES
from tokenlabels.cli.label_inputs import SetImages
from tokenlabels.report import contents as contents_module
from tokenlabels.report.contents import Contents, contents_of
from tokenlabels.report.gallery import Gallery, read_gallery
from tokenlabels.report.sample import REASONS
from tokenlabels.store import SkippedRecord, open_store

EMPTY = Gallery((), 0, ())


def test_the_set_is_described(case: Case, contents: Contents) -> None:
    description = contents.description
    assert description.name == f"{case.labels.parent.name}/labels"
    assert description.info == case.store.info
    assert (description.num_images, description.num_shards) == (40, 2)
    assert (description.num_skipped, description.missing, description.versions) == (0, (), ({},))
    assert description.size_bytes == sum(
        file.size_bytes for shard in case.store.shards for file in shard.manifest.files.values()
    )


def test_images_are_counted(case: Case, contents: Contents) -> None:
    turns = [(row % 3, (stem, row) == BROKEN) for stem, num in LENGTHS.items() for row in range(num)]
    assert contents.num_broken == 1
    assert contents.num_labelled == sum(turn < 2 for turn, is_broken in turns if not is_broken)
    assert contents.num_agreeing == sum(turn == 0 for turn, is_broken in turns if not is_broken)
    measures = case.audit().measures
    assert contents.num_multi_object == sum(
        num >= 2 for num, is_broken in zip(measures.num_objects, measures.is_broken, strict=True) if not is_broken
    )


def test_classes_are_those_that_occur(contents: Contents) -> None:
    for row in contents.classes:
        assert row.audit.num_images or row.audit.num_predicted
        assert row.num_shown == sum(row.audit.class_id in item.shows for item in contents.gallery.items)
    assert len(contents.classes) + contents.num_unseen == NUM_CLASSES
    assert contents.num_unseen > 0


def test_what_was_not_looked_for_is_not_zero(case: Case) -> None:
    audit = case.audit(lambda shard: np.full(len(shard), -1))
    found = {kind.kind: kind.count for kind in contents_of(case.store, audit, EMPTY, NAMES).findings}
    assert {kind for kind, count in found.items() if count is None} == {*NEED_CLASSES, IDENTICAL_IMAGES}
    assert (found["broken"], found["duplicate key"]) == (1, 0)


def test_long_lists_are_cut_and_counted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents_module, "NUM_LISTED", 3)
    monkeypatch.setattr(contents_module, "NUM_CONFUSIONS", 2)
    audit = case.audit()
    contents = contents_of(case.store, audit, EMPTY, NAMES)
    disagrees = next(kind for kind in contents.findings if kind.kind == "disagrees")
    assert disagrees.count == contents.num_labelled - contents.num_agreeing
    assert disagrees.listed == tuple(finding for finding in audit.findings if finding.kind == "disagrees")[:3]
    assert (len(contents.confusions), contents.num_pairs) == (2, len(audit.confusions))


def test_images_without_labels_and_shards_that_are_missing(tmp_path: Path) -> None:
    maps = {stem: maps_of(2, prefix=stem) for stem in ("a", "b")}
    write_label_set(tmp_path / "set", maps, skipped={"b": [SkippedRecord(key="gone", reason="empty file")]})
    (tmp_path / "set" / "manifest" / "a.json").unlink()
    (tmp_path / "set" / "a.zarr").rename(tmp_path / "a.zarr")
    store = open_store(tmp_path / "set")
    audit = audit_store(store, lambda shard: np.full(len(shard), -1), NAMES)
    description = contents_of(store, audit, EMPTY, NAMES).description
    assert (description.num_images, description.missing, description.num_skipped) == (2, ("a.tar",), 1)
    assert [(image.key, image.shard, image.reason) for image in description.skipped] == [("gone", "b", "empty file")]


def test_the_gallery_holds_the_images_of_its_keys(case: Case, contents: Contents) -> None:
    items = contents.gallery.items
    places = [(stem, row) for stem, num in LENGTHS.items() for row in range(num)]
    assert len(items) == 20
    assert contents.gallery.num_at_hand == 40
    assert contents.reasons == {reason: sum(reason in item.reasons for item in items) for reason in REASONS}
    for item in items:
        row = case.maps[item.shard].keys.index(item.key)
        assert (item.shard, row) in places
        assert (item.shard, row) != BROKEN
        assert item.view == tuple(case.maps[item.shard].views[row].tolist())
        assert (item.width > item.height) == (item.view[2] == pytest.approx(1) or item.view[0] == pytest.approx(0.15))
        assert item.label == (None if row % 3 == 2 else case.classes[item.shard][row])
        assert (item.label == item.predicted) == (row % 3 == 0)


def test_an_unreadable_image_is_named_and_replaced(contents: Contents, tmp_path: Path) -> None:
    gone = next(item for item in contents.gallery.items if item.reasons == ("random",))
    damaged = write_case(tmp_path, damaged=frozenset({gone.key}))
    progress: list[None] = []
    gallery = read_gallery(damaged.audit(), damaged.images, number=20, seed=0, on_image=lambda: progress.append(None))
    assert [(image.key, image.shard) for image in gallery.unreadable] == [(gone.key, gone.shard)]
    assert gallery.unreadable[0].reason
    before, after = ({item.key for item in found.items} for found in (contents.gallery, gallery))
    assert before - after == {gone.key}
    assert len(after) == 20
    assert len(progress) == 21
    assert gallery.num_at_hand == 40


def test_nothing_can_be_read(tmp_path: Path) -> None:
    keys = {key for stem, num in LENGTHS.items() for key in maps_of(num, prefix=stem).keys}
    damaged = write_case(tmp_path, damaged=frozenset({*keys, HOSTILE_KEY}))
    gallery = read_gallery(damaged.audit(), damaged.images, number=20, seed=0)
    assert gallery.items == ()
    assert len(gallery.unreadable) == 39  # of all but the broken map, each tried once


def test_images_that_are_not_given_are_not_shown(case: Case) -> None:
    gallery = read_gallery(case.audit(), SetImages(case.tars[:1], case.store), number=30, seed=0)
    assert {item.shard for item in gallery.items} == {"a"}
    assert (len(gallery.items), gallery.num_at_hand) == (17, 17)
