"""What `tokenlabels inspect` prints: a label set, or one map, as a dataclass."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenlabels.geometry import valid_cells
from tokenlabels.types import ScoreMap, ScoreMaps

if TYPE_CHECKING:
    from tokenlabels.store import LabelStore


@dataclass(frozen=True)
class StoreSummary:
    """A label set at a glance.

    Attributes:
        teacher: names of the models, and what was done with them.
        grid: rows and columns of cells.
        k: stored classes per cell.
        num_classes: classes of the teacher.
        resize: how images were fitted to the teacher's input.
        num_images: images with labels.
        num_shards: finished shards.
        num_missing_shards: shards that are listed but not finished.
        num_skipped: images without labels; the manifests name them with their reasons.
        size_bytes: bytes of all shard files.
        bytes_per_image: `size_bytes` over `num_images`.
        distinct_classes_median: median over images of the number of different classes in a map.
        distinct_classes_p99: 99th percentile of the same.
        tail_mean: softmax mass of the classes that are not stored, mean over all cells, letterbox padding
            included.
        num_labelled: labelled images whose data set gives a class (`cls`).
        image_level_agreement: share of those whose most probable class over the whole map is that class, or None.
    """

    path: str
    teacher: str
    grid: tuple[int, int]
    k: int
    num_classes: int
    resize: str
    num_images: int
    num_shards: int
    num_missing_shards: int
    num_skipped: int
    size_bytes: int
    bytes_per_image: float
    distinct_classes_median: float
    distinct_classes_p99: float
    tail_mean: float
    num_labelled: int
    image_level_agreement: float | None

    def __str__(self) -> str:
        return _page(self)


@dataclass(frozen=True)
class ClassShare:
    """How much of a map one class holds: cells where it has the highest score, of all cells, and its mean mass."""

    class_id: int
    name: str
    share_of_cells: float
    mean_probability: float


@dataclass(frozen=True)
class MapSummary:
    """One map at a glance. `classes` are in descending order of share."""

    key: str
    grid: tuple[int, int]
    k: int
    view: tuple[float, ...]
    tail_mean: float
    num_distinct_classes: int
    classes: tuple[ClassShare, ...]


def summarise_store(store: "LabelStore", on_shard: Callable[[str], None] = lambda _: None) -> StoreSummary:
    """Read every shard once and summarise the set. `on_shard` is told the stem of each shard before it is read."""
    distinct: list[NDArray[np.int64]] = []
    tail_sum, num_cells = 0.0, 0
    for shard in store.shards:
        on_shard(shard.stem)
        for maps in shard.stream():
            distinct.append(num_distinct_classes(maps))
            tail_sum += float(maps.tail.sum(dtype=np.float64))
            num_cells += maps.tail.size
    counts = np.concatenate(distinct) if distinct else np.zeros(0, np.int64)
    median, p99 = np.percentile(counts, [50, 99]) if len(counts) else (float("nan"), float("nan"))
    manifests = [shard.manifest for shard in store.shards]
    num_labelled = sum(manifest.image_level.num_labelled for manifest in manifests)
    num_agreeing = sum(manifest.image_level.num_agreeing for manifest in manifests)
    size_bytes = sum(manifest.size_bytes for manifest in manifests)
    return StoreSummary(
        path=str(store.path),
        teacher=describe_teacher(store),
        grid=store.info.grid,
        k=store.info.k,
        num_classes=store.info.num_classes,
        resize=store.info.resize,
        num_images=len(store),
        num_shards=len(store.shards),
        num_missing_shards=len(store.missing),
        num_skipped=sum(len(manifest.skipped) for manifest in manifests),
        size_bytes=size_bytes,
        bytes_per_image=size_bytes / max(len(store), 1),
        distinct_classes_median=float(median),
        distinct_classes_p99=float(p99),
        tail_mean=tail_sum / max(num_cells, 1),
        num_labelled=num_labelled,
        image_level_agreement=num_agreeing / num_labelled if num_labelled else None,
    )


def summarise_map(score_map: ScoreMap, class_names: tuple[str, ...] | None) -> MapSummary:
    """Which classes a map shows, by the share of cells in which they lead. Cells of letterbox padding do not count."""
    inside = valid_cells(score_map.view, score_map.grid)
    classes, probabilities = score_map.classes[inside], score_map.probabilities()[inside]
    leading = classes[:, 0]
    num_cells = max(len(leading), 1)
    mean_probability = {
        int(c): float(probabilities[classes == c].sum() / num_cells) for c in np.unique(classes).tolist()
    }
    shares = {c: float((leading == c).sum() / num_cells) for c in mean_probability}
    order = sorted(shares, key=lambda c: (-shares[c], -mean_probability[c], c))
    return MapSummary(
        key=score_map.key,
        grid=score_map.grid,
        k=score_map.k,
        view=tuple(score_map.view.tolist()),
        tail_mean=float(score_map.tail[inside].astype(np.float64).sum() / num_cells),
        num_distinct_classes=len(order),
        classes=tuple(ClassShare(c, class_name(class_names, c), shares[c], mean_probability[c]) for c in order),
    )


def class_name(class_names: tuple[str, ...] | None, class_id: int) -> str:
    """The name of a class, or its number where nobody knows the names."""
    return class_names[class_id] if class_names else f"class {class_id}"


def describe_teacher(store: "LabelStore") -> str:
    """One line: the models and their inputs, averaging, precision."""
    teacher = store.info.teacher
    if not teacher.models:
        return teacher.origin
    models = " + ".join(
        f"{model.name} ({model.weights}, {model.image_size[0]}x{model.image_size[1]} px)" for model in teacher.models
    )
    flip = ", mirrored views averaged" if teacher.flip else ""
    amp = f", {teacher.amp}" if teacher.amp != "none" else ""
    return models + flip + amp


def num_distinct_classes(maps: ScoreMaps) -> NDArray[np.int64]:
    """Different classes stored anywhere in each map, int64 [n]."""
    ids = np.sort(maps.classes.reshape(len(maps), math.prod(maps.classes.shape[1:])), axis=1)
    return np.asarray(1 + (ids[:, 1:] != ids[:, :-1]).sum(axis=1), dtype=np.int64)


def image_level_class(maps: ScoreMaps) -> NDArray[np.int64]:
    """The class with the largest mean probability over the cells of each map, int64 [n].

    Only stored mass counts: a class outside the k best of a cell adds nothing there. Nor do cells of letterbox padding.
    """
    best = np.zeros(len(maps), np.int64)
    probabilities = maps.probabilities()
    for row, (ids, view) in enumerate(zip(maps.classes, maps.views, strict=True)):
        weights = probabilities[row] * valid_cells(view, maps.grid)[..., None]
        classes, where = np.unique(ids, return_inverse=True)
        best[row] = classes[np.argmax(np.bincount(where.ravel(), weights=weights.ravel()))]
    return best


def _page(summary: StoreSummary) -> str:
    lines = {field.name.replace("_", " "): _shown(getattr(summary, field.name)) for field in fields(summary)}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return "unknown" if value is None else str(value)


def as_json(summary: StoreSummary | MapSummary) -> dict[str, Any]:
    """The summary as plain JSON types; NaN, which JSON lacks, becomes None."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(summary)), parse_constant=lambda _: None)
    return plain
