"""The whole job on 400 real photographs: an EfficientNet and an NFNet, inline and on Ray, with the real commands."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from annotate.schedule import ray_session
from tokenlabels.cli import app
from tokenlabels.files import files_below
from tokenlabels.store import open_store
from tokenlabels.store.writer import LOCK_FOLDER

# The pixels are few, so that a run takes well under a minute; the weights are random, because none can be downloaded.
TEACHERS = {
    "efficientnet": ("--teacher", "efficientnet_b0", "--random-weights", "0", "--image-size", "128"),
    "nfnet": ("--teacher", "dm_nfnet_f0", "--random-weights", "0", "--image-size", "96"),
}
GRIDS = {"efficientnet": (4, 4), "nfnet": (3, 3)}

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Photographs:
    """What an independent reader finds in the tars, in their order.

    Attributes:
        tars: file names.
        keys: of the images that can be decoded.
        num_broken: images that cannot.
    """

    tars: tuple[str, ...]
    keys: tuple[str, ...]
    num_broken: int


@dataclass(frozen=True)
class Labelled:
    """A label set that the command made, and the options that name its teacher."""

    labels: Path
    teacher: tuple[str, ...]
    grid: tuple[int, int]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def contents(labels: Path) -> dict[str, bytes]:
    """Every file of a label set but the locks."""
    names = [name for name in files_below(labels) if not name.startswith(LOCK_FOLDER)]
    return {name: (labels / name).read_bytes() for name in names}


def annotate(images: Path, out: Path, teacher: tuple[str, ...], *options: object) -> Path:
    num_threads = torch.get_num_threads()
    result = run("annotate", f"{images}/*.tar", "--out", out, *teacher, "--torch-threads", 1, *options)
    torch.set_num_threads(num_threads)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{out}: 400 images in 4 shards labelled")
    return out


@pytest.fixture(scope="module")
def photographs(imagenet_sample: Path) -> Photographs:
    tars = sorted(imagenet_sample.glob("*.tar"))
    keys, num_broken = [], 0
    for tar in tars:
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    image = archive.extractfile(member)
                    assert image is not None
                    try:
                        Image.open(io.BytesIO(image.read())).load()
                    except OSError:
                        num_broken += 1
                    else:
                        keys.append(member.name.removesuffix(".jpg"))
    return Photographs(tuple(tar.name for tar in tars), tuple(keys), num_broken)


@pytest.fixture(scope="module", params=TEACHERS)
def labelled(
    request: pytest.FixtureRequest, imagenet_sample: Path, tmp_path_factory: pytest.TempPathFactory
) -> Labelled:
    teacher = TEACHERS[request.param]
    out = tmp_path_factory.mktemp(request.param) / "labels"
    return Labelled(annotate(imagenet_sample, out, teacher), teacher, GRIDS[request.param])


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """Ray, which the commands of this process join; it is started unless other tests have done so."""
    with ray_session(None) as ray:
        yield ray


def test_there_is_a_map_for_every_photograph(labelled: Labelled, photographs: Photographs) -> None:
    store = open_store(labelled.labels)
    assert store.info.tars == photographs.tars
    assert tuple(store.keys()) == photographs.keys
    assert store.missing == ()
    assert (store.info.grid, store.info.num_classes, store.info.k) == (labelled.grid, 1000, 5)
    names = store.info.class_names
    assert names is not None
    assert names[0].startswith("tench")


def test_verify_finds_nothing(labelled: Labelled, imagenet_sample: Path) -> None:
    images = ("--images", f"{imagenet_sample}/*.tar")
    result = run("verify", labelled.labels, *images, "--recompute", 5, *labelled.teacher)
    assert result.exit_code == 0, result.output
    compared = "keys compared with the images of 4"
    assert result.stdout.endswith(f"whole. 400 maps in 4 shards, {compared}, 5 images labelled again\n")


def test_inspect_agrees_with_an_independent_count(labelled: Labelled, photographs: Photographs) -> None:
    summary = json.loads(run("inspect", labelled.labels, "--json").stdout)
    assert (summary["num_images"], summary["num_skipped"]) == (len(photographs.keys), photographs.num_broken)
    assert (summary["num_shards"], summary["num_missing_shards"]) == (len(photographs.tars), 0)
    assert summary["num_labelled"] == len(photographs.keys), "every photograph has a cls"
    size_bytes = sum(path.stat().st_size for path in labelled.labels.glob("*.zarr/**/*") if path.is_file())
    assert summary["size_bytes"] == size_bytes
    assert summary["bytes_per_image"] == pytest.approx(size_bytes / 400)


@pytest.mark.ray
def test_ray_makes_the_same_bytes(labelled: Labelled, imagenet_sample: Path, ray_cluster: Any, tmp_path: Path) -> None:
    assert ray_cluster.is_initialized()
    out = annotate(imagenet_sample, tmp_path / "labels", labelled.teacher, "--backend", "ray", "--workers", 2)
    assert contents(out) == contents(labelled.labels)
    assert run("verify", out, "--images", f"{imagenet_sample}/*.tar").exit_code == 0
