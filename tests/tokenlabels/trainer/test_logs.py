"""What is logged, what a resumed run cuts off, and what is shown."""

import csv
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tokenlabels.trainer import logs
from tokenlabels.trainer.display import Display, Throughput
from tokenlabels.trainer.logs import RunLog


def write(folder: Path, *, step: int, epoch: int, to_step: int, to_epoch: int) -> None:
    with RunLog(folder, step=step, epoch=epoch) as log:
        for number in range(step + 1, to_step + 1):
            log.step({"step": number, "loss": number / 2})
        for number in range(epoch + 1, to_epoch + 1):
            log.epoch({"epoch": number, "train_loss": 0.5, "top1": None}, step=number * 3)


def steps(folder: Path) -> list[str]:
    return (folder / "steps.jsonl").read_text().splitlines()


def test_rows_are_lines(tmp_path: Path) -> None:
    write(tmp_path, step=0, epoch=0, to_step=2, to_epoch=2)
    assert steps(tmp_path) == ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 1.0}']
    with (tmp_path / "epochs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"epoch": str(number), "train_loss": "0.5", "top1": ""} for number in (1, 2)]


def test_a_run_that_goes_on_cuts_off_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "whole", step=0, epoch=0, to_step=9, to_epoch=3)
    write(tmp_path / "killed", step=0, epoch=0, to_step=7, to_epoch=2)
    with (tmp_path / "killed/steps.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a line
    write(tmp_path / "killed", step=4, epoch=1, to_step=9, to_epoch=3)
    for name in ("steps.jsonl", "epochs.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_new_run_empties_what_a_dead_one_left_without_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, step=0, epoch=0, to_step=3, to_epoch=1)
    write(tmp_path, step=0, epoch=0, to_step=1, to_epoch=0)
    assert len(steps(tmp_path)) == 1
    assert (tmp_path / "epochs.csv").read_text() == "epoch,train_loss,top1\n"
    write(tmp_path, step=1, epoch=0, to_step=1, to_epoch=1)
    assert (tmp_path / "epochs.csv").read_text().splitlines() == ["epoch,train_loss,top1", "1,0.5,"]


def test_tensorboard_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, 0.0, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(logs, "find_spec", lambda name: name)
    write(tmp_path, step=4, epoch=1, to_step=5, to_epoch=2)
    assert written == [
        (str(tmp_path / "tensorboard"), 0.0, 5),
        ("loss", 2.5, 5),
        ("train_loss", 0.5, 6),
        ("closed", 0.0, 0),
    ]


def test_only_one_rank_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    for is_shown in (True, False):
        with Display(is_shown) as display:
            display.begin("epoch 1/3", 10, 2)
            display.show("loss 1.0")
            display.advance(3)
            display.line("epoch 1: loss 1.0")
    assert capsys.readouterr().err == "epoch 1: loss 1.0\n"


def test_throughput_counts_from_lap_to_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 16.0])
    monkeypatch.setattr("tokenlabels.trainer.display.time.perf_counter", lambda: next(clock))
    speed = Throughput()
    speed.count(30)
    speed.count(10)
    assert speed.lap() == 20
    speed.count(4)
    assert speed.lap() == 1
