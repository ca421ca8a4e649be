import numpy as np
import pytest
from numpy.typing import NDArray

from annotate import textures

OUTLINES = {
    "disc": textures.disc,
    "triangle": textures.polygon(3),
    "square": textures.polygon(4),
    "octagon": textures.polygon(8),
    "star": textures.star(5, 0.55),
    "ring": textures.ring,
    "cross": textures.cross,
    "heart": textures.heart,
}
PATTERNS = (
    textures.stripes,
    textures.checks,
    textures.dots,
    textures.rings,
    textures.rays,
    textures.waves,
    textures.zigzag,
    textures.bricks,
    textures.lattice,
    textures.scales,
)


def plane(half_side: float, num_pixels: int = 101) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    axis = np.linspace(-half_side, half_side, num_pixels, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    return u, v


@pytest.mark.parametrize("name", OUTLINES)
def test_outline_fits_the_unit_disc_and_is_not_thin(name: str) -> None:
    u, v = plane(1.5)
    inside = OUTLINES[name](u, v) < 0
    assert np.hypot(u, v)[inside].max() <= 1 + 1e-5
    assert inside.mean() * 9 > 1.0  # area, of 3.14 at most


def test_square_is_the_one_on_its_corner() -> None:
    u, v = plane(1.2)
    distance = textures.polygon(4)(u, v)
    np.testing.assert_allclose(distance, (np.abs(u) + np.abs(v) - 1) / np.sqrt(2), atol=1e-6)


def test_star_passes_through_its_corners() -> None:
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.55)
    u, v = (radii * np.sin(angles)), (-radii * np.cos(angles))
    np.testing.assert_allclose(textures.star(5, 0.55)(u, v), 0, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)
def test_pattern_has_contrast_within_0_to_1(pattern: textures.PlaneFunction) -> None:
    tones = pattern(*plane(8.0))
    assert tones.min() >= 0
    assert tones.max() <= 1
    assert tones.std() > 0.2


@pytest.mark.parametrize("kind", textures.BACKGROUND_KINDS)
def test_background_has_the_size_asked_for(kind: str) -> None:
    ground = textures.background(kind, (37, 60), np.random.default_rng(0))
    assert ground.shape == (37, 60)
    assert ground.std() > 0


def test_unknown_background_is_refused() -> None:
    with pytest.raises(ValueError, match="'fog'; known are clouds"):
        textures.background("fog", (8, 8), np.random.default_rng(0))
