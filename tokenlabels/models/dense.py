"""Any image classifier of timm with a classifier for its tokens beside it, to train with token labels.

The student that comes out is the plain model, `dense.model`; the classifier of tokens served its training (Token
Labeling, arXiv 2104.10858, section 3.1).

Legend: B images, N = h x w tokens, C feature channels, K classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from tokenlabels.checks import Grid, check_grid, describe
from tokenlabels.mixing import MixPlan
from tokenlabels.models.embedding import PlanHook, embedding_format, find_patch_embedding
from tokenlabels.models.features import FeatureError, count_classes, feature_format, probe_features
from tokenlabels.models.lvvit import LVViT
from tokenlabels.sparse_targets import TokenTargets


class DenseClassifier(nn.Module):
    """``dense(images, plan)`` gives the logits of images and of their tokens, in training and in evaluation.

    Image logits are those of the plain model. Tokens are its spatial features (the patch tokens of a ViT, the cells of
    a ResNet's map) as its own head gets them, and a linear layer classifies each.

    Args:
        model: an image classifier of timm with spatial features, on its device. It is not copied.
        image_size: pixels of the images to come, (height, width), or the side of a square. None takes that of its patch
            embedding, or else of its timm configuration.

    Attributes:
        model: the model. Its part of the state dict is its own, below ``model.``, so that ``dense.model.state_dict()``
            is the trained student. Its patch embedding has a forward hook, which does nothing outside of
            ``dense(images, plan)``.
        aux_head: the classifier of tokens, linear C -> K.
        grid: rows and columns of tokens, (h, w): what loaders and targets need.
        image_size: (height, width).
        num_classes: K.

    Several threads must not call one instance at the same time: the plan reaches the hook by an attribute.

    Raises:
        ValueError: the model has no classifier, takes no images of this size, its features have no positions or an
            unknown layout, or it classifies its tokens already.
    """

    def __init__(self, model: nn.Module, image_size: int | Sequence[int] | None = None) -> None:
        super().__init__()
        name = type(model).__name__
        self.num_classes = count_classes(model, name)
        if isinstance(model, LVViT) and model.aux_head is not None:
            raise FeatureError(f"{name}: it classifies its tokens already; train it as it is")
        self.image_size = find_image_size(model, name, image_size)
        self.model = model
        embedding = find_patch_embedding(model)
        parameter = next(model.parameters())
        full_precision = torch.autocast(parameter.device.type, enabled=False)
        with _evaluating(model), torch.no_grad(), full_precision, _calls_of(embedding) as calls:
            features = probe_features(model, name, self.image_size)
            self.format = feature_format(model, name, features, self.image_size)
            self.grid = self.format.grid
            self._hook, self._why_no_mixing = _plan_hook(embedding, calls, self.grid)
        self.aux_head = nn.Linear(
            self.format.num_channels, self.num_classes, device=parameter.device, dtype=parameter.dtype
        )
        trunc_normal_(self.aux_head.weight, std=0.02)
        nn.init.zeros_(self.aux_head.bias)

    def forward(self, images: Tensor, plan: MixPlan | None = None) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, height, width] -> logits of images [B, K] and of tokens [B, N, K], row-major.

        Args:
            images: of the size of `image_size`.
            plan: mixes the output of the patch embedding (MixToken); on the grid of the tokens, `grid`.

        Raises:
            ValueError: images of another size, a plan of another grid or number of samples, or a plan for a model
                without patch embedding.
        """
        self.check_images(images)
        return self.classify(self._features(images, plan))

    def check_images(self, images: Tensor) -> None:
        """Refuse images of another size.

        Raises:
            ValueError: they are not [B, C, *image_size].
        """
        if images.ndim != 4 or tuple(images.shape[2:]) != self.image_size:
            height, width = self.image_size
            raise ValueError(
                f"images must be [B, C, {height}, {width}], got {describe(images)}; resize them, or build "
                "DenseClassifier(model, image_size) for their size"
            )

    def classify(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the model's `forward_features` returned -> logits of images [B, K] and of tokens [B, N, K]."""
        image_logits = self.model.forward_head(features)  # type: ignore[operator]
        if isinstance(image_logits, tuple):  # of the class token and the distillation token, whose mean timm evaluates
            image_logits = (image_logits[0] + image_logits[1]) / 2
        return image_logits, self.aux_head(self.format.cells(features).flatten(1, 2))

    def check_targets(self, targets: TokenTargets) -> None:
        """Refuse targets that are not for these tokens and classes.

        Raises:
            ValueError: another grid, none, or another number of classes.
        """
        targets.check_model(self._name, grid=self.grid, num_classes=self.num_classes)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the model wants to be left out of weight decay, by their names here."""
        names: set[str] = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in names}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the model computes activations again in backward, to save memory."""
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]

    def get_classifier(self) -> Any:
        """The model's own classifier of images."""
        return self.model.get_classifier()  # type: ignore[operator]

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _features(self, images: Tensor, plan: MixPlan | None) -> Tensor:
        features: Tensor
        if plan is None:
            features = self.model.forward_features(images)  # type: ignore[operator]
            return features
        if self._hook is None:
            raise ValueError(
                f"{self._name} cannot mix tokens: {self._why_no_mixing}; mix the pixels instead: "
                'mix="cutmix" of the loader, or MixPlan.cutmix(...).mix(images)'
            )
        if tuple(plan.own.shape[1:]) != self.grid:
            raise ValueError(
                f"the plan must be on the grid {self.grid} of {self._name}'s tokens, got {tuple(plan.own.shape[1:])}; "
                f"draw it with MixPlan.mixtoken(..., grid={self.grid}), and give none for images mixed already"
            )
        self._hook.plan = plan
        try:
            features = self.model.forward_features(images)  # type: ignore[operator]
            is_mixed = self._hook.plan is None
        finally:
            self._hook.plan = None
        if not is_mixed:
            raise ValueError(
                f"{self._name}'s patch embedding is another module than when DenseClassifier was built, and nothing "
                "was mixed; build DenseClassifier after such changes"
            )
        return features


def find_image_size(model: nn.Module, name: str, image_size: int | Sequence[int] | None) -> Grid:
    """Pixels of the images to come, (height, width): as given, or what the model is built for."""
    if image_size is None:
        image_size = getattr(find_patch_embedding(model), "img_size", None)
    if image_size is None:  # asked second, because it stays that of the pretrained weights whatever was built
        shape = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        if shape is None:
            raise FeatureError(f"{name}: it names no image size; give image_size")
        image_size = shape[-2:]
    return check_grid((image_size, image_size) if isinstance(image_size, int) else image_size, "image_size")


def _plan_hook(
    embedding: nn.Module | None, calls: list[tuple[Tensor, object]], grid: Grid
) -> tuple[PlanHook | None, str]:
    """A hook for the patch embedding, or None and the reason.

    Args:
        embedding: in evaluation mode.
        calls: what it was given and returned when the model was tried.
        grid: of the model's tokens.
    """
    if embedding is None:
        return None, "it has no patch embedding (patch_embed, patch_embeds or stem)"
    if not calls:
        return None, "it does not use its patch embedding"
    try:
        found = embedding_format(embedding, *calls[0])
    except ValueError as error:
        return None, f"of its patch embedding, {error}"
    if found.grid[0] % grid[0] or found.grid[1] % grid[1]:
        return None, f"its patch embedding is on {found.grid}, which cannot be divided evenly among tokens on {grid}"
    hook = PlanHook(found)
    embedding.register_forward_hook(hook)
    return hook, ""


@contextmanager
def _calls_of(module: nn.Module | None) -> Iterator[list[tuple[Tensor, object]]]:
    """Collects the first argument and the result of every call of a module."""
    calls: list[tuple[Tensor, object]] = []
    if module is None:
        yield calls
        return
    handle = module.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # some models of timm keep tensors in evaluation (LeViT) that only their own `train` throws away
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training
