import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from annotate.scenes import (
    BACKGROUND,
    CLASS_NAMES,
    Scene,
    draw_scene,
    read_truth,
    token_accuracy,
    write_scenes,
)

WHOLE_IMAGE = np.array([0, 0, 1, 1], np.float32)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(7, index) for index in range(40)]


class TestDrawScene:
    def test_function_of_seed_and_index(self) -> None:
        first, again, other_index, other_seed = (draw_scene(*pair) for pair in ((3, 5), (3, 5), (3, 6), (4, 5)))
        np.testing.assert_array_equal(first.image, again.image)
        np.testing.assert_array_equal(first.truth, again.truth)
        assert first.objects == again.objects
        for other in (other_index, other_seed):
            assert first.image.shape != other.image.shape or (first.image != other.image).any()

    def test_sizes_vary_in_both_orientations(self, scenes: list[Scene]) -> None:
        shapes = [scene.truth.shape for scene in scenes]
        assert all(200 <= side <= 400 for shape in shapes for side in shape)
        assert {np.sign(width - height) for height, width in shapes} == {-1, 1}
        assert len(set(shapes)) > 30

    def test_truth_objects_and_label_agree(self, scenes: list[Scene]) -> None:
        for scene in scenes:
            ids, areas = np.unique(scene.truth[scene.truth != BACKGROUND], return_counts=True)
            assert sorted(shape.class_id for shape in scene.objects) == ids.tolist()
            assert areas.max() == np.count_nonzero(scene.truth == scene.label)
            for shape in scene.objects:
                rows, columns = np.nonzero(scene.truth == shape.class_id)
                box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                assert shape.box_xyxy_px == box

    def test_one_to_three_objects_of_every_class(self, scenes: list[Scene]) -> None:
        assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
        seen = {shape.class_id for scene in scenes for shape in scene.objects}
        assert seen == set(range(len(CLASS_NAMES)))

    def test_truth_lies_on_the_shapes(self, scenes: list[Scene]) -> None:
        """Shapes are colourful and grounds are not, so a shifted or mirrored truth would see less colour."""

        def colourfulness(mask: NDArray[np.bool_], image: NDArray[np.uint8]) -> float:
            return float(np.ptp(image.astype(int), axis=2)[mask].mean())

        for scene in scenes:
            mask = scene.truth != BACKGROUND
            inside, outside = colourfulness(mask, scene.image), colourfulness(~mask, scene.image)
            mirrored = colourfulness(mask[::-1, ::-1], scene.image)
            assert inside > 1.2 * outside
            assert inside >= mirrored


class TestWriteScenes:
    def test_tars_look_like_a_users(self, tmp_path: Path) -> None:
        shards = write_scenes(tmp_path, shard_sizes=(3, 1), seed=11)
        assert [tar.name for tar in shards.tars] == ["scenes-0000.tar", "scenes-0001.tar"]
        index = 0
        for tar_path, truth_path, size in zip(shards.tars, shards.truths, (3, 1), strict=True):
            with tarfile.open(tar_path) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            truth = read_truth(truth_path)
            assert list(members) == [f"{key}.{extension}" for key in truth for extension in ("jpg", "cls", "json")]
            assert len(truth) == size
            for key in truth:
                self.check_sample(members, key, truth[key], draw_scene(11, index))
                index += 1

    @staticmethod
    def check_sample(members: dict[str, bytes], key: str, truth: NDArray[np.int16], scene: Scene) -> None:
        np.testing.assert_array_equal(truth, scene.truth)
        pixels = np.asarray(Image.open(io.BytesIO(members[f"{key}.jpg"]))).astype(int)
        assert np.abs(pixels - scene.image).mean() < 8
        assert int(members[f"{key}.cls"]) == scene.label
        description = json.loads(members[f"{key}.json"])
        assert (description["height"], description["width"]) == scene.truth.shape
        assert description["objects"] == [
            {"class": shape.class_id, "box_xyxy": list(shape.box_xyxy_px)} for shape in scene.objects
        ]

    def test_same_arguments_same_bytes(self, tmp_path: Path) -> None:
        for run in ("first", "second"):
            write_scenes(tmp_path / run, shard_sizes=(2, 1), seed=0)
        files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
        assert len(files) == 4
        for file in files:
            assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()

    @pytest.mark.parametrize("sizes", [(), (3, 0), (-1,)], ids=["none", "zero", "negative"])
    def test_impossible_sizes_are_refused(self, tmp_path: Path, sizes: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="at least one size, each 1 or more"):
            write_scenes(tmp_path, shard_sizes=sizes, seed=0)


