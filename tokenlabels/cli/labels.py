"""tokenlabels verify, tokenlabels inspect: is a label set whole, and what is in it."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokenlabels.cli.common import (
    FOUND,
    Checkpoints,
    DeviceOption,
    ImageSize,
    LabelsFolder,
    Presets,
    Pretrained,
    RandomWeights,
    Teachers,
    shard_progress,
    show_user_errors,
    teacher_specs,
)

if TYPE_CHECKING:
    from annotate.teachers import TeacherSpec
    from tokenlabels.images import ImageShard
    from tokenlabels.store import Finding

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


@show_user_errors
def verify(
    labels: LabelsFolder,
    images: Annotated[
        list[str] | None, typer.Option("--images", help="The image tars, to compare keys with; as in annotate.")
    ] = None,
    recompute: Annotated[int, typer.Option(help="Label this many random images again and compare.", min=0)] = 0,
    teacher: Teachers = None,
    preset: Presets = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoints = None,
    random_weights: RandomWeights = None,
    image_size: ImageSize = None,
    device: DeviceOption = "auto",
    as_json: Json = False,
) -> None:
    """Check every byte and every value of a label set; exit 1 if anything is wrong."""
    from tokenlabels.images import find_shards
    from tokenlabels.store import manifest_path, open_store, verify_store

    shards = {shard.stem: shard for shard in find_shards(images or [])}
    if images and not any(manifest_path(labels, stem).exists() for stem in shards):
        raise ValueError(f"none of the given images belong to a shard of {labels}; they would check nothing")
    if not recompute and (teacher or preset):
        raise ValueError("a teacher is needed for --recompute N only")
    findings: list[Finding] = []
    unreadable: list[Finding] = []
    with shard_progress(labels, "checking") as on_shard:
        checks = verify_store(labels, source_keys=_source_keys(shards, unreadable), on_shard=on_shard)
        findings.extend(_shown(checks, as_json))
    findings.extend(_shown(iter(unreadable), as_json))
    if recompute and findings and not as_json:
        typer.echo(f"{labels}: no images were labelled again; mend these findings first")
    if recompute and not findings:
        if not shards:
            raise ValueError("--recompute needs the images too: --images 'train-*.tar'")
        specs = teacher_specs(
            teacher,
            preset,
            pretrained=pretrained,
            checkpoints=checkpoint,
            random_weights=random_weights,
            image_size=image_size,
        )
        again = _recomputed(labels, list(shards.values()), specs, recompute, device)
        findings.extend(_shown(again, as_json))
    if as_json:
        typer.echo(json.dumps({"findings": [{"path": str(f.path), "problem": f.problem} for f in findings]}, indent=1))
    if findings:
        if not as_json:
            typer.echo(f"{labels}: {len(findings)} findings")
        raise typer.Exit(FOUND)
    if not as_json:
        store = open_store(labels)
        num_at_hand = sum(len(shard) for shard in store.shards if shard.stem in shards)
        recomputed = f", {min(recompute, num_at_hand)} images labelled again" if recompute else ""
        num_compared = sum(shard.stem in shards for shard in store.shards)
        compared = f", keys compared with the images of {num_compared}" if images else ""
        typer.echo(f"{labels}: whole. {len(store)} maps in {len(store.shards)} shards{compared}{recomputed}")


@show_user_errors
def inspect(
    labels: LabelsFolder,
    key: Annotated[str | None, typer.Option(help="Show the map of one image.")] = None,
    as_json: Json = False,
) -> None:
    """Print what a label set holds, or what one map shows."""
    from tokenlabels.nearest import nearest_keys
    from tokenlabels.store import open_store
    from tokenlabels.summary import as_json as to_json
    from tokenlabels.summary import summarise_map, summarise_store
    from tokenlabels.views import block_map

    store = open_store(labels)
    if key is None:
        with shard_progress(labels, "reading") as on_shard:
            summary = summarise_store(store, on_shard)
        typer.echo(json.dumps(to_json(summary), indent=1) if as_json else str(summary))
        return
    if key not in store:
        nearest = ", ".join(nearest_keys(key, store)) or "none: it is empty"
        raise ValueError(f"{labels} has no labels for {key!r}; near it are {nearest}")
    score_map = store[key]
    if as_json:
        typer.echo(json.dumps(to_json(summarise_map(score_map, store.info.class_names)), indent=1))
    else:
        Console().print(block_map(score_map, store.info.class_names))


def _source_keys(shards: "dict[str, ImageShard]", unreadable: "list[Finding]") -> "Callable[[str], list[str] | None]":
    """Gives the keys of a shard's images; a damaged tar goes to `unreadable`, so that the others are still compared."""
    from tokenlabels.store import Finding

    def keys_of(stem: str) -> list[str] | None:
        try:
            # A copy: a shard keeps the index of its tar, and a thousand of them would pile up.
            return copy.copy(shards[stem]).keys() if stem in shards else None
        except (ValueError, OSError) as error:
            unreadable.append(Finding(Path(shards[stem].path), f"cannot be compared with its labels ({error})"))
            return None

    return keys_of


def _recomputed(
    labels: Path, shards: "list[ImageShard]", specs: "tuple[TeacherSpec, ...]", num_images: int, device: str
) -> "Iterator[Finding]":
    from annotate.recompute import recompute
    from annotate.schedule import Job
    from tokenlabels.store import open_store

    store = open_store(labels)
    made_by = store.info.teacher
    job = Job(labels, specs, topk=store.info.k, flip=made_by.flip, amp=made_by.amp, device=device)
    return recompute(store, shards, job.load_teacher(), num_images=num_images)


def _shown(findings: "Iterator[Finding]", as_json: bool) -> "Iterator[Finding]":
    """Print findings as they come: a large set takes minutes."""
    for finding in findings:
        if not as_json:
            typer.echo(str(finding))
        yield finding
