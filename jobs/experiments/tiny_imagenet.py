"""What supervises and what mixes (Token Labeling, arXiv 2104.10858, Table 2), and targets that follow the tokens
(TL-Align, arXiv 2210.06455, Table 2), and other tokenizers (MoTo and TokenProp, arXiv 2212.11115, Table 12), on 50
classes of Tiny ImageNet.

    python -m jobs.experiments.tiny_imagenet --data ../shared/data/tiny-imagenet-50 --out runs/tiny --scale reduced

A small convolutional teacher is trained with hard labels on all training images and labels them; the labels are held
against annotated boxes; the same small LV-ViT is then trained with every supervision and way of mixing, from the same
seeds and by the same schedule. Repeated, the command goes on where it was stopped and keeps what is finished.

On cores that others use too, run it with OMP_WAIT_POLICY=passive: threads that spin while they wait for one that has
lost its core make steps ten times slower.
"""

import csv
import json
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal, NamedTuple

import typer
from rich.console import Console

from annotate.progress import ProgressBar
from annotate.schedule import Job, run_inline
from annotate.shard import AnnotateConfig
from annotate.teachers import TeacherSpec
from jobs.config import (
    AlignConfig,
    DataConfig,
    Mix,
    ModelConfig,
    RunConfig,
    Supervision,
    TokenizerConfig,
    TokenPropConfig,
)
from jobs.experiments.localisation import Localisation, localise_store, read_boxes
from jobs.experiments.scales import FULL, IMAGE_SIZE_PX, PATCH_SIZE_PX, REDUCED, Course, Scale
from jobs.overrides import as_dict, differences, from_dict
from jobs.train import train
from loaders.index import load_index
from tokenlabels.cli.common import show_user_errors
from tokenlabels.cli.train import show_stops
from tokenlabels.files import replace_file
from tokenlabels.images import find_shards
from tokenlabels.store import open_store, verify_store
from tokenlabels.trainer import LossConfig, OptimizerConfig, ScheduleConfig, TrainerConfig
from tokenlabels.trainer.checkpoint import CONFIG_FILE, LAST_FILE, read_checkpoint
from tokenlabels.trainer.logs import EPOCHS_FILE

MIXES: dict[Mix, str] = {"mixtoken": "MixToken", "cutmix": "CutMix"}
"""Columns of the table, with their titles."""


Method = Literal["transmix", "tl_align", "moto", "token_prop", "moto_token_prop"]


class Row(NamedTuple):
    """A row of the table: what targets are made of, and what else is done. Methods are tried with CutMix alone."""

    title: str
    supervision: Supervision
    method: Method | None = None


ROWS = (
    Row("token labels", "token"),
    Row("ReLabel", "relabel"),
    Row("hard labels", "hard"),
    Row("hard labels, TransMix", "hard", "transmix"),
    Row("hard labels, TL-Align", "hard", "tl_align"),
    Row("token labels, TL-Align for every token", "token", "tl_align"),
    Row("hard labels, MoTo", "hard", "moto"),
    Row("hard labels, TokenProp", "hard", "token_prop"),
    Row("hard labels, MoTo and TokenProp", "hard", "moto_token_prop"),
)


class Arm(NamedTuple):
    """What the runs of the experiment differ in, but for their seeds."""

    supervision: Supervision
    mix: Mix
    method: Method | None = None

    @property
    def name(self) -> str:
        """Of the folders of its runs."""
        return "-".join(filter(None, self))

    def applied(self, config: RunConfig) -> RunConfig:
        """A run with the arm's method."""
        if self.method in ("transmix", "tl_align"):
            return replace(config, align=AlignConfig(self.method))
        if self.method in ("moto", "moto_token_prop"):
            config = replace(config, tokenizer=TokenizerConfig(norm="moto"))
        if self.method in ("token_prop", "moto_token_prop"):
            config = replace(config, token_prop=TokenPropConfig(weight=1e-3))
        return config


ARMS = tuple(
    Arm(row.supervision, mix, row.method) for row in ROWS for mix in MIXES if not row.method or mix == "cutmix"
)


