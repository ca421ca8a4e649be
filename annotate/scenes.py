"""Generated images whose every pixel has a known class: the material of the demo and of end-to-end tests.

One to three textured shapes of ten classes lie on a textured ground. A scene is a function of (seed, index) alone.
"""

import colorsys
import io
import json
import math
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from annotate import textures
from annotate.textures import Plane, PlaneFunction


@dataclass(frozen=True)
class _Kind:
    name: str
    outline: PlaneFunction
    pattern: PlaneFunction
    hue: float  # turns, 0 is red


_KINDS = (
    _Kind("striped disc", textures.disc, textures.stripes, 0.00),
    _Kind("checkered square", textures.polygon(4), textures.checks, 0.62),
    _Kind("dotted triangle", textures.polygon(3), textures.dots, 0.13),
    _Kind("ringed hexagon", textures.polygon(6), textures.rings, 0.40),
    _Kind("rayed star", textures.star(5, 0.55), textures.rays, 0.16),
    _Kind("wavy ring", textures.ring, textures.waves, 0.53),
    _Kind("zigzag cross", textures.cross, textures.zigzag, 0.80),
    _Kind("brick pentagon", textures.polygon(5), textures.bricks, 0.05),
    _Kind("latticed octagon", textures.polygon(8), textures.lattice, 0.30),
    _Kind("scaly heart", textures.heart, textures.scales, 0.92),
)
CLASS_NAMES: tuple[str, ...] = tuple(kind.name for kind in _KINDS)

BACKGROUND = -1
_SIDES_PX = range(200, 401)
_JPEG_QUALITY = 92
# of the short side of the image, by the number of objects
_MIN_RADIUS, _MAX_RADIUS = {1: 0.34, 2: 0.26, 3: 0.22}, 0.40
_NOISE_STD = 5.0


@dataclass(frozen=True)
class SceneObject:
    """A shape in a scene.

    Attributes:
        class_id: index into CLASS_NAMES.
        box_xyxy_px: tight box of its visible pixels, (left, top, right, bottom), right and bottom exclusive.
    """

    class_id: int
    box_xyxy_px: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Scene:
    """A generated image and the truth about it.

    Attributes:
        image: uint8 [height, width, 3], RGB.
        truth: int16 [height, width], class of the top-most object at each pixel, BACKGROUND where there is none.
        objects: the visible objects, bottom-most first; no two have the same class.
        label: class with the largest visible area.
    """

    image: NDArray[np.uint8]
    truth: NDArray[np.int16]
    objects: tuple[SceneObject, ...]
    label: int

    def __post_init__(self) -> None:
        assert self.image.shape == (*self.truth.shape, 3)
        assert any(shape.class_id == self.label for shape in self.objects)

    def __repr__(self) -> str:
        height, width = self.truth.shape
        return f"Scene({width}x{height} px, {', '.join(CLASS_NAMES[shape.class_id] for shape in self.objects)})"


@dataclass(frozen=True)
class SceneShards:
    """What `write_scenes` wrote.

    Attributes:
        tars: WebDataset tars with jpg, cls and json members, in order.
        truths: one npz per tar, in the same order; `read_truth` opens them.
    """

    tars: tuple[Path, ...]
    truths: tuple[Path, ...]


def draw_scene(seed: int, index: int) -> Scene:
    """Draw scene `index` of the endless series `seed`, both at least 0. Sides are 200-400 px, never equal."""
    rng = np.random.default_rng((seed, index))
    short_px, long_px = sorted(rng.choice(_SIDES_PX, size=2, replace=False).tolist())
    height, width = (short_px, long_px) if rng.random() < 0.5 else (long_px, short_px)
    canvas = _draw_background(rng, height, width)
    truth = np.full((height, width), BACKGROUND, np.int16)

    num_objects = int(rng.integers(1, 4))
    class_ids = rng.choice(len(_KINDS), size=num_objects, replace=False).tolist()
    placements: list[_Placement] = []
    for class_id in class_ids:
        radius_px = short_px * rng.uniform(_MIN_RADIUS[num_objects], _MAX_RADIUS)
        placements.append(_Placement.draw(rng, class_id, radius_px, (width, height), placements))
        placements[-1].paint(canvas, truth)
    canvas += _NOISE_STD * rng.standard_normal((height, width, 1), np.float32)

    areas = [int(np.count_nonzero(truth == class_id)) for class_id in class_ids]
    objects = tuple(
        SceneObject(class_id, _visible_box(truth == class_id))
        for class_id, area in zip(class_ids, areas, strict=True)
        if area
    )
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(image, truth, objects, label=class_ids[int(np.argmax(areas))])


