"""The experiment on Tiny ImageNet: what its arms share, what it counts, and that it goes on where it stopped."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from annotate.specs import TeacherSpec
from annotate.teachers import load_teacher
from jobs.build import build_model
from jobs.config import RunConfig
from jobs.experiments import tiny_imagenet as experiment
from jobs.experiments.localisation import Localisation, localise, read_boxes
from jobs.experiments.scales import FULL, REDUCED, Course, Scale
from jobs.experiments.tiny_imagenet import ARMS, Arm, Results, StudentResult, Study, finish
from jobs.overrides import as_dict, differences
from tests.loaders.photos import encode, random_maps, smooth_image, write_tar
from tokenlabels.geometry import cell_centres
from tokenlabels.images import TarShard
from tokenlabels.trainer.checkpoint import CONFIG_FILE, LAST_FILE, save_checkpoint
from tokenlabels.trainer.logs import RunLog
from tokenlabels.types import ScoreMaps

MINIATURE = Scale(
    name="miniature",
    teacher="tiny_teacher_s",
    teacher_course=Course(epochs=4, warmup_epochs=0, batch_size=8, lr=4e-3),
    student={"embed_dim": 16, "depth": 1, "num_heads": 2, "stem_channels": 8},
    student_course=Course(epochs=1, warmup_epochs=0, batch_size=8, lr=1e-3),
    num_tars=1,
    seeds=(0,),
)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Of three training tars and one of validation, with an image each."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    for name in ("tiny-train-0000", "tiny-train-0001", "tiny-train-0002", "tiny-val-0000"):
        write_tar(folder / f"{name}.tar", {f"{name}_0": {"jpg": encode(smooth_image(rng, 64, 64)), "cls": b"3"}})
    classes = [{"index": index, "name": f"class {index}"} for index in (1, 0, 3, 2)]
    (folder / "classes.json").write_text(json.dumps(classes))
    return Study(folder, tmp_path / "out", REDUCED)


def changed_fields(left: RunConfig, right: RunConfig) -> set[str]:
    return {line.partition(":")[0] for line in differences(left, right)}


class TestConfigs:
    def test_arms_differ_in_supervision_and_mixing_alone(self, study: Study) -> None:
        first = study.student_config(ARMS[0], 0)
        assert len(set(ARMS)) == 12
        assert len({arm.name for arm in ARMS}) == 12
        for arm in ARMS:
            config = study.student_config(arm, 0)
            changed = {"data.supervision", "data.mix", "align.method", "tokenizer.norm", "token_prop.weight"}
            assert changed_fields(first, config) <= changed
            assert (config.data.supervision, config.data.mix) == arm[:2]
            used = {config.align.method, config.tokenizer.norm, "token_prop" if config.token_prop.weight else None}
            assert "_".join(sorted(filter(None, used))) == (arm.method or "")
            assert changed_fields(config, study.student_config(arm, 1)) == {"trainer.seed"}

    def test_students_of_the_reduced_scale_see_the_first_tars_and_the_teacher_all(self, study: Study) -> None:
        full = replace(study, scale=FULL)
        assert [Path(tar).name for tar in study.student_config(ARMS[0], 0).data.images] == [
            "tiny-train-0000.tar",
            "tiny-train-0001.tar",
        ]
        assert full.student_config(ARMS[0], 0).data.images == study.train
        teacher = study.teacher_config().data
        assert (teacher.images, teacher.labels, teacher.num_classes, teacher.mix) == (study.train, None, 4, None)
        assert study.class_names == ("class 0", "class 1", "class 2", "class 3")
        assert len(study.classes_of(study.train)) == 3
        assert set(study.classes_of(study.val).values()) == {3}

    @pytest.mark.parametrize("scale", [REDUCED, FULL], ids=lambda scale: scale.name)
    def test_teacher_and_student_have_the_same_grid(self, study: Study, scale: Scale) -> None:
        """The annotator takes the teacher's head cell by cell, as `load_teacher` tests."""
        teacher = load_teacher([TeacherSpec(scale.teacher, seed=0, image_size=64)])
        student = build_model(replace(study, scale=scale).student_config(Arm("token", "mixtoken"), 0), 50)
        assert teacher.grid == (8, 8)
        assert student.grid == (8, 8)


