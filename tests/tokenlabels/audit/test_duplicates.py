"""Things that are there twice."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loaders.photos import encode, random_maps, smooth_image, write_label_set, write_tar
from tests.tokenlabels.audit.maps import maps_of
from tokenlabels.audit.duplicates import copies, hashes_of, identical_images, map_hashes
from tokenlabels.cli.label_inputs import SetImages
from tokenlabels.store import LabelStore, open_store


@given(st.lists(st.binary(max_size=2), max_size=30))
def test_copies_of_bytes(contents: list[bytes]) -> None:
    rows = np.arange(len(contents)) * 10
    expected = {}
    for place, content in enumerate(contents):
        if (first := contents.index(content)) < place:
            expected[10 * place] = 10 * first
    assert copies(hashes_of(contents), rows) == expected


@pytest.mark.parametrize("column", ["scores", "classes", "tail", "views"])
def test_maps_differ_by_every_column(column: str) -> None:
    maps = maps_of(2, views=((0, 0, 1, 1),))
    for each in (maps.scores, maps.classes, maps.tail, maps.views):
        each[1] = each[0]
    assert len(set(map_hashes(maps).tolist())) == 1
    values = vars(maps)[column]
    values[1].flat[-1] += values.dtype.type(1)
    assert len(set(map_hashes(maps).tolist())) == 2


class CountedImages(SetImages):
    """Counts what is read."""

    num_read = 0

    def read(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        for data in super().read(*args, **kwargs):
            self.num_read += 1
            yield data


@pytest.fixture
def images() -> list[bytes]:
    """Six, of which the last repeats the second, and the fifth has the size of the first."""
    rng = np.random.default_rng(0)
    found = [encode(smooth_image(rng, 20 + row, 20)) for row in range(4)]
    return [*found, found[0][:-1] + b"x", found[1]]


@pytest.fixture
def store(images: list[bytes], tmp_path: Path) -> LabelStore:
    maps = {}
    for stem, part in (("a", range(4)), ("b", range(4, 6))):
        write_tar(tmp_path / f"{stem}.tar", {f"{stem}{row}": {"jpg": images[row], "cls": b"0"} for row in part})
        maps[stem] = random_maps(np.random.default_rng(0), [f"{stem}{row}" for row in part])
    return open_store(write_label_set(tmp_path / "labels", maps))


def test_identical_images_across_shards(store: LabelStore, tmp_path: Path) -> None:
    given_images = CountedImages([str(tmp_path / "*.tar")], store)
    seen: list[str] = []
    found = identical_images(store.shards, np.array([3, 5, 3, 3, 3, 5]), given_images, seen.append)
    assert found == {5: 1}
    assert given_images.num_read == 4
    assert seen == ["a", "b"]


def test_a_copy_of_another_predicted_class_is_missed(store: LabelStore, tmp_path: Path) -> None:
    given_images = CountedImages([str(tmp_path / "*.tar")], store)
    assert identical_images(store.shards, np.array([3, 5, 3, 3, 3, 4]), given_images) == {}
    assert given_images.num_read == 2


def test_a_copy_in_images_that_are_not_given_is_missed(store: LabelStore, tmp_path: Path) -> None:
    given_images = CountedImages([str(tmp_path / "a.tar")], store)
    assert identical_images(store.shards, np.full(6, 3), given_images) == {}
    assert given_images.num_read == 0
