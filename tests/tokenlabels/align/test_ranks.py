"""Two real processes against one: the same shares and the same gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tokenlabels.align import two_ranks

ROOT = Path(__file__).parents[3]
TRIED = ("vit", "distilled", "swin-padded", "convnext")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    rendezvous = ["--rdzv-endpoint", "localhost:0", "--rdzv-backend", "c10d"]
    result = subprocess.run(
        [sys.executable, *torchrun, *rendezvous, str(Path(two_ranks.__file__)), str(folder), *TRIED],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", TRIED)
def test_two_ranks_align_and_train_as_one_does(folder: Path, case: str) -> None:
    one = two_ranks.step(two_ranks.make(case), 0, 1, case)
    first, second = (torch.load(folder / f"{case}-{rank}.pt") for rank in (0, 1))
    shares = torch.cat([first["share"], second["share"]], dim=1)
    torch.testing.assert_close(shares, one["share"], rtol=0, atol=1e-5)
    assert not torch.equal(one["share"][0], one["share"][1]), "the second step has other weights"
    assert first["gradients"].keys() == one["gradients"].keys()
    for name, gradient in one["gradients"].items():
        assert torch.equal(first["gradients"][name], second["gradients"][name])
        scale = max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=0, atol=1e-4 * scale)