class TestLocalisation:
    def test_a_box_over_the_upper_left_cells(self, tmp_path: Path) -> None:
        """4 x 4 cells of 16 px; pixels 0..39 hold the centres of two columns, 0..23 those of one row."""
        (tmp_path / "boxes.json").write_text(json.dumps({"a": [0, 0, 39, 23]}))
        boxes = read_boxes(tmp_path / "boxes.json", 64)
        assert boxes == {"a": (0, 0, 0.625, 0.375)}
        classes = np.full((1, 4, 4, 1), 5, np.uint16)
        classes[0, 0, 0] = classes[0, 3, :2] = 7
        shape = classes.shape
        maps = ScoreMaps(
            ("a",), np.ones(shape, np.float16), classes, np.zeros(shape[:3], np.float16), np.float32([[0, 0, 1, 1]])
        )
        found = localise(maps, {"a": 7}, boxes)
        assert found == Localisation(1, num_inside=2, num_outside=14, num_right_inside=1, num_right_outside=2)
        assert (found.share_inside, found.share_outside) == (1 / 2, 1 / 7)

    def test_as_counted_cell_by_cell(self) -> None:
        rng = np.random.default_rng(0)
        keys = [f"key{number}" for number in range(40)]
        maps = random_maps(rng, keys, grid=(5, 6), num_classes=6)
        views = np.concatenate([rng.uniform(-0.2, 0.3, (40, 2)), rng.uniform(0.7, 1.2, (40, 2))], 1).astype(np.float32)
        maps = ScoreMaps(maps.keys, maps.scores, maps.classes, maps.tail, views)
        class_of = {key: int(rng.integers(6)) for key in keys[3:]}
        corners = np.sort(rng.uniform(0, 1, (40, 2, 2)), axis=1)
        boxes = dict(zip(keys[:-5], map(tuple, corners.reshape(40, 4).tolist()), strict=False))
        right, wrong = {True: 0, False: 0}, {True: 0, False: 0}  # by whether the centre is inside
        num_images = 0
        for one in maps:
            if one.key not in class_of or one.key not in boxes:
                continue
            num_images += 1
            x0, y0, x1, y1 = boxes[one.key]
            x_W, y_H = cell_centres(one.view, maps.grid)
            for row, column in np.ndindex(maps.grid):
                is_inside = bool(x0 <= x_W[column] < x1 and y0 <= y_H[row] < y1)
                counts = right if one.classes[row, column, 0] == class_of[one.key] else wrong
                counts[is_inside] += 1
        assert num_images == 32
        assert min(*right.values(), *wrong.values()) > 0
        assert localise(maps, class_of, boxes) == Localisation(
            num_images, right[True] + wrong[True], right[False] + wrong[False], right[True], right[False]
        )

    def test_nothing_to_count(self) -> None:
        found = localise(random_maps(np.random.default_rng(0), ["a"]), {"a": 0}, {})
        assert found + found == Localisation()
        assert (found.share_inside, found.share_outside) == (0, 0)


def results(scale: Scale, top1: dict[Arm, list[float]]) -> Results:
    students = [StudentResult(*arm, seed, share) for arm, shares in top1.items() for seed, share in enumerate(shares)]
    return Results(scale, 5000, 25000, 2500, 0.5, Localisation(100, 2000, 4400, 1500, 1100), tuple(students))


