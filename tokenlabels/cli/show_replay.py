"""tokenlabels show --epoch: what training sees of an image in an epoch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from tokenlabels.cli.common import needs_checkout
from tokenlabels.cli.replay_inputs import Training, TrainingChoice

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from loaders import TokenLabelLoader
    from loaders.replay import Replay
    from tokenlabels.geometry import Box
    from tokenlabels.views.drawing import Pixels
    from tokenlabels.views.replayed import ReplayedSample, Shown
    from tokenlabels.views.targets import Targets


def draw_replay(
    labels: Path,
    images: Sequence[str],
    key: str,
    *,
    epoch: int,
    names: Sequence[str],
    seed: int | None = None,
    recipe: str | None = None,
    run: Path | None = None,
    settings: Sequence[str] = (),
    world_size: int | None = None,
    device: str = "auto",
) -> "Image":
    """Draw what training sees of an image in an epoch: its crop, its partner, the mixed input and its targets.

    The picture is of a run that went through the whole epoch with the ranks and the batch size that it has now. Epochs
    before it was taken up with others need them: `world_size`, and data.batch_size among the `settings`. If that was in
    the middle of the epoch, the rest was shared out anew, which is not drawn.

    Args:
        labels: folder of the label set.
        images: patterns of the training images, all of them in the order of training; none takes those of the run.
        key: of the image.
        epoch: from 0.
        names: of the classes, by id.
        seed, recipe, run, settings, world_size, device: whose batches, see `TrainingChoice`.

    Raises:
        ValueError: there is no such image, epoch, recipe or run; images, labels and settings do not fit each other.
    """
    with needs_checkout("what makes the batches of a run"):
        from jobs.build import build_model, open_labels, train_loader
    from loaders.options import check_epoch
    from loaders.replay import replay
    from tokenlabels.views.replayed import draw_replayed

    check_epoch(epoch)
    training = TrainingChoice(recipe, run, tuple(settings), seed, world_size, device).find(labels, images)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(f"reading a batch of epoch {epoch}", total=None)
        training.check_size()
        store = open_labels(training.config)
        assert store is not None, "a label set is named"
        model = build_model(training.config, store.info.num_classes)

        def make(**ranks: int) -> "TokenLabelLoader":
            return training.checked(train_loader(training.config, model, store, training.device, **ranks))

        found = replay(make, key, epoch, world_size=training.world_size)
        sample = _sample_of(found, names)
    return draw_replayed(sample, names, f"{key} in epoch {epoch}", _facts(found, sample, training))


def _facts(found: "Replay", sample: "ReplayedSample", training: Training) -> tuple[str, ...]:
    place, data = found.place, training.config.data
    mixing = "nothing is mixed" if data.mix is None else f"mixed by {data.mix}"
    if data.mixup_alpha:
        mixing += " and mixup"
    if data.mix is not None and sample.mixed is None:
        mixing += " (this image stays as it is)"
    place_in_run = (
        f"rank {place.rank} (of {training.world_size}), batch {place.batch} (of {len(found.loader)}), row {place.row} "
        f"(of {len(found.batch)}), counted from 0"
    )
    facts = [f"{training.name}: {mixing}, seed {training.config.trainer.seed} on {training.device.type}", place_in_run]
    facts += training.differences()
    if not found.batch.has_mixed_targets:
        facts.append(f"targets are mixed by area here, and by {training.config.align.method} in training")
    if training.config.trainer.loss.smoothing:
        facts.append(f"the loss smooths these targets by {training.config.trainer.loss.smoothing:g}")
    return tuple(facts)


def _sample_of(found: "Replay", names: Sequence[str]) -> "ReplayedSample":
    from loaders.replay import partner_of
    from tokenlabels.views.replayed import Mixed, ReplayedSample, Shown

    row, plan, lines = found.place.row, found.batch.plan, () if found.batch.is_mixed else ("mixed as patch tokens",)
    if partner_of(plan, row) is None and found.mixup is not None:
        plan, lines = found.mixup, ()  # MixToken took nothing of a partner
    partner = partner_of(plan, row)
    left, top, right, bottom = found.batch.boxes[row].tolist()
    mixed = None
    if plan is not None and partner is not None:
        given = Shown(_grey_levels(found, found.mixed_image()), lines)
        mixed = Mixed(_crop(found, partner, names), given, plan.own[row].cpu().numpy())
    return ReplayedSample(
        source=_source(found, (left, top, right, bottom)),
        box=(left, top, right, bottom),
        own=_crop(found, row, names),
        mixed=mixed,
        targets=_targets(found),
    )


def _source(found: "Replay", box: "Box") -> "Shown":
    """The whole image, and where its crop is."""
    import numpy as np

    from tokenlabels.images.decode import decode_rgb
    from tokenlabels.views.replayed import Shown

    shard, index = found.sample
    with found.loader.dataset.shards[shard].open() as file:
        pixels = np.asarray(decode_rgb(file.read(index)))
    height, width, _ = pixels.shape
    left, top, right, bottom = (
        round(edge * side) for edge, side in zip(box, (width, height, width, height), strict=True)
    )
    area = (right - left) * (bottom - top) / (width * height)
    mirrored = ", mirrored" if bool(found.batch.flip[found.place.row]) else ""
    return Shown(
        pixels,
        (f"{width} x {height} px", f"crop {left},{top} to {right},{bottom}", f"{area:.0%} of the area{mirrored}"),
    )


def _crop(found: "Replay", row: int, names: Sequence[str]) -> "Shown":
    """An image of the batch before mixing."""
    from loaders.replay import partner_of
    from tokenlabels.views.replayed import Shown

    label = int(found.batch.labels[row])
    lines = [found.batch.keys[row], f"class {names[label]}" if 0 <= label < len(names) else "no class of its own"]
    other = partner_of(found.mixup, row)
    if found.mixup is not None and other is not None:
        lines.append(f"mixup: {1 - float(found.mixup.share()[row]):.1%} {found.batch.keys[other]}")
    return Shown(_grey_levels(found, found.unmixed.images[row]), tuple(lines))


def _grey_levels(found: "Replay", image: "Tensor") -> "Pixels":
    """Normalised float [3, H, W] as uint8 [H, W, 3]; noise of erasing beyond black and white is cut off."""
    stage = found.loader.stage
    mean, std = (image.new_tensor(values)[:, None, None] for values in (stage.mean, stage.std))
    pixels: Pixels = (255 * (image * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return pixels


def _targets(found: "Replay") -> "Targets | None":
    """What the loss gets of the sample; mixed by area where the model finds the shares."""
    from dataclasses import replace

    from tokenlabels.views.targets import Targets

    targets, plan, row = found.batch.targets, found.batch.plan, slice(found.place.row, found.place.row + 1)
    if targets is None:
        return None
    if plan is not None and not found.batch.has_mixed_targets:
        targets = plan.mix_targets(targets)
    one = replace(
        targets,
        classes=targets.classes[row],
        weights=targets.weights[row],
        background=targets.background[row],
        valid=targets.valid[row],
    )
    return Targets(one.dense()[0].cpu().numpy(), one.valid[0].cpu().numpy(), one.grid)
