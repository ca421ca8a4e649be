"""Training on generated scenes: the main path from images to a student, in minutes on two cores."""

from dataclasses import dataclass, replace
from pathlib import Path

from annotate.demo import DemoMaterial, make_material
from annotate.demo_teacher import OnStep
from annotate.scenes import write_scenes
from jobs.config import RunConfig
from tokenlabels.store import open_store
from tokenlabels.trainer import ScheduleConfig

TRAIN_SHARD_SIZES, VAL_SHARD_SIZES = (200, 160, 120, 160), (160,)
VAL_SEED = 1


@dataclass(frozen=True)
class DemoData:
    """Where the demo's data are.

    Attributes:
        train: tars of scenes.
        labels: folder of their label set.
        val: tars of other scenes.
        material: what is still to be labelled, or None if the labels are there from before.
    """

    train: tuple[str, ...]
    labels: Path
    val: tuple[str, ...]
    material: DemoMaterial | None


def make_demo_data(folder: Path, on_step: OnStep) -> DemoData:
    """Draw scenes and train a teacher into `folder`, or find them there. Takes about a minute.

    Args:
        folder: of the demo.
        on_step: called as the teacher learns, see `train_demo_teacher`.
    """
    val = write_scenes(folder / "val", shard_sizes=VAL_SHARD_SIZES, seed=VAL_SEED)
    labels = folder / "labels"
    material = None
    if not (labels / "labels.json").exists() or open_store(labels).missing:
        material = make_material(folder, on_step, shard_sizes=TRAIN_SHARD_SIZES)
    tars = sorted(str(tar) for tar in (folder / "images").glob("*.tar"))
    return DemoData(tuple(tars), labels, tuple(str(tar) for tar in val.tars), material)


def demo_config(config: RunConfig, data: DemoData) -> RunConfig:
    """A recipe, made small enough for two cores: images of 64 pixels, batches of 32, 12 epochs."""
    trainer = replace(
        config.trainer,
        optimizer=replace(config.trainer.optimizer, base_lr=1e-3, lr_batch=32, clip_grad=1.0),
        schedule=ScheduleConfig(epochs=12, warmup_epochs=1),
        precision="fp32",
        ema_decay=None,
        log_every=10,
    )
    return replace(
        config,
        model=replace(config.model, image_size=64, drop_path=0.0),
        data=replace(
            config.data,
            images=data.train,
            labels=str(data.labels),
            val=data.val,
            batch_size=32,
            rand_augment=None,
            shuffle_shards=len(data.train),
            crop_pct=1.0,
        ),
        trainer=trainer,
    )
