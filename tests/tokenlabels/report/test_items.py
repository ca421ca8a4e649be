"""What the page's script reads is what the map says."""

import base64
import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.loaders.photos import encode, smooth_image
from tests.tokenlabels.audit.maps import TALL, VIEWS, cells_of_image, maps_of, probability
from tokenlabels.audit.measures import measure
from tokenlabels.images.decode import UndecodableImageError
from tokenlabels.report.items import Item, item_of
from tokenlabels.report.sample import Choice
from tokenlabels.report.thumbnails import LONGEST_SIDE_PX, Thumbnail, thumbnail
from tokenlabels.summary import summarise_map
from tokenlabels.types import ScoreMaps
from tokenlabels.views.palette import ColouredMap

PHOTO = Thumbnail(640, 480, "data:,")


def items_of(maps: ScoreMaps, labels: NDArray[np.int64], num_classes: int) -> list[Item]:
    measures = measure(maps, labels, num_classes)
    return [item_of(Choice(row, ("random",)), "shard", maps[row], measures, PHOTO) for row in range(len(maps))]


def decoded(text: str, dtype: str, *shape: int) -> NDArray[np.generic]:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


@pytest.mark.parametrize("num_classes", [20, 1000])
def test_cells_can_be_read_back(num_classes: int) -> None:
    maps = maps_of(len(VIEWS), num_classes=num_classes, grid=(12, 12), k=5)
    if num_classes == 1000:  # more classes than a byte counts
        maps.classes[:] = (
            np.random.default_rng(0).permuted(np.tile(np.arange(720), (4, 1)), axis=1).reshape(4, 12, 12, 5)
        )
    for item, score_map in zip(items_of(maps, np.full(4, -1), num_classes), maps, strict=True):
        cells = decoded(item.cells, "u1" if len(item.ids) <= 256 else "<u2", 12, 12, 5)
        np.testing.assert_array_equal(np.array(item.ids)[cells], score_map.classes)
        permille, tails = decoded(item.permille, "<u2", 12, 12, 5), decoded(item.tails, "<u2", 12, 12)
        inside = {(row, column) for row, column, _, _ in cells_of_image(score_map)}
        for row, column in np.ndindex(12, 12):
            shares = [probability(score_map, row, column)[int(c)] for c in score_map.classes[row, column]]
            assert permille[row, column] == pytest.approx(np.multiply(shares, 1000), abs=0.501)
            tail = float(score_map.tail[row, column]) * 1000
            assert tails[row, column] == (pytest.approx(tail, abs=0.501) if (row, column) in inside else 65_535)


def test_leading_classes_are_drawn_as_everywhere() -> None:
    maps = maps_of(4)
    for item, score_map in zip(items_of(maps, np.full(4, -1), 20), maps, strict=True):
        coloured = ColouredMap.of(score_map, None)
        assert [known.class_id for known in item.leading] == [share.class_id for share in coloured.leading]
        for known, colour in zip(item.leading, coloured.colours.tolist(), strict=True):
            assert [int(known.colour[i : i + 2], 16) for i in (1, 3, 5)] == colour


def test_an_image_is_found_by_what_it_shows() -> None:
    maps = maps_of(8)
    labels = np.array([-1, 3] * 4)
    for row, item in enumerate(items_of(maps, labels, 20)):
        shares = summarise_map(maps[row], None).classes
        leading = {share.class_id for share in shares if share.share_of_cells >= 0.05}
        assert {*item.shows} == leading | {item.predicted} | ({3} if row % 2 else set())
        assert len(item.shows) == len({*item.shows})
        assert (item.label, item.own_mass is None, item.disagreement is None) == (
            (3, False, False) if row % 2 else (None, True, True)
        )


def test_a_map_that_misses_the_image_has_no_cells() -> None:
    maps = maps_of(1, views=[(2.0, 2.0, 3.0, 3.0)])
    (item,) = items_of(maps, np.array([-1]), 20)
    assert (decoded(item.tails, "<u2", 5, 6) == 65_535).all()
    assert item.leading == ()


def test_the_view_is_kept() -> None:
    (item,) = items_of(maps_of(1, views=[TALL]), np.array([-1]), 20)
    assert item.view == tuple(np.array(TALL, np.float32).tolist())


@pytest.mark.parametrize(("size", "shrunk"), [((500, 375), (384, 288)), ((64, 64), (64, 64)), ((2000, 3), (384, 1))])
def test_thumbnails_are_small_and_keep_their_shape(size: tuple[int, int], shrunk: tuple[int, int]) -> None:
    photo = thumbnail(encode(smooth_image(np.random.default_rng(0), *size)))
    head, _, data = photo.uri.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (head, image.format, image.size) == ("data:image/webp;base64", "WEBP", shrunk)
    assert max(image.size) <= LONGEST_SIDE_PX
    assert (photo.width_px, photo.height_px) == size


def test_damaged_photographs_are_refused() -> None:
    with pytest.raises(UndecodableImageError):
        thumbnail(b"damaged")