def token_accuracy_per_pixel(
    classes_top1: NDArray[np.int64], view: list[Fraction], truth: NDArray[np.int16]
) -> tuple[int, int]:
    """The obvious twin: every cell against every pixel, in exact fractions."""
    (num_rows, num_columns), (height, width) = classes_top1.shape, truth.shape
    left, top, right, bottom = view
    cell_width, cell_height = (right - left) * width / num_columns, (bottom - top) * height / num_rows
    num_correct = num_counted = 0
    for row, column in np.ndindex(num_rows, num_columns):
        x0, y0 = left * width + column * cell_width, top * height + row * cell_height
        areas: dict[int, Fraction] = {}
        for y, x in np.ndindex(height, width):
            overlap_x = min(x0 + cell_width, x + 1) - max(x0, x)
            overlap_y = min(y0 + cell_height, y + 1) - max(y0, y)
            if overlap_x > 0 and overlap_y > 0 and truth[y, x] != BACKGROUND:
                areas[int(truth[y, x])] = areas.get(int(truth[y, x]), Fraction(0)) + overlap_x * overlap_y
        majority = [class_id for class_id in sorted(areas) if areas[class_id] * 2 >= cell_width * cell_height]
        if majority:
            num_counted += 1
            num_correct += majority[0] == classes_top1[row, column]
    return num_correct, num_counted


class TestTokenAccuracy:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_equals_the_per_pixel_twin(self, data: st.DataObject) -> None:
        sides = st.integers(1, 6)
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        truth = rng.integers(-1, 2, size=(data.draw(sides), data.draw(sides))).astype(np.int16)
        classes_top1 = rng.integers(0, 2, size=(data.draw(sides), data.draw(sides)))
        starts, lengths = st.integers(-4, 6), st.integers(1, 12)
        left, top = data.draw(starts), data.draw(starts)
        edges = [left, top, left + data.draw(lengths), top + data.draw(lengths)]
        view = [Fraction(edge, 8) for edge in edges]
        expected = token_accuracy_per_pixel(classes_top1, view, truth)
        assert token_accuracy(classes_top1, np.array(edges, np.float32) / 8, truth) == expected

    def test_counts_majorities_only(self) -> None:
        truth = np.array([[0, 0, 3, -1], [0, 0, -1, -1], [5, 2, -1, -1], [5, 2, -1, -1]], np.int16)
        # the cells hold: all of class 0; a quarter of class 3; half of 5 and half of 2; nothing
        assert token_accuracy(np.array([[0, 3], [2, 9]]), WHOLE_IMAGE, truth) == (2, 2)
        assert token_accuracy(np.array([[1, 3], [5, 9]]), WHOLE_IMAGE, truth) == (0, 2)

    def test_follows_the_view(self) -> None:
        truth = np.repeat(np.array([[0, 1, 2, 3]], np.int16), 2, axis=0)
        centre = np.array([0.25, 0, 0.75, 1], np.float32)
        assert token_accuracy(np.array([[1, 2]]), centre, truth) == (2, 2)
        # a map that reaches beyond the image on both sides: its outer cells see nothing
        wide = np.array([-0.5, 0, 1.5, 1], np.float32)
        assert token_accuracy(np.array([[9, 9, 0, 1, 2, 3, 9, 9]]), wide, truth) == (4, 4)

    def test_scene_without_objects_counts_nothing(self) -> None:
        assert token_accuracy(np.zeros((2, 2), int), WHOLE_IMAGE, np.full((4, 4), BACKGROUND)) == (0, 0)
