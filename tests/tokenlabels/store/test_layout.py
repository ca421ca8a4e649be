"""The format on disk, read from the JSON that other tools see."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenlabels.files import files_below
from tokenlabels.store import LabelSet, Manifest, create_label_set
from tokenlabels.types import ScoreMaps

LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}
CRC = {"name": "crc32c"}


def blosc(typesize: int) -> dict[str, Any]:
    settings = {"typesize": typesize, "cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 0}
    return {"name": "blosc", "configuration": settings}


@pytest.fixture(params=[(1000, "uint16", 65_535), (70_000, "uint32", 4_294_967_295)], ids=["uint16", "uint32"])
def ids(request: pytest.FixtureRequest) -> tuple[int, str, int]:
    """Number of classes, and the type and fill value that it asks for."""
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("num_maps", "rows_per_shard"), [(1, 256), (255, 256), (256, 256), (257, 512), (700, 768)], ids=str
)
def test_arrays_of_a_shard(
    num_maps: int,
    rows_per_shard: int,
    ids: tuple[int, str, int],
    tmp_path: Path,
    make_info: Callable[..., LabelSet],
    make_maps: Callable[..., ScoreMaps],
    write_shard: Callable[..., Manifest],
) -> None:
    num_classes, id_type, id_fill = ids
    info = make_info(num_classes=num_classes)
    create_label_set(tmp_path, info)
    write_shard(tmp_path, "a", make_maps(num_maps, info), info)

    # fmt: off
    expected = {
        "scores":  ((3, 2, 3), "float16", "NaN",   [LITTLE_ENDIAN, blosc(2), CRC]),
        "classes": ((3, 2, 3), id_type,   id_fill, [LITTLE_ENDIAN, blosc(np.dtype(id_type).itemsize), CRC]),
        "tail":    ((3, 2),    "float16", "NaN",   [LITTLE_ENDIAN, blosc(2), CRC]),
        "views":   ((4,),      "float32", "NaN",   [LITTLE_ENDIAN, blosc(4), CRC]),
        "keys":    ((),        "string",  "",      [{"name": "vlen-utf8", "configuration": {}}, blosc(1), CRC]),
    }
    # fmt: on
    group = tmp_path / "a.zarr"
    assert {path.name for path in group.iterdir()} == {*expected, "zarr.json"}
    for name, (row_shape, data_type, fill_value, codecs) in expected.items():
        found = json.loads((group / name / "zarr.json").read_bytes())
        assert (found["zarr_format"], found["node_type"]) == (3, "array")
        assert (found["shape"], found["data_type"]) == ([num_maps, *row_shape], data_type)
        assert found["fill_value"] == fill_value
        assert found["chunk_grid"]["configuration"]["chunk_shape"] == [rows_per_shard, *row_shape]
        [sharding] = found["codecs"]
        assert sharding["name"] == "sharding_indexed"
        assert sharding["configuration"]["chunk_shape"] == [256, *row_shape]
        assert sharding["configuration"]["codecs"] == codecs
        assert sharding["configuration"]["index_codecs"] == [LITTLE_ENDIAN, CRC]
        assert files_below(group / name) == ["/".join(["c", "0", *("0" for _ in row_shape)]), "zarr.json"]


def test_attributes_of_a_shard(label_set: Path) -> None:
    attributes = json.loads((label_set / "b.zarr" / "zarr.json").read_bytes())["attributes"]
    manifest = json.loads((label_set / "manifest" / "b.json").read_bytes())
    assert attributes == {
        "n": 5,
        "grid": [3, 2],
        "k": 3,
        "num_classes": 10,
        "source": {"name": "b.tar", "size_bytes": 10_240, "num_samples": 5, "num_ignored": 0},
        "keys_sha256": manifest["keys_sha256"],
        "teacher_digest": "t0",
        "versions": {"torch": "2.0"},
    }


def test_files_of_a_label_set(label_set: Path, contents: Callable[[Path], dict[str, bytes]]) -> None:
    outside_of_groups = [name for name in contents(label_set) if ".zarr/" not in name]
    assert outside_of_groups == ["labels.json", "manifest/a.json", "manifest/b.json"]
    assert list(json.loads((label_set / "labels.json").read_bytes())) == [
        "format_version",
        "grid",
        "k",
        "num_classes",
        "class_names",
        "scores_kind",
        "teacher",
        "resize",
        "tars",
        "sha256",
    ]


def test_chunks_are_written_even_where_they_equal_the_fill_value(
    label_set: Path, write_shard: Callable[..., Manifest]
) -> None:
    nothing = ScoreMaps(
        ("",),
        np.full((1, 3, 2, 3), np.nan, np.float16),
        np.full((1, 3, 2, 3), 65_535, np.uint16),
        np.full((1, 3, 2), np.nan, np.float16),
        np.full((1, 4), np.nan, np.float32),
    )
    manifest = write_shard(label_set, "b", nothing)
    assert sum("/c/" in name for name in manifest.files) == 5
