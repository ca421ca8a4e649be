"""Two real processes against one: the same steps, the same accuracy, one file, and they leave together."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tokenlabels.trainer import two_ranks
from tokenlabels.trainer.checkpoint import read_checkpoint
from tokenlabels.trainer.ranks import join_ranks, rank_and_world_size, seed_step, stop_on_sigterm

ROOT = Path(__file__).parents[3]


def torchrun(scenario: str, folder: Path, num_ranks: int = 2) -> str:
    """Run `two_ranks.py` and return what it printed."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--master-port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = [str(Path(two_ranks.__file__)), scenario, str(folder)]
    result = subprocess.run(
        [sys.executable, *command, "--rdzv-endpoint", "localhost:0", "--rdzv-backend", "c10d", *script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    two_ranks.run("plain", folder)
    return folder


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(alone: Path, tmp_path: Path) -> None:
    printed = torchrun("plain", tmp_path)
    assert len({line.partition(": ")[2] for line in printed.splitlines()}) == 1, "both have the same weights"
    one, two = (read_checkpoint(folder / "last.pt") for folder in (alone, tmp_path))
    assert two["world_size"] == 2
    for kind in ("state_dict", "state_dict_ema"):
        for name, tensor in two[kind].items():
            torch.testing.assert_close(tensor, one[kind][name], rtol=1e-4, atol=1e-6)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)
    tables = [list(csv.DictReader((folder / "epochs.csv").read_text().splitlines())) for folder in (alone, tmp_path)]
    for mine, theirs in zip(*tables, strict=True):
        assert float(mine["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-5)
        assert (mine["top1"], mine["ema_top5"]) == (theirs["top1"], theirs["ema_top5"])


@pytest.mark.slow
def test_two_ranks_accumulate_as_one_does(tmp_path: Path) -> None:
    two_ranks.run("accumulate", tmp_path / "one")
    torchrun("accumulate", tmp_path / "two")
    one, two = (read_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert one["progress"]["step"] == two["progress"]["step"] == 6
    for name, tensor in two["state_dict"].items():
        torch.testing.assert_close(tensor, one["state_dict"][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_both_go_on(alone: Path, tmp_path: Path) -> None:
    printed = torchrun("terminated", tmp_path)
    stops = [line.partition(": ")[2] for line in printed.splitlines() if "stopped by SIGTERM" in line]
    assert len(stops) == 2
    assert len(set(stops)) == 1
    assert "after step 3" in stops[0], "ranks ask each other after every step"
    torchrun("plain", tmp_path)
    whole, again = (read_checkpoint(folder / "last.pt") for folder in (alone, tmp_path))
    for name, tensor in again["state_dict"].items():
        torch.testing.assert_close(tensor, whole["state_dict"][name], rtol=1e-4, atol=1e-6)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
def test_one_goes_on_where_two_stopped(tmp_path: Path) -> None:
    """A loader with a place shares out what is left; the time of the schedule goes on."""
    torchrun("terminated", tmp_path)
    trainer = two_ranks.make_trainer(tmp_path)
    trainer.state.restore(tmp_path / "last.pt", rest := two_ranks.Shared(length=two_ranks.LENGTH))
    assert rest.state_dict() == {"epoch": 0, "batch": 0}
    progress = trainer.progress
    assert (progress.epoch, progress.batch) == (0, 0)
    assert progress.done_before == pytest.approx(3 / 6)
    progress.num_batches = 3
    progress.advance(2)
    assert progress.time == pytest.approx(5 / 6)


@pytest.mark.slow
def test_folders_that_machines_do_not_share_are_refused(tmp_path: Path) -> None:
    torchrun("local folders", tmp_path)
    assert [(tmp_path / rank / "last.pt").exists() for rank in "01"] == [True, False]
    with pytest.raises(
        AssertionError, match=r"not all ranks find the same .*put the run into a folder that all machines"
    ):
        torchrun("local folders", tmp_path)


def test_alone_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert join_ranks("cpu") == torch.device("cpu")
    assert rank_and_world_size() == (0, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(ValueError, match="torch sees no GPU here; use --device cpu"):
        join_ranks("cuda")


def test_steps_draw_what_they_draw() -> None:
    def draw(seed: int, step: int) -> list[float]:
        seed_step(seed, step)
        return torch.rand(3).tolist()

    assert draw(0, 5) == draw(0, 5)
    assert len({tuple(draw(seed, step)) for seed in range(5) for step in range(20)}) == 100


def test_signals_outside_the_main_thread_are_left_alone() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask() -> bool:
        with stop_on_sigterm() as stop:
            return stop.is_agreed()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask).result() is False
