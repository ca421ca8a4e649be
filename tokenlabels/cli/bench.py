"""tokenlabels bench: the project's figures, measured here and now, as ratios."""

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from tokenlabels.cli.common import DeviceOption, needs_checkout, show_user_errors

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
    with needs_checkout("the dense form to compare with"):
        from jobs.bench.targets import NUM_DISTINCT, distinct_classes
        from jobs.bench.targets import bench_targets as measure
    for num_distinct in NUM_DISTINCT:
        typer.echo(measure(num_images, num_distinct, rounds=rounds))
    if label_sets:
        typer.echo(distinct_classes(label_sets))


@bench.command("train")
@show_user_errors
def bench_train(
    model: Annotated[str, typer.Option(help="An LV-ViT: lvvit_t, s, m or l.")] = "lvvit_s",
    batch_size: Annotated[int, typer.Option(help="Images of a step.", min=2)] = 8,
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of the forward pass.")] = "fp32",
    steps: Annotated[int, typer.Option(help="Steps of a round.", min=1)] = 3,
    device: DeviceOption = "auto",
    rounds: Rounds = 5,
) -> None:
    """A training step with token labels and MixToken against hard labels; the trainer against a bare loop."""
    with needs_checkout("the steps to compare with"):
        from jobs.bench.train import bench_labels, bench_trainer
    from tokenlabels.trainer.ranks import join_ranks

    for measure in (bench_labels, bench_trainer):
        typer.echo(measure(model, batch_size, join_ranks(device), precision=precision, steps=steps, rounds=rounds))


@bench.command("align")
@show_user_errors
def bench_align(
    models: Annotated[
        list[str] | None, typer.Option(help="deit_s, deit_s_384 or swin_t; several are measured. [default: all]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images of a step.", min=2)] = 8,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the forward pass.")] = "fp32",
    steps: Annotated[int, typer.Option(help="Steps of a round.", min=1)] = 2,
    device: DeviceOption = "auto",
    rounds: Rounds = 5,
) -> None:
    """A training step with TL-Align, by every backend and as published, against the plain model; what differs."""
    with needs_checkout("the published way to compare with"):
        from jobs.bench.align import bench_align as measure
        from jobs.bench.align import find_cases
    from tokenlabels.trainer.ranks import join_ranks

    place = join_ranks(device)
    for name, case in find_cases(models).items():
        typer.echo(measure(name, case, batch_size, place, precision=precision, steps=steps, rounds=rounds))


@bench.command("moto")
@show_user_errors
def bench_moto(
    sizes: Annotated[
        list[int] | None,
        typer.Option("--size", help="Side of the map in pixels; several are measured. [default: 224 384 512 1024]"),
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="What needs more is not run. [default: half of what is free]", min=0)
    ] = None,
    max_seconds: Annotated[float, typer.Option(help="Calls that would take longer are not run.", min=0)] = 5,
    model: Annotated[str, typer.Option(help="timm model that TokenProp is joined to.")] = "deit_small_patch16_224",
    batch_size: Annotated[int, typer.Option(help="Images of its training step.", min=2)] = 8,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of its forward pass.")] = "fp32",
    steps: Annotated[int, typer.Option(help="Training steps of a round.", min=1)] = 2,
    device: DeviceOption = "auto",
    rounds: Rounds = 5,
) -> None:
    """MoTo against the literal loop and against attention between pixels; a training step with TokenProp."""
    with needs_checkout("the loop and the attention to compare with"):
        from jobs.bench.moto import SIZES
        from jobs.bench.moto import bench_moto as measure
        from jobs.bench.token_prop import bench_token_prop
    from tokenlabels.trainer.ranks import join_ranks

    place = join_ranks(device)
    typer.echo(measure(sizes or SIZES, place, rounds=rounds, memory_gb=memory_gb, max_seconds=max_seconds))
    typer.echo(bench_token_prop(model, batch_size, place, precision=precision, steps=steps, rounds=rounds))


@bench.command("loader")
@show_user_errors
def bench_loader(
    images: Annotated[list[str], typer.Argument(help="Photographs: tars or trees, a few hundred are enough.")],
    num_images: Annotated[int, typer.Option(help="Samples per pass; the images are repeated.", min=1)] = 5200,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.", min=2)] = 128,
    threads: Annotated[int, typer.Option(help="Threads, or worker processes of the others.", min=1)] = 2,
    rounds: Rounds = 3,
) -> None:
    """The loader against its decoder alone, WebDataset and ImageFolder; what labels cost; memory; the first batch."""
    with needs_checkout("the other loaders to compare with"):
        from jobs.bench.loader import bench_loader as measure
        from jobs.bench.loader import prepare
        from jobs.bench.loader_limits import measure_memory, measure_start
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare(images, folder, num_images)
        for comparison in measure(data, threads=threads, batch_size=batch_size, rounds=rounds):
            typer.echo(comparison)
        typer.echo(measure_memory(data.tars, data.labels, threads=threads, batch_size=batch_size))
        typer.echo(measure_start(data.images[0], folder / "start", threads=threads, batch_size=batch_size))
