import io
import os
import pickle
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from annotate import published_read, published_write
from annotate.decode import decode_rgb
from annotate.images import ImageShard, find_shards
from annotate.published import import_published
from annotate.published_read import ImportSettings, PublishedLayoutError, parse_label_file, tail_of_zero_logits
from annotate.published_write import export_published, published_path
from annotate.shard import ShardError
from tokenlabels.geometry import view_center
from tokenlabels.store import (
    ImageLevelRecord,
    LabelSet,
    LabelStoreError,
    SourceRecord,
    TeacherRecord,
    claim_shard,
    create_label_set,
    open_store,
    verify_store,
)
from tokenlabels.tars import TarError
from tokenlabels.types import ScoreMaps, class_dtype

K = 5
GRID = (4, 4)
NUM_CLASSES = 1000
SIZES_WH = {
    "n01440764_10026": (40, 30),
    "n01440764_10027": (30, 40),
    "n01443537_2": (32, 32),
    "n01443537_15": (61, 20),
    "n02102040_7": (17, 50),
}
KINDS = ("folder", ".tar", ".zip")

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def _sync_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)


def published_tensor(seed: int, *, grid: tuple[int, int] = GRID, num_classes: int = NUM_CLASSES) -> torch.Tensor:
    """A map as the published generator makes it: top k of dense logits, stacked as fp16, axes moved by a view."""
    logits_HWC = 4 * torch.randn(*grid, num_classes, generator=torch.Generator().manual_seed(seed))
    scores_HWk, ids_HWk = logits_HWC.topk(K)
    return torch.stack([scores_HWk.half(), ids_HWk.half()]).permute(0, 3, 1, 2)


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def label_files(names: Sequence[str] = tuple(SIZES_WH), **options: Any) -> Files:
    return {
        f"label_top5/{name.split('_')[0]}/{name}.pt": saved(published_tensor(seed, **options))
        for seed, name in enumerate(names)
    }


def pack(files: Files, folder: Path, kind: str) -> Path:
    """The files as a folder tree, tar or zip."""
    path = folder / ("labels" if kind == "folder" else f"labels{kind}")
    if kind == ".tar":
        with tarfile.open(path, "w") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    elif kind == ".zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for name, data in files.items():
                zipped.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def unpack(path: Path) -> Files:
    """The obvious way to read all three: everything, in any order."""
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as zipped:
            return {name: zipped.read(name) for name in zipped.namelist()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def jpeg(size_wh: tuple[int, int], orientation: int | None = None, image_format: str = "JPEG") -> bytes:
    image = Image.new("RGB", size_wh, (90, 120, 30))
    exif = image.getexif()
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, image_format, exif=exif)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.write_bytes(b"")
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> list[ImageShard]:
    """Two tars of three and two images."""
    names = list(SIZES_WH)
    for index, part in enumerate((names[:3], names[3:])):
        members = {}
        for name in part:
            members |= {f"{name}.jpg": jpeg(SIZES_WH[name]), f"{name}.cls": b"7"}
        write_tar(tmp_path / f"images-{index}.tar", members)
    return find_shards([str(tmp_path / "images-{0..1}.tar")])


def shard_of(tmp_path: Path, members: dict[str, bytes], name: str = "one") -> list[ImageShard]:
    write_tar(tmp_path / f"{name}.tar", members)
    return find_shards([str(tmp_path / f"{name}.tar")])


@pytest.mark.parametrize("out_kind", KINDS)
@pytest.mark.parametrize("in_kind", KINDS)
def test_import_then_export_gives_the_same_tensors(
    in_kind: str, out_kind: str, shards: list[ImageShard], tmp_path: Path
) -> None:
    files = label_files()
    report = import_published(pack(files, tmp_path, in_kind), shards, tmp_path / "set")
    assert (report.num_shards, report.num_images, report.num_skipped, report.num_unused_files) == (2, 5, 0, 0)
    assert list(verify_store(tmp_path / "set")) == []
    store = open_store(tmp_path / "set")
    assert (store.info.grid, store.info.k, store.info.num_classes, store.info.resize) == (GRID, K, 1000, "center")
    for name, data in files.items():
        scores_kHW, ids_kHW = torch.load(io.BytesIO(data), weights_only=True)
        stored = store[Path(name).stem]
        assert np.array_equal(stored.scores.transpose(2, 0, 1), scores_kHW.numpy())
        assert np.array_equal(stored.classes.transpose(2, 0, 1), ids_kHW.numpy())

    out = tmp_path / "out" / ("again" if out_kind == "folder" else f"again{out_kind}")
    exported = export_published(tmp_path / "set", out)
    again = unpack(out)
    assert (exported.num_files, exported.num_bytes) == (5, sum(map(len, again.values())))
    assert (exported.num_without, exported.resize) == (0, "center")
    assert {f"label_top5/{name}" for name in again} == set(files)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    for name, data in again.items():
        assert data == files[f"label_top5/{name}"], "not even the strides differ"


