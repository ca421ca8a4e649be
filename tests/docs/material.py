"""What the commands of the pages are run on, small and generated, under the names that the pages use.

photos/train/<class>/, photos/val/<class>/   class folders
images/train-{0000..0003}.tar, images/val-0000.tar, boxes.json   the same kind of pictures as tars, and where things are
teacher.safetensors, classes.txt   a classifier of three classes, untrained
labels/                            labels of the training tars that agree with their classes
published/                         a .pt file for every training image, as others publish them
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from annotate.scenes import draw_scene
from tests.loaders.photos import encode, random_maps, write_label_set, write_tar

CLASSES = ("bee", "fly", "wasp")
NUM_TARS, TAR_LENGTH, NUM_VAL, NUM_PER_FOLDER = 4, 4, 6, 2
GRID = (6, 6)


def write_material(folder: Path) -> Path:
    """Write all of it below `folder`."""
    images = [_image(index) for index in range(NUM_TARS * TAR_LENGTH)]
    for tar in range(NUM_TARS):
        rows = range(tar * TAR_LENGTH, (tar + 1) * TAR_LENGTH)
        write_tar(folder / "images" / f"train-{tar:04d}.tar", {_key(row): _members(images[row], row) for row in rows})
    val = {f"val_{row}": _members(images[row], row) for row in range(NUM_VAL)}
    write_tar(folder / "images" / "val-0000.tar", val)
    boxes = {_key(row): [0, 0, image.width // 2, image.height // 2] for row, image in enumerate(images)}
    (folder / "boxes.json").write_text(json.dumps(boxes), encoding="utf-8")
    _write_folders(folder / "photos", images)
    with torch.random.fork_rng():
        teacher = timm.create_model("resnet18", num_classes=len(CLASSES))
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    _write_labels(folder / "labels")
    _write_published(folder / "published")
    return folder


def _key(row: int) -> str:
    return f"img_{row:04d}"


def _image(index: int) -> Image.Image:
    return Image.fromarray(draw_scene(0, index).image).resize((96, 80))


def _members(image: Image.Image, row: int) -> dict[str, bytes]:
    return {"jpg": encode(image), "cls": str(row % len(CLASSES)).encode()}


def _write_folders(root: Path, images: list[Image.Image]) -> None:
    rows = iter(range(len(images)))
    for split in ("train", "val"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for _ in range(NUM_PER_FOLDER):
                row = next(rows)
                (root / split / name / f"{_key(row)}.jpg").write_bytes(encode(images[row]))


def _write_labels(labels: Path) -> None:
    """Maps whose first class is the image's own in every cell; the rest is as it comes."""
    maps_of = {}
    for tar in range(NUM_TARS):
        rows = np.arange(tar * TAR_LENGTH, (tar + 1) * TAR_LENGTH)
        maps = random_maps(np.random.default_rng(tar), [_key(row) for row in rows], GRID)
        classes = np.empty_like(maps.classes)
        classes[:] = (rows[:, None] + np.arange(maps.k))[:, None, None] % len(CLASSES)
        maps_of[f"train-{tar:04d}"] = replace(maps, classes=classes, tail=np.zeros_like(maps.tail))
    write_label_set(labels, maps_of, num_classes=len(CLASSES), class_names=CLASSES)


def _write_published(folder: Path) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for row in range(NUM_TARS * TAR_LENGTH):
        scores, ids = (4 * torch.randn(*GRID, 1000, generator=generator)).topk(5)
        torch.save(torch.stack([scores.half(), ids.half()]).permute(0, 3, 1, 2), folder / f"{_key(row)}.pt")