def write_scenes(folder: Path, *, shard_sizes: Sequence[int], seed: int) -> SceneShards:
    """Write scenes 0, 1, ... of the series `seed` as WebDataset tars of `shard_sizes` images.

    The tars hold what a user's would (jpg, cls, json); the truth lies beside them, in `folder/truth`. The same
    arguments write the same bytes.

    Raises:
        ValueError: `shard_sizes` is empty or holds a number below 1.
    """
    if not shard_sizes or min(shard_sizes) < 1:
        raise ValueError(f"got shard_sizes {tuple(shard_sizes)}; give at least one size, each 1 or more")
    (folder / "truth").mkdir(parents=True, exist_ok=True)
    tars, truths = [], []
    first = 0
    for shard, size in enumerate(shard_sizes):
        scenes = {f"scene_{index:06d}": draw_scene(seed, index) for index in range(first, first + size)}
        first += size
        tars.append(folder / f"scenes-{shard:04d}.tar")
        with tarfile.open(tars[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, scene in scenes.items():
                for extension, data in _encode(scene).items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)  # its other fields, time and owner among them, stay 0
                    tar.addfile(member, io.BytesIO(data))
        truths.append(folder / "truth" / f"scenes-{shard:04d}.npz")
        arrays: dict[str, Any] = {key: scene.truth for key, scene in scenes.items()}
        np.savez_compressed(truths[-1], **arrays)
    return SceneShards(tuple(tars), tuple(truths))


def read_truth(path: Path) -> dict[str, NDArray[np.int16]]:
    """The truth int16 [height, width] of every image of a tar, by WebDataset key, in the order of the tar."""
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def token_accuracy(
    classes_top1: NDArray[np.integer], view: NDArray[np.floating], truth: NDArray[np.integer]
) -> tuple[int, int]:
    """Compare the best class of each cell with the pixels that the cell covers.

    A cell counts if one class covers at least half of it; cells of background, or of several classes without a
    majority, do not. Of two classes with exactly half each, the lower id is the truth.

    Args:
        classes_top1: int [h, w], best class per cell.
        view: float [4], part of the image that the map covers, xyxy, normalised; may reach outside 0..1.
        truth: int [height, width], class per pixel, BACKGROUND where there is none.

    Returns:
        Number of correct cells, and number of counted cells.
    """
    (num_rows, num_columns), (height, width) = classes_top1.shape, truth.shape
    left, top, right, bottom = (float(edge) for edge in view)
    rows = _pixel_shares(np.linspace(top, bottom, num_rows + 1) * height, height)
    columns = _pixel_shares(np.linspace(left, right, num_columns + 1) * width, width)
    present = np.unique(truth[truth != BACKGROUND])
    if not present.size:
        return 0, 0
    # rounded, so that exact halves compare equal
    coverage = np.stack([rows @ (truth == class_id) @ columns.T for class_id in present]).round(9)
    counted = coverage.max(axis=0) >= 0.5
    correct = counted & (present[coverage.argmax(axis=0)] == classes_top1)
    return int(correct.sum()), int(counted.sum())


def _pixel_shares(edges_px: NDArray[np.float64], num_pixels: int) -> NDArray[np.float64]:
    """Share [n, num_pixels] of each of n intervals that falls into each pixel."""
    starts, ends = edges_px[:-1, None], edges_px[1:, None]
    pixels = np.arange(num_pixels)
    overlap = np.minimum(ends, pixels + 1) - np.maximum(starts, pixels)
    return np.asarray(np.maximum(overlap, 0) / (ends - starts))


@dataclass(frozen=True, eq=False)
class _Placement:
    """One object before it is painted."""

    class_id: int
    centre_px: tuple[float, float]  # x, y
    radius_px: float
    turn: float  # radians
    stretch: float  # height over width
    step_px: float  # unit of length of the pattern
    dark: Plane  # float32 [3], RGB in 0..255
    light: Plane

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        class_id: int,
        radius_px: float,
        size_px: tuple[int, int],
        below: "Sequence[_Placement]",
    ) -> "_Placement":
        """Of a few random places inside the image, the farthest from the objects below: overlap without burial."""
        margin_px = 0.8 * radius_px
        candidates = rng.uniform(margin_px, np.array(size_px) - margin_px, size=(8, 2)).tolist()
        centre = max(
            candidates, key=lambda place: min((math.dist(place, other.centre_px) for other in below), default=0)
        )
        dark, light = _two_tones(rng, _KINDS[class_id].hue)
        return cls(
            class_id=class_id,
            centre_px=(centre[0], centre[1]),
            radius_px=radius_px,
            turn=rng.uniform(-math.pi, math.pi),
            stretch=rng.uniform(0.8, 1.0),
            step_px=2 + rng.uniform(0.075, 0.105) * radius_px,
            dark=dark,
            light=light,
        )

    def paint(self, canvas: NDArray[np.float32], truth: NDArray[np.int16]) -> None:
        """Lay the object over `canvas` and `truth`, in place."""
        kind, (centre_x, centre_y), reach_px = _KINDS[self.class_id], self.centre_px, self.radius_px + 1
        height, width = truth.shape
        rows = slice(max(math.floor(centre_y - reach_px), 0), min(math.ceil(centre_y + reach_px), height))
        columns = slice(max(math.floor(centre_x - reach_px), 0), min(math.ceil(centre_x + reach_px), width))
        y, x = np.mgrid[rows, columns].astype(np.float32)
        x, y = x + (0.5 - centre_x), y + (0.5 - centre_y)
        u = x * math.cos(self.turn) + y * math.sin(self.turn)
        v = (y * math.cos(self.turn) - x * math.sin(self.turn)) / self.stretch
        distance_px = kind.outline(u / self.radius_px, v / self.radius_px) * self.radius_px
        tone = kind.pattern(u / self.step_px, v / self.step_px)[..., None]
        lit_from_upper_left = 1 - 0.15 * np.clip((x + y) / (2 * self.radius_px), -1, 1)[..., None]
        paint = (self.dark + tone * (self.light - self.dark)) * lit_from_upper_left
        soft_edge = np.clip(0.5 - distance_px, 0, 1)[..., None]
        canvas[rows, columns] += soft_edge * (paint - canvas[rows, columns])
        truth[rows, columns][distance_px < 0] = self.class_id


