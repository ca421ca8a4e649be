"""Train a student: ``python -m jobs.train lvvit_s --images ... --labels ... --val ... --out runs/lvvit_s``.

The same file runs on one device and under torchrun on many. ``--list`` shows the recipes.
"""

from pathlib import Path

from jobs.build import batch_size_per_rank, build_run
from jobs.config import RunConfig
from jobs.overrides import as_dict
from jobs.preflight import check_run
from tokenlabels.trainer import Accuracy, RealLabels, Trainer
from tokenlabels.trainer.ranks import join_ranks, leave_ranks

# Where things lie and how fast they are read: a run that goes on may find them elsewhere. The loader knows its images
# again, and the trainer compares its own settings.
_FREE_TO_CHANGE = (
    "data.images",
    "data.labels",
    "data.val",
    "data.real",
    "data.threads",
    "data.index_dir",
    "model.init",
    "trainer",
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
    chosen = join_ranks(device)
    try:
        run = build_run(config, chosen)
        check_run(run, config)
        trainer = Trainer(
            run.model,
            config.trainer,
            out,
            batch_size=batch_size_per_rank(config),
            description=as_dict(config),
            free_to_change=_FREE_TO_CHANGE,
        )
        real = None if config.data.real is None else RealLabels(config.data.real)
        return trainer.fit(run.train, run.val, resume=resume, real=real)
    finally:
        leave_ranks()


if __name__ == "__main__":
    import typer

    from tokenlabels.cli.train import train as command

    typer.run(command)
