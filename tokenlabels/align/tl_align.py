"""`TLAlign`: a model that also tells which share of each mixed image its representation is made of.

Legend: B images, P prefix tokens, N = h x w patch tokens, C columns of labels, K classes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

# The families register themselves when they are imported.
from tokenlabels.align import convnext, mixer, pvt, pvt_v1, swin, vit  # noqa: F401
from tokenlabels.align.attention import Backend
from tokenlabels.align.families import Features, FirstLabels, find_family
from tokenlabels.align.operations import first_labels
from tokenlabels.align.rules import Alignment
from tokenlabels.checks import Grid, check_choice
from tokenlabels.mixing import MixPlan
from tokenlabels.models.dense import DenseClassifier
from tokenlabels.models.wrapper import TrainingWrapper

Logits = Tensor | tuple[Tensor, Tensor]
"""Of images [B, K]; with those of tokens [B, N, K] where the model classifies them."""


class TLAlign(TrainingWrapper):
    """Token-label alignment (arXiv 2210.06455) around a model, which computes what it computes without.

    In training ``aligned(images, plan)`` returns (logits, share), in evaluation ``aligned(images)`` returns logits.
    Labels need no gradient (equation 12), no parameters, and nothing at inference; ``aligned.model`` is what you keep.

    Args:
        model: ViT, DeiT, Swin, Swin v2, PVT v2, MLP-Mixer or ConvNeXt of timm, LV-ViT or PVT of `tokenlabels.models`,
            or `DenseClassifier` around one.
        backend: how labels go through attention, see `tokenlabels.align.attention`; None takes the fastest.
        layers: numbers of the blocks that labels follow, from 0 over all stages, negative ones from the end; None is
            all. Rows 2 and 3 of Table 8 are ``(-1,)`` and ``(1, 3, 5, 7)``; the first averages the share by area with
            that by attention, as TransMix's published code does.
        normalize: False leaves out the average with the residual (equation 11), the row "Normalization Disabled" of
            Table 8. Read to the letter, sums without Norm grow alike in all tokens and mean the same label; that it
            trains worse says that attention alone was meant.

    Raises:
        AlignmentError: the model, or a block or part of it, has no rule; the message names it.
        ValueError: there is no such backend or layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        backend: Backend | None = None,
        layers: Sequence[int] | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if backend is not None:
            check_choice("backend", backend, Backend)
        self.model = model
        self._family = find_family(self.backbone)
        self.num_layers = len(self._family.blocks(self.backbone))
        self.alignment = Alignment(backend, _numbers(layers, self.num_layers), normalize)

    @property
    def backbone(self) -> nn.Module:
        """The model of timm, inside `DenseClassifier` if there is one."""
        return self.model.model if isinstance(self.model, DenseClassifier) else self.model

    def forward(self, images: Tensor, plan: MixPlan | None = None, *, return_token_share: bool = False) -> Any:
        """In training (logits, share) or (logits, share, token share), in evaluation logits.

        Args:
            images: float [B, 3, H_px, W_px], normalised, and mixed by the plan already.
            plan: who is mixed with whom; on any grid that could mix these images. Needed in training, and only there.
            return_token_share: also return the share of every patch token. With token labels each token's target is
                mixed by its own share: ours, the papers have one target per image or one label per token.

        Returns:
            logits: of the model: of images [B, K], or a pair with those of tokens [B, N, K].
            share: float32 [B] in 0..1, without gradient: the share of the own image in what is classified. The target
                is ``share * own + (1 - share) * partner's``, which ``plan.mix_targets(targets, share)`` makes.
            token share: float32 [B, N], row-major; for ``plan.mix_targets(targets, share, token_share)``.

        Raises:
            ValueError: a plan in evaluation mode or none in training, one of another batch, size or device.
        """
        if plan is None:
            if self.model.training:
                raise ValueError(
                    f"{type(self).__name__} needs the plan that mixed the images in training: model(images, plan); use "
                    "the model inside for images that are not mixed"
                )
            return self.model(images)
        if not self.model.training:
            raise ValueError(
                f"{type(self).__name__} makes targets for training, and this is evaluation mode: call .train(), or "
                "leave out the plan for predictions"
            )
        features = self.align(images, plan)
        share, token_share = self._shares(features, plan)
        logits = self._classify(features.tokens)
        return (logits, share, token_share) if return_token_share else (logits, share)

    def align(self, images: Tensor, plan: MixPlan, alignment: Alignment | None = None) -> Features:
        """Features before the classifier with the labels of their tokens, in the mode that the model is in.

        Args:
            images, plan: as of `forward`.
            alignment: another than that of this object, for those who want to see more.

        Raises:
            ValueError: the plan does not fit the images, or they have no whole patches.
        """
        _check_plan(plan)
        plan.check_images(images)
        self._family.check(self.backbone)  # the classifier may be another than at first
        if isinstance(self.model, DenseClassifier):
            self.model.check_images(images)
        _check_sides(images, self._family.stride(self.backbone))
        return self.features(images, partial(self._first_labels, plan), alignment)

    def features(self, images: Tensor, labels_of: FirstLabels, alignment: Alignment | None = None) -> Features:
        """`align` for any labels of the embedded patches, float32 [B, P + N, C]; every column goes the same way."""
        return self._family.features(self.backbone, images, labels_of, alignment or self.alignment)

    def classified(self, features: Features) -> Tensor:
        """Labels [B, C] of what the classifier reads."""
        return self._family.classified(self.backbone, features.labels)

    def _first_labels(self, plan: MixPlan, grid: Grid, num_prefix_tokens: int) -> Tensor:
        return first_labels(plan, grid, num_prefix_tokens)

    def _shares(self, features: Features, plan: MixPlan) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - for TransMix
        tokens = features.labels[:, features.labels.shape[1] - features.grid[0] * features.grid[1] :, 0]
        # reentrant checkpoints make whatever they return require gradients
        return self.classified(features)[:, 0].detach().clamp(0, 1), tokens.detach().clamp(0, 1)

    def _classify(self, tokens: Tensor) -> Logits:
        if isinstance(self.model, DenseClassifier):
            return self.model.classify(tokens)
        logits: Logits = self.model.forward_head(tokens)  # type: ignore[operator]
        return logits


def _numbers(layers: Sequence[int] | None, num_layers: int) -> frozenset[int] | None:
    if layers is None:
        return None
    if not _are_numbers(layers, num_layers):
        raise ValueError(
            f"layers must be numbers of blocks in {-num_layers}..{num_layers - 1}, such as (-1,), or None for all, got "
            f"{layers!r}"
        )
    return frozenset(layer % num_layers for layer in layers)


def _are_numbers(layers: object, num_layers: int) -> bool:
    return (
        isinstance(layers, Sequence)
        and len(layers) > 0
        and all(type(layer) is int and -num_layers <= layer < num_layers for layer in layers)
    )


def _check_plan(plan: object) -> None:
    if not isinstance(plan, MixPlan):
        raise ValueError(f"plan must be the MixPlan that mixed the images, got {type(plan).__name__}")


def _check_sides(images: Tensor, stride: Grid) -> None:
    height, width = images.shape[2:]
    if height % stride[0] or width % stride[1]:
        raise ValueError(
            f"images of {height} x {width} pixels have no whole patches of {stride[0]} x {stride[1]}, and part of them "
            "would be read by no token; crop or pad them to a multiple"
        )
