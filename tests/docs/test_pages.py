"""The pages of docs/, one per task: their commands and their Python run as they stand, on small generated material."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.docs.pages import ROOT, blocks
from tests.docs.running import run_page
from tokenlabels.store import open_store
from tokenlabels.types import ScoreMap

DOCS = ROOT / "docs"


@pytest.mark.slow
def test_label_your_data(workplace: Path) -> None:
    shutil.rmtree(workplace / "labels")  # the page makes its own
    run_page(DOCS / "label-your-data.md")
    assert [shard.stem for shard in open_store("labels").shards] == ["bee", "fly", "wasp"]


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_train_with_labels() -> None:
    names = run_page(DOCS / "train-with-labels.md")
    assert names["logits"].shape == (1, 3)
    assert names["loss"].isfinite()


@pytest.mark.usefixtures("workplace")
def test_from_published_labels() -> None:
    names = run_page(DOCS / "from-published-labels.md")
    assert open_store("imported")["img_0003"].scores.shape == (6, 6, 5)
    assert names["scores"].shape == names["ids"].shape == (5, 6, 6)


@pytest.mark.usefixtures("workplace")
def test_cluster() -> None:
    run_page(DOCS / "cluster.md")


ALONE = "import sys; sys.modules |= dict.fromkeys(('torch', 'tokenlabels', 'annotate', 'loaders', 'timm'))\n"
REMEMBER = """
np.savez("read.npz", dense=dense, scores=scores, classes=classes, tail=tail, views=views, keys=np.array(keys.tolist()))
stem = info["tars"][1].removesuffix(".tar")
(labels / f"{stem}.zarr" / "scores" / "c" / "0" / "0" / "0" / "0").unlink()
assert np.isnan(zarr.open_group(labels / f"{stem}.zarr", mode="r")["scores"][:]).all()
try:
    read_shard(stem)
except FileNotFoundError:
    (labels / "manifest" / f"{stem}.json").unlink()
assert read_shard(stem) is None
"""


def test_read_the_format_without_this_package(workplace: Path) -> None:
    """Also that what the page says of missing files and manifests is so."""
    code = "\n".join([ALONE, *blocks(DOCS / "read-the-format.md", "python")])
    expected = open_store("labels").shards[0].read()
    first_key = expected.keys[0]
    done = subprocess.run(
        [sys.executable, "-c", code + REMEMBER], cwd=workplace, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(first_key)
    read = np.load(workplace / "read.npz")
    assert tuple(read["keys"].tolist()) == expected.keys
    for name in ("scores", "classes", "tail", "views"):
        assert np.array_equal(read[name], getattr(expected, name)), name
    np.testing.assert_allclose(read["dense"], dense_of(expected[0], 3), atol=1e-6)


def dense_of(score_map: ScoreMap, num_classes: int) -> NDArray[np.float64]:
    """All classes of every cell, one number after the other."""
    height, width, k = score_map.scores.shape
    dense = np.zeros((height, width, num_classes))
    for y in range(height):
        for x in range(width):
            tail = float(score_map.tail[y, x])
            dense[y, x] = tail / max(num_classes - k, 1)
            exps = np.exp(score_map.scores[y, x].astype(np.float64))
            for place, class_id in enumerate(score_map.classes[y, x]):
                dense[y, x, class_id] = (1 - tail) * exps[place] / exps.sum()
    return dense
