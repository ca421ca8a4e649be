"""A small label set with everything that a page has to cope with: all kinds of views, hostile names and keys, images
without a class, without a match, and one of which the map is broken."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.loaders.photos import encode, smooth_image, write_label_set, write_tar
from tests.tokenlabels.audit.maps import TALL, VIEWS, WIDE, maps_of
from tokenlabels.audit.audit import Audit, audit_store
from tokenlabels.audit.measures import measure
from tokenlabels.cli.label_inputs import SetImages
from tokenlabels.store import LabelStore, ShardReader, open_store
from tokenlabels.types import ScoreMap, ScoreMaps

HOSTILE_NAME = "</script><script>document.title = 'owned'</script>"
HOSTILE_KEY = "a_<img src=x onerror=\"document['title']='owned'\">&amp;'_ü"
LONG_NAME = "a very long name of a class, which goes on and on, and on, " * 4
NAMES = (
    HOSTILE_NAME,
    "\"quoted\" & 'single'",
    "straße 北京",
    LONG_NAME,
    *(f"class-{number:02d}" for number in range(4, 20)),
)
NUM_CLASSES = len(NAMES)
LENGTHS = {"a": 17, "b": 23}
BROKEN = ("b", 3)


@dataclass(frozen=True)
class Case:
    """A label set and its images.

    Attributes:
        labels: folder of the set.
        tars: paths of the image tars.
        maps: by stem.
        classes: the data set's own, by stem; -1 without.
    """

    labels: Path
    tars: tuple[str, ...]
    maps: dict[str, ScoreMaps]
    classes: dict[str, NDArray[np.int64]]

    @property
    def pattern(self) -> str:
        return f"{Path(self.tars[0]).parent}/*.tar"

    @property
    def store(self) -> LabelStore:
        return open_store(self.labels)

    @property
    def images(self) -> SetImages:
        return SetImages(self.tars, self.store)

    def audit(self, labels_of: Callable[[ShardReader], NDArray[np.int64]] | None = None) -> Audit:
        return audit_store(self.store, labels_of or (lambda shard: self.classes[shard.stem]), NAMES)

    def map_of(self, key: str) -> ScoreMap:
        return next(score_map for maps in self.maps.values() for score_map in maps if score_map.key == key)


def write_case(folder: Path, *, damaged: frozenset[str] = frozenset()) -> Case:
    """Write the set into a folder; the images of `damaged` keys cannot be decoded."""
    maps = {stem: _maps(stem, num, seed) for seed, (stem, num) in enumerate(LENGTHS.items())}
    classes = {stem: _classes(of_shard) for stem, of_shard in maps.items()}
    rng = np.random.default_rng(0)
    tars = []
    for stem, of_shard in maps.items():
        samples = {}
        for row, key in enumerate(of_shard.keys):
            width, height = _size_px(of_shard.views[row])
            image = encode(smooth_image(rng, width, height))
            own = {"cls": str(classes[stem][row]).encode()} if classes[stem][row] >= 0 else {}
            samples[key] = {"jpg": b"damaged" if key in damaged else image, **own}
        tars.append(str(folder / f"{stem}.tar"))
        write_tar(Path(tars[-1]), samples)
    labels = write_label_set(folder / "labels", maps, num_classes=NUM_CLASSES, class_names=NAMES)
    return Case(labels, tuple(tars), maps, classes)


def _maps(stem: str, num: int, seed: int) -> ScoreMaps:
    maps = maps_of(num, seed=seed, num_classes=NUM_CLASSES, prefix=stem)
    if stem == BROKEN[0]:
        maps.scores[BROKEN[1]] = np.nan
    keys = (HOSTILE_KEY, *maps.keys[1:]) if stem == "a" else maps.keys
    return ScoreMaps(keys, maps.scores, maps.classes, maps.tail, maps.views)


def _classes(maps: ScoreMaps) -> NDArray[np.int64]:
    """Every third one is right, every third has none."""
    predicted = measure(maps, np.full(len(maps), -1), NUM_CLASSES).predicted
    turn = np.arange(len(maps)) % 3
    return np.where(turn == 0, predicted, np.where(turn == 1, (predicted + 1) % NUM_CLASSES, -1))


def _size_px(view: NDArray[np.float32]) -> tuple[int, int]:
    """Width and height of an image that has such a view: letterboxed ones fill a square."""
    assert view.tolist() in np.array(VIEWS, np.float32).tolist()
    if view.tolist() == np.array(WIDE, np.float32).tolist():
        return 190, 100
    return (100, 160) if view.tolist() == np.array(TALL, np.float32).tolist() else (120, 90)
