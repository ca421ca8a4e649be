"""Finding the labels and the image of a key."""

from pathlib import Path

import numpy as np
import pytest

from tests.loaders.photos import Photos, encode, random_maps, smooth_image, write_label_set, write_photos, write_tar
from tokenlabels.cli.show_keys import LabelledSample, find_labelled
from tokenlabels.images.shards import TarShard
from tokenlabels.store import SkippedRecord, open_store


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    return write_photos(tmp_path_factory.mktemp("photos"), (3, 2, 1))


def find(photos: Photos, *keys: str, images: list[str] | None = None, num: int | None = None) -> list[LabelledSample]:
    return find_labelled(open_store(photos.labels), images or photos.tars, keys, num, lambda _: None)


class TestFound:
    def test_keys_in_their_order_with_their_images_and_maps(self, photos: Photos) -> None:
        keys = [photos.keys[1][1], photos.keys[0][0], photos.keys[2][0]]
        store = open_store(photos.labels)
        for key, sample in zip(keys, find(photos, *keys), strict=True):
            assert (sample.image.key, sample.score_map.key) == (key, key)
            assert sample.image.data == photos.images[key]
            assert sample.image.label == photos.classes[key]
            np.testing.assert_array_equal(sample.score_map.scores, store[key].scores)

    def test_without_keys_the_first_image_or_some_of_all_shards_in_turn(self, photos: Photos) -> None:
        assert [sample.image.key for sample in find(photos)] == [photos.keys[0][0]]
        in_turn = [photos.keys[shard][row] for row, shard in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0))]
        assert [sample.image.key for sample in find(photos, num=9)] == in_turn

    def test_other_tars_are_not_opened(self, photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = []
        scanned = TarShard.keys

        def record(shard: TarShard) -> list[str]:
            opened.append(shard.path)
            return scanned(shard)

        monkeypatch.setattr(TarShard, "keys", record)
        find(photos, photos.keys[1][0])
        assert opened == [photos.tars[1]]


class TestRefused:
    @pytest.mark.parametrize(
        ("key", "message"),
        [
            pytest.param("train-00/img_07", "neither labels nor images .* near it are train-00/img_00", id="a slip"),
            pytest.param("TRAIN-01/img_001", "near it are train-01/img_001", id="a slip in front"),
            pytest.param("", "near it are train-00/img_000", id="nothing"),
        ],
    )
    def test_no_such_key(self, photos: Photos, key: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find(photos, key)

    def test_images_that_are_not_given(self, photos: Photos) -> None:
        with pytest.raises(ValueError, match=r"is an image of train-01\.tar; name that too"):
            find(photos, photos.keys[1][0], images=photos.tars[:1])

    def test_images_of_another_data_set(self, photos: Photos, tmp_path: Path) -> None:
        other = write_photos(tmp_path, (2,), stem="val-{:02d}")
        with pytest.raises(ValueError, match=r"no labels of val-00: it was made of train-00\.tar, train-01\.tar"):
            find(photos, images=other.tars)

    def test_images_without_labels(self, photos: Photos, tmp_path: Path) -> None:
        other = write_photos(tmp_path, (2,), stem="val-{:02d}")
        with pytest.raises(ValueError, match=r"of .*val-00\.tar has no labels: .* has none of that shard yet"):
            find(photos, other.keys[0][0], images=[*photos.tars, *other.tars])

    def test_other_images_in_a_tar_of_the_same_name(self, photos: Photos, tmp_path: Path) -> None:
        image = {"jpg": encode(smooth_image(np.random.default_rng(0), 9, 9))}
        tar = tmp_path / "train-00.tar"
        write_tar(tar, {"another": image})
        with pytest.raises(ValueError, match="has no image 'train-00/img_000', though the labels"):
            find(photos, images=[str(tar)])
        with pytest.raises(ValueError, match=r"'another' .* has no labels: they were made of other images"):
            find(photos, "another", images=[str(tar)])

    def test_an_image_that_was_skipped(self, tmp_path: Path) -> None:
        labels = write_label_set(
            tmp_path / "labels",
            {"a": random_maps(np.random.default_rng(0), ["one"])},
            skipped={"a": [SkippedRecord(key="two", reason="empty file")]},
        )
        write_tar(tmp_path / "a.tar", {"one": {"jpg": b""}, "two": {"jpg": b""}})
        with pytest.raises(ValueError, match="'two' of a has no labels, as it was skipped: empty file"):
            find_labelled(open_store(labels), [str(tmp_path / "a.tar")], ["two"], None, lambda _: None)

    def test_a_sample_without_image_and_maps_that_are_broken(self, tmp_path: Path) -> None:
        maps = random_maps(np.random.default_rng(0), ["one", "two", "three", "four"])
        maps.scores[1, 2, 2], maps.tail[2, 1, 0], maps.classes[3, 0, 0, 0] = np.nan, np.nan, 60000
        labels = write_label_set(tmp_path / "labels", {"a": maps})
        write_tar(tmp_path / "a.tar", {"one": {"cls": b"1"}, **{key: {"jpg": b""} for key in maps.keys[1:]}})
        broken = [(key, f"labels of '{key}' in .* are broken") for key in maps.keys[1:]]
        for key, message in (("one", "sample 'one': no image member"), *broken):
            with pytest.raises(ValueError, match=message):
                find_labelled(open_store(labels), [str(tmp_path / "a.tar")], [key], None, lambda _: None)

    def test_what_is_not_named(self, photos: Photos) -> None:
        store = open_store(photos.labels)
        with pytest.raises(ValueError, match="name the images that were labelled"):
            find_labelled(store, [], ["a"], None, lambda _: None)
        with pytest.raises(ValueError, match="give keys or a number"):
            find_labelled(store, photos.tars, ["a"], 3, lambda _: None)
