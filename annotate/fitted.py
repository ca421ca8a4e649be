"""Encoded images -> arrays for every model of a teacher, decoded and resized in threads ahead of it."""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from annotate.ahead import map_ahead
from annotate.fit import ImageSpec, fit
from annotate.teachers import ModelInfo, Teacher
from tokenlabels.geometry import ResizeMode
from tokenlabels.images import EncodedImage
from tokenlabels.images.decode import UndecodableImageError, decode_rgb


@dataclass(frozen=True)
class FittedImage:
    """One image ready for every model of a teacher, or why it is not.

    Attributes:
        key, label: as in `EncodedImage`.
        problem: why the image cannot be used, on one line; then `arrays` is empty and `view` None.
        arrays: uint8 [H, W, 3] for each model, at its input size.
        view: float32 [4], the part of the image that they show, xyxy, normalised.
    """

    key: str
    label: int | None
    problem: str | None
    arrays: tuple[NDArray[np.uint8], ...] = ()
    view: NDArray[np.float32] | None = None


def image_specs(teacher: Teacher, resize: ResizeMode) -> tuple[ImageSpec, ...]:
    """How images are fitted for each model of the teacher.

    Every model sees the same part of the image, that of the first model's `crop_pct`, because their maps are averaged.
    """
    crop_pct = teacher.info.models[0].crop_pct
    return tuple(
        ImageSpec(
            size=model.image_size,
            interpolation=model.interpolation,
            resize=resize,
            crop_pct=crop_pct,
            fill_rgb=_mean_rgb(model),
        )
        for model in teacher.info.models
    )


def _mean_rgb(model: ModelInfo) -> tuple[int, int, int]:
    """The colour that normalisation turns into zeros."""
    red, green, blue = (round(255 * value) for value in model.mean)
    return red, green, blue


def fitted_images(
    images: Iterable[EncodedImage], specs: Sequence[ImageSpec], *, num_threads: int, max_bytes: int
) -> Generator[FittedImage, None, None]:
    """Decode and resize images in order, in `num_threads` threads; at most `max_bytes` wait for the consumer."""
    fitted_bytes = sum(3 * spec.size[0] * spec.size[1] for spec in specs)
    return map_ahead(
        partial(_fit_all, specs=specs),
        images,
        size_of=lambda image: fitted_bytes + len(image.data or b""),
        num_threads=num_threads,
        max_bytes=max_bytes,
    )


def _fit_all(image: EncodedImage, specs: Sequence[ImageSpec]) -> FittedImage:
    if image.data is None:
        return FittedImage(image.key, image.label, image.problem)
    try:
        picture = decode_rgb(image.data)
    except UndecodableImageError as error:
        return FittedImage(image.key, image.label, str(error))
    arrays, views = zip(*(fit(picture, spec) for spec in specs), strict=True)
    return FittedImage(image.key, image.label, None, arrays, views[0])
