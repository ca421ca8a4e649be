"""Pictures of two maps of an image."""

import numpy as np
import pytest
from PIL import Image

from tests.tokenlabels.audit.maps import VIEWS, WHOLE, maps_of
from tokenlabels.audit.pictures import draw_difference
from tokenlabels.types import ScoreMap, ScoreMaps
from tokenlabels.views.palette import class_colours

NAMES = tuple(f"a rather long name of the class with the number {class_id}, and more words" for class_id in range(20))
TITLES = ("A: first", "B: second")


def one_class(class_id: int, grid: tuple[int, int]) -> ScoreMap:
    maps = maps_of(1, grid=grid, views=(WHOLE,))
    classes = np.broadcast_to(np.array([class_id, 1, 2], np.uint16), maps.classes.shape)
    return ScoreMaps(maps.keys, maps.scores, classes, maps.tail, maps.views)[0]


def has_colour(picture: Image.Image, class_ids: list[int], which: int) -> bool:
    return bool((np.asarray(picture) == class_colours(class_ids)[which]).all(axis=-1).any())


def test_classes_have_their_colours_in_both_maps() -> None:
    image = Image.new("RGB", (64, 64), "gray")
    picture = draw_difference(image, one_class(5, (4, 4)), one_class(17, (2, 2)), NAMES, titles=TITLES)
    # 5 and 17 would have the same colour in pictures of their own
    np.testing.assert_array_equal(class_colours([5]), class_colours([17]))
    assert has_colour(picture, [5, 17], 0)
    assert has_colour(picture, [5, 17], 1)


def test_equal_maps_are_drawn_equally() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    score_map = maps_of(1, grid=(8, 8), views=(WHOLE,))[0]
    pixels = np.asarray(draw_difference(image, score_map, score_map, NAMES, titles=("the same", "the same")))
    third = (pixels.shape[1] - 4 * 24) // 3 + 24
    np.testing.assert_array_equal(pixels[:, 24 + third : 24 + 2 * third - 24], pixels[:, 24 + 2 * third : -24])


@pytest.mark.parametrize("size", [(64, 64), (400, 30), (30, 400)], ids=str)
def test_images_and_views_of_all_kinds(size: tuple[int, int]) -> None:
    image = Image.new("L", size, 128)
    for first, second in zip(maps_of(4, views=VIEWS), maps_of(4, seed=1, grid=(2, 2), views=VIEWS[::-1]), strict=True):
        picture = draw_difference(image, first, second, NAMES, titles=TITLES, lines=("one", "two"))
        assert picture.mode == "RGB"
        assert len(picture.getcolors(1 << 24) or []) > 2