@dataclass(frozen=True)
class Study:
    """The experiment on its way.

    Attributes:
        data: folder with tiny-train-*.tar, tiny-val-*.tar, classes.json and boxes.json.
        out: folder that everything is written to.
        scale: see there.
        train, val: paths of the tars.
    """

    data: Path
    out: Path
    scale: Scale
    train: tuple[str, ...] = field(init=False)
    val: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        for split in ("train", "val"):
            tars = find_shards([str(self.data / f"tiny-{split}-*.tar")])
            object.__setattr__(self, split, tuple(tar.path for tar in tars))

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class index."""
        classes = json.loads((self.data / "classes.json").read_text(encoding="utf-8"))
        return tuple(entry["name"] for entry in sorted(classes, key=lambda entry: int(entry["index"])))

    def classes_of(self, tars: tuple[str, ...]) -> dict[str, int]:
        """Class index of every image by key."""
        indexes = [load_index(tar, self.out / "index") for tar in tars]
        return {key: one for index in indexes for key, one in zip(index.keys, index.labels.tolist(), strict=True)}

    def teacher_config(self) -> RunConfig:
        """Hard labels on all training images, nothing mixed, erased or smoothed: what the cells say is to be sharp."""
        data = DataConfig(self.train, num_classes=len(self.class_names), supervision="hard", mix=None, erase_prob=0.0)
        return self._config(self.scale.teacher_course, ModelConfig(self.scale.teacher), data, smoothing=0.0, seed=0)

    def student_config(self, arm: Arm, seed: int) -> RunConfig:
        """A run of one arm. All read the same folder of labels; "hard" takes the number of classes from it."""
        labels = str(self.out / "labels")
        data = DataConfig(self.train[: self.scale.num_tars], labels, supervision=arm.supervision, mix=arm.mix)
        model = ModelConfig("lvvit_t", args={"patch_size": PATCH_SIZE_PX} | self.scale.student)
        config = self._config(self.scale.student_course, model, data, smoothing=0.1, seed=seed)
        return arm.applied(config)

    def _config(
        self, course: Course, model: ModelConfig, data: DataConfig, *, smoothing: float, seed: int
    ) -> RunConfig:
        """What teacher and students have in common."""
        data = replace(
            data,
            val=self.val,
            batch_size=course.batch_size,
            rand_augment=self.scale.rand_augment,
            shuffle_shards=len(data.images),
            crop_pct=1.0,
            index_dir=str(self.out / "index"),
        )
        trainer = TrainerConfig(
            optimizer=OptimizerConfig(base_lr=course.lr, lr_batch=course.batch_size),
            schedule=ScheduleConfig(epochs=course.epochs, warmup_epochs=course.warmup_epochs),
            loss=LossConfig(smoothing=smoothing),
            precision=self.scale.precision,
            ema_decay=None,
            seed=seed,
        )
        return RunConfig(replace(model, image_size=IMAGE_SIZE_PX, drop_path=course.drop_path), data, trainer)


@dataclass(frozen=True)
class StudentResult:
    """One run of one arm.

    Attributes:
        supervision, mix, method, seed: which.
        top1: share of the validation images that are right after the last epoch, 0..1.
    """

    supervision: Supervision
    mix: Mix
    method: Method | None
    seed: int
    top1: float


@dataclass(frozen=True)
class Results:
    """What the experiment found.

    Attributes:
        scale: how large it was.
        num_images, num_teacher_images, num_val_images: that students and teacher were trained on, and evaluated on.
        teacher_top1: as of a `StudentResult`.
        localisation: of the labels of all training images.
        students: all runs.
    """

    scale: Scale
    num_images: int
    num_teacher_images: int
    num_val_images: int
    teacher_top1: float
    localisation: Localisation
    students: tuple[StudentResult, ...]

    def as_markdown(self) -> str:
        """A table of targets and ways of mixing, and what has to be known to read it."""
        scale, course, found = self.scale, self.scale.student_course, self.localisation
        rows = [[row.title, *(self._cell(Arm(row.supervision, mix, row.method)) for mix in MIXES)] for row in ROWS]
        head = ["targets", *MIXES.values()]
        table = "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))
        student = ", ".join(f"{name} {value}" for name, value in scale.student.items())
        return (
            f"Scale **{scale.name}**: LV-ViT ({student}; patches of {PATCH_SIZE_PX} px), {self.num_images:,} training "
            f"images of {IMAGE_SIZE_PX} px, {course.epochs} epochs in batches of {course.batch_size}, learning rate "
            f"{course.lr:g}, RandAugment {scale.rand_augment or 'off'}, {scale.precision}.\n\n{table}\n"
            f"Top-1 in % of {self.num_val_images:,} validation images after the last epoch: mean ± half of the range "
            "over seeds.\n\n"
            f"Teacher: {scale.teacher}, {self.num_teacher_images:,} training images, {scale.teacher_course.epochs} "
            f"epochs, top-1 {self.teacher_top1:.1%}.\n\n"
            f"Its labels on {found.num_images:,} training images with a box: the image's class is first in "
            f"{found.share_inside:.1%} of the {found.num_inside:,} cells whose centre lies inside the box, and in "
            f"{found.share_outside:.1%} of the {found.num_outside:,} cells outside.\n"
        )

    def _cell(self, arm: Arm) -> str:
        top1 = [100 * run.top1 for run in self.students if (run.supervision, run.mix, run.method) == arm]
        if not top1:
            return "-"
        seeds = "1 seed" if len(top1) == 1 else f"{len(top1)} seeds"
        return f"{fmean(top1):.1f} ± {(max(top1) - min(top1)) / 2:.1f} ({seeds})"


def run(study: Study) -> Results:
    """The whole experiment; what is finished in its folder is not done again."""
    teacher_top1 = finish(study.teacher_config(), study.out / "teacher")
    label(study)
    class_of = study.classes_of(study.train)
    boxes = read_boxes(study.data / "boxes.json", IMAGE_SIZE_PX)
    localisation = localise_store(open_store(study.out / "labels"), class_of, boxes)
    students = [
        StudentResult(*arm, seed, finish(study.student_config(arm, seed), study.out / f"{arm.name}-seed{seed}"))
        for seed, arm in product(study.scale.seeds, ARMS)
    ]
    num_images = len(study.classes_of(study.train[: study.scale.num_tars]))
    num_val_images = len(study.classes_of(study.val))
    return Results(study.scale, num_images, len(class_of), num_val_images, teacher_top1, localisation, tuple(students))


def finish(config: RunConfig, folder: Path) -> float:
    """Train a run, or go on with it, or find it finished; its top-1 after the last epoch, 0..1.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    if not _is_finished(config, folder):
        train(config, folder, resume="auto")
    with (folder / EPOCHS_FILE).open(encoding="utf-8", newline="") as file:
        *_, last = csv.DictReader(file)
    return float(last["top1"])


