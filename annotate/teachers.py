"""Teachers: uint8 images in, the k best classes of every cell out.

One teacher is one timm classifier or several whose class probabilities are averaged, each applied at every position of
its own feature map (cells.py), optionally to the mirrored image too.

Legend: B images, h x w cells, K classes, k of them kept, C feature channels.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from annotate.cells import CellClassifier, TeacherError
from annotate.members import ModelInfo, TeacherModel, load_model
from annotate.specs import PRESETS, TeacherSpec, preset
from annotate.topk import ProbabilityMean, TopK, top_k

__all__ = [
    "PRESETS",
    "Amp",
    "ModelInfo",
    "Teacher",
    "TeacherError",
    "TeacherInfo",
    "TeacherModel",
    "TeacherSpec",
    "TopK",
    "load_teacher",
    "preset",
]

Amp = Literal["none", "bf16", "fp16"]
_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Cells x classes that exist at once: 64 MiB of float32 logits, and a few copies while they are ranked.
_MAX_LOGITS = 2**24


@dataclass(frozen=True)
class TeacherInfo:
    """What has to be known of a teacher to make its labels again.

    Attributes:
        models: one or more, in the order of the inputs.
        flip: whether the mirrored view is averaged in.
        amp: precision of the backbone on the GPU.
        digest: sha256 over all of the above.
    """

    models: tuple[ModelInfo, ...]
    flip: bool
    amp: Amp
    digest: str


class Teacher:
    """Labels images. Made by `load_teacher`.

    Attributes:
        info: recorded with the labels.
        models: in the order of the inputs.
        grid: rows and columns of cells, (h, w).
        num_classes: K.
        topk: k.
        class_names: K names, or None where they are not known.

    Raises:
        TeacherError: the models do not share a grid or their classes, or have fewer classes than k.
    """

    def __init__(self, models: Sequence[TeacherModel], *, topk: int, flip: bool = False, amp: Amp = "none") -> None:
        _check_same(models)
        classifier = models[0].classifier
        if not 1 <= topk <= classifier.num_classes:
            raise TeacherError(
                f"{models[0].info.name} has {classifier.num_classes} classes, so topk must be 1 to "
                f"{classifier.num_classes}; got {topk}"
            )
        self.models = tuple(models)
        self.grid = classifier.format.grid
        self.num_classes = classifier.num_classes
        self.topk = topk
        self.class_names = next((model.class_names for model in models if model.class_names is not None), None)
        self.info = _teacher_info(tuple(model.info for model in models), flip, amp)
        # Images per forward pass. Only running out of memory lowers it, and it stays there for the batches to come.
        self._max_batch: int | None = None

    def __call__(self, images: Sequence[Tensor]) -> TopK:
        """The k best classes at every cell.

        Args:
            images: for each model, in the order of `info.models`, the same B images as uint8 [B, H_px, W_px, 3] of
                that model's `image_size`, RGB, on the CPU or the teacher's device.

        Returns:
            On the CPU. With one model and no flip, the scores are the model's own logits; see `ProbabilityMean` for
            the others.

        Raises:
            TeacherError: wrong inputs, logits that are not finite or not within float16, or a GPU too small for one
                image.
        """
        num_images = self._check_images(images)
        parts: list[TopK] = []
        start = 0
        while start < num_images:
            stop = min(num_images, start + (self._max_batch or num_images))
            try:
                part: TopK | None = self._label([batch[start:stop] for batch in images])
            except torch.OutOfMemoryError as error:
                part = None
                if stop - start == 1:
                    raise TeacherError(
                        f"{self._names}: one image does not fit into the memory of the GPU; give a smaller image_size, "
                        "use amp, or free memory that other programs hold"
                    ) from error
            # outside the handler, whose traceback keeps the tensors of the failed attempt alive
            if part is None:
                self._max_batch = (stop - start) // 2
                torch.cuda.empty_cache()
            else:
                parts.append(part)
                start = stop
        best = TopK.cat(parts)
        self._check_finite(best)
        return best

    @torch.inference_mode()
    def _label(self, images: Sequence[Tensor]) -> TopK:
        views = [
            (model.classifier, cells)
            for model, batch in zip(self.models, images, strict=True)
            for cells in self._views(model, batch)
        ]
        images_at_once = max(1, _MAX_LOGITS // (self.grid[0] * self.grid[1] * self.num_classes))
        blocks = zip(*(torch.split(cells, images_at_once) for _, cells in views), strict=True)
        classifiers = [classifier for classifier, _ in views]
        return TopK.cat([self._rank(classifiers, block) for block in blocks]).cpu()

    def _views(self, model: TeacherModel, images: Tensor) -> list[Tensor]:
        """Feature cells [B, h, w, C] of the images and, with flip, of their mirror images, mirrored back."""
        pixels = model.normalise(images)
        with self._autocast(pixels.device):
            cells = [model.classifier.cells(pixels)]
            if self.info.flip:
                cells.append(model.classifier.cells(pixels.flip(-1)).flip(2))
        return cells

    def _rank(self, classifiers: Sequence[CellClassifier], block: Sequence[Tensor]) -> TopK:
        # The heads run in float32 under autocast too: half precision would round logits to steps of up to 1/8.
        if len(block) == 1:
            return top_k(classifiers[0].logits(block[0].float()), self.topk)
        mean = ProbabilityMean()
        for classifier, cells in zip(classifiers, block, strict=True):
            mean.add(classifier.logits(cells.float()))
        return mean.top_k(self.topk)

    def _autocast(self, device: torch.device) -> torch.autocast | nullcontext[None]:
        if self.info.amp == "none":
            return nullcontext()
        return torch.autocast(device.type, _AMP_DTYPES[self.info.amp])

    @property
    def _names(self) -> str:
        return " + ".join(model.name for model in self.info.models)

    def _check_images(self, images: Sequence[Tensor]) -> int:
        if len(images) != len(self.models):
            raise TeacherError(f"{self._names}: got {len(images)} batches of images, give one for each model")
        num_images = len(images[0])
        for model, batch in zip(self.info.models, images, strict=True):
            shape = (num_images, *model.image_size, 3)
            if batch.dtype != torch.uint8 or tuple(batch.shape) != shape or num_images == 0:
                raise TeacherError(
                    f"{model.name}: images must be uint8 {('B', *shape[1:])} with B at least 1 and the same for every "
                    f"model, got {batch.dtype} {tuple(batch.shape)}"
                )
        return num_images

    def _check_finite(self, best: TopK) -> None:
        if not best.tail.isfinite().all() or best.scores.isnan().any():
            hint = "" if self.info.amp == "none" else f" under amp={self.info.amp!r}; use amp='none' or 'bf16'"
            raise TeacherError(f"{self._names}: it returns logits that are not finite numbers{hint}")
        if not best.scores.isfinite().all():
            raise TeacherError(
                f"{self._names}: it returns logits beyond the range of float16 (+-65,504), in which scores are stored; "
                "are these weights trained?"
            )


def load_teacher(
    specs: Sequence[TeacherSpec], *, topk: int = 5, flip: bool = False, amp: Amp = "none", device: str = "cpu"
) -> Teacher:
    """Load the models of a teacher and test that their heads can be applied to single cells.

    Args:
        specs: one model, or several whose probabilities are averaged.
        topk: classes kept per cell.
        flip: average the mirrored view in.
        amp: autocast of the backbones, on a CUDA device only.
        device: such as "cpu", "cuda" or "cuda:1".

    Raises:
        TeacherError: a model or its weights cannot be had, a head cannot be applied per cell, the models do not go
            together, or the settings do not go with the device.
    """
    target = _device(device, amp)
    if not specs:
        raise TeacherError("a teacher needs at least one model, got no specs")
    return Teacher([load_model(spec, target) for spec in specs], topk=topk, flip=flip, amp=amp)


def _device(device: str, amp: Amp) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise TeacherError(f"no device {device!r}; give cpu, cuda or cuda:N") from error
    if amp not in ("none", *_AMP_DTYPES):
        raise TeacherError(f"amp must be none, bf16 or fp16, got {amp!r}")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise TeacherError(f"no device {device!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    if amp != "none" and target.type != "cuda":
        raise TeacherError(f"amp={amp!r} needs a CUDA device, got {device!r}; use amp='none'")
    return target


def _teacher_info(models: tuple[ModelInfo, ...], flip: bool, amp: Amp) -> TeacherInfo:
    content = {"models": [asdict(model) for model in models], "flip": flip, "amp": amp}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return TeacherInfo(models, flip, amp, digest)


def _check_same(models: Sequence[TeacherModel]) -> None:
    """Refuse models whose cells or classes do not correspond."""
    grids = {model.info.name: model.classifier.format.grid for model in models}
    if len(set(grids.values())) > 1:
        shown = ", ".join(f"{name} {height} x {width}" for name, (height, width) in grids.items())
        raise TeacherError(f"models of one teacher need the same grid, got {shown}; image_size can make them equal")
    counts = {model.info.name: model.classifier.num_classes for model in models}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise TeacherError(f"models of one teacher need the same classes, got {shown}; choose models that share them")
    known = [model for model in models if model.class_names is not None]
    for model in known[1:]:
        # other words for a class are harmless; the same words in another order are not
        if model.class_names != known[0].class_names and set(model.class_names or ()) == set(
            known[0].class_names or ()
        ):
            raise TeacherError(
                f"{known[0].info.name} and {model.info.name} number the same classes in different orders"
            )
