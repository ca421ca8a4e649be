"""Train a student: ``python -m jobs.train lvvit_s --images ... --labels ... --val ... --out runs/lvvit_s``.

The same file runs on one device and under torchrun on many. ``--list`` shows the recipes.
"""

import json
from pathlib import Path

from jobs.build import batch_size_per_rank, build_run
from jobs.config import RunConfig
from jobs.overrides import as_dict, differences, from_dict
from jobs.preflight import check_run
from tokenlabels.trainer import Accuracy, RealLabels, Trainer
from tokenlabels.trainer.checkpoint import CONFIG_FILE
from tokenlabels.trainer.ranks import join_ranks, leave_ranks

# Where things lie and how fast they are read: a run that goes on may find them elsewhere.
_FREE_TO_CHANGE = (
    "data.images",
    "data.labels",
    "data.val",
    "data.real",
    "data.threads",
    "data.index_dir",
    "model.init",
)


def train(config: RunConfig, out: Path, *, resume: str = "never", device: str = "auto") -> Accuracy | None:
    """Build what a configuration names, refuse what does not fit, and train.

    Args:
        config: of the run; saved in the folder.
        out: folder of the run.
        resume: "never", "auto" or a checkpoint, see `Trainer.fit`.
        device: "auto", "cpu" or "cuda".

    Returns:
        Accuracy after the last epoch, if there are validation images.

    Raises:
        ValueError: something is missing or does not fit; nothing has been trained.
    """
    _refuse_other_config(config, out, resume)
    chosen = join_ranks(device)
    try:
        run = build_run(config, chosen)
        check_run(run, config)
        trainer = Trainer(
            run.model, config.trainer, out, batch_size=batch_size_per_rank(config), description=as_dict(config)
        )
        real = None if config.data.real is None else RealLabels(config.data.real)
        return trainer.fit(run.train, run.val, resume=resume, real=real)
    finally:
        leave_ranks()


def _refuse_other_config(config: RunConfig, out: Path, resume: str) -> None:
    """A run that goes on does so with its own settings; those of the trainer are compared by `Trainer.fit`."""
    saved = out / CONFIG_FILE
    if resume != "auto" or not saved.exists():
        return
    before = from_dict(json.loads(saved.read_text(encoding="utf-8")))
    lines = [line for line in differences(before, config) if not line.startswith((*_FREE_TO_CHANGE, "trainer."))]
    if lines:
        raise ValueError(
            f"{saved} is of a run with other settings (saved != now): {'; '.join(lines)}. Use the same ones to go on, "
            "or another folder for another run"
        )


if __name__ == "__main__":
    import typer

    from tokenlabels.cli.train import train as command

    typer.run(command)
