"""What annotate_shard says of the images of one shard; test_shard_commit.py is about the files that hold it."""

import importlib.metadata
import platform
import tarfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch

from annotate.fit import ImageSpec, fit
from annotate.fitted import image_specs
from annotate.shard import AnnotateConfig, annotate_shard, label_images, label_set, library_versions
from annotate.teachers import Teacher, TeacherError, TeacherSpec, load_teacher
from tokenlabels.geometry import ResizeMode
from tokenlabels.images import TarShard
from tokenlabels.images.decode import decode_rgb
from tokenlabels.images.folders import folder_shards
from tokenlabels.store import ImageLevelRecord, open_store, verify_store
from tokenlabels.types import ScoreMap, ScoreMaps

MakeTeacher = Callable[..., Any]
WriteTar = Callable[[Path, Mapping[str, bytes]], TarShard]

CROP_PCT = 0.8  # of the first model of a PixelTeacher
MEAN_RGB = (51, 102, 153)  # its mean, 0.2 0.4 0.6


def jpegs_of(tar: str | Path) -> dict[str, bytes]:
    with tarfile.open(tar) as archive:
        members = [member for member in archive.getmembers() if member.name.endswith((".jpg", ".JPEG"))]
        return {member.name.split(".")[0]: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]


def obvious_view(width: int, height: int, resize: ResizeMode, canvas: int) -> list[float]:
    if resize == "squash":
        return [0, 0, 1, 1]
    if resize == "center":
        side = CROP_PCT * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return [left / width, top / height, (left + side) / width, (top + side) / height]
    scaled = [max(1, round(side * canvas / max(width, height))) for side in (width, height)]
    starts = [(canvas - side) // 2 for side in scaled]
    lows = [-start / side for start, side in zip(starts, scaled, strict=True)]
    return lows + [low + canvas / side for low, side in zip(lows, scaled, strict=True)]


def obvious_maps(jpegs: Mapping[str, bytes], teacher: Teacher, resize: ResizeMode) -> list[ScoreMap]:
    """The slow twin: one image after the other, decoded, resized and labelled on its own."""
    maps = []
    for key, jpeg in jpegs.items():
        image = decode_rgb(jpeg)
        inputs = []
        for model in teacher.info.models:
            crop_pct = teacher.info.models[0].crop_pct
            fill_rgb = tuple(round(255 * value) for value in model.mean)
            pixels, _ = fit(image, ImageSpec(model.image_size, model.interpolation, resize, crop_pct, fill_rgb))  # type: ignore[arg-type]
            inputs.append(torch.from_numpy(pixels)[None])
        best = teacher(inputs)
        view = obvious_view(*image.size, resize, teacher.info.models[0].image_size[0])
        classes = best.classes[0].numpy().astype(np.uint16)
        maps.append(ScoreMap(key, best.scores[0].numpy(), classes, best.tail[0].numpy(), np.array(view, np.float32)))
    return maps


def obvious_class(score_map: ScoreMap, num_classes: int) -> int:
    """The class with the largest mean probability, from dense rows of probabilities."""
    totals = np.zeros(num_classes)
    for cell in np.ndindex(score_map.grid):
        weights = np.exp(score_map.scores[cell].astype(np.float64))
        kept = 1 - float(score_map.tail[cell])
        for class_id, weight in zip(score_map.classes[cell], weights, strict=True):
            totals[class_id] += kept * weight / weights.sum()
    return int(totals.argmax())


def assert_same_maps(stored: ScoreMaps, expected: Sequence[ScoreMap]) -> None:
    assert list(stored.keys) == [score_map.key for score_map in expected]
    for mine, other in zip(stored, expected, strict=True):
        for name in ("scores", "classes", "tail"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(other, name), err_msg=f"{name} of {mine.key}")
        np.testing.assert_allclose(mine.view, other.view, atol=1e-6)


def maps_in(labels: Path) -> ScoreMaps:
    (shard,) = open_store(labels).shards
    return shard.read()


class TestMaps:
    @pytest.mark.parametrize(
        "config",
        [
            pytest.param(AnnotateConfig(resize="squash", batch_size=1), id="squash-one-by-one"),
            pytest.param(AnnotateConfig(resize="squash", batch_size=2), id="squash-with-a-remainder"),
            pytest.param(AnnotateConfig(resize="squash", batch_size=5), id="squash-one-full-batch"),
            pytest.param(AnnotateConfig(resize="squash", decode_threads=4, queue_bytes=1), id="squash-narrow-queue"),
            pytest.param(AnnotateConfig(resize="center", batch_size=2), id="center"),
            pytest.param(AnnotateConfig(resize="letterbox", batch_size=2), id="letterbox"),
        ],
    )
    @pytest.mark.parametrize("sizes", [((24, 24),), ((24, 24), (36, 36))], ids=["one-model", "two-models"])
    def test_they_are_those_of_one_image_at_a_time(
        self, config: AnnotateConfig, sizes: Any, scene_tars: Path, pixel_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        tar, teacher = scene_tars / "scenes-0000.tar", pixel_teacher(sizes)
        annotate_shard(TarShard(str(tar)), tmp_path / "labels", teacher, config)
        assert_same_maps(maps_in(tmp_path / "labels"), obvious_maps(jpegs_of(tar), pixel_teacher(sizes), config.resize))

    def test_the_teacher_sees_inputs_that_are_not_square(
        self, scene_tars: Path, pixel_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        tar, teacher = scene_tars / "scenes-0001.tar", pixel_teacher(((24, 36), (12, 24)))
        annotate_shard(TarShard(str(tar)), tmp_path / "labels", teacher, AnnotateConfig())
        assert_same_maps(maps_in(tmp_path / "labels"), obvious_maps(jpegs_of(tar), teacher, "squash"))

    @pytest.mark.parametrize("flip", [False, True], ids=["one-model", "two-models-mirrored"])
    def test_real_models(self, flip: bool, scene_tars: Path, tiny_spec: TeacherSpec, tmp_path: Path) -> None:
        specs = [tiny_spec, TeacherSpec("test_efficientnet_ln", seed=1, image_size=60)] if flip else [tiny_spec]
        tar, teacher = scene_tars / "scenes-0001.tar", load_teacher(specs, topk=3, flip=flip)
        # One by one: the batch size changes the last bits of a real model's convolutions.
        annotate_shard(TarShard(str(tar)), tmp_path / "labels", teacher, AnnotateConfig(batch_size=1))
        assert_same_maps(maps_in(tmp_path / "labels"), obvious_maps(jpegs_of(tar), teacher, "squash"))
        record = open_store(tmp_path / "labels").info.teacher
        assert (record.flip, [model.image_size for model in record.models]) == (
            flip,
            [(64, 64), (60, 60)][: len(specs)],
        )

    def test_class_ids_above_65535(self, scene_tars: Path, pixel_teacher: MakeTeacher, tmp_path: Path) -> None:
        tar, teacher = scene_tars / "scenes-0002.tar", pixel_teacher(num_classes=200_000)
        annotate_shard(TarShard(str(tar)), tmp_path / "labels", teacher, AnnotateConfig())
        maps = maps_in(tmp_path / "labels")
        assert maps.classes.dtype == np.uint32
        assert maps.classes.max() > 65_535
        assert list(verify_store(tmp_path / "labels")) == []

    def test_an_image_folder(self, scene_tars: Path, pixel_teacher: MakeTeacher, tmp_path: Path) -> None:
        jpegs = jpegs_of(scene_tars / "scenes-0001.tar")
        for key, jpeg in jpegs.items():
            file = tmp_path / "train" / "bird" / "deep" / f"{key}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg)
        (shard,) = folder_shards(tmp_path / "train")
        annotate_shard(shard, tmp_path / "labels", pixel_teacher(), AnnotateConfig())
        expected = obvious_maps({f"bird/deep/{key}": jpeg for key, jpeg in jpegs.items()}, pixel_teacher(), "squash")
        assert_same_maps(maps_in(tmp_path / "labels"), expected)
        assert list(verify_store(tmp_path / "labels")) == []

    def test_photographs(self, imagenet_sample: Path, pixel_teacher: MakeTeacher, tmp_path: Path) -> None:
        tar = imagenet_sample / "imagenet1k-train-0003.tar"
        report = annotate_shard(
            TarShard(str(tar)), tmp_path / "labels", pixel_teacher(), AnnotateConfig(resize="center")
        )
        assert (report.rows, report.skipped) == (44, ())
        assert_same_maps(maps_in(tmp_path / "labels"), obvious_maps(jpegs_of(tar), pixel_teacher(), "center"))


class TestSkipped:
    @pytest.fixture
    def members(self, scene_tars: Path) -> dict[str, bytes]:
        """Of five samples, three whole."""
        jpeg = jpegs_of(scene_tars / "scenes-0002.tar")["scene_000008"]
        return {
            "a.jpg": jpeg[:2000],
            "b.jpg": jpeg,
            "c.cls": b"3",
            "d.jpg": jpeg,
            "e.jpg": jpeg,
            "e.cls": b"seven",
        }

    def test_they_are_named_with_their_reasons(
        self, members: Mapping[str, bytes], write_tar: WriteTar, pixel_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        shard = write_tar(tmp_path / "t.tar", members)
        report = annotate_shard(shard, tmp_path / "labels", pixel_teacher(), AnnotateConfig(max_skip=0.6, batch_size=1))
        (reader,) = open_store(tmp_path / "labels").shards
        assert reader.manifest.skipped == report.skipped
        assert [(record.key, record.reason.split(" (")[0].split(":")[0]) for record in report.skipped] == [
            ("a", "truncated image data"),
            ("c", "no image member"),
        ]
        assert (report.rows, reader.manifest.source.num_samples) == (3, 5)
        assert reader.manifest.image_level.num_labelled == 0
        expected = obvious_maps({key: members[f"{key}.jpg"] for key in "bde"}, pixel_teacher(), "squash")
        assert_same_maps(reader.read(), expected)
        assert list(verify_store(tmp_path / "labels", source_keys=lambda _: shard.keys())) == []

    def test_all_of_them_if_that_is_allowed(
        self, write_tar: WriteTar, pixel_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        shard, teacher = write_tar(tmp_path / "t.tar", {"a.jpg": b"", "b.jpg": b"no image"}), pixel_teacher()
        report = annotate_shard(shard, tmp_path / "labels", teacher, AnnotateConfig(max_skip=1))
        assert (report.status, report.rows, [record.key for record in report.skipped]) == ("written", 0, ["a", "b"])
        assert teacher.batch_sizes == []
        assert len(open_store(tmp_path / "labels")) == 0
        assert list(verify_store(tmp_path / "labels")) == []


class TestImageLevelAgreement:
    def test_only_images_with_a_class_count(
        self, scene_tars: Path, write_tar: WriteTar, pixel_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        jpegs, teacher = jpegs_of(scene_tars / "scenes-0000.tar"), pixel_teacher()
        best = [obvious_class(score_map, 20) for score_map in obvious_maps(jpegs, teacher, "squash")]
        assert len(set(best)) > 1
        labels = {"right": best[0], "wrong": (best[1] + 1) % 20, "none": None, "unlabelled": -1, "also": best[4]}
        members = {}
        for (key, label), jpeg in zip(labels.items(), jpegs.values(), strict=True):
            members[f"{key}.jpg"] = jpeg
            if label is not None:
                members[f"{key}.cls"] = str(label).encode()
        annotate_shard(write_tar(tmp_path / "t.tar", members), tmp_path / "labels", teacher, AnnotateConfig())
        (reader,) = open_store(tmp_path / "labels").shards
        assert reader.manifest.image_level == ImageLevelRecord(num_labelled=3, num_agreeing=2)


def test_images_are_reported_batch_by_batch(scene_tars: Path, pixel_teacher: MakeTeacher, tmp_path: Path) -> None:
    shard, teacher = TarShard(str(scene_tars / "scenes-0000.tar")), pixel_teacher()
    counts: list[int] = []
    annotate_shard(shard, tmp_path / "labels", teacher, AnnotateConfig(batch_size=2), on_images=counts.append)
    assert counts == teacher.batch_sizes == [2, 2, 1]


def test_labelling_in_memory_is_the_same_as_on_disk(
    scene_tars: Path, pixel_teacher: MakeTeacher, tmp_path: Path
) -> None:
    shard = TarShard(str(scene_tars / "scenes-0001.tar"))
    labelled = label_images(shard.images(), 3, pixel_teacher(), AnnotateConfig())
    annotate_shard(shard, tmp_path / "labels", pixel_teacher(), AnnotateConfig())
    assert_same_maps(maps_in(tmp_path / "labels"), list(labelled.maps))
    assert (labelled.skipped, labelled.image_level.num_labelled) == ((), 3)


def test_an_error_of_the_teacher_leaves_no_threads_and_no_shard(
    scene_tars: Path, pixel_teacher: MakeTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, threads = pixel_teacher(), set(threading.enumerate())

    def refuse(_: Any) -> None:
        raise TeacherError("logits that are not finite")

    monkeypatch.setattr(type(teacher), "__call__", lambda _, images: refuse(images))
    shard = TarShard(str(scene_tars / "scenes-0000.tar"))
    # Kept, its traceback keeps the generators of the threads alive: they have to be closed, not forgotten.
    with pytest.raises(TeacherError, match="not finite") as caught:
        annotate_shard(shard, tmp_path / "labels", teacher, AnnotateConfig(batch_size=1))
    assert set(threading.enumerate()) == threads
    assert caught.tb is not None
    assert open_store(tmp_path / "labels").missing == ("scenes-0000.tar",)


def test_how_images_are_fitted(pixel_teacher: MakeTeacher) -> None:
    assert image_specs(pixel_teacher(((24, 36), (12, 12))), "letterbox") == (
        ImageSpec((24, 36), "bicubic", "letterbox", CROP_PCT, MEAN_RGB),
        ImageSpec((12, 12), "bilinear", "letterbox", CROP_PCT, MEAN_RGB),
    )


def test_versions(scene_tars: Path, pixel_teacher: MakeTeacher, tmp_path: Path) -> None:
    annotate_shard(
        TarShard(str(scene_tars / "scenes-0002.tar")), tmp_path / "labels", pixel_teacher(), AnnotateConfig()
    )
    versions = open_store(tmp_path / "labels").shards[0].attributes.versions
    assert versions == library_versions()
    assert versions["python"] == platform.python_version()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["numpy"] == np.__version__
    assert PIL.__version__ in versions["pillow"]
    for name in ("tokenlabels", "timm", "zarr"):
        assert versions[name] == importlib.metadata.version(name)


class TestClassNames:
    NAMES, OTHERS = tuple(f"class {number}" for number in range(20)), tuple(f"Klasse {number}" for number in range(20))

    @pytest.mark.parametrize(
        ("of_teacher", "of_config", "expected"),
        [(None, None, None), (NAMES, None, NAMES), (None, OTHERS, OTHERS), (NAMES, OTHERS, OTHERS)],
        ids=["nobody", "teacher", "user", "user-before-teacher"],
    )
    def test_whose(self, of_teacher: Any, of_config: Any, expected: Any, pixel_teacher: MakeTeacher) -> None:
        teacher = pixel_teacher(class_names=of_teacher)
        assert label_set(teacher, AnnotateConfig(class_names=of_config), []).class_names == expected

    @pytest.mark.parametrize("num_names", [1, 19, 21])
    def test_another_number_is_refused(
        self, num_names: int, scene_tars: Path, pixel_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        shard, config = TarShard(str(scene_tars / "scenes-0002.tar")), AnnotateConfig(class_names=("x",) * num_names)
        with pytest.raises(ValueError, match=f"^{num_names} class names were given; the teacher has 20 classes$"):
            annotate_shard(shard, tmp_path / "labels", pixel_teacher(), config)
        assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("batch_size", 0),
        ("decode_threads", 0),
        ("queue_bytes", 0),
        ("max_skip", -0.1),
        ("max_skip", 1.1),
        ("max_skip", float("nan")),
    ],
)
def test_settings_that_make_no_sense(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{setting} .* got {value}$"):
        AnnotateConfig(**{setting: value})  # type: ignore[arg-type]
