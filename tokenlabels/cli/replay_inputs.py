"""Whose training `tokenlabels show --epoch` replays: the settings of a run or of a recipe, its ranks and its device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tokenlabels.cli.common import needs_checkout

if TYPE_CHECKING:
    import torch

    from jobs.config import RunConfig
    from loaders import TokenLabelLoader

DEFAULT_RECIPE = "lvvit_s"


@dataclass(frozen=True)
class TrainingChoice:
    """The options that say which training.

    Attributes:
        recipe: whose settings are used; None is that of the run, or `DEFAULT_RECIPE`.
        run: folder of a run, whose settings are used; None for none.
        settings: changes of single settings, as ``data.batch_size=64``.
        seed: of order, augmentation and mixing; None is that of the run or the recipe.
        world_size: number of ranks; None is that of the run, or 1.
        device: "auto", "cpu" or "cuda"; "auto" is that of the run, or CUDA where there is a GPU.
    """

    recipe: str | None = None
    run: Path | None = None
    settings: tuple[str, ...] = ()
    seed: int | None = None
    world_size: int | None = None
    device: str = "auto"

    def find(self, labels: Path, images: Sequence[str]) -> "Training":
        """The training, with these labels and images; without images, those of the run.

        Raises:
            ValueError: there is no such run or recipe, a setting is none, or it is not said where the images are; the
                run was on a GPU and there is none.
        """
        if self.recipe is not None and self.run is not None:
            raise ValueError("settings come from a run or from a recipe; give --run or --recipe, not both")
        with needs_checkout("what makes the batches of a run"):
            from jobs.overrides import apply_overrides
            from jobs.recipes import get_recipe

        name = self.recipe or DEFAULT_RECIPE
        saved = None if self.run is None else SavedRun.read(self.run)
        config = apply_overrides(get_recipe(name)() if saved is None else saved.config, self.settings)
        data = replace(config.data, images=tuple(images) or config.data.images, labels=str(labels))
        if not data.images:
            raise ValueError("name the training images, all of them: --images 'imagenet1k-train-{0000..1023}.tar'")
        trainer = config.trainer if self.seed is None else replace(config.trainer, seed=self.seed)
        # Of the model its tokens are asked for, and no weights.
        config = replace(config, data=data, trainer=trainer, model=replace(config.model, init=None))
        world_size = (1 if saved is None else saved.world_size) if self.world_size is None else self.world_size
        return Training(config, world_size, self._device(saved), str(self.run or name), saved, self.settings)

    def _device(self, saved: "SavedRun | None") -> "torch.device":
        import torch

        from loaders.options import choose_device

        has_gpu = torch.cuda.is_available()
        if self.device != "auto":
            return choose_device(self.device)
        if saved is None:
            return torch.device("cuda" if has_gpu else "cpu")
        if saved.device == "cuda" and not has_gpu:
            raise ValueError(
                f"{self.run} was trained on CUDA, whose generator drew the mixing, and there is no GPU here; replay it "
                "where there is one, or say --device cpu for the same crops with other partners"
            )
        return torch.device(saved.device)


@dataclass(frozen=True)
class Training:
    """A training whose batches can be made again.

    Attributes:
        config: of the run, with the images and labels that were found.
        world_size: number of its ranks.
        device: that draws mixing and the noise of erasing.
        name: of the run or the recipe.
        saved: what the run left, or None.
        settings: in which the configuration was changed.
    """

    config: "RunConfig"
    world_size: int
    device: "torch.device"
    name: str
    saved: "SavedRun | None"
    settings: tuple[str, ...]

    def differences(self) -> list[str]:
        """In what this is not the run that it is of, for people; nothing without a run."""
        if self.saved is None:
            return []
        theirs, ours = self.saved.config.data, self.config.data
        lines = []
        if theirs.labels is None or Path(theirs.labels).absolute() != Path(str(ours.labels)).absolute():
            lines.append(f"with labels {ours.labels}; the run had {theirs.labels}")
        if self.settings:
            lines.append(f"changed: {', '.join(self.settings)}")
        return lines

    def check_size(self) -> None:
        """Refuse images that are fewer than a batch.

        Raises:
            ValueError: they are, or there are none.
        """
        from jobs.build import images_of
        from loaders.dataset import ImageDataset

        data = self.config.data
        index_dir = None if data.index_dir is None else Path(data.index_dir)
        num_images = len(ImageDataset.find(images_of(data), index_dir))
        size = data.batch_size // self.config.trainer.accumulate
        if num_images < size:
            raise ValueError(
                f"{num_images} images are fewer than a batch of {self.name}, which has {size}: name all images of the "
                f"training, or say how large its batches were, as --set data.batch_size={min(64, num_images)}"
            )

    def checked(self, loader: "TokenLabelLoader") -> "TokenLabelLoader":
        """The loader, if its order is that of the run.

        Raises:
            ValueError: the run had other images or batches.
        """
        from loaders.state import Position

        if self.saved is not None:
            try:
                Position.from_state(self.saved.position).refuse_others(Position.from_state(loader.state_dict()))
            except ValueError as error:
                images = ", ".join(self.saved.config.data.images)
                raise ValueError(
                    f"{self.name} had other batches: {error}. Its images were {images}; batches of other ranks need "
                    "--world-size and --set data.batch_size"
                ) from error
        return loader


@dataclass(frozen=True, eq=False)
class SavedRun:
    """What a run says of itself in its last.pt.

    Attributes:
        config: of the run.
        world_size: number of its ranks.
        device: "cpu" or "cuda".
        position: of its loader, see `loaders.state`.
    """

    config: "RunConfig"
    world_size: int
    device: str
    position: object

    @classmethod
    def read(cls, folder: Path) -> "SavedRun":
        """Read the file.

        Raises:
            ValueError: it is not there, or damaged.
        """
        from jobs.overrides import from_dict
        from tokenlabels.trainer.checkpoint import LAST_FILE, read_checkpoint

        path = folder / LAST_FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no run: it has no {LAST_FILE}; give what was --out of tokenlabels train")
        content = read_checkpoint(path)
        if not content["description"] or content["loader"] is None:
            raise ValueError(f"{path} does not say what its batches were: it is of no run of tokenlabels train")
        return cls(from_dict(content["description"]), content["world_size"], _device_of(path), content["loader"])


def _device_of(checkpoint: Path) -> str:
    """The kind of device that the tensors of a checkpoint were on."""
    import torch
    from torch.types import Storage

    kinds: set[str] = set()

    def note(storage: Storage, location: str) -> Storage:
        kinds.add(location.partition(":")[0])
        return storage

    torch.load(checkpoint, map_location=note, weights_only=True, mmap=True)
    return "cuda" if "cuda" in kinds else "cpu"
