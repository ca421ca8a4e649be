"""Data that do not belong together are refused before the first step."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.build import build_run
from jobs.config import RunConfig
from jobs.preflight import agreement, check_run, class_folders
from loaders.dataset import ImageDataset
from tests.loaders.photos import encode, random_maps, smooth_image, write_label_set, write_tar
from tokenlabels.store import open_store
from tokenlabels.types import ScoreMaps

MakeRun = Callable[..., RunConfig]
NUM_CLASSES = 20


def maps_that_name(keys: Sequence[str], classes: Sequence[int]) -> ScoreMaps:
    """Random maps, but every cell's best class is the image's."""
    maps = random_maps(np.random.default_rng(0), keys)
    ids, scores = maps.classes.copy(), maps.scores.copy()
    for row, own in enumerate(classes):
        ids[row, ..., 0], ids[row, ..., 1], ids[row, ..., 2] = own, (own + 1) % NUM_CLASSES, (own + 2) % NUM_CLASSES
    scores[:] = (6, 2, 1)
    return ScoreMaps(maps.keys, scores, ids, maps.tail, maps.views)


class Tars:
    """Two tars of 30 and 10 images whose class is known, with labels that name another one for some."""

    def __init__(self, folder: Path, rename: Callable[[int], int]) -> None:
        rng = np.random.default_rng(1)
        jpeg = encode(smooth_image(rng, 40, 40))
        maps = {}
        for stem, length in (("a", 30), ("b", 10)):
            keys = [f"{stem}{number:03d}" for number in range(length)]
            own = rng.integers(NUM_CLASSES, size=length).tolist()
            write_tar(
                folder / f"{stem}.tar",
                {key: {"jpg": jpeg, "cls": str(label).encode()} for key, label in zip(keys, own, strict=True)},
            )
            maps[stem] = maps_that_name(keys, [rename(label) for label in own])
        self.images = f"{folder}/*.tar"
        self.labels = write_label_set(folder / "labels", maps)

    def agreement(self) -> tuple[float, int]:
        return agreement(open_store(self.labels), ImageDataset.find(self.images))


def settings(tars: Tars, *more: str) -> list[str]:
    return [f"data.images={tars.images}", f"data.labels={tars.labels}", "data.min_agreement=none", *more]


def check(config: RunConfig) -> None:
    check_run(build_run(config, torch.device("cpu")), config)


def test_labels_of_these_images_pass(make_run: MakeRun, tmp_path: Path) -> None:
    tars = Tars(tmp_path / "data", lambda label: label)
    assert tars.agreement() == (1.0, 40)
    check(make_run("lvvit_t", *settings(tars)))


def test_teachers_may_err(tmp_path: Path, make_run: MakeRun) -> None:
    tars = Tars(tmp_path / "data", lambda label: label if label % 2 else 0)
    share, _ = tars.agreement()
    assert 0.3 < share < 0.7
    check(make_run("lvvit_t", *settings(tars)))


@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(lambda label: (label + 7) % NUM_CLASSES, id="another order"),
        pytest.param(lambda label: NUM_CLASSES - 1 - label, id="from the back"),
        pytest.param(lambda _: 3, id="always the same"),
    ],
)
def test_labels_that_number_classes_differently(
    make_run: MakeRun, tmp_path: Path, rename: Callable[[int], int]
) -> None:
    tars = Tars(tmp_path / "data", rename)
    with pytest.raises(ValueError, match=r"of 40 images .* name their own class, at least 14\.5% are expected"):
        check(make_run("lvvit_t", *settings(tars)))
    check(make_run("lvvit_t", *settings(tars, "data.min_agreement=0")))
    check(make_run("hard_labels", *settings(tars)))  # nothing but the number of classes is taken from the labels


def test_images_without_classes_cannot_disagree(make_run: MakeRun, tmp_path: Path) -> None:
    tars = Tars(tmp_path / "data", lambda label: (label + 1) % NUM_CLASSES)
    rng = np.random.default_rng(0)
    for stem, length in (("a", 30), ("b", 10)):
        jpeg = encode(smooth_image(rng, 40, 40))
        write_tar(tmp_path / f"data/{stem}.tar", {f"{stem}{number:03d}": {"jpg": jpeg} for number in range(length)})
    assert tars.agreement() == (1.0, 0)
    check(make_run("lvvit_t", *settings(tars)))


def write_tree(root: Path, names: Sequence[str], num_images: int = 2) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(num_images):
            Image.new("RGB", (40, 40), (number, 0, 0)).save(root / name / f"{number}.png")
    return root


class TestTrees:
    """ImageFolder trees bring the names of their classes."""

    names = tuple(f"class{number:02d}" for number in range(NUM_CLASSES))

    def labels(self, tmp_path: Path, class_names: Sequence[str]) -> Path:
        maps = {
            name: maps_that_name([f"{name}/0", f"{name}/1"], [number, number]) for number, name in enumerate(self.names)
        }
        return write_label_set(tmp_path / "labels", maps, class_names=tuple(class_names))

    def test_names_that_agree(self, make_run: MakeRun, tmp_path: Path) -> None:
        tree = write_tree(tmp_path / "train", self.names)
        assert class_folders(ImageDataset.find(tree)) == list(self.names)
        labels = self.labels(tmp_path, self.names)
        check(make_run("lvvit_t", f"data.images={tree}", f"data.labels={labels}", f"data.val={tree}"))

    def test_other_names_for_the_same_classes(self, make_run: MakeRun, tmp_path: Path) -> None:
        tree = write_tree(tmp_path / "train", self.names)
        labels = self.labels(tmp_path, [f"a name of {name}" for name in self.names])
        check(make_run("lvvit_t", f"data.images={tree}", f"data.labels={labels}", "data.min_agreement=none"))

    def test_the_same_names_in_another_order(self, make_run: MakeRun, tmp_path: Path) -> None:
        tree = write_tree(tmp_path / "train", self.names)
        swapped = [self.names[1], self.names[0], *self.names[2:]]
        labels = self.labels(tmp_path, swapped)
        with pytest.raises(ValueError, match="another order: class 0 is 'class01' in the labels and 'class00' in"):
            check(make_run("lvvit_t", f"data.images={tree}", f"data.labels={labels}"))

    def test_a_validation_tree_of_other_classes(self, make_run: MakeRun, tmp_path: Path) -> None:
        tree = write_tree(tmp_path / "train", self.names)
        val = write_tree(tmp_path / "val", self.names[1:])
        labels = self.labels(tmp_path, self.names)
        with pytest.raises(ValueError, match=r"training has 20 class folders and validation 19.*class00 is in one"):
            check(make_run("lvvit_t", f"data.images={tree}", f"data.labels={labels}", f"data.val={val}"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 25], r"class 25, but the model has the classes 0\.\.19"),
        ([None, None], "validation images have no classes"),
    ],
)
def test_validation_images_of_another_data_set(
    make_run: MakeRun, tmp_path: Path, labels: list[int | None], message: str
) -> None:
    jpeg = encode(smooth_image(np.random.default_rng(0), 40, 40))
    members = [{"jpg": jpeg} if label is None else {"jpg": jpeg, "cls": str(label).encode()} for label in labels]
    write_tar(tmp_path / "val.tar", {f"sample{number}": sample for number, sample in enumerate(members)})
    with pytest.raises(ValueError, match=message):
        check(make_run("lvvit_t", f"data.val={tmp_path}/val.tar"))


def test_real_labels_of_other_images(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json.dumps([[0]] * 50))
    with pytest.raises(ValueError, match="keys must hold a name like ILSVRC2012_val_00000001"):
        check(make_run("lvvit_t", f"data.real={tmp_path}/real.json"))
    with pytest.raises(ValueError, match=r"ReaL labels \(--real\) are of validation images"):
        check(make_run("lvvit_t", f"data.real={tmp_path}/real.json", "data.val=()"))
