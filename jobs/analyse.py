"""What trained models have learned, beside accuracy: ``python -m jobs.analyse tokenizer runs/a --images ...``."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from jobs.build import build_model
from jobs.config import AlignConfig, RunConfig, TokenPropConfig
from jobs.overrides import from_dict
from loaders import EvaluationLoader, TokenLabelBatch, TokenLabelLoader
from tokenlabels.analysis import Tokenizer, reconstruct, token_similarity
from tokenlabels.cli.common import DeviceOption, show_user_errors
from tokenlabels.files import replace_file
from tokenlabels.models import load_checkpoint
from tokenlabels.trainer.checkpoint import BEST_FILE, CONFIG_FILE, LAST_FILE
from tokenlabels.trainer.ranks import join_ranks

RAW: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
"""Pixels stay in 0..1: every tokenizer normalises them as its model does."""

PASSES = 3
"""Over the validation images: before and after training, and for the similarity."""

_SHOWN_AFTER_SECONDS = 1.0

app = typer.Typer(name="analyse", no_args_is_help=True, pretty_exceptions_show_locals=False)


@app.callback()
def _analyse() -> None:
    """What trained models have learned, beside accuracy."""


@dataclass(frozen=True)
class TokenizerFigures:
    """A row of the table: what Figure 2 of arXiv 2212.11115 says of a tokenizer.

    Attributes:
        run: folder.
        model: name, as `timm.create_model` knows it.
        tokenizer: class of its patch embedding, and of what normalises its tokens.
        grid, channels: of the tokens.
        error, before, variance: see `tokenlabels.analysis.Reconstruction`.
        similarity: mean cosine of different tokens of an image, over the validation images.
        num_images: of validation.
    """

    run: str
    model: str
    tokenizer: str
    grid: tuple[int, int]
    channels: int
    error: float
    before: float
    variance: float
    similarity: float
    num_images: int


@app.command()
@show_user_errors
def tokenizer(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, as training leaves them.", metavar="RUN")],
    images: Annotated[list[str], typer.Option("--images", help="Training images; as in tokenlabels annotate.")],
    val: Annotated[
        list[str] | None, typer.Option("--val", help="Images that are measured.", show_default="those of --images")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of every decoder.", min=1)] = 10,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    num_images: Annotated[
        int | None, typer.Option(help="So many at most, of training in an epoch and of validation.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the decoders, the crops and their order.", min=0, max=2**63 - 1)] = 0,
    device: DeviceOption = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, and no table.")] = None,
) -> None:
    """Reconstruction error and token similarity of the patch embeddings of trained models (arXiv 2212.11115, Figure 2).

    For each run a decoder learns to make images of 64 x 64 pixels from the tokens of the frozen patch embedding. Errors
    are mean squared differences of pixels normalised as for ImageNet, on centre crops; the similarity is the mean
    cosine of different tokens of an image.
    """
    chosen = join_ranks(device)
    models = [TrainedTokenizer.load(run, chosen) for run in runs]
    data = [Images(images, val or images, model.image_size, batch_size, num_images, seed, chosen) for model in models]
    with _Progress() as progress:
        figures = [
            measure(model, of_model, progress, epochs=epochs, seed=seed)
            for model, of_model in zip(models, data, strict=True)
        ]
    if json_file is None:
        Console().print(table_of(figures))
        return
    settings = {"images": images, "val": val or images, "epochs": epochs, "num_images": num_images, "seed": seed}
    content = settings | {"runs": [asdict(one) for one in figures]}
    replace_file(json_file, (json.dumps(content, indent=1) + "\n").encode())
    typer.echo(f"figures: {json_file}")


@dataclass(frozen=True, eq=False)
class TrainedTokenizer:
    """The tokenizer of a run.

    Attributes:
        run: folder.
        config: of the run.
        tokenizer: with its trained weights, on a device.
    """

    run: Path
    config: RunConfig
    tokenizer: Tokenizer

    @classmethod
    def load(cls, run: Path, device: torch.device) -> Self:
        """Build the model of a run, with its best weights, or its last ones if nothing was evaluated.

        Raises:
            ValueError: the folder holds no run, the weights are of another model, or it has no patch embedding.
        """
        config = read_config(run)
        weights = next((run / name for name in (BEST_FILE, LAST_FILE) if (run / name).is_file()), None)
        if weights is None:
            raise ValueError(f"{run} has neither {BEST_FILE} nor {LAST_FILE}: has the run begun?")
        # Neither what the weights began with nor how they were trained matters now.
        bare = replace(
            config, model=replace(config.model, init=None), align=AlignConfig(), token_prop=TokenPropConfig()
        )
        with torch.random.fork_rng(devices=[]):
            model = _innermost(build_model(bare, config.data.num_classes or 1))
            load_checkpoint(model, weights, take_classes=True)
        side = config.model.image_size
        return cls(run, config, Tokenizer.of(model.to(device), (side, side)))

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.config.model.image_size


def read_config(run: Path) -> RunConfig:
    """The configuration in the folder of a run.

    Raises:
        ValueError: there is none.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{run} holds no run: there is no {path}; give the folder that was --out of the training")
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is no configuration of jobs.train: {error}") from error


