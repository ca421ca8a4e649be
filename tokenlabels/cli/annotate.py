"""tokenlabels annotate: run a teacher over image shards."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from tokenlabels.cli.common import (
    FOUND,
    INTERRUPTED,
    Checkpoints,
    ClassNames,
    DeviceOption,
    ImagePatterns,
    ImageSize,
    OutFolder,
    Presets,
    Pretrained,
    RandomWeights,
    Teachers,
    fail,
    show_user_errors,
    teacher_specs,
)

if TYPE_CHECKING:
    from annotate.ledger import RunReport
    from annotate.schedule import Job
    from tokenlabels.images import ImageShard

BackendName = Literal["inline", "ray"]


@show_user_errors
def annotate(
    images: ImagePatterns,
    out: OutFolder,
    teacher: Teachers = None,
    preset: Presets = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoints = None,
    random_weights: RandomWeights = None,
    image_size: ImageSize = None,
    resize: Annotated[
        Literal["squash", "center", "letterbox"],
        typer.Option(help="How an image is fitted to the teacher: squash and letterbox keep all of it."),
    ] = "squash",
    flip: Annotated[bool, typer.Option("--flip", help="Average with the view of the mirrored image.")] = False,
    topk: Annotated[int, typer.Option(help="Classes to keep per cell.", min=1)] = 5,
    class_names: ClassNames = None,
    amp: Annotated[Literal["none", "bf16", "fp16"], typer.Option(help="Autocast on a GPU.")] = "none",
    device: DeviceOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.", min=1)] = 32,
    decode_threads: Annotated[int, typer.Option(help="Threads that decode ahead, per worker.", min=1)] = 4,
    max_skip: Annotated[float, typer.Option(help="Share of a shard's images that may fail.", min=0, max=1)] = 0.001,
    backend: Annotated[BackendName, typer.Option(help="inline: this process. ray: several.")] = "inline",
    workers: Annotated[
        int | None, typer.Option(help="Ray workers. [default: one per GPU of the cluster, or 1]", min=1)
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="Join this Ray cluster ('auto' or host:port).")] = None,
    torch_threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads of one teacher; scores may differ in the last bit between numbers of threads. "
            "[default: all cores, shared by the workers]",
            min=1,
        ),
    ] = None,
    shard_index: Annotated[int | None, typer.Option(help="This job's number in a job array, from 0.", min=0)] = None,
    num_shards: Annotated[int | None, typer.Option(help="Number of jobs in the array.", min=1)] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="One JSON object per line on stdout.")] = False,
) -> None:
    """Label images with a teacher. Run it again to go on where it stopped."""
    _check_backend(backend, workers, ray_address)
    from annotate.schedule import Job, job_array_part
    from annotate.shard import AnnotateConfig
    from tokenlabels.class_names import read_class_names
    from tokenlabels.images import find_shards

    specs = teacher_specs(
        teacher,
        preset,
        pretrained=pretrained,
        checkpoints=checkpoint,
        random_weights=random_weights,
        image_size=image_size,
    )
    shards = find_shards(images)
    tars = tuple(shard.name for shard in shards)
    if (shard_index is None) != (num_shards is None):
        raise ValueError("--shard-index and --num-shards go together")
    if shard_index is not None and num_shards is not None:
        shards = job_array_part(shards, shard_index, num_shards)
    config = AnnotateConfig(
        resize=resize,
        class_names=None if class_names is None else read_class_names(class_names),
        batch_size=batch_size,
        decode_threads=decode_threads,
        max_skip=max_skip,
    )
    job = Job(
        out,
        specs,
        config,
        topk=topk,
        flip=flip,
        amp=amp,
        device=device,
        torch_threads=torch_threads,
        tars=tars,
    )
    report = run_with_progress(
        shards, job, backend=backend, workers=workers, ray_address=ray_address, log_json=log_json
    )
    _finish(report, out, log_json)


def run_with_progress(
    shards: "list[ImageShard]",
    job: "Job",
    *,
    backend: BackendName,
    workers: int | None = None,
    ray_address: str | None = None,
    log_json: bool = False,
) -> "RunReport":
    """Run a job on a backend, showing how it goes; leave with a message where it cannot go on."""
    from annotate.ledger import RunStoppedError
    from annotate.progress import JsonLines, ProgressBar
    from annotate.schedule import run_inline, run_ray

    try:
        with JsonLines(sys.stdout) if log_json else ProgressBar(Console(stderr=True)) as progress:
            if backend == "ray":
                return run_ray(shards, job, progress, num_workers=workers, address=ray_address)
            return run_inline(shards, job, progress)
    except RunStoppedError as error:
        fail(str(error), FOUND)
    except KeyboardInterrupt:
        fail(f"stopped. Finished shards in {job.labels} are whole; the same command goes on from there.", INTERRUPTED)


def _check_backend(backend: BackendName, workers: int | None, ray_address: str | None) -> None:
    if backend == "inline" and (workers is not None or ray_address is not None):
        raise ValueError("--workers and --ray-address need --backend ray")


def _finish(report: "RunReport", out: Path, log_json: bool) -> None:
    if not log_json:
        written = sum(shard.status == "written" for shard in report.reports)
        typer.echo(
            f"{out}: {report.num_images} images in {written} shards labelled, "
            f"{len(report.reports) - written} shards were finished before, {report.num_skipped} images skipped"
        )
    if report.failures:
        lines = "".join(f"\n  {failure.stem}: {failure.reason}" for failure in report.failures)
        fail(f"{len(report.failures)} shards failed; see to their causes and run the same command again:{lines}", FOUND)