def test_the_table() -> None:
    top1 = {arm: [0.05 * (number + 1), 0.05 * (number + 1) + 0.05] for number, arm in enumerate(ARMS)}
    page = results(REDUCED, top1).as_markdown()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert table == [
        "| targets | MixToken | CutMix |",
        "| --- | --- | --- |",
        "| token labels | 7.5 ± 2.5 (2 seeds) | 12.5 ± 2.5 (2 seeds) |",
        "| ReLabel | 17.5 ± 2.5 (2 seeds) | 22.5 ± 2.5 (2 seeds) |",
        "| hard labels | 27.5 ± 2.5 (2 seeds) | 32.5 ± 2.5 (2 seeds) |",
        "| hard labels, TransMix | - | 37.5 ± 2.5 (2 seeds) |",
        "| hard labels, TL-Align | - | 42.5 ± 2.5 (2 seeds) |",
        "| token labels, TL-Align for every token | - | 47.5 ± 2.5 (2 seeds) |",
        "| hard labels, MoTo | - | 52.5 ± 2.5 (2 seeds) |",
        "| hard labels, TokenProp | - | 57.5 ± 2.5 (2 seeds) |",
        "| hard labels, MoTo and TokenProp | - | 62.5 ± 2.5 (2 seeds) |",
    ]
    for fact in ("Scale **reduced**", "5,000 training images", "2,500 validation images", "half of the range"):
        assert fact in page
    assert "top-1 50.0%" in page
    assert "75.0% of the 2,000 cells" in page
    assert "25.0% of the 4,400 cells" in page


def test_a_finished_run_is_read_and_not_run_again(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def train(config: RunConfig, folder: Path, *, resume: str) -> None:
        """Leaves what a run leaves, of one more epoch in every call."""
        assert resume == "auto"
        begun.append(folder.name)
        epoch = begun.count(folder.name)
        with RunLog(folder, step=epoch - 1, epoch=epoch - 1) as log:
            log.epoch({"epoch": epoch, "top1": epoch / 10, "top5": None}, step=epoch)
        (folder / CONFIG_FILE).write_text(json.dumps(as_dict(config)))
        save_checkpoint(folder / LAST_FILE, {"progress": {"epoch": epoch}})

    monkeypatch.setattr(experiment, "train", train)
    small = replace(study, scale=replace(REDUCED, student_course=Course(2, 0, 8, 1e-3)))
    config = small.student_config(ARMS[0], 0)
    assert [finish(config, study.out / "a") for _ in range(4)] == [0.1, 0.2, 0.2, 0.2]
    assert begun == ["a", "a"]
    finish(small.student_config(ARMS[0], 1), study.out / "a")
    assert begun == ["a", "a", "a"]  # it refuses the folder of another run


def cut(source: Path, tars: list[Path]) -> None:
    """Share out 24 images of the classes 0 and 1 for each of `tars`."""
    images = [image for image in TarShard(str(source)).images() if image.label in (0, 1)]
    for start, tar in zip(range(0, len(images), 24), tars, strict=False):
        part = images[start : start + 24]
        assert len(part) == 24
        write_tar(tar, {image.key: {"jpg": image.data or b"", "cls": str(image.label).encode()} for image in part})


@pytest.mark.slow
def test_from_images_to_the_table(
    tiny_imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    cut(tiny_imagenet / "tiny-train-0000.tar", [data / "tiny-train-0000.tar", data / "tiny-train-0001.tar"])
    cut(tiny_imagenet / "tiny-val-0000.tar", [data / "tiny-val-0000.tar"])
    for name in ("boxes.json", "classes.json"):
        shutil.copyfile(tiny_imagenet / name, data / name)
    monkeypatch.setattr(experiment, "REDUCED", MINIATURE)
    experiment.main(data, out, "reduced")
    page = capsys.readouterr().out
    assert page == (out / "results.md").read_text(encoding="utf-8")
    assert page.count("(1 seed)") == 12
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert {(run["supervision"], run["mix"], run["method"]) for run in found["students"]} == set(ARMS)
    assert all(0 <= run["top1"] <= 1 for run in found["students"])
    assert (found["num_images"], found["num_teacher_images"], found["num_val_images"]) == (24, 48, 24)
    assert found["localisation"]["num_images"] == 48
    assert found["localisation"]["num_inside"] + found["localisation"]["num_outside"] == 48 * 8 * 8
    assert found["configs"]["student"]["model"]["args"]["embed_dim"] == 16

    study = Study(data, out, MINIATURE)
    with pytest.raises(ValueError, match=r"other settings.*data\.mix: mixtoken != cutmix"):
        finish(study.student_config(Arm("token", "cutmix"), 0), out / "token-mixtoken-seed0")
    monkeypatch.delattr(experiment, "train")
    experiment.main(data, out, "reduced")
    assert capsys.readouterr().out == page
