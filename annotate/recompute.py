"""Labelling a few images again, to see that a label set is what its teacher says."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from annotate.images import ImageShard
from annotate.shard import AnnotateConfig, label_images, label_set
from annotate.teachers import Teacher
from tokenlabels.store import Finding, LabelStore, LabelStoreError
from tokenlabels.types import ScoreMap

# float16 keeps 11 bits, and another batch size or processor changes the last bits of float32 convolutions; half
# precision autocast changes about the eighth bit of a logit.
RELATIVE_TOLERANCE = {"none": 0.005, "fp16": 0.03, "bf16": 0.15}


@dataclass(frozen=True)
class Recomputed:
    """How far one stored map is from what the teacher says now.

    Attributes:
        key: the image.
        max_difference: largest difference of a score, rank by rank, in logits.
        tolerance: what is allowed.
        leading_agreement: share of cells with the same leading class.
    """

    key: str
    max_difference: float
    tolerance: float
    leading_agreement: float


def recompute(
    store: LabelStore, shards: Sequence[ImageShard], teacher: Teacher, *, num_images: int, seed: int = 0
) -> Iterator[Finding]:
    """Label `num_images` random images again and compare them with the store.

    Args:
        shards: the image shards of the set; at least one of them.

    Yields:
        A finding per image whose scores or classes differ by more than arithmetic explains, or that is skipped now.

    Raises:
        LabelStoreError: the teacher is not the one that made the labels, or no shard belongs to the set.
    """
    config = AnnotateConfig(resize=store.info.resize, class_names=store.info.class_names, max_skip=1.0)
    if differences := store.info.differences(label_set(teacher, config, [])):
        lines = "\n  ".join(differences)
        raise LabelStoreError(f"{store.path} was made by another teacher (there != given):\n  {lines}")
    source_by_stem = {shard.stem: shard for shard in shards}
    rows = [(shard, row) for shard in store.shards if shard.stem in source_by_stem for row in range(len(shard))]
    if not rows:
        raise LabelStoreError(f"{store.path}: none of the given images belong to its shards")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(rows), size=min(num_images, len(rows)), replace=False)
    for index in sorted(chosen.tolist()):
        shard, row = rows[index]
        stored = shard.row(row)
        source = source_by_stem[shard.stem]
        again = label_images(source.read([stored.key]), 1, teacher, config)
        if again.skipped:
            yield Finding(shard.path, f"{stored.key}: cannot be labelled now ({again.skipped[0].reason})")
            continue
        result = compare(stored, again.maps[0], amp=teacher.info.amp)
        if result.max_difference > result.tolerance or result.leading_agreement < 0.99:
            yield Finding(
                shard.path,
                f"{stored.key}: scores differ by up to {result.max_difference:.3g} (allowed {result.tolerance:.3g}), "
                f"{result.leading_agreement:.1%} of the cells have the same leading class",
            )


def compare(stored: ScoreMap, again: ScoreMap, *, amp: str) -> Recomputed:
    """Compare two maps of one image.

    Scores are compared rank by rank and not class by class, because near ties may swap places. A leading class
    counts as the same where it is among the new classes with a score that close to the new best.
    """
    scores, new_scores = stored.scores.astype(np.float64), again.scores.astype(np.float64)
    tolerance = RELATIVE_TOLERANCE[amp] * max(1.0, float(np.abs(scores).max()))
    close_to_best = new_scores >= new_scores[..., :1] - 2 * tolerance
    same = ((again.classes == stored.classes[..., :1]) & close_to_best).any(axis=-1)
    return Recomputed(stored.key, float(np.abs(scores - new_scores).max()), tolerance, float(same.mean()))
