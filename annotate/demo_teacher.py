"""Trains the teacher of the demo: a tiny timm classifier, from random weights, in well under a minute.

It learns from image-level targets alone, on small crops of generated scenes. A crop hardly wider than what one
cell sees makes a classifier whose cells can be trusted; crops of plain background ask for "I do not know".
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from annotate.scenes import BACKGROUND, CLASS_NAMES, Scene, draw_scene, token_accuracy
from annotate.specs import TeacherSpec
from annotate.teachers import load_teacher

MODEL_NAME = "test_resnet"
IMAGE_SIZE_PX = 384  # at stride 32: 12 x 12 cells
DEFAULT_STEPS = 150

# the first of the series of scenes for training and testing; `write_scenes` with a small seed draws none of them
_FIRST_SERIES = 1_000_000
_NUM_TRAINING_SCENES, _NUM_HELD_OUT_SCENES = 400, 40
_CROP_PX, _BATCH_SIZE = 96, 64
_MAX_LEARNING_RATE, _WEIGHT_DECAY = 4e-3, 0.02
_WHOLE_IMAGE = np.array([0, 0, 1, 1], np.float32)

OnStep = Callable[[int, float], None]


@dataclass(frozen=True)
class DemoTeacher:
    """A trained teacher; `timm.create_model(name, num_classes=len(CLASS_NAMES))` takes its weights.

    Attributes:
        name: timm's name of the architecture.
        checkpoint: safetensors file with the state dict.
        image_size: side in pixels of the square images that it expects, the whole scene squashed.
        token_accuracy: share of the cells of held-out scenes whose best class is the true one, 0..1; cells of
            background do not count.
        num_cells: number of cells behind that share.
    """

    name: str
    checkpoint: Path
    image_size: int
    token_accuracy: float
    num_cells: int


def train_demo_teacher(
    path: Path, *, seed: int = 0, steps: int = DEFAULT_STEPS, on_step: OnStep | None = None
) -> DemoTeacher:
    """Train the teacher, write it to `path` as safetensors, and measure it on scenes that it has not seen.

    Runs on one CPU thread: the weights then depend on (seed, steps) and not on the number of cores, and a busy
    machine does not stretch the minute, as it does when threads wait for each other in every layer.

    Args:
        path: file to write; its name ends in .safetensors.
        seed: of the weights, the scenes and the crops; at least 0.
        steps: number of batches, at least 2.
        on_step: called after each batch with its number, from 0, and its loss.

    Raises:
        ValueError: `steps` is below 2, or the file has another ending.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"got the file {path}; give a name that ends in .safetensors")
    if steps < 2:
        raise ValueError(f"got steps={steps}; give 2 or more (a usable teacher takes about {DEFAULT_STEPS})")
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(MODEL_NAME, num_classes=len(CLASS_NAMES))
        pixels = _Pixels.of(model)
        series = _FIRST_SERIES + 2 * seed
        training_set = _TrainingSet.draw(series, pixels)
        _fit(model, pixels, training_set, np.random.default_rng(seed), steps, on_step)
        save_file(model.state_dict(), path)
        spec = TeacherSpec(MODEL_NAME, checkpoint=path, image_size=IMAGE_SIZE_PX)
        held_out = [draw_scene(series + 1, index) for index in range(_NUM_HELD_OUT_SCENES)]
        num_correct, num_cells = _count_correct(spec, pixels, held_out)
    return DemoTeacher(MODEL_NAME, path, IMAGE_SIZE_PX, num_correct / num_cells, num_cells)


@dataclass(frozen=True, eq=False)
class _Pixels:
    """How the architecture wants its pixels, as its own configuration says."""

    mean: Tensor  # float32 [3], of pixels in 0..1
    std: Tensor  # float32 [3]
    resampling: Image.Resampling

    @classmethod
    def of(cls, model: nn.Module) -> "_Pixels":
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        resampling = Image.Resampling[config["interpolation"].upper()]
        return cls(torch.tensor(config["mean"]), torch.tensor(config["std"]), resampling)

    def squash(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.array(Image.fromarray(image).resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX), self.resampling))

    def normalise(self, images: NDArray[np.uint8]) -> Tensor:
        """uint8 [B, side, side, 3] to float32 [B, 3, side, side]."""
        scaled = (torch.from_numpy(images) / 255 - self.mean) / self.std
        return scaled.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, eq=False)
class _TrainingSet:
    """Squashed scenes: n images and truths of one size, from which crops are cut."""

    images: NDArray[np.uint8]  # [n, side, side, 3]
    truths: NDArray[np.int16]  # [n, side, side]

    @classmethod
    def draw(cls, series: int, pixels: _Pixels) -> "_TrainingSet":
        scenes = [draw_scene(series, index) for index in range(_NUM_TRAINING_SCENES)]
        images = np.stack([pixels.squash(scene.image) for scene in scenes])
        return cls(images, np.stack([_squash_truth(scene.truth) for scene in scenes]))

    def crops(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], Tensor]:
        """A batch of crops uint8 [B, crop, crop, 3] with its targets float32 [B, K], see `_area_target`."""
        rows = rng.integers(len(self.images), size=_BATCH_SIZE).tolist()
        corners = rng.integers(IMAGE_SIZE_PX - _CROP_PX + 1, size=(_BATCH_SIZE, 2)).tolist()
        windows = [np.s_[row, y : y + _CROP_PX, x : x + _CROP_PX] for row, (y, x) in zip(rows, corners, strict=True)]
        targets = np.stack([_area_target(self.truths[window]) for window in windows])
        return np.stack([self.images[window] for window in windows]), torch.from_numpy(targets)


def _fit(
    model: nn.Module,
    pixels: _Pixels,
    training_set: _TrainingSet,
    rng: np.random.Generator,
    steps: int,
    on_step: OnStep | None,
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _MAX_LEARNING_RATE, total_steps=steps, pct_start=0.15)
    for step in range(steps):
        images, targets = training_set.crops(rng)
        loss = cross_entropy(model(pixels.normalise(images)), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())


def _count_correct(spec: TeacherSpec, pixels: _Pixels, scenes: Sequence[Scene]) -> tuple[int, int]:
    """Correct and counted cells (see `token_accuracy`) of the teacher as annotation will load it."""
    teacher = load_teacher([spec], topk=1)
    num_correct = num_cells = 0
    for scene in scenes:
        image = torch.from_numpy(pixels.squash(scene.image))
        classes_top1 = np.asarray(teacher([image[None]]).classes)[0, ..., 0]
        correct, counted = token_accuracy(classes_top1, _WHOLE_IMAGE, scene.truth)
        num_correct, num_cells = num_correct + correct, num_cells + counted
    return num_correct, num_cells


def _squash_truth(truth: NDArray[np.int16]) -> NDArray[np.int16]:
    """Nearest pixel, as classes cannot be interpolated."""
    rows, columns = (((np.arange(IMAGE_SIZE_PX) + 0.5) * side / IMAGE_SIZE_PX).astype(int) for side in truth.shape)
    return truth[np.ix_(rows, columns)]


def _area_target(truth: NDArray[np.int16]) -> NDArray[np.float32]:
    """float32 [K], share of the area of each class; what is background counts for all classes alike."""
    num_classes = len(CLASS_NAMES)
    areas = np.bincount(truth[truth != BACKGROUND], minlength=num_classes)
    background = truth.size - areas.sum()
    shares: NDArray[np.float64] = (areas + background / num_classes) / truth.size
    return shares.astype(np.float32)


@contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