def test_a_set_is_the_same_from_a_folder_a_tar_and_a_zip(shards: list[ImageShard], tmp_path: Path) -> None:
    for kind in KINDS:
        import_published(pack(label_files(), tmp_path, kind), shards, tmp_path / f"set{kind}")
    sets = [open_store(tmp_path / f"set{kind}") for kind in KINDS]
    assert len({store.info.teacher.digest for store in sets}) == 1
    assert [store.info.teacher.origin.split(",")[0] for store in sets] == [
        "published layout: labels",
        "published layout: labels.tar",
        "published layout: labels.zip",
    ]
    assert len({store.shards[0].read().scores.tobytes() for store in sets}) == 1


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_center_views_are_the_square_of_each_image(crop_pct: float, shards: list[ImageShard], tmp_path: Path) -> None:
    import_published(pack(label_files(), tmp_path, "folder"), shards, tmp_path / "set", crop_pct=crop_pct)
    store = open_store(tmp_path / "set")
    for name, (width, height) in SIZES_WH.items():
        assert store[name].view.tolist() == np.float32(view_center(width, height, crop_pct)).tolist()
    side = 30 * crop_pct
    expected = [(40 - side) / 80, (30 - side) / 60, (40 + side) / 80, (30 + side) / 60]
    assert store["n01440764_10026"].view == pytest.approx(expected, abs=1e-6)


def test_squash_views_are_the_whole_image(shards: list[ImageShard], tmp_path: Path) -> None:
    import_published(pack(label_files(), tmp_path, "folder"), shards, tmp_path / "set", view="squash")
    store = open_store(tmp_path / "set")
    assert store.info.resize == "squash"
    assert all(store[name].view.tolist() == [0, 0, 1, 1] for name in SIZES_WH)


def test_columns_first_is_the_same_set_transposed(shards: list[ImageShard], tmp_path: Path) -> None:
    rows_first = {name: published_tensor(seed, grid=(2, 3)) for seed, name in enumerate(SIZES_WH)}
    for axes in ("hw", "wh"):
        files = {
            f"{name}.pt": saved(tensor if axes == "hw" else tensor.transpose(2, 3))
            for name, tensor in rows_first.items()
        }
        (tmp_path / axes).mkdir()
        import_published(pack(files, tmp_path / axes, ".zip"), shards, tmp_path / axes / "set", axes=axes)  # type: ignore[arg-type]
    hw, wh = (open_store(tmp_path / axes / "set") for axes in ("hw", "wh"))
    assert hw.info.grid == wh.info.grid == (2, 3)
    for name in SIZES_WH:
        assert np.array_equal(hw[name].scores, wh[name].scores)
        assert np.array_equal(hw[name].classes, wh[name].classes)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_maps_turn_as_decoding_turns_their_image(orientation: int | None, image_format: str, tmp_path: Path) -> None:
    data = jpeg((40, 30), orientation, image_format)
    tensor = published_tensor(3)
    shards = shard_of(tmp_path, {f"a.{image_format.lower()}": data})
    archive = pack({"a.pt": saved(tensor)}, tmp_path, "folder")
    report = import_published(archive, shards, tmp_path / "set")
    stored = open_store(tmp_path / "set")["a"]

    leading_HW = Image.fromarray(tensor[1, 0].to(torch.int32).numpy())
    leading_HW.getexif()[0x0112] = orientation or 1
    assert np.array_equal(stored.classes[..., 0], np.asarray(ImageOps.exif_transpose(leading_HW)))
    upright = decode_rgb(data)
    assert stored.view == pytest.approx(view_center(upright.width, upright.height, 1.0), abs=1e-6)
    assert report.num_turned == (orientation in range(2, 9))