def _is_finished(config: RunConfig, folder: Path) -> bool:
    """Whether all epochs of this very config are done; another config is left to `train`, which refuses it."""
    if not (folder / LAST_FILE).exists():
        return False
    saved = from_dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    epochs_done = read_checkpoint(folder / LAST_FILE)["progress"]["epoch"]
    return not differences(saved, config) and epochs_done == config.trainer.schedule.epochs


def label(study: Study) -> None:
    """Label all training images as `tokenlabels annotate` does and check every value. Finished shards are kept.

    Raises:
        ValueError: a shard failed, or its labels are not whole.
    """
    teacher = TeacherSpec(study.scale.teacher, checkpoint=study.out / "teacher" / LAST_FILE, image_size=IMAGE_SIZE_PX)
    job = Job(study.out / "labels", (teacher,), AnnotateConfig(class_names=study.class_names), device="auto")
    shards = find_shards(study.train)
    with ProgressBar(Console(stderr=True)) as progress:
        report = run_inline(shards, job, progress)
    keys_of = {shard.stem: shard.keys() for shard in shards}
    problems = [*map(str, report.failures), *map(str, verify_store(job.labels, source_keys=keys_of.get))]
    if problems:
        raise ValueError("\n".join(problems))


def write(study: Study, results: Results) -> None:
    """Leave results.json, with everything that a comparison needs, and results.md."""
    configs = {"teacher": study.teacher_config(), "student": study.student_config(ARMS[0], study.scale.seeds[0])}
    found = results.localisation
    shares = {"share_inside": found.share_inside, "share_outside": found.share_outside}
    content = asdict(results) | {
        "localisation": asdict(found) | shares,
        "configs": {name: as_dict(config) for name, config in configs.items()},
    }
    replace_file(study.out / "results.json", (json.dumps(content, indent=1) + "\n").encode())
    replace_file(study.out / "results.md", results.as_markdown().encode())


@show_user_errors
def main(
    data: Annotated[Path, typer.Option(help="Folder with tiny-*.tar, classes.json and boxes.json.")],
    out: Annotated[Path, typer.Option(help="Folder for runs, labels and results.")],
    scale: Annotated[Literal["reduced", "full"], typer.Option(help="reduced: two cores. full: a GPU.")] = "reduced",
) -> None:
    """Compare targets and ways of mixing on Tiny ImageNet. Run it again to go on where it stopped."""
    study = Study(data, out, {"reduced": REDUCED, "full": FULL}[scale])
    with show_stops():
        results = run(study)
    write(study, results)
    typer.echo(results.as_markdown(), nl=False)


if __name__ == "__main__":
    typer.run(main)
