"""Small image tars and fast teachers, shared by the tests of annotate."""

import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from annotate.scenes import write_scenes
from annotate.teachers import ModelInfo, Teacher, TeacherInfo, TeacherSpec, TopK
from annotate.topk import top_k
from tokenlabels.images import TarShard

SCENES_PER_TAR = (5, 3, 2)


class PixelTeacher(Teacher):
    """Stands in for a real teacher: what it says of an image is a fixed function of that image's pixels alone.

    No batch, no other image and no number of threads changes a bit of it. It counts what it was given.

    Args:
        sizes: pixels (H, W) of the images of each model; multiples of the grid's rows and columns.
        seed: of the function; teachers with different seeds differ in all they say, and in their digest.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]] = ((24, 24),),
        *,
        grid: tuple[int, int] = (2, 3),
        topk: int = 4,
        num_classes: int = 20,
        class_names: tuple[str, ...] | None = None,
        seed: int = 0,
    ) -> None:
        self.grid, self.topk, self.num_classes, self.class_names = grid, topk, num_classes, class_names
        models = tuple(
            ModelInfo(
                name=f"pixels{number}",
                weights="none",
                digest=f"seed {seed}",
                image_size=size,
                interpolation=("bicubic", "bilinear")[number % 2],
                crop_pct=0.8 + 0.1 * number,
                mean=(0.2, 0.4, 0.6),
                std=(1.0, 1.0, 1.0),
            )
            for number, size in enumerate(sizes)
        )
        self.info = TeacherInfo(models=models, flip=False, amp="none", digest=f"pixels, seed {seed}")
        generator = torch.Generator().manual_seed(seed)
        self._weights = torch.randn(3 * len(models), num_classes, generator=generator, dtype=torch.float64)
        self.batch_sizes: list[int] = []

    def __call__(self, images: Sequence[Tensor]) -> TopK:
        for model, batch in zip(self.info.models, images, strict=True):
            assert batch.dtype == torch.uint8
            assert batch.shape == (len(images[0]), *model.image_size, 3)
        self.batch_sizes.append(len(images[0]))
        return TopK.cat([self._label(one_image) for one_image in zip(*images, strict=True)])

    def _label(self, images: Sequence[Tensor]) -> TopK:
        features = torch.cat([self._cell_means(image) - 128 for image in images], dim=-1)
        return top_k((features @ self._weights / 16).float()[None], self.topk)

    def _cell_means(self, image: Tensor) -> Tensor:
        (rows, columns), (height, width, _) = self.grid, image.shape
        cells = image.double().reshape(rows, height // rows, columns, width // columns, 3)
        return cells.mean(dim=(1, 3))


@pytest.fixture(autouse=True)
def _flush_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power, and flushing is most of the time of a small write."""
    monkeypatch.setattr(os, "fsync", os.fstat)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The number of threads changes the last bits of convolutions; no test changes it for another one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def scene_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of scenes-0000.tar .. scenes-0002.tar with 5, 3 and 2 generated scenes (jpg, cls, json).

    Keys are scene_000000 .. scene_000009. Shared by all tests: copy it before changing anything.
    """
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, shard_sizes=SCENES_PER_TAR, seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_spec() -> TeacherSpec:
    """A real timm model that loads in 0.1 s and labels 1,000 images/s: 64 px, 2 x 2 cells, 1000 classes with names.

    The weights are random but seeded, so that a second load gives the same teacher with the same digest.
    """
    return TeacherSpec("test_efficientnet_gn", seed=0, image_size=64)


@pytest.fixture(scope="session")
def pixel_teacher() -> Callable[..., PixelTeacher]:
    """The class PixelTeacher, to make teachers that are exact to the bit and cost nothing."""
    return PixelTeacher


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Mapping[str, bytes]], TarShard]:
    """write_tar(path, {member name: content}) -> TarShard."""

    def write(path: Path, members: Mapping[str, bytes]) -> TarShard:
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return TarShard(str(path))

    return write
