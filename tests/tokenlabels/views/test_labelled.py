"""Pictures of an image beside its labels."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.tokenlabels.views.maps import LONG_NAME, score_map
from tokenlabels.geometry import view_letterbox
from tokenlabels.views import overlay
from tokenlabels.views.crop import StudentCrop, coloured_targets
from tokenlabels.views.drawing import MARGIN_PX
from tokenlabels.views.figure import Figure, Frame, Words, draw
from tokenlabels.views.labelled import Labelled, labelled_figure
from tokenlabels.views.legend import COLUMN_PX, percent
from tokenlabels.views.palette import GREY, class_colours
from tokenlabels.views.panels import CAPTION_PX
from tokenlabels.views.typeface import matplotlib_font

NAMES = tuple(f"kind {index}" for index in range(1000))
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (392, 392, 3)).astype(np.uint8))


def labelled(classes: Any = ((1, 2), (3, 3)), image: Image.Image = PHOTO, **more: Any) -> Labelled:
    of_map = {name: more.pop(name) for name in ("view", "logit", "tail", "key") if name in more}
    return Labelled(image, score_map(np.array(classes), **of_map), **({"names": NAMES} | more))


def crop(num_classes: int = 1000, **more: Any) -> StudentCrop:
    """A crop whose left half is class 3, its right half class 7, and without target in the first row."""
    targets = np.zeros((14, 14, num_classes), np.float32)
    targets[:, :7, 3] = targets[:, 7:, 7] = 0.75
    image_target = np.zeros(num_classes, np.float32)
    image_target[[3, 7]] = 0.25, 0.5
    valid = np.ones((14, 14), bool)
    valid[0] = False
    values = {"box": (0.1, 0.2, 0.8, 0.9), "flip": True, "pixels": np.full((224, 224, 3), 9, np.uint8)}
    return StudentCrop(**(values | {"targets": targets, "image_target": image_target, "valid": valid} | more))


def texts(figure: Figure) -> list[str]:
    return [item.text for item in figure.items if isinstance(item, Words)]


def boxes(figure: Figure) -> list[tuple[float, float, float, float, str]]:
    """Where the texts are: left, top, right, bottom."""
    found = []
    for item in figure.items:
        if isinstance(item, Words):
            width = item.font.getlength(item.text)
            left = item.x - {"l": 0, "m": width / 2, "r": width}[item.anchor]
            found.append((left, item.y - 0.75 * item.size_px, left + width, item.y + 1, item.text))
    return found


class TestContents:
    def test_what_is_written(self) -> None:
        figure = labelled_figure(labelled(label=3, source="resnet18; squash", key="n01440764_10026"))
        shown = texts(figure)
        for text in ("n01440764_10026", "resnet18; squash", "image, 392 x 392 px", "2 x 2 token labels", "kind 3"):
            assert text in shown
        assert "The teacher agrees with the data set" in shown
        assert "data set: kind 3" in shown

    @pytest.mark.parametrize(
        ("label", "expected"),
        [
            (2, ["The teacher disagrees with the data set", "teacher: kind 3, 50%", "data set: kind 2"]),
            (None, ["Whole image", "teacher: kind 3, 50%", "the data set gives no class"]),
        ],
    )
    def test_the_class_of_the_data_set(self, label: int | None, expected: list[str]) -> None:
        shown = texts(labelled_figure(labelled(label=label)))
        assert [text for text in shown if text in expected] == expected

    def test_entropy_tail_and_a_class(self) -> None:
        one = labelled(((1, 1), (1, 2)), logit=0.0, tail=0.5, class_id=1)
        shown = texts(labelled_figure(one))
        # twice 1/4 and 998 times 1/1996
        entropy = (2 * 0.25 * np.log(4) + 0.5 * np.log(1996)) / np.log(1000)
        assert f"entropy, mean {entropy:.0%}" in shown
        assert "tail, mean 50%" in shown
        assert "class, mean 19%: kind 1" in shown  # 1/4 in three of four cells

    def test_classes_of_a_cell(self) -> None:
        figure = labelled_figure(labelled(cell=(0, 1), logit=0.0, tail=0.2))
        shown = texts(figure)
        assert shown[shown.index("Cell 0,1") :] == [
            *("Cell 0,1", "kind 2", "40.0%", "kind 999", "40.0%", "the other 998 classes (tail)", "20.0%")
        ]
        bars = [item for item in figure.items if isinstance(item, Frame) and item.height == 8][1::2]
        assert [round(bar.width) for bar in bars] == [160, 160, 80]
        assert bars[0].fill == tuple(class_colours([2])[0].tolist())

    def test_a_cell_of_padding_is_said_to_be_one(self) -> None:
        view = view_letterbox(100, 25, (100, 100))
        shown = texts(
            labelled_figure(labelled(np.ones((8, 8), int), Image.new("L", (100, 25)), view=view, cell=(0, 0)))
        )
        assert "Cell 0,0: padding, beside the image" in shown

    def test_an_image_that_passes_between_the_centres_of_all_cells(self) -> None:
        view = view_letterbox(4000, 1, (64, 64))
        one = labelled(np.ones((2, 2), int), Image.new("L", (4000, 1)), view=view, label=2)
        shown = texts(labelled_figure(one))
        assert "teacher: no cell shows the image" in shown
        assert "Nothing to agree with" in shown

    def test_a_crop(self) -> None:
        figure = labelled_figure(labelled(crop=crop()))
        shown = texts(figure)
        for text in ("crop 0.10,0.20,0.80,0.90, mirrored, 224 px", "its 14 x 14 targets", "Targets of the crop"):
            assert text in shown
        table = shown[shown.index("Targets of the crop") :]
        assert table == ["Targets of the crop", "tokens", "probability", "kind 7", "50%", "50%", "kind 3", "50%", "25%"]

    def test_classes_after_the_tenth_share_a_grey(self) -> None:
        figure = labelled_figure(labelled(np.arange(13)[None]))
        swatches = [item.fill for item in figure.items if isinstance(item, Frame) and item.width == 14]
        assert swatches == [*map(tuple, class_colours(range(10)).tolist()), GREY]
        assert "3 more" in texts(figure)

    def test_probable_classes_that_lead_nowhere_are_listed(self) -> None:
        assert "kind 999" in texts(labelled_figure(labelled(logit=0.1)))


def test_targets_keep_the_colours_of_the_map_and_new_classes_get_free_ones() -> None:
    known = {3: (1, 2, 3)}
    targets = coloured_targets(crop(), NAMES, known)
    assert [share.class_id for share in targets.leading] == [7, 3]
    assert tuple(targets.colours[1].tolist()) == (1, 2, 3)
    np.testing.assert_array_equal(targets.colours[0], class_colours([3, 7])[1])
    assert not targets.cell_colours()[0].any()
    np.testing.assert_array_equal(targets.cell_colours()[1:, :7], np.broadcast_to((1, 2, 3), (13, 7, 3)))


@settings(max_examples=15, deadline=None)
@given(
    size=st.sampled_from([(64, 64), (900, 90), (90, 900), (4000, 1), (1, 4000), (500, 375)]),
    only=st.sampled_from([None, str(matplotlib_font())]),
    seed=st.integers(0, 99),
)
def test_texts_never_overlap_and_stay_in_the_picture(size: tuple[int, int], only: str | None, seed: int) -> None:
    classes = np.random.default_rng(seed).integers(0, 999, (5, 5))
    one = labelled(
        classes,
        Image.new("RGB", size),
        names=(LONG_NAME,) * 1000,
        key=LONG_NAME,
        source=LONG_NAME,
        label=2,
        cell=(4, 0),
        class_id=5,
        crop=crop(),
        logit=1.0,
    )
    figure = labelled_figure(one, only=only)
    found = boxes(figure)
    for left, top, right, bottom, text in found:
        assert left >= MARGIN_PX - 0.1, text
        assert right <= figure.width - MARGIN_PX + 0.5, text
        assert 0 <= top < bottom <= figure.height, text
    for index, one_box in enumerate(found):
        for other in found[:index]:
            apart_x = one_box[0] >= other[2] or other[0] >= one_box[2]
            assert apart_x or one_box[1] >= other[3] or other[1] >= one_box[3], (one_box, other)


class TestOverlay:
    @pytest.mark.parametrize(
        "size", [(64, 64), (1000, 30), (30, 1000), (500, 375), (1, 1)], ids=lambda size: "x".join(map(str, size))
    )
    def test_any_aspect_ratio(self, size: tuple[int, int]) -> None:
        labels = score_map(np.arange(12).reshape(3, 4), key=LONG_NAME)
        picture = overlay(Image.new("L", size, 128), labels, (LONG_NAME,) * 1000)
        assert picture.mode == "RGB"
        assert 400 < picture.width < 1600
        assert 300 < picture.height < 1300
        margin = np.concatenate([np.asarray(picture)[:, -20:].reshape(-1, 3), np.asarray(picture)[-20:].reshape(-1, 3)])
        assert (margin == 255).all()

    def test_image_and_map_lie_side_by_side(self) -> None:
        picture = np.asarray(overlay(PHOTO, score_map(np.array([[0, 1], [2, 3]])), None)).astype(int)
        top, right = MARGIN_PX + CAPTION_PX, MARGIN_PX + 392 + 24
        np.testing.assert_array_equal(picture[top : top + 392, MARGIN_PX : MARGIN_PX + 392], np.asarray(PHOTO))
        grey = 40 + 0.6 * np.asarray(PHOTO.convert("L")).astype(int)[..., None]
        for class_id, (row, column) in enumerate(np.ndindex(2, 2)):
            inside = np.s_[196 * row + 1 : 196 * (row + 1), 196 * column + 1 : 196 * (column + 1)]
            expected = grey[inside] + 0.8 * (class_colours([class_id])[0] - grey[inside])
            painted = picture[top : top + 392, right : right + 392][inside]
            np.testing.assert_allclose(painted, expected, atol=1)

    def test_wide_images_lie_above_their_map(self) -> None:
        assert overlay(Image.new("RGB", (800, 200)), score_map(np.array([[0]])), None).height > 2 * 150


def test_stronger_where_the_teacher_is_surer() -> None:
    def strength(logit: float) -> float:
        figure = labelled_figure(labelled(np.array([[0]]), Image.new("RGB", (392, 392)), logit=logit))
        return float(np.asarray(draw(figure))[300, 24 + 392 + 24 + 200, 0])

    probabilities = 1 / (1 + np.exp(-np.array([0.0, 1.0, 2.0, 9.0])))
    expected = 40 + 0.8 * probabilities * (float(class_colours([0])[0, 0]) - 40)
    np.testing.assert_allclose([strength(logit) for logit in (0.0, 1.0, 2.0, 9.0)], expected, atol=2)


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0%"), (0.001, "<1%"), (0.005, "<1%"), (0.5, "50%"), (0.996, ">99%"), (1, "100%")]
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_the_legend_is_a_column() -> None:
    assert labelled_figure(labelled()).width == 2 * MARGIN_PX + 2 * 392 + 2 * 24 + COLUMN_PX
