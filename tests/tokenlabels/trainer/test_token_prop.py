"""Training with the reconstruction of images from their tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.tokenlabels.trainer.batches import NUM_CLASSES, SIDE, make_batch
from tokenlabels import TokenTargets
from tokenlabels.losses import token_label_loss
from tokenlabels.models import DenseClassifier
from tokenlabels.models.modulation import modulate
from tokenlabels.models.tokenprop import TokenProp
from tokenlabels.trainer import OptimizerConfig, Trainer, TrainerConfig, batch_loss
from tokenlabels.trainer.optimizer import make_optimizer

MakeConfig = Callable[..., TrainerConfig]

HARD = TokenTargets.from_labels(torch.tensor([0, 1, 2, 3]), NUM_CLASSES)


def vit() -> nn.Module:
    torch.manual_seed(0)
    return modulate(timm.create_model("test_vit", num_classes=NUM_CLASSES, img_size=SIDE), "moto", num_entities=2)


def test_the_loss_has_both_terms(make_config: MakeConfig) -> None:
    """With token labels and MixToken, too: the plan reaches the model inside."""
    model = TokenProp(DenseClassifier(vit(), SIDE), weight=0.5).train()
    batch, config = make_batch(0), make_config()
    assert batch.targets is not None
    (image_logits, token_logits), reconstruction = model(batch.images, batch.plan)
    expected = token_label_loss(image_logits, token_logits, batch.targets.smooth(config.loss.smoothing))
    assert reconstruction > 0.01
    torch.testing.assert_close(batch_loss(model, batch, config), expected + reconstruction)


@pytest.mark.parametrize("dense", [False, True])
def test_a_run_leaves_the_student_alone(dense: bool, make_config: MakeConfig, tmp_path: Path) -> None:
    def build() -> TokenProp:
        return TokenProp(DenseClassifier(vit(), SIDE) if dense else vit(), SIDE)

    batches = [make_batch(seed) if dense else make_batch(seed, mix=False, targets=HARD) for seed in range(3)]
    val = [make_batch(9, mix=False)]
    trainer = Trainer(build(), make_config(ema_decay=0.9), tmp_path, batch_size=4)
    assert trainer.fit(batches, val) is not None
    best = torch.load(tmp_path / "best.pt", weights_only=True)["state_dict"]
    student = build().model
    student.load_state_dict(best)
    resumed = Trainer(build(), make_config(ema_decay=0.9), tmp_path, batch_size=4)
    assert resumed.fit(batches, val, resume="auto") is None, "all is done"
    for name, value in trainer.state.model.state_dict().items():
        assert torch.equal(value, resumed.state.model.state_dict()[name]), name


def test_a_model_that_cannot_mix_tokens_inside(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes no plan and cannot mix tokens"):
        Trainer(TokenProp(vit(), SIDE), make_config(), tmp_path, batch_size=4).fit([make_batch(0, targets=HARD)])


def test_scales_and_shifts_of_moto_do_not_decay() -> None:
    model = TokenProp(vit(), SIDE)
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.1), 64)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decays = {name: decay_of[id(parameter)] for name, parameter in model.named_parameters()}
    assert decays["model.patch_embed.modulation.beta"] == decays["model.patch_embed.modulation.alpha"] == 0
    assert decays["model.pos_embed"] == decays["model.cls_token"] == decays["model.head.bias"] == 0
    assert decays["model.patch_embed.modulation.f.weight"] == decays["model.head.weight"] == 0.1
    assert decays["decoder.proj.weight"] == 0.1
