"""State, copies and a training step."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from tests.tokenlabels.align.cases import CASES, NUM_CLASSES, build, mixed
from tokenlabels.align import TLAlign
from tokenlabels.losses import token_label_loss
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier
from tokenlabels.sparse_targets import TokenTargets


@pytest.mark.parametrize("case", CASES)
def test_the_models_state_is_its_own(case: str) -> None:
    model = build(case)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    aligned = TLAlign(model)
    assert aligned.model is model
    assert aligned.state_dict().keys() == {f"model.{name}" for name in expected}
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert [name for name, _ in aligned.named_parameters()] == [f"model.{name}" for name, _ in model.named_parameters()]
    assert [name for name, _ in aligned.named_buffers()] == [f"model.{name}" for name, _ in model.named_buffers()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_a_trainer_asks_for() -> None:
    model = build("vit")
    aligned = TLAlign(model)
    assert aligned.no_weight_decay() == {f"model.{name}" for name in model.no_weight_decay()}
    assert (aligned.num_classes, aligned.grid, aligned.aux_head, aligned.num_layers) == (NUM_CLASSES, None, None, 3)
    aligned.set_grad_checkpointing(True)
    assert model.grad_checkpointing
    dense = DenseClassifier(build("distilled"), (32, 48))
    wrapped = TLAlign(dense)
    assert (wrapped.num_classes, wrapped.grid, wrapped.backbone) == (NUM_CLASSES, (4, 6), dense.model)
    assert wrapped.aux_head is dense.aux_head
    lvvit = TLAlign(build("lvvit"))
    assert (lvvit.grid, lvvit.aux_head) == ((4, 6), lvvit.model.aux_head)
    assert TLAlign(build("lvvit", aux_head=False)).grid is None


@pytest.mark.parametrize("case", ["vit", "swin-padded", "convnext"])
@torch.no_grad()
def test_copies_are_on_their_own(case: str) -> None:
    images, plan = mixed(case)
    aligned = TLAlign(build(case))
    expected = aligned(images, plan)
    average = ModelEmaV3(aligned, decay=0.5)
    duplicate = copy.deepcopy(aligned)
    for parameter in aligned.parameters():
        parameter.mul_(0.5)
    torch.testing.assert_close(duplicate(images, plan), expected, rtol=0, atol=0)
    torch.testing.assert_close(average.module.train()(images, plan), expected, rtol=0, atol=0)
    assert not torch.allclose(aligned(images, plan)[0], expected[0])
    average.update(aligned)
    for ours, halved in zip(average.module.parameters(), aligned.parameters(), strict=True):
        torch.testing.assert_close(ours, 1.5 * halved)


@pytest.mark.parametrize("case", ["distilled", "lvvit"])
def test_a_training_step_with_token_labels_reaches_every_parameter(case: str) -> None:
    model = build(case)
    aligned = TLAlign(model if case == "lvvit" else DenseClassifier(model, CASES[case][1])).train()
    images, plan = mixed(case)
    torch.manual_seed(0)
    dense = torch.rand(4, 25, NUM_CLASSES).softmax(dim=-1)
    targets = TokenTargets.from_dense(dense, (4, 6))
    logits, share, tokens = aligned(images, plan, return_token_share=True)
    loss = token_label_loss(*logits, plan.mix_targets(targets, share, tokens))
    loss.backward()
    assert [name for name, p in aligned.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    shares = torch.cat([share[:, None], tokens], dim=1)[..., None]
    target = shares * dense + (1 - shares) * dense[plan.partner]
    image_loss = -(target[:, 0] * logits[0].log_softmax(dim=-1)).sum(dim=-1).mean()
    token_loss = -(target[:, 1:] * logits[1].log_softmax(dim=-1)).sum(dim=-1).mean()
    torch.testing.assert_close(loss, image_loss + 0.5 * token_loss)


def test_a_model_in_half_precision() -> None:
    """Labels are float32, whatever the tokens are."""
    images, plan = mixed("vit")
    expected = TLAlign(build("vit"))(images, plan)[1]
    logits, share = TLAlign(build("vit").bfloat16())(images.bfloat16(), plan)
    assert (logits.dtype, share.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(share, expected, rtol=0, atol=5e-3)


def test_gradients_reach_images() -> None:
    images, plan = mixed("swin")
    images.requires_grad_()
    logits, share = TLAlign(build("swin"))(images, plan)
    logits.sum().backward()
    assert not share.requires_grad
    assert images.grad is not None
    assert (images.grad != 0).any()


def hard_targets(labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels, NUM_CLASSES).float()


def test_the_target_of_an_image_is_its_aligned_label() -> None:
    images, plan = mixed("vit")
    labels = torch.tensor([2, 5, 0, 3])
    _, share = TLAlign(build("vit"))(images, plan)
    targets = TokenTargets.from_dense(hard_targets(labels)[:, None], None)
    expected = share[:, None] * hard_targets(labels) + (1 - share)[:, None] * hard_targets(labels[plan.partner])
    torch.testing.assert_close(plan.mix_targets(targets, share).dense()[:, 0], expected)
    whole = MixPlan(plan.partner, torch.ones(4, 1, 1))
    torch.testing.assert_close(whole.mix_targets(targets).dense()[:, 0], hard_targets(labels))
