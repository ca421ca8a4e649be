import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenlabels.store import LabelSet, LabelStoreError, Manifest, manifest_path, shard_path, stem_of
from tokenlabels.store.schema import (
    FileRecord,
    ImageLevelRecord,
    ModelRecord,
    Record,
    SkippedRecord,
    SourceRecord,
    TeacherRecord,
    keys_sha256,
    read_sealed,
    seal,
    write_sealed,
)

few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
counts, texts, fractions = st.integers(0, 2**63), st.text(max_size=12), st.floats(allow_nan=False, allow_infinity=False)
sources = st.builds(SourceRecord, name=texts, size_bytes=counts, num_samples=counts)
manifests = st.builds(
    Manifest,
    rows=counts,
    source=sources,
    keys_sha256=texts,
    teacher_digest=texts,
    skipped=st.lists(st.builds(SkippedRecord, key=texts, reason=texts), max_size=3).map(tuple),
    image_level=st.builds(ImageLevelRecord, num_labelled=counts, num_agreeing=counts),
    files=st.dictionaries(texts, st.builds(FileRecord, size_bytes=counts, sha256=texts), max_size=3),
)
models = st.builds(
    ModelRecord,
    name=texts,
    weights=texts,
    digest=texts,
    image_size=st.tuples(counts, counts),
    interpolation=texts,
    crop_pct=fractions,
    mean=st.lists(fractions, max_size=3).map(tuple),
    std=st.lists(fractions, max_size=3).map(tuple),
)
teachers = st.builds(
    TeacherRecord,
    models=st.lists(models, max_size=2).map(tuple),
    flip=st.booleans(),
    amp=st.sampled_from(["none", "bf16", "fp16"]),
    digest=texts,
    origin=texts,
)
label_sets = st.builds(
    LabelSet,
    grid=st.tuples(st.integers(1, 99), st.integers(1, 99)),
    k=st.integers(1, 3),
    num_classes=st.just(3),
    class_names=st.none() | st.tuples(texts, texts, texts),
    teacher=teachers,
    resize=st.sampled_from(["squash", "center", "letterbox"]),
    tars=st.sets(texts, max_size=4).map(lambda names: tuple(sorted(names))),
)


def sealed(fields: dict[str, Any]) -> bytes:
    """The slow, obvious seal: the layout of the file written out, for fields that no record would accept too."""
    body = json.dumps(fields, ensure_ascii=False)
    lines = json.dumps({**fields, "sha256": hashlib.sha256(body.encode()).hexdigest()}, ensure_ascii=False, indent=1)
    return (lines + "\n").encode()


@few
@given(record=manifests | label_sets)
def test_records_come_back_as_they_were_written(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "record.json"
    write_sealed(path, record)
    assert path.read_bytes() == seal(record) == sealed(record.model_dump(mode="json"))
    assert read_sealed(path, type(record)) == record


@settings(few, max_examples=200)
@given(data=st.data())
def test_every_other_byte_is_noticed(data: st.DataObject, label_set: Path) -> None:
    path = label_set / data.draw(st.sampled_from(["labels.json", "manifest/b.json"]))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
    path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
    try:
        with pytest.raises(LabelStoreError, match=path.name):
            read_sealed(path, LabelSet if path.name == "labels.json" else Manifest)
    finally:
        path.write_bytes(whole)


HAND_EDITS: dict[str, Callable[[bytes], bytes]] = {
    "nothing left": lambda _: b"",
    "cut in the middle": lambda raw: raw[: len(raw) // 2],
    "last newline gone": lambda raw: raw[:-1],
    "another newline": lambda raw: raw + b"\n",
    "Windows line ends": lambda raw: raw.replace(b"\n", b"\r\n"),
    "byte order mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "not text": lambda raw: raw.replace(b"a.tar", b"\xff.tar"),
    "not JSON": lambda raw: raw.replace(b",", b";"),
    "a list": lambda raw: b"[" + raw + b"]",
    "null": lambda _: b"null",
    "a number": lambda _: b"1",
    "deeply nested": lambda _: b"[" * 100_000,
    "a huge number": lambda raw: raw.replace(b"10240", b"1" * 5000),
    "a number too large for a float": lambda raw: raw.replace(b"10240", b"1e999"),
    "NaN": lambda raw: raw.replace(b"10240", b"NaN"),
    "half of a character": lambda raw: raw.replace(b"a.tar", b"\\ud800.tar"),
    "formatted again": lambda raw: json.dumps(json.loads(raw), indent=4).encode(),
    "an escaped letter": lambda raw: raw.replace(b"a.tar", b"\\u0061.tar"),
    "fields in another order": lambda raw: json.dumps(dict(reversed(json.loads(raw).items())), indent=1).encode(),
    "a field twice": lambda raw: raw.replace(b'"rows": 300,', b'"rows": 300,\n "rows": 300,'),
    "a field gone": lambda raw: raw.replace(b' "rows": 300,\n', b""),
    "a field more": lambda raw: raw.replace(b'"rows"', b'"note": "checked", "rows"'),
    "another value": lambda raw: raw.replace(b'"rows": 300', b'"rows": 301'),
    "a float for an integer": lambda raw: raw.replace(b'"rows": 300', b'"rows": 300.0'),
    "a string for an integer": lambda raw: raw.replace(b'"rows": 300', b'"rows": "300"'),
    "true for one": lambda raw: raw.replace(b'"format_version": 1', b'"format_version": true'),
    "checksum gone": lambda raw: raw[: raw.rindex(b",")] + b"\n}\n",
    "checksum in capitals": lambda raw: raw[:-70] + raw[-70:].upper(),
    "checksum of another file": lambda raw: raw[:-68] + hashlib.sha256(raw).hexdigest().encode() + raw[-4:],
}


@pytest.mark.parametrize("edit", HAND_EDITS.values(), ids=HAND_EDITS.keys())
def test_hand_edits_are_refused(edit: Callable[[bytes], bytes], label_set: Path) -> None:
    path = manifest_path(label_set, "a")
    whole = path.read_bytes()
    edited = edit(whole)
    assert edited != whole
    path.write_bytes(edited)
    with pytest.raises(LabelStoreError, match=r"a\.json: (damaged|not a valid record)"):
        read_sealed(path, Manifest)


FOREIGN_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"colour": "red"}, "not a valid record .colour: Extra inputs"),
    "unknown field further down": ({"source": {"name": "a", "size_bytes": 1, "num_samples": 1, "x": 1}}, "source.x"),
    "field of another type": ({"rows": "many"}, "rows: Input should be a valid integer"),
    "a later format": ({"format_version": 2}, "format 2; this version reads format 1"),
    "a later format with other fields": ({"format_version": 3, "chunks": []}, "format 3; this version reads format 1"),
}


