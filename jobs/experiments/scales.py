"""How large the experiment on Tiny ImageNet is: its teachers, its students, and how they are trained."""

from dataclasses import dataclass
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

from tokenlabels.trainer.config import Precision

IMAGE_SIZE_PX, PATCH_SIZE_PX = 64, 8

_TEACHER = {
    "input_size": (3, IMAGE_SIZE_PX, IMAGE_SIZE_PX),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "conv1.0",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs({"tiny_teacher_s": _TEACHER, "tiny_teacher_m": _TEACHER})


def _create_teacher(name: str, pretrained: bool, **kwargs: Any) -> ResNet:
    # The last of timm's four stages is empty. At stride 8 there are as many cells as the student has tokens: 8 x 8.
    shape: dict[str, Any] = {"block": BasicBlock, "output_stride": 8, "stem_type": "deep"}
    model: ResNet = build_model_with_cfg(ResNet, name, pretrained, **(shape | kwargs))
    return model


@register_model
def tiny_teacher_s(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """A ResNet of 5 blocks, 0.7 M parameters."""
    size = {"layers": (1, 2, 2, 0), "channels": (32, 64, 128, 128), "stem_width": 16}
    return _create_teacher("tiny_teacher_s", pretrained, **(size | kwargs))


@register_model
def tiny_teacher_m(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """A ResNet of 6 blocks, 2.8 M parameters."""
    size = {"layers": (2, 2, 2, 0), "channels": (64, 128, 256, 256), "stem_width": 32}
    return _create_teacher("tiny_teacher_m", pretrained, **(size | kwargs))


@dataclass(frozen=True)
class Course:
    """How long and how fast a model learns.

    Attributes:
        epochs, warmup_epochs: see `ScheduleConfig`.
        batch_size: samples per optimizer step.
        lr: highest learning rate of AdamW.
        drop_path: rate of stochastic depth.
    """

    epochs: int
    warmup_epochs: float
    batch_size: int
    lr: float
    drop_path: float = 0.0


@dataclass(frozen=True)
class Scale:
    """How large the experiment is.

    Attributes:
        name: of the scale.
        teacher: name of its model.
        teacher_course: its training, on all training tars.
        student: shape of the LV-ViT, arguments of its model.
        student_course: its training, the same for all arms.
        num_tars: training tars that students see, the first ones; None for all.
        seeds: every arm is trained once from each.
        rand_augment: timm's string, or None; of teacher and students.
        precision: of both.
    """

    name: str
    teacher: str
    teacher_course: Course
    student: dict[str, int]
    student_course: Course
    num_tars: int | None
    seeds: tuple[int, ...]
    rand_augment: str | None = None
    precision: Precision = "fp32"


REDUCED = Scale(
    name="reduced",
    teacher="tiny_teacher_s",
    teacher_course=Course(epochs=8, warmup_epochs=1, batch_size=64, lr=4e-3),
    student={"embed_dim": 96, "depth": 4, "num_heads": 4, "stem_channels": 32},
    student_course=Course(epochs=10, warmup_epochs=1, batch_size=64, lr=1e-3),
    num_tars=2,
    seeds=(0, 1),
)
"""About 40 minutes on two cores."""

FULL = Scale(
    name="full",
    teacher="tiny_teacher_m",
    teacher_course=Course(epochs=60, warmup_epochs=5, batch_size=256, lr=4e-3),
    student={"embed_dim": 192, "depth": 12, "num_heads": 3, "stem_channels": 64},
    student_course=Course(epochs=100, warmup_epochs=5, batch_size=256, lr=1e-3, drop_path=0.1),
    num_tars=None,
    seeds=(0, 1, 2),
    rand_augment="rand-m9-mstd0.5-inc1",
    precision="bf16",
)
"""For a GPU."""
