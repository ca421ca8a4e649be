"""Labelling a few images again, to see that a label set is what its teacher says."""

from collections.abc import Iterator, Sequence

import numpy as np

from annotate.shard import AnnotateConfig, label_images, label_set
from annotate.teachers import Teacher
from tokenlabels.images import ImageShard
from tokenlabels.store import Finding, LabelStore, LabelStoreError
from tokenlabels.types import ScoreMap

# float16 keeps 11 bits, and another batch size or processor changes the last bits of float32 convolutions; half
# precision autocast rounds every activation to 11 (fp16) or 8 (bf16) bits.
RELATIVE_TOLERANCE = {"none": 0.005, "fp16": 0.02, "bf16": 0.06}


def recompute(
    store: LabelStore, shards: Sequence[ImageShard], teacher: Teacher, *, num_images: int, seed: int | None = None
) -> Iterator[Finding]:
    """Label `num_images` random images again and compare them with the store.

    Args:
        shards: the image shards of the set; at least one of them.

    Yields:
        A finding per image whose map differs by more than arithmetic explains, or that is skipped now.

    Raises:
        LabelStoreError: the teacher is not the one that made the labels, or no shard belongs to the set.
    """
    config = AnnotateConfig(resize=store.info.resize)
    there, given = (
        info.model_copy(update={"class_names": None}) for info in (store.info, label_set(teacher, config, []))
    )
    if differences := there.differences(given):
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
        if problems := list(compare(stored, again.maps[0], amp=teacher.info.amp)):
            yield Finding(shard.path, f"{stored.key}: {'; '.join(problems)}")


def compare(stored: ScoreMap, again: ScoreMap, *, amp: str) -> Iterator[str]:
    """Compare two maps of one image.

    Near ties may swap places, also across the last place that is kept. So scores are compared rank by rank, and a
    stored class has to be there again, in its place or with a score near its own, or may just have dropped out.

    Yields:
        What differs by more than arithmetic explains.
    """
    scores, new_scores = stored.scores.astype(np.float64), again.scores.astype(np.float64)
    tolerance = RELATIVE_TOLERANCE[amp] * max(1.0, float(np.abs(scores).max()))
    difference = float(np.abs(scores - new_scores).max())
    if difference > tolerance:
        yield f"scores differ by up to {difference:.3g} (allowed {tolerance:.3g})"
    same_class = stored.classes[..., :, None] == again.classes[..., None, :]
    near = np.abs(scores[..., :, None] - new_scores[..., None, :]) <= tolerance
    dropped = ~same_class.any(axis=-1) & (scores <= new_scores[..., -1:] + tolerance)
    explained = (stored.classes == again.classes) | (same_class & near).any(axis=-1) | dropped
    if num_other := int(np.count_nonzero(~explained)):
        yield f"{num_other} of {scores.size} classes are others"
    # A tail is the logistic function, of slope 1/4 at most, of the distance of two log-sums of logits; none of the two
    # moves farther than a logit. The rest is rounding to float16.
    tail_tolerance = tolerance / 2 + 2**-10
    tail_difference = float(np.abs(stored.tail.astype(np.float64) - again.tail.astype(np.float64)).max())
    if tail_difference > tail_tolerance:
        yield f"tails differ by up to {tail_difference:.3g} (allowed {tail_tolerance:.3g})"
    if not np.allclose(stored.view, again.view, rtol=0, atol=1e-6):
        yield f"the view is {stored.view.tolist()}, expected {again.view.tolist()}"
