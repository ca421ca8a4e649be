import io
import os
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from annotate.published import import_published
from annotate.published_read import PublishedLayoutError
from annotate.published_write import export_published
from annotate.shard import ShardError
from tokenlabels.geometry import view_center
from tokenlabels.images import ImageShard, find_shards
from tokenlabels.images.decode import decode_rgb
from tokenlabels.store import ImageLevelRecord, LabelStoreError, open_store, verify_store

SIZES_WH = {
    "n01440764_10026": (40, 30),
    "n01440764_10027": (30, 40),
    "n01443537_2": (32, 32),
    "n01443537_15": (61, 20),
    "n02102040_7": (17, 50),
}
NAMES = tuple(SIZES_WH)
KINDS = ("folder", ".tar", ".zip")

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def _sync_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)


def published_tensor(seed: int = 0, grid: tuple[int, int] = (4, 4)) -> torch.Tensor:
    """A map as the published generator makes it: top 5 of dense logits, stacked as fp16, axes moved by a view."""
    logits = 4 * torch.randn(*grid, 1000, generator=torch.Generator().manual_seed(seed))
    scores, ids = logits.topk(5)
    return torch.stack([scores.half(), ids.half()]).permute(0, 3, 1, 2)


def saved(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def loaded(data: bytes) -> torch.Tensor:
    tensor = torch.load(io.BytesIO(data), weights_only=True)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def label_files(names: Sequence[str] = NAMES) -> Files:
    """Label files as they are published, in a folder per class."""
    return {f"{name.split('_')[0]}/{name}.pt": saved(published_tensor(seed)) for seed, name in enumerate(names)}


def write_tar(path: Path, members: Files) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pack(files: Files, folder: Path, kind: str = "folder") -> Path:
    """The files as a folder tree, tar or zip."""
    if kind == ".tar":
        return write_tar(folder / "labels.tar", files)
    if kind == ".zip":
        with zipfile.ZipFile(folder / "labels.zip", "w") as zipped:
            for name, data in files.items():
                zipped.writestr(name, data)
        return folder / "labels.zip"
    for name, data in files.items():
        (folder / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "labels" / name).write_bytes(data)
    return folder / "labels"


def unpack(folder: Path) -> Files:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.pt")}


def jpeg(size_wh: tuple[int, int] = (8, 8), orientation: int | None = None, image_format: str = "JPEG") -> bytes:
    image = Image.new("RGB", size_wh, (90, 120, 30))
    exif = image.getexif()
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, image_format, exif=exif)
    return buffer.getvalue()


def one_shard(folder: Path, members: Files) -> list[ImageShard]:
    return find_shards([str(write_tar(folder / "one.tar", members))])


@pytest.fixture
def shards(tmp_path: Path) -> list[ImageShard]:
    """Two tars of three and two images."""
    for index, names in enumerate((NAMES[:3], NAMES[3:])):
        write_tar(tmp_path / f"images-{index}.tar", {f"{name}.jpg": jpeg(SIZES_WH[name]) for name in names})
    return find_shards([str(tmp_path / "images-{0..1}.tar")])


@pytest.mark.parametrize("kind", KINDS)
def test_import_and_export_give_the_same_bytes(kind: str, shards: list[ImageShard], tmp_path: Path) -> None:
    files = label_files()
    report = import_published(pack(files, tmp_path, kind), shards, tmp_path / "set")
    assert (report.num_shards, report.num_images, report.num_skipped, report.num_unused_files) == (2, 5, 0, 0)
    assert list(verify_store(tmp_path / "set")) == []
    store = open_store(tmp_path / "set")
    assert (store.info.grid, store.info.k, store.info.num_classes, store.info.resize) == ((4, 4), 5, 1000, "center")
    for name, data in files.items():
        stored = store[Path(name).stem]
        assert np.array_equal(np.stack([stored.scores, stored.classes]).transpose(0, 3, 1, 2), loaded(data).numpy())
    export_published(tmp_path / "set", tmp_path / "out")
    assert unpack(tmp_path / "out") == files


