"""Training with targets that follow the tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.tokenlabels.trainer.batches import GRID, NUM_CLASSES, SIDE, Batch, make_batch
from tokenlabels import MixPlan, TokenTargets
from tokenlabels.align import TLAlign, TransMix
from tokenlabels.losses import token_label_loss
from tokenlabels.models import DenseClassifier, load_checkpoint
from tokenlabels.trainer import Trainer, TrainerConfig, batch_loss

MakeConfig = Callable[..., TrainerConfig]

HARD = TokenTargets.from_labels(torch.tensor([0, 1, 2, 3]), NUM_CLASSES)


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=NUM_CLASSES, img_size=SIDE, drop_path_rate=0.1)


def mixed_batch(seed: int, **changes: Any) -> Batch:
    """Images that CutMix has mixed, and targets that it has not."""
    plan = MixPlan.cutmix(4, image_size=SIDE, generator=torch.Generator().manual_seed(seed))
    batch = make_batch(seed, mix=False)
    mixed = {"images": plan.mix(batch.images), "plan": plan, "is_mixed": True, "has_mixed_targets": False}
    return replace(batch, **(mixed | changes))


def test_the_loss_of_tokens_and_image_is_of_their_own_shares(make_config: MakeConfig) -> None:
    model, batch, config = TLAlign(DenseClassifier(vit(), SIDE)).train(), mixed_batch(0), make_config()
    assert model.grid == GRID
    torch.manual_seed(1)
    loss = batch_loss(model, batch, config)
    torch.manual_seed(1)
    assert batch.plan is not None
    assert batch.targets is not None
    logits, share, token_share = model(batch.images, batch.plan, return_token_share=True)
    dense = batch.targets.dense()
    shares = torch.cat([share[:, None], token_share], dim=1)[..., None]
    target = TokenTargets.from_dense(shares * dense + (1 - shares) * dense[batch.plan.partner], GRID)
    expected = token_label_loss(*logits, target.smooth(config.loss.smoothing))
    torch.testing.assert_close(loss, expected)
    by_area = token_label_loss(*logits, batch.plan.mix_targets(batch.targets).smooth(config.loss.smoothing))
    assert abs(by_area - expected) > 1e-4


@pytest.mark.parametrize("wrapper", [TLAlign, TransMix])
def test_a_run_on_hard_labels(wrapper: type[TLAlign], make_config: MakeConfig, tmp_path: Path) -> None:
    batches = [mixed_batch(seed, targets=HARD) for seed in range(3)]
    val = [make_batch(9, mix=False)]
    trainer = Trainer(wrapper(vit()), make_config(ema_decay=0.9), tmp_path, batch_size=4)
    assert trainer.fit(batches, val) is not None
    assert trainer.progress.step == 9
    resumed = Trainer(wrapper(vit()), make_config(ema_decay=0.9), tmp_path, batch_size=4)
    assert resumed.fit(batches, val, resume="auto") is None, "all is done"
    for name, value in trainer.state.model.state_dict().items():
        assert torch.equal(value, resumed.state.model.state_dict()[name]), name


def test_weights_of_a_run_load_into_the_plain_model(make_config: MakeConfig, tmp_path: Path) -> None:
    """Nothing of the alignment is left in best.pt, and what is left in last.pt is seen through."""
    trainer = Trainer(TLAlign(vit()), make_config(), tmp_path, batch_size=4)
    trainer.fit([mixed_batch(0, targets=HARD)], [make_batch(9, mix=False)])
    plain = vit()
    plain.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True)["state_dict"])
    load_checkpoint(plain, tmp_path / "last.pt", use_ema=False)
    images = make_batch(3, mix=False).images
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), trainer.state.model.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"plan": None}, "TLAlign finds the shares that targets are mixed by", id="not mixed"),
        pytest.param({"is_mixed": False}, "it needs images that are mixed", id="MixToken"),
        pytest.param({"has_mixed_targets": True}, "targets that are not; give the loader", id="mixed targets"),
    ],
)
def test_batches_that_do_not_fit(
    changes: dict[str, Any], message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    batch = mixed_batch(0, targets=HARD, **changes)
    with pytest.raises(ValueError, match=message):
        Trainer(TLAlign(vit()), make_config(), tmp_path, batch_size=4).fit([batch])


def test_nobody_finds_the_shares(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="their targets are not, and VisionTransformer does not find the shares"):
        Trainer(vit(), make_config(), tmp_path, batch_size=4).fit([mixed_batch(0, targets=HARD)])


def test_tokens_of_another_grid(make_config: MakeConfig, tmp_path: Path) -> None:
    targets = TokenTargets.from_dense(torch.full((4, 17, NUM_CLASSES), 0.1))
    with pytest.raises(ValueError, match=r"on the grid \(2, 2\) of TLAlign's tokens, got \(4, 4\)"):
        Trainer(TLAlign(DenseClassifier(vit(), SIDE)), make_config(), tmp_path, batch_size=4).fit(
            [mixed_batch(0, targets=targets)]
        )