def test_a_map_that_is_not_square_cannot_lie_on_its_side(tmp_path: Path) -> None:
    images = {"flat.jpg": jpeg((40, 30), 3), "side.jpg": jpeg((40, 30), 6)}
    archive = pack(
        {f"{name}.pt": saved(published_tensor(0, grid=(2, 3))) for name in ("flat", "side")}, tmp_path, ".tar"
    )
    import_published(archive, shard_of(tmp_path, images), tmp_path / "set", max_skip=0.5)
    (shard,) = open_store(tmp_path / "set").shards
    assert shard.keys == ("flat",)
    assert [(record.key, record.reason) for record in shard.manifest.skipped] == [
        ("side", "EXIF orientation 6 lays its map, which is not square, on its side")
    ]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([0, 1, 7, 994]), st.floats(-30, 60000))
@settings(max_examples=50, deadline=None)
def test_tail_is_the_mass_of_zero_logits(seed: int, k: int, num_absent: int, offset: float) -> None:
    scores = (np.random.default_rng(seed).normal(0, 8, (3, k)) + offset).astype(np.float16)
    dense = np.concatenate([scores.astype(np.float64), np.zeros((3, num_absent))], axis=1)
    exponentials = np.exp(dense - dense.max(axis=1, keepdims=True))
    expected = exponentials[:, k:].sum(axis=1) / exponentials.sum(axis=1)
    tail = tail_of_zero_logits(scores, k + num_absent)
    assert tail.dtype == np.float16
    assert tail == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_stored_tails_follow_the_scores(shards: list[ImageShard], tmp_path: Path) -> None:
    import_published(pack(label_files(), tmp_path, "folder"), shards, tmp_path / "set")
    maps = open_store(tmp_path / "set").shards[0].read()
    mass = np.exp(maps.scores.astype(np.float64)).sum(axis=-1)
    assert maps.tail == pytest.approx((1000 - K) / (mass + 1000 - K), rel=1e-3)


def test_unsorted_cells_are_sorted_with_their_ids(tmp_path: Path) -> None:
    tensor = published_tensor(0)
    shuffled = tensor[:, torch.tensor([3, 0, 4, 1, 2])]
    shards = shard_of(tmp_path, {"a.jpg": jpeg((8, 8))})
    import_published(pack({"a.pt": saved(shuffled)}, tmp_path, "folder"), shards, tmp_path / "set")
    export_published(tmp_path / "set", tmp_path / "out")
    assert torch.equal(torch.load(tmp_path / "out" / "a.pt", weights_only=True), tensor)


def test_equal_scores_keep_their_order() -> None:
    scores, ids = np.float16([[[1, 3, 3, 3, 2]]]), np.float16([[[9, 8, 1, 5, 0]]])
    both = torch.from_numpy(np.stack([scores, ids])).permute(0, 3, 1, 2)
    parsed = parse_label_file(saved(both), "x.pt", ImportSettings())
    assert parsed.scores.tolist() == [[[3, 3, 3, 2, 1]]]
    assert parsed.classes.tolist() == [[[8, 1, 5, 0, 9]]]


def test_the_largest_exact_id_is_let_through() -> None:
    tensor = published_tensor(0, num_classes=1500)
    tensor[1, 0] = 2048
    assert parse_label_file(saved(tensor), "x.pt", ImportSettings(num_classes=2049)).classes.max() == 2048


def test_files_of_old_torch_are_read() -> None:
    data = saved(published_tensor(5), _use_new_zipfile_serialization=False)
    assert parse_label_file(data, "x.pt", ImportSettings()).scores.shape == (*GRID, K)


