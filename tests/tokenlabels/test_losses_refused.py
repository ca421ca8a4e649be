"""What the losses refuse, and what they say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenlabels.cross_entropy import soft_cross_entropy
from tokenlabels.losses import chunked_token_label_loss, token_label_loss
from tokenlabels.mixing import MixPlan
from tokenlabels.sparse_targets import TokenTargets

ZEROS = torch.zeros
TARGETS = TokenTargets(
    ZEROS(4, 5).long(), ZEROS(4, 7, 5), torch.full((4, 7), 1 / 11), torch.ones(4, 7, dtype=torch.bool), (2, 3), 11
)
RELABEL = TokenTargets.from_labels(torch.tensor([1, 2, 3, 4]), 11)
Refused = dict[str, tuple[dict[str, Any], str]]

ROWS_REFUSED: Refused = {
    "two dimensions": ({"logits": ZEROS(2, 11)}, r"logits must be floating \[B, R, K\]"),
    "integer logits": ({"logits": ZEROS(2, 3, 11).long()}, "logits must be floating.*int64"),
    "empty batch": ({"logits": ZEROS(0, 3, 11)}, "without empty sides"),
    "no broadcast of images": ({"logits": ZEROS(1, 3, 11)}, r"classes must be int64 \[1, 4\]"),
    "nor of rows": ({"logits": ZEROS(2, 1, 11)}, r"weights must be float32 \[2, 1, 4\]"),
    "id above K - 1": ({"logits": ZEROS(2, 3, 2)}, "classes must be in 0..1 "),
    "id below 0": ({"classes": torch.full((2, 4), -1)}, "must be in 0..10 .*got -1..-1"),
    "int32 ids": ({"classes": ZEROS(2, 4).int()}, "classes must be int64.*got int32"),
    "one id": ({"classes": torch.tensor(3)}, "classes must be int64"),
    "float64 weights": ({"weights": ZEROS(2, 3, 4).double()}, "weights must be float32"),
    "learned weights": ({"weights": ZEROS(2, 3, 4).requires_grad_()}, r"detach\(\) it"),
    "one background": ({"background": ZEROS(2, 1)}, r"background must be float32 \[2, 3\]"),
    "another device": ({"background": ZEROS(2, 3, device="meta")}, "on cpu.*on meta"),
}
LOSS_REFUSED: Refused = {
    "dense targets": ({"targets": TARGETS.dense()}, "must be TokenTargets, got Tensor"),
    "another K": ({"image_logits": ZEROS(4, 12)}, r"image_logits must be floating \[4, 11\]"),
    "another batch": ({"image_logits": ZEROS(1, 11)}, r"got float32 \[1, 11\]"),
    "integer logits": ({"image_logits": ZEROS(4, 11).int()}, "image_logits must be floating"),
    "another device": ({"image_logits": ZEROS(4, 11, device="meta")}, "must be on cpu"),
    "another K of tokens": ({"token_logits": ZEROS(4, 6, 12)}, r"token_logits must be floating \[4, 6, 11\]"),
    "another N": ({"token_logits": ZEROS(4, 7, 11)}, r"2x3 rows.*got float32 \[4, 7, 11\]"),
    "a map of logits": ({"token_logits": ZEROS(4, 2, 3, 11)}, r"floating \[4, 6, 11\]"),
    "no token logits": ({"token_logits": None}, "token_logits is None, but .* dense_weight=0"),
    "tokens without targets": ({"targets": RELABEL}, "no tokens; give None for token_logits"),
    "negative weight": ({"image_weight": -1.0}, "image_weight must be a finite number of 0 or more, got -1"),
    "weight that is no number": ({"dense_weight": float("nan")}, "dense_weight must be a finite number of 0 or more"),
    "keep no token": ({"keep_tokens": 0.0}, "keep_tokens must be a number above 0 and at most 1"),
    "keep too many": ({"keep_tokens": 1.01}, "keep_tokens must be a number above 0 and at most 1"),
    "weight per image": ({"image_weight": torch.ones(4)}, "image_weight must be a finite number"),
    "weight as text": ({"dense_weight": "1"}, "dense_weight must be a finite number"),
    "three ground truth weights": ({"ground_truth_weights": (0.5, 0.1, 0.3)}, "must be two numbers"),
    "seed for a generator": ({"generator": 1}, "generator must be a torch.Generator or None, got 1"),
    "no plan": ({"plan": {}}, "plan must be a MixPlan or None, got dict"),
    "plan of another batch": ({"plan": MixPlan.mixup(6)}, "mixes 6 samples"),
    "too few labels": ({"ground_truth": torch.tensor([1, 2])}, r"labels must be integer \[4\]"),
    "no such label": ({"ground_truth": torch.tensor([1, 2, 3, 11])}, "labels must be in 0..10"),
    "label's weight": (
        {"ground_truth": RELABEL.classes[:, 0], "ground_truth_weights": (0.5, 2)},
        "disagree must be a number in",
    ),
}
CHUNKS_REFUSED: Refused = {
    "another N": ({"token_features": ZEROS(4, 7, 5)}, r"token_features must be floating \[4, 6, 5\]"),
    "another batch": ({"token_features": ZEROS(3, 6, 5)}, r"token_features must be floating \[4, 6, 5\]"),
    "another K": ({"classifier": nn.Linear(5, 12)}, r"the classifier's output must be floating \[3, 6, 11\]"),
    "pooled tokens": ({"classifier": lambda x: x.mean(1)}, "the classifier's output must be floating"),
    "tokens without targets": ({"targets": RELABEL}, "token_features is .* has no tokens"),
    "empty chunks": ({"images_per_chunk": 0}, "images_per_chunk must be an integer of at least 1, got 0"),
    "negative rate": ({"keep_tokens": -0.5}, "keep_tokens must be a number above 0"),
}


def assert_refused(
    function: Callable[..., Tensor], good: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    function(**good)
    with pytest.raises(ValueError, match=message):
        function(**good | changed)


@pytest.mark.parametrize(("changed", "message"), ROWS_REFUSED.values(), ids=ROWS_REFUSED.keys())
def test_rows_refuse(changed: dict[str, Any], message: str) -> None:
    classes = torch.tensor([[0, 5, 10, 5]] * 2)
    good = {"logits": ZEROS(2, 3, 11), "classes": classes, "weights": ZEROS(2, 3, 4), "background": ZEROS(2, 3)}
    assert_refused(soft_cross_entropy, good, changed, message)


@pytest.mark.parametrize(("changed", "message"), LOSS_REFUSED.values(), ids=LOSS_REFUSED.keys())
def test_loss_refuses(changed: dict[str, Any], message: str) -> None:
    good = {"image_logits": ZEROS(4, 11), "token_logits": ZEROS(4, 6, 11), "targets": TARGETS}
    assert_refused(token_label_loss, good, changed, message)


@pytest.mark.parametrize(("changed", "message"), CHUNKS_REFUSED.values(), ids=CHUNKS_REFUSED.keys())
def test_chunks_refuse(changed: dict[str, Any], message: str) -> None:
    good = {"image_logits": ZEROS(4, 11), "token_features": ZEROS(4, 6, 5), "classifier": nn.Linear(5, 11)}
    good |= {"targets": TARGETS, "images_per_chunk": 3}
    assert_refused(chunked_token_label_loss, good, changed, message)
