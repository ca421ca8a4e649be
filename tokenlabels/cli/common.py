"""What several commands share: how errors are shown, and the options that choose a teacher."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    from annotate.teachers import TeacherSpec

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

FOUND, WRONG_USE, INTERRUPTED = 1, 2, 130

Device = Literal["auto", "cpu", "cuda"]

LabelsFolder = Annotated[Path, typer.Argument(help="Folder of the label set.", metavar="LABELS")]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder of the label set, made if it is not there.")]
ImagePatterns = Annotated[
    list[str],
    typer.Argument(
        help="Image tars or folders of class folders: names, globs or braces, quoted ('train-{0000..1023}.tar').",
        metavar="IMAGES...",
    ),
]
Teachers = Annotated[
    list[str] | None,
    typer.Option("--teacher", help="timm model name, hf-hub:... or local-dir:...; several are averaged."),
]
Presets = Annotated[list[str] | None, typer.Option("--preset", help="A teacher of the papers, such as dm_nfnet_f6.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Use timm's pretrained weights.")]
Checkpoints = Annotated[
    list[Path] | None,
    typer.Option("--checkpoint", help="Weights (.safetensors, .pth), one for each teacher, presets last."),
]
RandomWeights = Annotated[
    int | None, typer.Option("--random-weights", help="Random weights from this seed, to try things out.")
]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", help="Side of the teacher's input in pixels. [default: the model's own]")
]
ClassNames = Annotated[
    str | None,
    typer.Option(help="Names of the classes: a file (text, or JSON as classes.json), or imagenet-1k.", metavar="FILE"),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto takes CUDA if it is there.")]


def show_user_errors(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Turn errors that a user can mend into one message and an exit code; bugs keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of our output is gone, as with `| head`: typer ends quietly
        except (ValueError, OSError) as error:
            fail(str(error), _exit_code(error))

    return wrapped


def _exit_code(error: Exception) -> int:
    """2 where other arguments would help; 1 where the machine is to blame, as for a full disk or a closed folder."""
    from tokenlabels.store import DiskFullError

    wrong_use = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
    return WRONG_USE if isinstance(error, wrong_use) and not isinstance(error, DiskFullError) else FOUND


def fail(message: str, code: int) -> NoReturn:
    """Say why on stderr and leave."""
    Console(stderr=True, highlight=False, soft_wrap=True).print("[bold red]error:[/]", end=" ")
    typer.echo(message, err=True)
    raise typer.Exit(code)


def teacher_specs(
    teachers: list[str] | None,
    presets: list[str] | None,
    *,
    pretrained: bool,
    checkpoints: list[Path] | None,
    random_weights: int | None,
    image_size: int | None,
) -> "tuple[TeacherSpec, ...]":
    """The teachers that the options name.

    Raises:
        ValueError: none is named, or it is not clear where a teacher's weights come from.
    """
    from annotate.specs import TeacherSpec, Weights, preset

    published = [preset(name, image_size=image_size) for name in presets or []]
    models: list[tuple[str, int | None, Weights | None]] = [(name, image_size, None) for name in teachers or []]
    models += [(spec.name, spec.image_size, spec.weights) for spec in published]
    checkpoints = checkpoints or []
    if not models:
        raise ValueError("name a teacher: --teacher NAME (any timm classifier) or --preset NAME")
    if checkpoints and len(checkpoints) != len(models):
        raise ValueError(f"{len(checkpoints)} --checkpoint for {len(models)} teachers; give one for each")
    elsewhere = bool(checkpoints) or random_weights is not None
    return tuple(
        TeacherSpec(
            name,
            weights="pretrained" if pretrained else None if elsewhere else default_weights,
            checkpoint=checkpoints[index] if checkpoints else None,
            seed=random_weights,
            image_size=size,
        )
        for index, (name, size, default_weights) in enumerate(models)
    )


@contextmanager
def needs_checkout(what: str) -> Iterator[None]:
    """Turn the missing `jobs` of an installed package into advice."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("jobs"):
            raise
        message = f"{what} is in jobs/, which is not installed; run this from a checkout"
        raise ValueError(message) from error


def check_place(out: Path) -> None:
    """Refuse a file that cannot be written, as far as that is known before there is something to write."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a file")
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{out}: {folder} is no folder that can be written to")


@contextmanager
def shard_progress(labels: Path, what: str, *, num_passes: int = 1) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr over the finished shards of a label set; the function is told each stem before it."""
    total = num_passes * len(list((labels / "manifest").glob("*.json")))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def on_shard(stem: str) -> None:
            bar.update(task, advance=1, description=f"{what} {stem}")

        yield on_shard