def test_a_set_is_the_same_from_a_folder_a_tar_and_a_zip(shards: list[ImageShard], tmp_path: Path) -> None:
    for kind in KINDS:
        import_published(pack(label_files(), tmp_path, kind), shards, tmp_path / f"set{kind}")
    stores = [open_store(tmp_path / f"set{kind}") for kind in KINDS]
    assert len({store.info.teacher.digest for store in stores}) == 1
    assert [store.info.teacher.origin for store in stores] == [
        f"published layout: {name}, axes hw, view center (crop_pct 1)"
        for name in ("labels", "labels.tar", "labels.zip")
    ]
    assert len({store.shards[1].read().scores.tobytes() for store in stores}) == 1


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_center_views_are_the_square_of_each_image(crop_pct: float, shards: list[ImageShard], tmp_path: Path) -> None:
    import_published(pack(label_files(), tmp_path), shards, tmp_path / "set", crop_pct=crop_pct)
    store = open_store(tmp_path / "set")
    for name, (width, height) in SIZES_WH.items():
        side = min(width, height) * crop_pct
        left, top = (width - side) / 2, (height - side) / 2
        expected = [left / width, top / height, (left + side) / width, (top + side) / height]
        assert store[name].view == pytest.approx(expected, abs=1e-6)


def test_squash_views_are_the_whole_image(shards: list[ImageShard], tmp_path: Path) -> None:
    import_published(pack(label_files(), tmp_path), shards, tmp_path / "set", view="squash")
    store = open_store(tmp_path / "set")
    assert store.info.resize == "squash"
    assert all(store[name].view.tolist() == [0, 0, 1, 1] for name in NAMES)


def test_columns_first_is_stored_transposed(tmp_path: Path) -> None:
    tensor = published_tensor(grid=(2, 3))
    shards = one_shard(tmp_path, {"a.jpg": jpeg()})
    import_published(pack({"a.pt": saved(tensor.transpose(2, 3))}, tmp_path), shards, tmp_path / "set", axes="wh")
    assert open_store(tmp_path / "set").info.grid == (2, 3)
    export_published(tmp_path / "set", tmp_path / "out")
    assert torch.equal(loaded(unpack(tmp_path / "out")["a.pt"]), tensor)


def test_unsorted_files_come_out_sorted(tmp_path: Path) -> None:
    shuffled = published_tensor()[:, [3, 0, 4, 1, 2]]
    shards = one_shard(tmp_path, {"a.jpg": jpeg()})
    import_published(pack({"a.pt": saved(shuffled)}, tmp_path), shards, tmp_path / "set")
    export_published(tmp_path / "set", tmp_path / "out")
    assert torch.equal(loaded(unpack(tmp_path / "out")["a.pt"]), published_tensor())


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_maps_turn_as_decoding_turns_their_image(orientation: int | None, image_format: str, tmp_path: Path) -> None:
    data = jpeg((40, 30), orientation, image_format)
    shards = one_shard(tmp_path, {f"a.{image_format.lower()}": data})
    report = import_published(pack({"a.pt": saved(published_tensor())}, tmp_path), shards, tmp_path / "set")
    stored = open_store(tmp_path / "set")["a"]

    leading_class = Image.fromarray(published_tensor()[1, 0].to(torch.int32).numpy())
    leading_class.getexif()[0x0112] = orientation or 1
    assert np.array_equal(stored.classes[..., 0], np.asarray(ImageOps.exif_transpose(leading_class)))
    upright = decode_rgb(data)
    assert stored.view == pytest.approx(view_center(upright.width, upright.height, 1.0), abs=1e-6)
    assert report.num_turned == (orientation in range(2, 9))


def test_a_map_that_is_not_square_cannot_lie_on_its_side(tmp_path: Path) -> None:
    files = {f"{name}.pt": saved(published_tensor(grid=(2, 3))) for name in ("flat", "side")}
    shards = one_shard(tmp_path, {"flat.jpg": jpeg((40, 30), 3), "side.jpg": jpeg((40, 30), 6)})
    import_published(pack(files, tmp_path), shards, tmp_path / "set", max_skip=0.5)
    (shard,) = open_store(tmp_path / "set").shards
    assert shard.keys == ("flat",)
    assert [(record.key, record.reason) for record in shard.manifest.skipped] == [
        ("side", "EXIF orientation 6 lays its map, which is not square, on its side")
    ]


def test_tails_are_those_of_absent_classes_at_zero(shards: list[ImageShard], tmp_path: Path) -> None:
    import_published(pack(label_files(), tmp_path), shards, tmp_path / "set")
    maps = open_store(tmp_path / "set").shards[0].read()
    stored_mass = np.exp(maps.scores.astype(np.float64)).sum(axis=-1)
    assert maps.tail == pytest.approx(995 / (stored_mass + 995), rel=1e-3)


