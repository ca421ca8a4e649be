"""Label sets on disk, format 1: a folder with one zarr group per image tar.

schema.py  the records (labels.json, manifests, attributes), validated and sealed with checksums
layout.py  the five arrays of a shard, their chunks and codecs
writer.py  claim a shard, write it, commit it
reader.py  open_store(path): keys -> ScoreMap, shards in bulk or as a stream
verify.py  every check that needs no teacher

A shard's life: claimed -> written to a hidden sibling -> compared -> renamed -> confirmed by its manifest.
"""

from tokenlabels.store.reader import LabelStore, ShardReader, open_store
from tokenlabels.store.schema import (
    DiskFullError,
    FileRecord,
    ImageLevelRecord,
    LabelSet,
    LabelStoreError,
    Manifest,
    ModelRecord,
    SkippedRecord,
    SourceRecord,
    StoreWriteError,
    TeacherRecord,
    keys_sha256,
    manifest_path,
    shard_path,
    stem_of,
)
from tokenlabels.store.verify import Finding, verify_store
from tokenlabels.store.writer import ShardBusyError, ShardWriter, claim_shard, create_label_set

__all__ = [
    "DiskFullError",
    "FileRecord",
    "Finding",
    "ImageLevelRecord",
    "LabelSet",
    "LabelStore",
    "LabelStoreError",
    "Manifest",
    "ModelRecord",
    "ShardBusyError",
    "ShardReader",
    "ShardWriter",
    "SkippedRecord",
    "SourceRecord",
    "StoreWriteError",
    "TeacherRecord",
    "claim_shard",
    "create_label_set",
    "keys_sha256",
    "manifest_path",
    "open_store",
    "shard_path",
    "stem_of",
    "verify_store",
]
