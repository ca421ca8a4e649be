"""The device's part of a batch: float work on pixels, mixing, targets.

Order, as in timm: colours and geometry of RandAugment on the crop, normalisation, Random Erasing, mixing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from loaders.batch import HostBatch, TokenLabelBatch
from loaders.color_ops import apply_color
from loaders.crop_targets import CropTargets
from loaders.erasing import EraseMode, erase, erased_tokens
from loaders.upload import upload
from loaders.warp import warp
from tokenlabels.checks import Grid, check_choice, check_share, is_number
from tokenlabels.lazy import cached_property
from tokenlabels.mixing import MixPlan
from tokenlabels.sparse_targets import TokenTargets

Mix = Literal["mixtoken", "cutmix", "mixup", "random", "blockwise"]


@dataclass(frozen=True)
class Mixing:
    """How samples are mixed.

    Attributes:
        kind: see `TokenLabelLoader`.
        grid: (h, w) tokens.
        image_size: (S_h, S_w) in pixels.
        alpha: of the Beta distribution of shares.
        prob: probability that a sample is mixed.
        mixup_alpha: of MixUp beside "cutmix" or "mixtoken"; 0 is none.
    """

    kind: Mix
    grid: Grid
    image_size: Grid
    alpha: float
    prob: float
    mixup_alpha: float = 0.0

    def __post_init__(self) -> None:
        check_choice("mix", self.kind, Mix)
        check_share("mix_prob", self.prob)
        if not is_number(self.alpha) or not 0 < self.alpha < math.inf:
            raise ValueError(f"mix_alpha must be a finite number above 0, got {self.alpha!r}; mix=None mixes nothing")
        _check_mixup_alpha(self.mixup_alpha, self.kind)

    def before_tokens(self, num_samples: int, generator: torch.Generator) -> MixPlan | None:
        """Draw the MixUp of the pixels that MixToken is then applied to. To be drawn before `plan`."""
        if self.kind != "mixtoken" or self.mixup_alpha == 0:
            return None
        return MixPlan.mixup(num_samples, alpha=self.mixup_alpha, prob=self.prob, generator=generator)

    def plan(self, num_samples: int, generator: torch.Generator) -> MixPlan:
        """Draw who is mixed with whom."""
        draw: dict[Mix, Callable[..., MixPlan]] = {
            "mixtoken": MixPlan.mixtoken,
            "cutmix": MixPlan.cutmix,
            "mixup": MixPlan.mixup,
            "random": MixPlan.random_patches,
            "blockwise": MixPlan.blockwise,
        }
        of_cutmix = {"image_size": self.image_size, "mixup_alpha": self.mixup_alpha}
        own: dict[str, Any] = {"mixup": {}, "cutmix": of_cutmix}.get(self.kind, {"grid": self.grid})
        return draw[self.kind](num_samples, alpha=self.alpha, prob=self.prob, generator=generator, **own)


def choose_mixing(
    mix: Mix | None,
    grid: Grid,
    image_size: Grid,
    alpha: float,
    prob: float,
    batch_size: int,
    mixup_alpha: float = 0.0,
) -> Mixing | None:
    """How to mix batches of this size, or None.

    Raises:
        ValueError: an argument is not allowed, or there is nobody to be mixed with.
    """
    if mix is None:
        _check_mixup_alpha(mixup_alpha, mix)
        return None
    if batch_size == 1:
        raise ValueError(f"mix={mix!r} needs another sample of the batch, but batch_size is 1; raise it, or mix=None")
    return Mixing(mix, grid, image_size, alpha, prob, mixup_alpha)


@dataclass(frozen=True)
class DeviceStage:
    """Turns a host batch into what the model takes.

    Attributes:
        device: where to.
        mean, std: of the normalisation, for values in 0..1.
        crop_targets: from maps to targets, or None without maps.
        num_classes: for targets from the labels of the data set where there are no maps; None makes no targets.
        mixing: or None.
        mix_targets: whether targets are mixed as the images are.
        erase_mode: what an erased box is filled with.
        ignore_erased: whether erased tokens are left out of the dense loss.
    """

    device: torch.device
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_targets: CropTargets | None = None
    num_classes: int | None = None
    mixing: Mixing | None = None
    mix_targets: bool = True
    erase_mode: EraseMode = "pixel"
    ignore_erased: bool = False

    def __post_init__(self) -> None:
        _check_channels("mean", self.mean, -math.inf)
        _check_channels("std", self.std, 0)
        check_choice("erase_mode", self.erase_mode, EraseMode)
        if not isinstance(self.mix_targets, bool):
            raise ValueError(f"mix_targets must be True or False, got {self.mix_targets!r}")
        if not self.mix_targets and (self.mixing is None or self.mixing.kind == "mixtoken"):
            raise ValueError(
                "mix_targets=False leaves targets to TLAlign, which needs images that are mixed here: mix='cutmix', "
                f"'mixup', 'random' or 'blockwise', got {self.mixing and self.mixing.kind!r}"
            )

    @torch.no_grad()
    def __call__(self, host: HostBatch) -> TokenLabelBatch:
        """One batch. The images of `host` may be overwritten when the device has come so far."""
        generator = torch.Generator(self.device).manual_seed(host.hash % 2**63)
        images = self._pixels(host, generator)
        targets = self._targets(host)
        plan = on_pixels = None
        if self.mixing is not None and len(host) > 1:
            before = self.mixing.before_tokens(len(host), generator)
            plan = self.mixing.plan(len(host), generator)
            on_pixels = before if self.mixing.kind == "mixtoken" else plan
            if on_pixels is not None:
                images = on_pixels.mix(images)
            for step in (before, plan):
                if self.mix_targets and targets is not None and step is not None:
                    targets = step.mix_targets(targets)
        return TokenLabelBatch(
            images=images,
            targets=targets,
            plan=plan,
            is_mixed=plan is not None and on_pixels is plan,
            has_mixed_targets=self.mix_targets or plan is None,
            labels=self._moved(torch.from_numpy(host.labels)),
            keys=host.keys,
            boxes=self._moved(torch.from_numpy(host.crops).float()),
            flip=self._moved(torch.from_numpy(host.mirrored)),
        )

    def _pixels(self, host: HostBatch, generator: torch.Generator) -> Tensor:
        images = host.images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        if host.augment is not None:
            images = apply_color(images, host.augment.to(self.device), inplace=True)
        if host.is_warped.any():
            rows = self._moved(torch.from_numpy(host.is_warped.nonzero()[0]))
            to_input = self._moved(torch.from_numpy(host.warp).float())
            images = warp(images, to_input, self._mean, rows, inplace=True)
        images = images.sub_(self._mean[:, None, None]).div_(self._std[:, None, None])
        if host.erased is not None:
            images = erase(images, self._moved(host.erased), self.erase_mode, generator, inplace=True)
        return images

    def _targets(self, host: HostBatch) -> TokenTargets | None:
        if self.crop_targets is None:
            if self.num_classes is None:
                return None
            return TokenTargets.from_labels(self._moved(torch.from_numpy(host.labels)), self.num_classes)
        targets = self.crop_targets(host)
        if host.erased is None or not self.ignore_erased or targets.grid is None:
            return targets
        erased = erased_tokens(self._moved(host.erased), host.images.shape[1:3], targets.grid).flatten(1)
        return _without(targets, torch.cat([erased.new_zeros(len(host), 1), erased], dim=1))

    @cached_property
    def _mean(self) -> Tensor:
        with torch.inference_mode(False):
            return 255 * torch.tensor(self.mean, dtype=torch.float32, device=self.device)

    @cached_property
    def _std(self) -> Tensor:
        with torch.inference_mode(False):
            return 255 * torch.tensor(self.std, dtype=torch.float32, device=self.device)

    def _moved(self, tensor: Tensor) -> Tensor:
        return upload(tensor, self.device)


def _check_mixup_alpha(value: object, mix: Mix | None) -> None:
    """Refuse what is no finite number from 0 on, and MixUp beside mixing that it is not combined with."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"mixup_alpha must be a finite number of 0 or more, got {value!r}")
    if value > 0 and mix not in ("cutmix", "mixtoken"):
        alone = "; MixUp alone is mix='mixup' with mix_alpha" if mix in (None, "mixup") else ""
        raise ValueError(f"mixup_alpha above 0 needs mix='cutmix' or mix='mixtoken', got {value!r} and {mix!r}{alone}")


def _check_channels(name: str, values: object, above: float) -> None:
    """Refuse what is not a finite number per channel, above a bound."""
    if not isinstance(values, Sequence) or len(values) != 3 or not all(map(is_number, values)):
        raise ValueError(f"{name} must be three numbers, for red, green and blue, got {values!r}")
    if not all(above < value < math.inf for value in values):
        bound = "" if above < 0 else f" above {above}"
        raise ValueError(f"{name} must be three finite numbers{bound}, got {values!r}")


def _without(targets: TokenTargets, rows: Tensor) -> TokenTargets:
    """The targets with these rows, bool [B, R], marked as having none."""
    return replace(
        targets,
        weights=targets.weights.masked_fill(rows[..., None], 0),
        background=targets.background.masked_fill(rows, 0),
        valid=targets.valid & ~rows,
    )