@pytest.mark.parametrize(("changes", "message"), FOREIGN_FIELDS.values(), ids=FOREIGN_FIELDS.keys())
def test_foreign_fields_are_refused_by_name(changes: dict[str, Any], message: str, label_set: Path) -> None:
    """The checksum is right in all of these, as another program would write them."""
    path = manifest_path(label_set, "a")
    fields = json.loads(path.read_bytes())
    del fields["sha256"]
    path.write_bytes(sealed(fields))
    assert read_sealed(path, Manifest).rows == 300
    path.write_bytes(sealed({**fields, **changes}))
    with pytest.raises(LabelStoreError, match=message):
        read_sealed(path, Manifest)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelStoreError, match=r"labels\.json: no such file"):
        read_sealed(tmp_path / "labels.json", LabelSet)


WRONG_SETS = {
    "no rows": ({"grid": (0, 2)}, "grid must be positive"),
    "no classes per cell": ({"k": 0}, "greater than 0"),
    "more classes per cell than classes": ({"k": 11}, "k=11 classes per cell, but there are only 10"),
    "too few names": ({"class_names": ("cat", "dog")}, "2 class names for 10 classes"),
    "tars out of order": ({"tars": ("b.tar", "a.tar")}, "sorted and name different shards"),
    "two tars of one stem": ({"tars": ("a", "a.tar")}, "sorted and name different shards"),
    "a tar twice": ({"tars": ("a.tar", "a.tar")}, "sorted and name different shards"),
    "another kind of scores": ({"scores_kind": "probabilities"}, "scores_kind"),
    "another resize mode": ({"resize": "stretch"}, "resize"),
    "unknown field": ({"colour": "red"}, "colour"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_SETS.values(), ids=WRONG_SETS.keys())
def test_label_sets_check_their_fields(
    changes: dict[str, Any], message: str, make_info: Callable[..., LabelSet]
) -> None:
    with pytest.raises(ValidationError, match=message):
        make_info(**changes)


def test_differences_name_every_field_but_the_tars(make_info: Callable[..., LabelSet]) -> None:
    mine = make_info()
    [model] = mine.teacher.models
    teacher = mine.teacher.model_copy(update={"models": (model.model_copy(update={"crop_pct": 1.0}),), "flip": True})
    others = make_info(grid=(3, 4), k=2, teacher=teacher, resize="center", tars=("z.tar",))
    assert mine.differences(make_info(tars=("z.tar",))) == []
    assert mine.differences(others) == [
        "grid: [3, 2] != [3, 4]",
        "k: 3 != 2",
        "resize: squash != center",
        "teacher.flip: False != True",
        "teacher.models.0.crop_pct: 0.9 != 1.0",
    ]


def test_differences_name_the_fields_of_a_further_teacher(make_info: Callable[..., LabelSet]) -> None:
    mine = make_info()
    [model] = mine.teacher.models
    both = make_info(teacher=mine.teacher.model_copy(update={"models": (model, model)}))
    assert "teacher.models.1.name: absent != tiny" in mine.differences(both)
    assert all(line.startswith("teacher.models.1.") for line in mine.differences(both))


@few
@given(mine=label_sets, others=label_sets)
def test_sets_without_differences_are_equal(mine: LabelSet, others: LabelSet) -> None:
    same = mine.model_copy(update={"tars": ()}) == others.model_copy(update={"tars": ()})
    assert (mine.differences(others) == []) == same


def test_names_of_the_files_of_a_shard() -> None:
    assert [stem_of(name) for name in ("a-0001.tar", "n01440764", "a.tar.tar")] == ["a-0001", "n01440764", "a.tar"]
    assert shard_path(Path("labels"), "a.tar") == Path("labels/a.tar.zarr")
    assert manifest_path(Path("labels"), "a.tar") == Path("labels/manifest/a.tar.json")


def test_keys_checksum_knows_the_order() -> None:
    assert keys_sha256(("a", "b")) == hashlib.sha256(b"a\nb").hexdigest() != keys_sha256(("b", "a"))