def _innermost(model: nn.Module) -> nn.Module:
    """The timm model, without a classifier of tokens around it."""
    inner = getattr(model, "model", None)
    return _innermost(inner) if isinstance(inner, nn.Module) else model


class Images:
    """The images that a decoder learns from, random crops in random order, and those that are measured, centre crops.

    The crops of an image are the same for all models, whatever the size of their input.

    Args:
        images, val: patterns of tars or trees.
        image_size: side in pixels of the model's input.
        batch_size: at most the number of images.
        num_images: of training in every epoch, and of validation, at most; None is all.
        seed: of crops and order.
        device: where batches go.

    Raises:
        ValueError: there are no images.
    """

    def __init__(
        self,
        images: Sequence[str],
        val: Sequence[str],
        image_size: int,
        batch_size: int,
        num_images: int | None,
        seed: int,
        device: torch.device,
    ) -> None:
        size = batch_size if num_images is None else min(batch_size, num_images)
        options: dict[str, Any] = {"image_size": image_size, "batch_size": size, "device": device, **RAW}
        self._train = TokenLabelLoader(images, seed=seed, last="repeat", grid=1, **options)
        self._val = EvaluationLoader(val, **options)
        self.num_train, self.num_val = (
            min(len(loader.dataset), num_images or len(loader.dataset)) for loader in (self._train, self._val)
        )

    def train(self, epoch: int) -> Iterator[Tensor]:
        """Images float [B, 3, side, side], 0..1, of one epoch."""
        self._train.set_epoch(epoch)
        return _first(self._train, self.num_train)

    def val(self) -> Iterator[Tensor]:
        """The validation images, alike."""
        return _first(self._val, self.num_val)


def _first(batches: Iterable[TokenLabelBatch], num_images: int) -> Iterator[Tensor]:
    """The images of batches, so many of them."""
    for batch in batches:
        yield batch.images[:num_images]
        num_images -= len(batch.images)
        if num_images <= 0:
            return


def measure(
    model: TrainedTokenizer, images: Images, progress: "_Progress", *, epochs: int, seed: int
) -> TokenizerFigures:
    """Train a decoder, and measure it and the tokens on the validation images."""
    tokens_of, found = model.tokenizer, model.tokenizer.format
    progress.begin(str(model.run), epochs * images.num_train + PASSES * images.num_val)
    similarity = 0.0
    for batch in images.val():
        similarity += float(token_similarity(tokens_of(batch)).double().sum())
        progress.advance(len(batch))
    made = reconstruct(
        tokens_of,
        found.grid,
        found.num_channels,
        images.train,
        images.val,
        epochs=epochs,
        seed=seed,
        device=tokens_of.mean.device,
        on_batch=progress.advance,
    )
    return TokenizerFigures(
        run=str(model.run),
        model=model.config.model.name,
        tokenizer=tokens_of.name,
        grid=found.grid,
        channels=found.num_channels,
        error=made.error,
        before=made.before,
        variance=made.variance,
        similarity=similarity / made.num_images,
        num_images=made.num_images,
    )


def table_of(figures: Sequence[TokenizerFigures]) -> Table:
    """The table of Figure 2, a row for each run."""
    first = figures[0]
    caption = f"{first.num_images} images; one colour for all pixels has an error of {first.variance:.3f}"
    table = Table(title="Tokenizers", caption=caption)
    table.add_column("run", overflow="fold")
    table.add_column("model and tokenizer", overflow="fold")
    table.add_column("tokens", no_wrap=True)
    table.add_column("reconstruction error", justify="right", min_width=len("reconstruction"))
    table.add_column("token similarity", justify="right", min_width=len("similarity"))
    for one in figures:
        tokens = f"{one.grid[0]} x {one.grid[1]} x {one.channels}"
        model = f"{one.model}\n{one.tokenizer}"
        table.add_row(one.run, model, tokens, f"{one.error:.4f}", f"{one.similarity:.3f}", end_section=True)
    return table


class _Progress:
    """A bar on stderr, in a terminal, once something takes longer than a second."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=None, visible=False)
        self._since = time.monotonic()

    def begin(self, description: str, total: int) -> None:
        """The next run begins."""
        self._bar.reset(self._task, description=description, total=total)

    def advance(self, num_images: int) -> None:
        """So many more went through."""
        is_shown = time.monotonic() - self._since > _SHOWN_AFTER_SECONDS
        self._bar.update(self._task, advance=num_images, visible=is_shown)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


if __name__ == "__main__":
    app()