def changed(**values: Any) -> torch.Tensor:
    tensor = published_tensor(0).clone()
    for plane, value in values.items():
        tensor[0 if plane == "score" else 1, 1, 2, 3] = value
    return tensor


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a tensor file"),
    "text": (b"<html>quota exceeded</html>", "not a tensor file"),
    "truncated": (saved(published_tensor(0))[:700], "not a tensor file"),
    "code": (pickle.dumps(_Harmful()), "not a tensor file"),
    "code in a tensor file": (saved(_Harmful()), "not a tensor file"),
    "dictionary": (saved({"scores": published_tensor(0)}), "holds a dict"),
    "float32": (saved(published_tensor(0).float()), r"torch.float32 \[2, 5, 4, 4\]"),
    "scores alone": (saved(published_tensor(0)[:1]), r"torch.float16 \[1, 5, 4, 4\]"),
    "flat": (saved(published_tensor(0).flatten(2)), r"torch.float16 \[2, 5, 16\]"),
    "no cells": (saved(published_tensor(0)[..., :0]), r"torch.float16 \[2, 5, 4, 0\]"),
    "NaN score": (saved(changed(score=float("nan"))), "a score is not finite"),
    "infinite score": (saved(changed(score=float("inf"))), "a score is not finite"),
    "NaN id": (saved(changed(id=float("nan"))), "class id nan"),
    "negative id": (saved(changed(id=-1)), "class id -1 .* are there really 1000 classes"),
    "fractional id": (saved(changed(id=3.5)), "class id 3.5 is not a whole number in 0..999"),
    "id of no class": (saved(changed(id=1000)), "class id 1000 is not a whole number in 0..999"),
    "rounded id": (saved(changed(id=2050)), "class id 2050 .* lost already"),
    "class twice": (saved(changed(id=float(published_tensor(0)[1, 0, 2, 3]))), "names a class twice"),
}


