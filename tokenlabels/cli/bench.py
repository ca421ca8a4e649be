"""tokenlabels bench: the project's figures, measured here and now, as ratios."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tokenlabels.cli.common import DeviceOption, show_user_errors

bench = typer.Typer(help="Measure ratios on this machine; nothing is downloaded.", no_args_is_help=True)

Rounds = Annotated[int, typer.Option(help="Interleaved rounds.", min=1)]


@bench.command("annotate")
@show_user_errors
def bench_annotate(
    images: Annotated[
        list[str] | None, typer.Argument(help="Image tars. [default: generated scenes]", metavar="[IMAGES...]")
    ] = None,
    teacher: Annotated[str, typer.Option(help="timm model, with random weights.")] = "tf_efficientnet_b3",
    image_size: Annotated[int | None, typer.Option(help="Side of its input in pixels.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 16,
    device: DeviceOption = "auto",
    rounds: Rounds = 3,
    with_ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Compare Ray workers too.")] = True,
) -> None:
    """Inline backend against the bare teacher; two Ray workers against two processes."""
    from annotate.bench import bench_inline, bench_ray, scene_shards
    from annotate.schedule import Job
    from annotate.shard import AnnotateConfig
    from annotate.teachers import TeacherSpec
    from tokenlabels.images import find_shards

    spec = TeacherSpec(name=teacher, weights="random", checkpoint=None, seed=0, image_size=image_size)
    with tempfile.TemporaryDirectory() as folder:
        shards = find_shards(images) if images else scene_shards(Path(folder, "images"), (64, 64))
        config = AnnotateConfig(batch_size=batch_size, max_skip=1.0)
        job = Job(Path(folder, "labels"), (spec,), config, device=device)
        typer.echo(bench_inline(shards, job, rounds=rounds))
        if with_ray:
            typer.echo(bench_ray(shards, job, rounds=rounds))


@bench.command("store")
@show_user_errors
def bench_store(
    num_images: Annotated[int, typer.Option(help="Maps in the shard.", min=1)] = 1280,
    rounds: Rounds = 5,
) -> None:
    """Bytes, reading speed and writer memory against one file per image."""
    from annotate.bench_store import bench_store as measure

    with tempfile.TemporaryDirectory() as folder:
        typer.echo(measure(Path(folder), num_images=num_images, rounds=rounds))


@bench.command("targets")
@show_user_errors
def bench_targets(
    label_sets: Annotated[
        list[Path] | None,
        typer.Argument(help="Label sets whose distinct classes per map are printed too.", metavar="[LABELS...]"),
    ] = None,
    num_images: Annotated[int, typer.Option(help="Images of the batch.", min=2)] = 128,
    rounds: Rounds = 5,
) -> None:
    """Sparse targets and loss against the dense form, on the CPU: time, bytes and peak memory."""
    try:
        from jobs.bench.targets import NUM_DISTINCT, distinct_classes
        from jobs.bench.targets import bench_targets as measure
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("jobs"):
            raise
        message = "the dense form to compare with is in jobs/, which is not installed; run this from a checkout"
        raise ValueError(message) from error
    for num_distinct in NUM_DISTINCT:
        typer.echo(measure(num_images, num_distinct, rounds=rounds))
    if label_sets:
        typer.echo(distinct_classes(label_sets))
