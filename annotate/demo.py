"""The main job on generated scenes, where the truth is known for every pixel: `tokenlabels demo`.

Scenes are drawn into unequal tars, a small teacher is trained on other scenes, the tars are annotated like any user's,
and the labels are held against the truth. Nothing is downloaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from annotate.demo_teacher import OnStep, train_demo_teacher
from annotate.scenes import BACKGROUND, CLASS_NAMES, SceneShards, read_truth, token_accuracy, write_scenes
from annotate.schedule import Job
from annotate.shard import AnnotateConfig
from annotate.teachers import TeacherSpec
from tokenlabels.images import ImageShard, find_shards
from tokenlabels.images.decode import decode_rgb
from tokenlabels.store import open_store
from tokenlabels.views import overlay

SHARD_SIZES = (40, 25, 15)
SEED = 0


@dataclass(frozen=True)
class DemoMaterial:
    """What the demo annotates, and with what.

    Attributes:
        scenes: the tars, and the truth beside them.
        shards: the same tars as image shards.
        job: the teacher and where labels go.
        teacher_accuracy: share of cells that the teacher names right on held-out scenes, 0..1.
    """

    scenes: SceneShards
    shards: list[ImageShard]
    job: Job
    teacher_accuracy: float


def make_material(folder: Path, on_step: OnStep, *, shard_sizes: Sequence[int] = SHARD_SIZES) -> DemoMaterial:
    """Draw the scenes and train the teacher into `folder`; takes about a minute."""
    scenes = write_scenes(folder / "images", shard_sizes=shard_sizes, seed=SEED)
    teacher = train_demo_teacher(folder / "teacher.safetensors", seed=SEED, on_step=on_step)
    spec = TeacherSpec(teacher.name, checkpoint=teacher.checkpoint, image_size=teacher.image_size)
    job = Job(folder / "labels", (spec,), AnnotateConfig(class_names=CLASS_NAMES))
    return DemoMaterial(scenes, find_shards([str(tar) for tar in scenes.tars]), job, teacher.token_accuracy)


def label_accuracy(labels: Path, scenes: SceneShards) -> tuple[int, int]:
    """Cells whose leading class is the true one, and cells that are mostly covered by one object."""
    num_correct = num_counted = 0
    for shard, truths in zip(open_store(labels).shards, scenes.truths, strict=True):
        truth_by_key = read_truth(truths)
        for score_map in shard.read():
            correct, counted = token_accuracy(score_map.classes[..., 0], score_map.view, truth_by_key[score_map.key])
            num_correct += correct
            num_counted += counted
    return num_correct, num_counted


def draw_example(labels: Path, material: DemoMaterial, picture: Path) -> str:
    """Draw the first scene with three objects in sight beside its labels; returns its key."""
    store = open_store(labels)
    truths = [(key, truth) for path in material.scenes.truths for key, truth in read_truth(path).items()]
    key = next(key for key, truth in truths if len(set(np.unique(truth).tolist()) - {BACKGROUND}) == 3)
    drawn: Image.Image = overlay(_image_of(key, material.shards), store[key], store.info.class_names)
    drawn.save(picture)
    return key


def _image_of(key: str, shards: list[ImageShard]) -> Image.Image:
    shard = next(shard for shard in shards if key in set(shard.keys()))
    (encoded,) = shard.read([key])
    assert encoded.data is not None
    return decode_rgb(encoded.data)
