"""What a run leaves to be read: steps.jsonl, epochs.csv, and TensorBoard where it is installed.

Rank 0 writes. A run that goes on from a checkpoint cuts off what was logged after it, so that nothing stands twice.
"""

import csv
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from tokenlabels.files import replace_file

STEPS_FILE, EPOCHS_FILE = "steps.jsonl", "epochs.csv"


class RunLog:
    """The logs of one run. Every row is on the disk when the call returns.

    Args:
        folder: of the run.
        step: optimizer steps that are done; rows of later ones are cut off.
        epoch: epochs that are done; likewise.
    """

    def __init__(self, folder: Path, *, step: int, epoch: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _keep(folder / STEPS_FILE, step)
        _keep_epochs(folder / EPOCHS_FILE, epoch)
        self._steps = (folder / STEPS_FILE).open("a", encoding="utf-8")
        self._epochs_path = folder / EPOCHS_FILE
        self._board = _tensorboard(folder, purge_step=step + 1)

    def step(self, row: Mapping[str, float]) -> None:
        """A line of steps.jsonl. `row` has "step", counted from 1."""
        self._steps.write(json.dumps(row) + "\n")
        self._steps.flush()
        self._to_board(row, int(row["step"]))

    def epoch(self, row: Mapping[str, float | None], *, step: int) -> None:
        """A line of epochs.csv. `row` begins with "epoch", from 1, and always has the same names; None is empty."""
        is_new = not self._epochs_path.exists() or not self._epochs_path.stat().st_size
        with self._epochs_path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        self._to_board(row, step)

    def _to_board(self, row: Mapping[str, float | None], step: int) -> None:
        if self._board is not None:
            for name, value in row.items():
                if name not in ("step", "epoch") and value is not None:
                    self._board.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._steps.close()
        if self._board is not None:
            self._board.close()


def _keep(path: Path, step: int) -> None:
    """Keep the lines up to a step. A last line that a kill cut short goes too."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        replace_file(path, "".join(f"{line}\n" for line in kept).encode())


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _keep_epochs(path: Path, epoch: int) -> None:
    if path.exists():
        header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        kept = [row for row in rows if row.partition(",")[0].isdigit() and int(row.partition(",")[0]) <= epoch]
        replace_file(path, "".join([header, *kept]).encode())


def _tensorboard(folder: Path, purge_step: int) -> Any:
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)