def _draw_background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """A textured ground of muted colours, float32 [height, width, 3] in about 0..255."""
    kind = textures.BACKGROUND_KINDS[int(rng.integers(len(textures.BACKGROUND_KINDS)))]
    plane = textures.background(kind, (height, width), rng)[..., None]
    base, contrast = rng.uniform(70, 190), rng.choice((-1, 1)) * rng.uniform(25, 60)
    dark, light = base + np.array([[-contrast / 2], [contrast / 2]]) + rng.normal(0, 14, size=(2, 3))
    return np.asarray(dark.astype(np.float32) + plane * (light - dark).astype(np.float32))


def _two_tones(rng: np.random.Generator, hue: float) -> tuple[Plane, Plane]:
    """A dark and a light colour near one hue, float32 [3] each in 0..255."""
    hues = hue + rng.normal(0, 0.025, size=2)
    dark = _rgb(hues[0], rng.uniform(0.6, 0.9), rng.uniform(0.35, 0.6))
    light = _rgb(hues[1], rng.uniform(0.15, 0.6), rng.uniform(0.85, 1.0))
    return dark, light


def _rgb(hue: float, saturation: float, value: float) -> Plane:
    red_green_blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return np.array(red_green_blue, np.float32) * 255


def _visible_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _encode(scene: Scene) -> dict[str, bytes]:
    """The members of a WebDataset sample by extension."""
    jpeg = io.BytesIO()
    Image.fromarray(scene.image).save(jpeg, "JPEG", quality=_JPEG_QUALITY)
    height, width = scene.truth.shape
    objects = [{"class": shape.class_id, "box_xyxy": list(shape.box_xyxy_px)} for shape in scene.objects]
    description = {"width": width, "height": height, "objects": objects}
    return {"jpg": jpeg.getvalue(), "cls": str(scene.label).encode(), "json": json.dumps(description).encode()}