def test_agreement_with_the_labels_of_the_images(tmp_path: Path) -> None:
    tensor = published_tensor().clone()
    tensor[0, 0] += 20
    tensor[1, 0] = torch.where(torch.arange(16).view(4, 4) < 9, 111.0, 112.0)
    images = {"right.jpg": jpeg(), "right.cls": b"111", "wrong.jpg": jpeg(), "wrong.cls": b"112", "free.jpg": jpeg()}
    files = {f"{name}.pt": saved(tensor) for name in ("right", "wrong", "free")}
    import_published(pack(files, tmp_path), one_shard(tmp_path, images), tmp_path / "set")
    (shard,) = open_store(tmp_path / "set").shards
    assert shard.manifest.image_level == ImageLevelRecord(num_labelled=2, num_agreeing=1)


def test_class_names_are_kept(tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(1000)]
    shards = one_shard(tmp_path, {"a.jpg": jpeg()})
    import_published(pack({"a.pt": saved(published_tensor())}, tmp_path), shards, tmp_path / "set", class_names=names)
    assert open_store(tmp_path / "set").info.class_names == tuple(names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_named_and_no_shard_is_written(kind: str, tmp_path: Path) -> None:
    files = {"x/a.pt": saved(published_tensor()), "x/b.pt": b"<html>quota exceeded</html>"}
    shards = one_shard(tmp_path, {"a.jpg": jpeg(), "b.jpg": jpeg()})
    with pytest.raises(PublishedLayoutError, match=r"labels(\.tar|\.zip)?: x/b\.pt: not a tensor file"):
        import_published(pack(files, tmp_path, kind), shards, tmp_path / "set")
    assert open_store(tmp_path / "set").shards == ()


def test_maps_of_another_shape_are_refused(tmp_path: Path) -> None:
    files = {"a.pt": saved(published_tensor()), "b.pt": saved(published_tensor(grid=(3, 4)))}
    shards = one_shard(tmp_path, {"a.jpg": jpeg(), "b.jpg": jpeg()})
    with pytest.raises(PublishedLayoutError, match=r"b\.pt: a map of \(3, 4, 5\).* first one was \(4, 4, 5\)"):
        import_published(pack(files, tmp_path), shards, tmp_path / "set")


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("cats", "dogs"):
        (tmp_path / "tree" / folder).mkdir(parents=True)
        (tmp_path / "tree" / folder / "0001.jpg").write_bytes(jpeg())
    archive = pack({"cats/0001.pt": saved(published_tensor())}, tmp_path)
    with pytest.raises(PublishedLayoutError, match=r"two images, cats/0001 in cats and dogs/0001 in dogs"):
        import_published(archive, find_shards([str(tmp_path / "tree")]), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_an_archive_for_other_images_is_refused(shards: list[ImageShard], tmp_path: Path) -> None:
    archive = pack({"x/0001.pt": saved(published_tensor())}, tmp_path, ".zip")
    with pytest.raises(PublishedLayoutError, match=r"'n01440764_10026', and there are files such as .*x/0001\.pt"):
        import_published(archive, shards, tmp_path / "set")


def test_images_of_a_tree_match_by_name(tmp_path: Path) -> None:
    (tmp_path / "tree" / "n01443537").mkdir(parents=True)
    (tmp_path / "tree" / "n01443537" / "n01443537_2.JPEG").write_bytes(jpeg())
    report = import_published(pack(label_files(), tmp_path), find_shards([str(tmp_path / "tree")]), tmp_path / "set")
    assert (report.num_images, report.num_unused_files) == (1, 4)
    assert list(open_store(tmp_path / "set")) == ["n01443537/n01443537_2"]


def test_missing_labels_fail_the_shard_by_name(shards: list[ImageShard], tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"images-1\.tar: 1 of 2 images .*\n  n02102040_7: no n02102040_7\.pt in lab"):
        import_published(pack(label_files(NAMES[:4]), tmp_path), shards, tmp_path / "set")
    assert [shard.stem for shard in open_store(tmp_path / "set").shards] == ["images-0"]


def test_what_has_no_labels_is_named_with_its_reason(tmp_path: Path) -> None:
    images = {"a.jpg": jpeg(), "b.jpg": jpeg(), "c.jpg": b"no image", "d.cls": b"3", "e.jpg": jpeg()}
    files = {f"{name}.pt": saved(published_tensor()) for name in "acdez"}
    report = import_published(pack(files, tmp_path), one_shard(tmp_path, images), tmp_path / "set", max_skip=0.6)
    assert (report.num_images, report.num_skipped, report.num_unused_files) == (2, 3, 1)
    (shard,) = open_store(tmp_path / "set").shards
    assert shard.keys == ("a", "e")
    reasons = {record.key: record.reason for record in shard.manifest.skipped}
    assert list(reasons) == ["b", "c", "d"]
    assert reasons["b"] == "no b.pt in labels"
    assert reasons["c"].startswith("its size cannot be read: ")
    assert reasons["d"].startswith("no image member")
    assert list(verify_store(tmp_path / "set", source_keys=lambda _: list("abcde"))) == []


def test_a_shard_may_end_up_empty(shards: list[ImageShard], tmp_path: Path) -> None:
    import_published(pack(label_files(NAMES[:3]), tmp_path), shards, tmp_path / "set", max_skip=1)
    assert [len(shard) for shard in open_store(tmp_path / "set").shards] == [3, 0]
    assert list(verify_store(tmp_path / "set")) == []


def test_a_rerun_goes_on_where_it_stopped(shards: list[ImageShard], tmp_path: Path) -> None:
    files = label_files()
    last = list(files)[-1]
    archive = pack(files | {last: bytes(len(files[last]))}, tmp_path)
    with pytest.raises(PublishedLayoutError, match="n02102040_7"):
        import_published(archive, shards, tmp_path / "set")
    first = tmp_path / "set" / "manifest" / "images-0.json"
    written_at = first.stat().st_mtime_ns
    (archive / last).write_bytes(files[last])
    seen: list[str] = []
    report = import_published(archive, shards, tmp_path / "set", on_shard=seen.append)
    assert (report.num_shards, report.num_finished_before, report.num_images) == (1, 1, 2)
    assert seen == ["images-0", "images-1"]
    assert first.stat().st_mtime_ns == written_at
    assert list(verify_store(tmp_path / "set")) == []
    again = import_published(archive, shards, tmp_path / "set")
    assert (again.num_shards, again.num_finished_before, again.num_unused_files) == (0, 2, 0)


OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "view": {"view": "squash"},
    "axes": {"axes": "wh"},
    "crop": {"crop_pct": 0.9},
    "classes": {"num_classes": 1001},
}


@pytest.mark.parametrize("settings", OTHER_SETTINGS.values(), ids=OTHER_SETTINGS.keys())
def test_other_settings_are_another_set(settings: dict[str, Any], shards: list[ImageShard], tmp_path: Path) -> None:
    archive = pack(label_files(), tmp_path)
    import_published(archive, shards, tmp_path / "set")
    with pytest.raises(LabelStoreError, match=r"made in another way(.|\n)*teacher.digest"):
        import_published(archive, shards, tmp_path / "set", **settings)


def test_other_files_are_another_set(shards: list[ImageShard], tmp_path: Path) -> None:
    archive = pack(label_files(), tmp_path)
    import_published(archive, shards, tmp_path / "set")
    (archive / "extra.pt").write_bytes(b"x")
    with pytest.raises(LabelStoreError, match="made in another way"):
        import_published(archive, shards, tmp_path / "set")


def test_real_photographs(imagenet_sample: Path, tmp_path: Path) -> None:
    shards = find_shards([str(imagenet_sample / "imagenet1k-train-0003.tar")])
    keys = shards[0].keys()
    files = label_files(keys)
    report = import_published(pack(files, tmp_path, ".zip"), shards, tmp_path / "set")
    assert (report.num_images, report.num_skipped, report.num_unused_files) == (44, 0, 0)
    assert list(verify_store(tmp_path / "set", source_keys=lambda _: keys)) == []
    maps = open_store(tmp_path / "set").shards[0].read()
    sizes_px = np.array([decode_rgb(image.data).size for image in shards[0].images() if image.data])
    sides_px = (maps.views[:, 2:] - maps.views[:, :2]) * sizes_px
    assert sides_px == pytest.approx(sizes_px.min(axis=1, keepdims=True).repeat(2, axis=1), rel=1e-5)
    export_published(tmp_path / "set", tmp_path / "out")
    assert unpack(tmp_path / "out") == files