@pytest.mark.parametrize(("data", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_named(kind: str, data: bytes, message: str, tmp_path: Path) -> None:
    files = {"x/a.pt": saved(published_tensor(0)), "x/b.pt": data}
    shards = shard_of(tmp_path, {"a.jpg": jpeg((8, 8)), "b.jpg": jpeg((8, 8))})
    with pytest.raises(PublishedLayoutError, match=rf"x/b\.pt: .*{message}"):
        import_published(pack(files, tmp_path, kind), shards, tmp_path / "set")
    assert open_store(tmp_path / "set").shards == ()


def test_maps_of_another_shape_are_refused(tmp_path: Path) -> None:
    files = {"a.pt": saved(published_tensor(0)), "b.pt": saved(published_tensor(0, grid=(3, 4)))}
    shards = shard_of(tmp_path, {"a.jpg": jpeg((8, 8)), "b.jpg": jpeg((8, 8))})
    with pytest.raises(PublishedLayoutError, match=r"b\.pt: a map of \(3, 4, 5\).* first one was \(4, 4, 5\)"):
        import_published(pack(files, tmp_path, "folder"), shards, tmp_path / "set")


@pytest.mark.parametrize("kind", KINDS)
def test_two_files_of_one_name_are_refused(kind: str, shards: list[ImageShard], tmp_path: Path) -> None:
    files = label_files() | {"other/n01443537_2.pt": saved(published_tensor(9))}
    with pytest.raises(PublishedLayoutError, match=r"n01443537/n01443537_2\.pt and .*other/n01443537_2\.pt"):
        import_published(pack(files, tmp_path, kind), shards, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    for split in ("cats", "dogs"):
        (tmp_path / "tree" / split).mkdir(parents=True)
        (tmp_path / "tree" / split / "0001.jpg").write_bytes(jpeg((8, 8)))
    shards = find_shards([str(tmp_path / "tree")])
    archive = pack({"cats/0001.pt": saved(published_tensor(0))}, tmp_path, "folder")
    with pytest.raises(PublishedLayoutError, match=r"two images, cats/0001 in cats and dogs/0001 in dogs"):
        import_published(archive, shards, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_an_archive_for_other_images_is_refused(shards: list[ImageShard], tmp_path: Path) -> None:
    archive = pack({"x/0001.pt": saved(published_tensor(0))}, tmp_path, ".zip")
    with pytest.raises(PublishedLayoutError, match=r"'n01440764_10026', and there are files such as .*x/0001\.pt"):
        import_published(archive, shards, tmp_path / "set")


def test_folder_images_match_by_name(tmp_path: Path) -> None:
    (tmp_path / "tree" / "n01443537").mkdir(parents=True)
    (tmp_path / "tree" / "n01443537" / "n01443537_2.JPEG").write_bytes(jpeg((8, 8)))
    import_published(pack(label_files(), tmp_path, ".tar"), find_shards([str(tmp_path / "tree")]), tmp_path / "set")
    assert list(open_store(tmp_path / "set")) == ["n01443537/n01443537_2"]
    export_published(tmp_path / "set", tmp_path / "out")
    assert list(unpack(tmp_path / "out")) == ["n01443537/n01443537_2.pt"]


def test_missing_labels_fail_the_shard_by_name(shards: list[ImageShard], tmp_path: Path) -> None:
    archive = pack(label_files(list(SIZES_WH)[:4]), tmp_path, ".tar")
    with pytest.raises(ShardError, match=r"images-1\.tar: 1 of 2 images .*\n  n02102040_7: no n02102040_7\.pt in lab"):
        import_published(archive, shards, tmp_path / "set")
    assert [shard.stem for shard in open_store(tmp_path / "set").shards] == ["images-0"]


def test_what_cannot_be_matched_is_counted_and_named(tmp_path: Path) -> None:
    images = {"a.jpg": jpeg((8, 8)), "b.jpg": jpeg((8, 8)), "c.jpg": b"no image", "d.cls": b"3", "e.jpg": jpeg((8, 8))}
    files = {f"{name}.pt": saved(published_tensor(seed)) for seed, name in enumerate("acdez")}
    report = import_published(
        pack(files, tmp_path, "folder"), shard_of(tmp_path, images), tmp_path / "set", max_skip=0.6
    )
    (shard,) = open_store(tmp_path / "set").shards
    assert shard.keys == ("a", "e")
    reasons = {record.key: record.reason for record in shard.manifest.skipped}
    assert reasons.keys() == {"b", "c", "d"}
    assert reasons["b"] == "no b.pt in labels"
    assert reasons["c"].startswith("its size cannot be read: ")
    assert reasons["d"].startswith("no image member")
    assert (report.num_images, report.num_skipped, report.num_unused_files) == (2, 3, 1)
    assert list(verify_store(tmp_path / "set", source_keys=lambda _: list("abcde"))) == []


def test_what_is_no_label_file_is_left_alone(tmp_path: Path) -> None:
    files = {"l/a.pt": saved(published_tensor(0)), "__MACOSX/l/._a.pt": b"x", "l/readme.txt": b"x", "a.pt.bak": b"x"}
    for kind in KINDS:
        report = import_published(
            pack(files, tmp_path, kind), shard_of(tmp_path, {"a.jpg": jpeg((8, 8))}), tmp_path / f"set{kind}"
        )
        assert (report.num_images, report.num_unused_files) == (1, 0)


def test_a_shard_may_end_up_empty(tmp_path: Path, shards: list[ImageShard]) -> None:
    archive = pack(label_files(list(SIZES_WH)[:3]), tmp_path, "folder")
    import_published(archive, shards, tmp_path / "set", max_skip=1)
    assert [len(shard) for shard in open_store(tmp_path / "set").shards] == [3, 0]
    assert list(verify_store(tmp_path / "set")) == []


def test_agreement_with_the_labels_of_the_images(tmp_path: Path) -> None:
    tensor = published_tensor(0)
    tensor[0, 0] += 20
    tensor[1, 0] = torch.where(torch.arange(16).view(4, 4) < 9, 111.0, 112.0)
    images = {}
    for name, label in (("right", b"111"), ("wrong", b"112")):
        images |= {f"{name}.jpg": jpeg((8, 8)), f"{name}.cls": label}
    images["unlabelled.jpg"] = jpeg((8, 8))
    files = {f"{name}.pt": saved(tensor) for name in ("right", "wrong", "unlabelled")}
    import_published(pack(files, tmp_path, ".tar"), shard_of(tmp_path, images), tmp_path / "set")
    (shard,) = open_store(tmp_path / "set").shards
    assert shard.manifest.image_level == ImageLevelRecord(num_labelled=2, num_agreeing=1)


def test_a_rerun_goes_on_where_it_stopped(shards: list[ImageShard], tmp_path: Path) -> None:
    files = label_files()
    broken = list(files)[-1]
    good = files[broken]
    archive = pack(files | {broken: b"\0" * len(good)}, tmp_path, "folder")
    with pytest.raises(PublishedLayoutError, match="n02102040_7"):
        import_published(archive, shards, tmp_path / "set")
    first = tmp_path / "set" / "manifest" / "images-0.json"
    before = first.stat().st_mtime_ns
    (archive / broken).write_bytes(good)
    seen: list[str] = []
    report = import_published(archive, shards, tmp_path / "set", on_shard=seen.append)
    assert (report.num_shards, report.num_finished_before, report.num_images) == (1, 1, 2)
    assert seen == ["images-0", "images-1"]
    assert first.stat().st_mtime_ns == before
    assert list(verify_store(tmp_path / "set")) == []
    again = import_published(archive, shards, tmp_path / "set")
    assert (again.num_shards, again.num_finished_before, again.num_unused_files) == (0, 2, 0)


@pytest.mark.parametrize(
    "other",
    [{"view": "squash"}, {"axes": "wh"}, {"crop_pct": 0.9}, {"num_classes": 1001}],
    ids=["view", "axes", "crop", "classes"],
)
def test_other_settings_are_another_set(other: dict[str, Any], shards: list[ImageShard], tmp_path: Path) -> None:
    archive = pack(label_files(), tmp_path, "folder")
    import_published(archive, shards, tmp_path / "set")
    with pytest.raises(LabelStoreError, match=r"made in another way(.|\n)*teacher.digest"):
        import_published(archive, shards, tmp_path / "set", **other)


def test_another_archive_is_another_set(shards: list[ImageShard], tmp_path: Path) -> None:
    archive = pack(label_files(), tmp_path, "folder")
    import_published(archive, shards, tmp_path / "set")
    (archive / "extra.pt").write_bytes(saved(published_tensor(3)))
    with pytest.raises(LabelStoreError, match="made in another way"):
        import_published(archive, shards, tmp_path / "set")


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "axes": ({"axes": "xy"}, "hw or wh, got 'xy'"),
    "view": ({"view": "letterbox"}, "center or squash, got 'letterbox'"),
    "no crop": ({"crop_pct": 0.0}, "above 0 and at most 1"),
    "large crop": ({"crop_pct": 1.1}, "above 0 and at most 1"),
    "crop of the whole": ({"crop_pct": 0.9, "view": "squash"}, "no meaning for view squash"),
    "no classes": ({"num_classes": 0}, "at least 1"),
}


@pytest.mark.parametrize(("options", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_settings_say_what_they_allow(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImportSettings(**options)


def test_archives_say_what_is_wrong_with_them(shards: list[ImageShard], tmp_path: Path) -> None:
    def run(path: Path) -> None:
        import_published(path, shards, tmp_path / "set")

    with pytest.raises(FileNotFoundError, match=r"nowhere\.tar: no such file"):
        run(tmp_path / "nowhere.tar")
    (tmp_path / "labels.tar.gz").write_bytes(b"x")
    with pytest.raises(PublishedLayoutError, match=r"decompress a \.tar\.gz first"):
        run(tmp_path / "labels.tar.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PublishedLayoutError, match=r"empty: no \.pt files"):
        run(tmp_path / "empty")
    for kind, error in ((".tar", TarError), (".zip", PublishedLayoutError)):
        whole = pack(label_files(), tmp_path, kind)
        whole.write_bytes(whole.read_bytes()[:-3000])
        with pytest.raises(error, match=r"labels\.(tar|zip)"):
            run(whole)


def test_a_flipped_bit_in_a_zip_is_named(tmp_path: Path) -> None:
    archive = pack(label_files(["n01443537_2"]), tmp_path, ".zip")
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    with pytest.raises(PublishedLayoutError, match=r"n01443537_2\.pt: cannot be unpacked"):
        import_published(archive, shard_of(tmp_path, {"n01443537_2.jpg": jpeg((8, 8))}), tmp_path / "set")


def test_an_archive_is_indexed_once_and_each_file_read_once(
    shards: list[ImageShard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = published_read.TarReader.read
    monkeypatch.setattr(
        published_read.TarReader, "read", lambda reader, member: reads.append(1) or read(reader, member)
    )
    scans: list[str] = []
    scan = published_read.scan_tar
    monkeypatch.setattr(published_read, "scan_tar", lambda path: scans.append(path) or scan(path))
    import_published(pack(label_files(), tmp_path, ".tar"), shards, tmp_path / "set")
    assert len(scans) == 1
    # 5 images and 5 labels of the image tars, 5 label files, and the first of them once more for its shape.
    assert len(reads) == 16


KEYS = {
    "n01440764_10026": "n01440764/n01440764_10026.pt",
    "train/n01440764/n01440764_10026": "n01440764/n01440764_10026.pt",
    "cats/0001": "cats/0001.pt",
    "cats/0001.copy": "cats/0001.pt",
    "0001": "0001.pt",
    "n1_2": "n1_2.pt",
    "./0001": "0001.pt",
}


@pytest.mark.parametrize(("key", "path"), KEYS.items(), ids=KEYS.keys())
def test_where_the_layout_keeps_a_key(key: str, path: str) -> None:
    assert published_path(key) == path


@pytest.mark.parametrize("key", ["../0001", "a/../0001", "cats/", "cats/.hidden"])
def test_keys_without_a_place(key: str) -> None:
    with pytest.raises(PublishedLayoutError, match="has no place"):
        published_path(key)


@dataclass(frozen=True)
class _Written:
    path: Path
    maps: ScoreMaps


WriteSet = Callable[..., _Written]


@pytest.fixture
def write_set(tmp_path: Path) -> Iterator[WriteSet]:
    """Writes a one-shard label set by hand: keys, number of classes, largest id, tars that it lists."""

    def write(
        keys: Sequence[str] = ("n01440764_1", "n01440764_2"),
        *,
        num_classes: int = 1000,
        largest_id: int = 999,
        tars: Sequence[str] = ("one.tar",),
    ) -> _Written:
        generator = np.random.default_rng(0)
        shape = (len(keys), *GRID, 2)
        scores = -np.sort(-generator.normal(0, 3, shape), axis=-1).astype(np.float16)
        classes = np.broadcast_to([largest_id, 0], shape).astype(class_dtype(num_classes))
        views = np.tile(np.float32([0, 0, 1, 1]), (len(keys), 1))
        maps = ScoreMaps(tuple(keys), scores, classes, np.zeros(shape[:3], np.float16), views)
        teacher = TeacherRecord(models=(), flip=False, amp="none", digest="d")
        info = LabelSet(
            grid=GRID,
            k=2,
            num_classes=num_classes,
            class_names=None,
            teacher=teacher,
            resize="squash",
            tars=tuple(tars),
        )
        path = tmp_path / "written"
        info = create_label_set(path, info)
        with claim_shard(path, "one", info) as writer:
            writer.write(
                maps,
                source=SourceRecord(name="one.tar", size_bytes=1, num_samples=len(keys)),
                image_level=ImageLevelRecord(num_labelled=0, num_agreeing=0),
                versions={},
            )
        return _Written(path, maps)

    yield write
    shutil.rmtree(tmp_path / "written", ignore_errors=True)


@pytest.mark.parametrize("out_kind", KINDS)
def test_an_export_is_imported_again(out_kind: str, write_set: WriteSet, tmp_path: Path) -> None:
    written = write_set()
    out = tmp_path / ("out" if out_kind == "folder" else f"out{out_kind}")
    assert export_published(written.path, out).resize == "squash"
    shards = shard_of(tmp_path, {f"{key}.jpg": jpeg((9, 5)) for key in written.maps.keys})
    import_published(out, shards, tmp_path / "again", view="squash")
    maps = open_store(tmp_path / "again").shards[0].read()
    for name in ("scores", "classes", "views"):
        assert getattr(maps, name).tobytes() == getattr(written.maps, name).tobytes()


def test_exports_of_one_set_are_the_same_bytes(write_set: WriteSet, tmp_path: Path) -> None:
    written = write_set()
    for suffix in (".tar", ".zip"):
        outs = [tmp_path / f"{name}{suffix}" for name in ("first", "second")]
        for out in outs:
            export_published(written.path, out)
        assert outs[0].read_bytes() == outs[1].read_bytes()


def test_exported_members_may_be_read_by_all(write_set: WriteSet, tmp_path: Path) -> None:
    written = write_set()
    export_published(written.path, tmp_path / "out.zip")
    export_published(written.path, tmp_path / "out.tar")
    with zipfile.ZipFile(tmp_path / "out.zip") as zipped, tarfile.open(tmp_path / "out.tar") as tar:
        modes = [member.external_attr >> 16 for member in zipped.infolist()] + [member.mode for member in tar]
    assert {stat.S_IMODE(mode) for mode in modes} == {0o644}


def test_ids_up_to_2048_of_more_classes_are_exported(write_set: WriteSet, tmp_path: Path) -> None:
    export_published(write_set(num_classes=21_841, largest_id=2048).path, tmp_path / "out")
    tensor = torch.load(tmp_path / "out" / "n01440764" / "n01440764_1.pt", weights_only=True)
    assert tensor[1].max() == 2048


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "large id": ({"num_classes": 21_841, "largest_id": 2049}, r"one\.zarr: has class id 2049"),
    "uint32 id": ({"num_classes": 70_000, "largest_id": 69_999}, r"one\.zarr: has class id 69999"),
    "unfinished": ({"tars": ("one.tar", "two.tar")}, r"1 of 2 shards have no labels yet .*two\.tar"),
    "one path for two": ({"keys": ("train/c/x", "val/c/x")}, r"'train/c/x' and 'val/c/x' would both be c/x\.pt"),
    "outside": ({"keys": ("../x",)}, "has no place"),
}


@pytest.mark.parametrize("out_kind", KINDS)
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_nothing_is_written_of_what_the_layout_cannot_hold(
    options: dict[str, Any], message: str, out_kind: str, write_set: WriteSet, tmp_path: Path
) -> None:
    written = write_set(**options)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PublishedLayoutError, match=message):
        export_published(written.path, tmp_path / ("out" if out_kind == "folder" else f"out{out_kind}"))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["out.tar", "out.zip", "out"])
def test_what_is_there_is_not_overwritten(name: str, write_set: WriteSet, tmp_path: Path) -> None:
    written = write_set()
    export_published(written.path, tmp_path / name)
    with pytest.raises(PublishedLayoutError, match=f"{name} exists already"):
        export_published(written.path, tmp_path / name)


def test_compressed_archives_are_not_made(write_set: WriteSet, tmp_path: Path) -> None:
    with pytest.raises(PublishedLayoutError, match=r"a folder, a \.tar or a \.zip"):
        export_published(write_set().path, tmp_path / "out.tar.gz")


@pytest.mark.parametrize("out_kind", KINDS)
def test_an_interrupted_export_leaves_nothing(
    out_kind: str, write_set: WriteSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_set()
    out = tmp_path / ("out" if out_kind == "folder" else f"out{out_kind}")
    leftover = out.with_name(f".{out.name}.tmp-of-a-killed-export")
    leftover.mkdir()
    (leftover / "x.pt").write_bytes(b"x")
    make, made = published_write.published_bytes, []

    def fail_on_the_second(score_map: Any) -> bytes:
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return make(score_map)

    monkeypatch.setattr(published_write, "published_bytes", fail_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        export_published(written.path, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["written"]
    monkeypatch.undo()
    assert export_published(written.path, out).num_files == 2


def test_real_photographs(imagenet_sample: Path, tmp_path: Path) -> None:
    shards = find_shards([str(imagenet_sample / "imagenet1k-train-0003.tar")])
    keys = shards[0].keys()
    files = {f"{key.split('_')[0]}/{key}.pt": saved(published_tensor(seed)) for seed, key in enumerate(keys)}
    report = import_published(pack(files, tmp_path, ".zip"), shards, tmp_path / "set")
    assert (report.num_images, report.num_skipped, report.num_unused_files) == (44, 0, 0)
    assert list(verify_store(tmp_path / "set", source_keys=lambda _: keys)) == []
    maps = open_store(tmp_path / "set").shards[0].read()
    widths, heights = np.transpose([decode_rgb(image.data).size for image in shards[0].images() if image.data])
    sides_px = (maps.views[:, 2:] - maps.views[:, :2]) * np.stack([widths, heights], axis=1)
    assert sides_px == pytest.approx(np.minimum(widths, heights)[:, None].repeat(2, axis=1), rel=1e-5)
    export_published(tmp_path / "set", tmp_path / "out")
    assert {name: data for name, data in unpack(tmp_path / "out").items()} == files
