"""tokenlabels train: a student by a recipe, on tars with labels, or on the demo's scenes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokenlabels.cli.annotate import run_with_progress
from tokenlabels.cli.common import FOUND, DeviceOption, fail, needs_checkout, show_user_errors

if TYPE_CHECKING:
    from jobs.config import RunConfig

TERMINATED = 143

DEMO_FOLDER = Path("demo-train")


@show_user_errors
def train(
    recipe: Annotated[str | None, typer.Argument(help="What to train; --list shows the recipes.")] = None,
    images: Annotated[list[str] | None, typer.Option("--images", help="Training images; as in annotate.")] = None,
    labels: Annotated[str | None, typer.Option("--labels", help="Their label set.")] = None,
    val: Annotated[list[str] | None, typer.Option("--val", help="Images to evaluate on after every epoch.")] = None,
    real: Annotated[str | None, typer.Option(help="real.json of ImageNet-ReaL, for --val.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="For hard labels without --labels.")] = None,
    init: Annotated[str | None, typer.Option(help="Checkpoint to begin with, for fine-tuning.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/RECIPE]")] = None,
    resume: Annotated[
        str, typer.Option(help="never; auto: go on with the run in --out, if there is one; or a checkpoint.")
    ] = "never",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: path.to.field=value; may come again.")
    ] = None,
    device: DeviceOption = "auto",
    demo: Annotated[bool, typer.Option("--demo", help="Train on generated scenes: minutes on two cores.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Show the recipes and leave.")] = False,
) -> None:
    """Train a vision transformer by a recipe. Under torchrun: python -m jobs.train, with the same arguments."""
    with needs_checkout("training recipes"):
        from jobs.overrides import apply_overrides
        from jobs.recipes import get_recipe
    if show:
        _list_recipes()
        return
    if recipe is None:
        raise ValueError("name a recipe; --list shows them")
    config = get_recipe(recipe)()
    if demo:
        if images or labels or val or num_classes:
            raise ValueError("--demo brings its own images, labels and classes; leave --images, --labels, --val out")
        config = _demo_config(config)
    data = replace(
        config.data,
        images=tuple(images or config.data.images),
        labels=labels or config.data.labels,
        val=tuple(val or config.data.val),
        real=real or config.data.real,
        num_classes=num_classes or config.data.num_classes,
    )
    config = replace(config, data=data, model=replace(config.model, init=init or config.model.init))
    config = apply_overrides(config, settings or [])
    _run(recipe, config, out or Path("runs", f"{recipe}_demo" if demo else recipe), resume, device)


def _run(recipe: str, config: "RunConfig", out: Path, resume: str, device: str) -> None:
    from jobs.recipes import needs_init
    from jobs.train import train as train_run
    from tokenlabels.trainer.checkpoint import LAST_FILE

    goes_on = resume not in ("never", "auto") or (resume == "auto" and (out / LAST_FILE).exists())
    if needs_init(recipe) and config.model.init is None and not goes_on:
        raise ValueError(f"{recipe} fine-tunes; give the checkpoint to begin with (--init)")
    if not config.data.images:
        raise ValueError("name the training images: --images 'imagenet1k-train-{0000..1023}.tar'; or try --demo")
    with show_stops():
        accuracy = train_run(config, out, resume=resume, device=device)
    typer.echo(f"{out}: done{'' if accuracy is None else f', {accuracy}'}")


@contextmanager
def show_stops() -> Iterator[None]:
    """Turn the ways in which training stops early into one line and an exit code."""
    from tokenlabels.trainer import NonFiniteLossError, TrainingStoppedError

    try:
        yield
    except NonFiniteLossError as error:
        fail(str(error), FOUND)
    except TrainingStoppedError as error:
        fail(str(error), TERMINATED)


def _demo_config(config: "RunConfig") -> "RunConfig":
    from rich.progress import Progress

    from annotate.demo_teacher import DEFAULT_STEPS
    from jobs.train_demo import demo_config, make_demo_data

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training a teacher on generated scenes", total=DEFAULT_STEPS)
        data = make_demo_data(DEMO_FOLDER, lambda step, _: bar.update(task, completed=step + 1))
    if data.material is not None:
        run_with_progress(data.material.shards, data.material.job, backend="inline")
    return demo_config(config, data)


def _list_recipes() -> None:
    from jobs.recipes import RECIPES

    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        typer.echo(f"{name:<{width}}  {(recipe.__doc__ or '').partition(chr(10))[0]}")
