"""Teacher and data set class by class, and which classes are taken for which."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenlabels.audit.boxes import BoxMeasures, Localisation
from tokenlabels.audit.measures import ImageMeasures


@dataclass(frozen=True)
class ClassAudit:
    """One class of the teacher. Broken maps do not count.

    Attributes:
        class_id, name: of the class.
        num_images: images that the data set gives this class.
        num_agreeing: those of them whose most probable class it is.
        num_predicted: images of any class, or of none, whose most probable class it is.
        own_mass: mean mass of the class in the maps of its images, 0..1; None without images.
        num_boxed: its images with a box that their map sees; None where boxes were not asked for, as in the next two.
        pointing_hits: those of them that win the pointing game.
        mass_inside: mean share of the class's mass inside of the boxes; None where no boxed image stores the class.
    """

    class_id: int
    name: str
    num_images: int
    num_agreeing: int
    num_predicted: int
    own_mass: float | None
    num_boxed: int | None
    pointing_hits: int | None
    mass_inside: float | None

    @property
    def agreement(self) -> float | None:
        """`num_agreeing` over `num_images`, None without images."""
        return self.num_agreeing / self.num_images if self.num_images else None


@dataclass(frozen=True)
class Confusion:
    """How many images of the class `label` have `predicted`, another one, as their most probable class."""

    label: int
    predicted: int
    count: int


def audit_classes(measures: ImageMeasures, names: Sequence[str], boxes: BoxMeasures | None) -> tuple[ClassAudit, ...]:
    """All classes, in the order of their ids.

    Args:
        measures: of n images.
        names: of the K classes.
        boxes: of the same images, or None.
    """
    num_classes = len(names)
    labelled = measures.label[measures.is_labelled]
    num_images = np.bincount(labelled, minlength=num_classes)
    num_agreeing = np.bincount(measures.label[measures.agrees], minlength=num_classes)
    num_predicted = np.bincount(measures.predicted[~measures.is_broken], minlength=num_classes)
    mass = np.bincount(labelled, weights=measures.own_mass[measures.is_labelled], minlength=num_classes)
    classes = []
    for class_id, name in enumerate(names):
        found = None if boxes is None else Localisation.of(boxes, measures.label == class_id)
        classes.append(
            ClassAudit(
                class_id,
                name,
                int(num_images[class_id]),
                int(num_agreeing[class_id]),
                int(num_predicted[class_id]),
                float(mass[class_id] / num_images[class_id]) if num_images[class_id] else None,
                None if found is None else found.num_boxed,
                None if found is None else found.num_hits,
                None if found is None else found.mass_inside,
            )
        )
    return tuple(classes)


def confusions(measures: ImageMeasures, num_classes: int) -> tuple[Confusion, ...]:
    """The pairs of different classes, the most frequent first."""
    wrong = measures.is_labelled & ~measures.agrees
    pairs: NDArray[np.int64] = measures.label[wrong] * num_classes + measures.predicted[wrong]
    found, counts = np.unique(pairs, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return tuple(
        Confusion(pair // num_classes, pair % num_classes, count)
        for pair, count in zip(found[order].tolist(), counts[order].tolist(), strict=True)
    )
