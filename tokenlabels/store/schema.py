"""The records of format 1: what labels.json, the manifests and the attributes of a shard may hold.

Every record refuses unknown fields. Records that are files of their own are sealed: the file carries the sha256 of
its content and is only accepted if it is, byte for byte, what the writer would write again.
"""

import hashlib
import json
from pathlib import Path
from typing import Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tokenlabels.differences import differences
from tokenlabels.files import replace_file

FORMAT_VERSION: Final = 1
LABELS_FILE = "labels.json"
MANIFEST_FOLDER = "manifest"
LOCK_FOLDER = ".locks"

AnyRecord = TypeVar("AnyRecord", bound="Record")


class LabelStoreError(ValueError):
    """A label set cannot be trusted, or cannot be written as asked. The message names the path."""


class DiskFullError(LabelStoreError):
    """There is no room for a shard; trying the next one would not help."""


class StoreWriteError(LabelStoreError):
    """The file system failed in the middle of writing; it may be worth another try."""


class Record(BaseModel):
    """Base of all records: immutable, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelRecord(Record):
    """One teacher model and how images were prepared for it."""

    name: str
    weights: str
    digest: str
    image_size: tuple[int, int]
    interpolation: str
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class TeacherRecord(Record):
    """Who made the labels. Labels that were imported have no models, and `origin` says where they came from."""

    models: tuple[ModelRecord, ...]
    flip: bool
    amp: Literal["none", "bf16", "fp16"]
    digest: str
    origin: str = "annotate"


class LabelSet(Record):
    """labels.json: what holds for the whole set.

    Attributes:
        grid: rows and columns of every map.
        k: stored classes per cell.
        class_names: one name per class id, or None where nobody knows them.
        scores_kind: what the scores are; "logits" is the only kind of format 1.
        resize: how images were fitted to the teacher's input; with each model's `crop_pct` it explains the views.
        tars: file names of the image tars (or names of class folders), sorted. Shard i of the set belongs to
            tars[i].
    """

    format_version: Literal[1] = FORMAT_VERSION
    grid: tuple[int, int]
    k: int = Field(gt=0)
    num_classes: int = Field(gt=0)
    class_names: tuple[str, ...] | None
    scores_kind: Literal["logits"] = "logits"
    teacher: TeacherRecord
    resize: Literal["squash", "center", "letterbox"]
    tars: tuple[str, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.grid) < 1:
            raise ValueError(f"grid must be positive, got {self.grid}")
        if self.k > self.num_classes:
            raise ValueError(f"k={self.k} classes per cell, but there are only {self.num_classes} classes")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        if list(self.tars) != sorted(self.tars) or len({stem_of(tar) for tar in self.tars}) != len(self.tars):
            raise ValueError("tars must be sorted and name different shards")
        return self

    def differences(self, other: "LabelSet") -> list[str]:
        """Fields, tars apart, in which two sets differ, as "field: mine != other" lines."""
        mine, others = (record.model_dump(mode="json", exclude={"tars"}) for record in (self, other))
        return differences(mine, others)


class SourceRecord(Record):
    """The image shard that a label shard was made from. `num_ignored` counts files that belong to no sample."""

    name: str
    size_bytes: int
    num_samples: int
    num_ignored: int = 0


class SkippedRecord(Record):
    """An image that has no labels, and why."""

    key: str
    reason: str


class FileRecord(Record):
    """Size and checksum of one file of a shard."""

    size_bytes: int
    sha256: str


class ImageLevelRecord(Record):
    """How often the class with the largest mean probability over all cells is the data set's own label."""

    num_labelled: int
    num_agreeing: int


class ShardAttributes(Record):
    """Attributes of a shard's zarr group."""

    n: int
    grid: tuple[int, int]
    k: int
    num_classes: int
    source: SourceRecord
    keys_sha256: str
    teacher_digest: str
    versions: dict[str, str]


class Manifest(Record):
    """manifest/<stem>.json, written last: without it a shard does not exist. `files` are relative to the group."""

    format_version: Literal[1] = FORMAT_VERSION
    rows: int
    source: SourceRecord
    keys_sha256: str
    teacher_digest: str
    skipped: tuple[SkippedRecord, ...]
    image_level: ImageLevelRecord
    files: dict[str, FileRecord]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files of the shard."""
        return sum(file.size_bytes for file in self.files.values())


def stem_of(tar: str) -> str:
    """Name of a label shard, from the file name of its image tar or the name of its class folder."""
    return tar.removesuffix(".tar")


def manifest_path(labels: Path, stem: str) -> Path:
    """Where the manifest of a shard is."""
    return labels / MANIFEST_FOLDER / f"{stem}.json"


def shard_path(labels: Path, stem: str) -> Path:
    """Where the zarr group of a shard is."""
    return labels / f"{stem}.zarr"


def keys_sha256(keys: tuple[str, ...]) -> str:
    """One checksum for all keys and their order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def seal(record: Record) -> bytes:
    """The file that holds a record: readable JSON that ends with the sha256 of everything before it."""
    body = record.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(body, ensure_ascii=False).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, ensure_ascii=False, indent=1) + "\n").encode()


def write_sealed(path: Path, record: Record) -> None:
    """Put a sealed record in place of whatever was there, in one step."""
    replace_file(path, seal(record))


def read_sealed(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """Read a sealed record.

    Raises:
        LabelStoreError: the file is missing, not readable as this record, or was changed after it was written.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise LabelStoreError(f"{path}: no such file; it is part of every label set") from error
    try:
        fields = json.loads(raw)
        if not isinstance(fields, dict):
            raise ValueError(f"a JSON object is expected, got {type(fields).__name__}")
        version = fields.get("format_version", FORMAT_VERSION)
        fields.pop("sha256", None)
        record = kind.model_validate(fields)
        unchanged = seal(record) == raw
    except ValidationError as error:
        if version != FORMAT_VERSION:
            problem = f"format {version}; this version reads format {FORMAT_VERSION}"
        else:
            problem = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise LabelStoreError(f"{path}: not a valid record ({problem})") from error
    except (ValueError, RecursionError) as error:
        raise LabelStoreError(f"{path}: damaged ({error})") from error
    if not unchanged:
        raise LabelStoreError(f"{path}: damaged or edited by hand (its sha256 does not match its content)")
    return record
