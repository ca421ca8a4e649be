"""The paint box of the generated scenes: outlines, patterns and backgrounds as functions on pixel grids.

Outlines are signed distances in the frame of the object (u right, v down, the object fits the unit disc);
patterns and backgrounds are intensities in 0..1.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.floating[Any]]
PlaneFunction = Callable[[Plane, Plane], Plane]

BACKGROUND_KINDS = ("clouds", "slope", "weave", "mottle")


def polygon(num_sides: int) -> PlaneFunction:
    """Outline of a regular polygon with its corners on the unit circle, one of them at the top."""
    sector = 2 * math.pi / num_sides

    def distance(u: Plane, v: Plane) -> Plane:
        from_side = np.mod(np.arctan2(u, -v), sector) - sector / 2
        return np.hypot(u, v) * np.cos(from_side) - math.cos(sector / 2)

    return distance


def star(num_points: int, waist: float) -> PlaneFunction:
    """Outline of a star whose inner corners lie at the radius `waist`; the distance is to the nearest edge line."""
    sector = 2 * math.pi / num_points
    # the edge from the point (0, 1) to the inner corner, as a unit normal
    run, rise = math.sin(sector / 2) * waist, math.cos(sector / 2) * waist - 1
    normal = (-rise / math.hypot(run, rise), run / math.hypot(run, rise))

    def distance(u: Plane, v: Plane) -> Plane:
        angle = np.abs(np.mod(np.arctan2(u, -v) + sector / 2, sector) - sector / 2)
        radius = np.hypot(u, v)
        return radius * np.sin(angle) * normal[0] + (radius * np.cos(angle) - 1) * normal[1]

    return distance


def disc(u: Plane, v: Plane) -> Plane:
    """Outline of the unit disc."""
    return np.hypot(u, v) - 1


def ring(u: Plane, v: Plane) -> Plane:
    """Outline of a broad ring; what lies in its hole stays visible."""
    return np.abs(np.hypot(u, v) - 0.68) - 0.32


def cross(u: Plane, v: Plane) -> Plane:
    """Outline of a plus sign."""
    across, along = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(across - 0.36, along - 0.93), np.maximum(along - 0.36, across - 0.93))


def heart(u: Plane, v: Plane) -> Plane:
    """Outline of a heart: two discs on the upper sides of a square that stands on its corner."""
    side, x, y = 0.62, np.abs(u), -v + 0.1
    lobe = np.hypot(x - side / 2, y - side / 2) - side / math.sqrt(2)
    corner = x + np.abs(y) - side
    return np.asarray(np.minimum(lobe, corner))


def stripes(u: Plane, _: Plane) -> Plane:
    """Parallel bands."""
    return _band(np.sin(math.pi * u))


def checks(u: Plane, v: Plane) -> Plane:
    """A chess board."""
    return _band(2 * np.sin(np.pi / 1.5 * u) * np.sin(np.pi / 1.5 * v))


def dots(u: Plane, v: Plane) -> Plane:
    """Round dots on a square lattice."""
    return _band(4 * (0.55 - np.hypot(np.mod(u, 1.8) - 0.9, np.mod(v, 1.8) - 0.9)))


def rings(u: Plane, v: Plane) -> Plane:
    """Circles around the centre."""
    return _band(np.sin(np.pi * np.hypot(u, v)))


def rays(u: Plane, v: Plane) -> Plane:
    """Twelve rays from the centre."""
    return _band(np.sin(12 * np.arctan2(u, v)) * np.minimum(np.hypot(u, v), 2))


def waves(u: Plane, v: Plane) -> Plane:
    """Bands that swing."""
    return _band(np.sin(np.pi * (v + 0.6 * np.sin(np.pi * u / 1.5))))


def zigzag(u: Plane, v: Plane) -> Plane:
    """Bands with sharp bends."""
    return _band(np.sin(np.pi * (v + 1.4 * np.abs(np.mod(u / 2, 2) - 1))))


def bricks(u: Plane, v: Plane) -> Plane:
    """A wall: rows of bricks, every second row shifted by half a brick."""
    shifted = u + 1.5 * np.mod(np.floor(v / 1.4), 2)
    joint = np.minimum(np.mod(v, 1.4), np.mod(shifted, 3.0))
    return _band(8 * (joint - 0.3))


def lattice(u: Plane, v: Plane) -> Plane:
    """Thin crossing lines, slanted."""
    lines = np.minimum(np.abs(np.mod(u + v, 2) - 1), np.abs(np.mod(u - v, 2) - 1))
    return _band(8 * (lines - 0.28))


def scales(u: Plane, v: Plane) -> Plane:
    """Overlapping round scales, shaded from rim to root."""
    row = np.floor(v)
    across = np.mod(u + np.mod(row, 2), 2) - 1
    height = np.mod(v, 1) - np.sqrt(np.maximum(1 - across**2, 0)) * 0.9
    return np.asarray(np.mod(height, 1))


def background(kind: str, size: tuple[int, int], rng: np.random.Generator) -> Plane:
    """Intensities [height, width] of one of BACKGROUND_KINDS; weaker in contrast than any pattern above."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, math.pi)
    across = x * math.cos(angle) + y * math.sin(angle)
    along = y * math.cos(angle) - x * math.sin(angle)
    if kind == "clouds":
        plane = _clouds(rng, size, cell_px=60) * 0.7 + _clouds(rng, size, cell_px=18) * 0.3
    elif kind == "slope":
        plane = (across - across.min()) / np.ptp(across)
    elif kind == "weave":
        per_px = 2 * math.pi / rng.uniform(9, 18)
        plane = 0.5 + 0.25 * (np.sin(across * per_px) + np.sin(along * per_px))
    elif kind == "mottle":
        plane = _clouds(rng, size, cell_px=8)
    else:
        raise ValueError(f"got background {kind!r}; known are {', '.join(BACKGROUND_KINDS)}")
    return np.asarray(plane, np.float32)


def _band(wave: Plane) -> Plane:
    """A wave around 0 to nearly two tones, with edges soft enough not to alias."""
    return np.asarray(np.clip(0.5 + 1.5 * wave, 0, 1))


def _clouds(rng: np.random.Generator, size: tuple[int, int], cell_px: int) -> Plane:
    """Smooth noise: random values on a coarse lattice, interpolated."""
    height, width = size
    coarse = rng.random((height // cell_px + 2, width // cell_px + 2), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
