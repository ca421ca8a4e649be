"""What is refused before the first step, and losses that are no numbers."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.tokenlabels.trainer.batches import Batch, Batches, StatefulBatches, make_batch
from tokenlabels import MixPlan, TokenTargets
from tokenlabels.models import LVViT
from tokenlabels.trainer import (
    LossConfig,
    NonFiniteLossError,
    OptimizerConfig,
    ScheduleConfig,
    Trainer,
    TrainerConfig,
)
from tokenlabels.trainer.checkpoint import read_checkpoint

MakeModel = Callable[..., LVViT]
MakeConfig = Callable[..., TrainerConfig]

HARD = TokenTargets.from_labels(torch.tensor([0, 1, 2, 3]), 10)
FINER = TokenTargets.from_dense(torch.full((4, 17, 10), 0.1))
OTHER_CLASSES = TokenTargets.from_dense(torch.full((4, 5, 12), 1 / 12))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        pytest.param({"targets": None}, "no targets: give the loader labels", id="no targets"),
        pytest.param({"targets": FINER, "plan": None}, r"grid \(2, 2\) of LVViT's tokens, got \(4, 4\)", id="grid"),
        pytest.param({"targets": OTHER_CLASSES, "plan": None}, "the 10 classes of LVViT, got 12", id="classes"),
        pytest.param({"targets": HARD, "plan": None}, "a classifier for tokens that nothing would train", id="hard"),
    ],
)
def test_batches_that_do_not_fit(
    make_model: MakeModel, make_config: MakeConfig, tmp_path: Path, batch: dict[str, Any], message: str
) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        Trainer(model, make_config(), tmp_path, batch_size=4).fit([make_batch(0, **batch)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "last.pt").exists()


def test_a_classifier_of_tokens_with_no_weight_in_the_loss(
    make_model: MakeModel, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(loss=LossConfig(dense_weight=0.0))
    with pytest.raises(ValueError, match=r"loss\.dense_weight is 0"):
        Trainer(make_model(), config, tmp_path, batch_size=4).fit(Batches())


def test_a_model_that_cannot_mix_tokens(make_config: MakeConfig, tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    batch = make_batch(0, targets=HARD)
    with pytest.raises(ValueError, match="takes no plan and cannot mix tokens"):
        Trainer(model, make_config(), tmp_path, batch_size=4).fit([batch])
    mixed = replace(batch, is_mixed=True)
    Trainer(model, make_config(), tmp_path, batch_size=4).fit([mixed])


def test_plans_that_were_applied_to_pixels_are_not_applied_again(
    make_model: MakeModel, make_config: MakeConfig, tmp_path: Path
) -> None:
    """MixUp and mixing of patches have plans that would fit the tokens."""
    plan = MixPlan.mixup(4, generator=torch.Generator().manual_seed(0))
    found = []
    for name, changes in {"mixed": {"plan": plan, "is_mixed": True}, "not": {"plan": None}}.items():
        model = make_model()
        Trainer(model, make_config(), tmp_path / name, batch_size=4).fit(Batches(changes=changes))
        found.append(model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_iterables_that_cannot_be_scheduled(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(make_model(), make_config(), tmp_path, batch_size=4)
    with pytest.raises(ValueError, match=r"generator has no len\(\)"):
        trainer.fit(make_batch(number) for number in range(3))
    with pytest.raises(ValueError, match="list has no batches"):
        trainer.fit([])


def test_folders_and_checkpoints_of_other_runs(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(schedule=ScheduleConfig(epochs=1, warmup_epochs=0))
    Trainer(make_model(), config, tmp_path, batch_size=4).fit(Batches())

    def refit(batches: Batches, *, wide: bool = False, **changes: Any) -> None:
        model = make_model(embed_dim=48) if wide else make_model()
        Trainer(model, replace(config, **changes), tmp_path, batch_size=4).fit(batches, resume="auto")

    with pytest.raises(ValueError, match="holds a run already; go on with it"):
        Trainer(make_model(), config, tmp_path, batch_size=4).fit(Batches())
    with pytest.raises(ValueError, match=r"loss.smoothing: 0.1 != 0.2; optimizer.base_lr: 0.01 != 0.5"):
        refit(Batches(), loss=LossConfig(smoothing=0.2), optimizer=OptimizerConfig(base_lr=0.5, lr_batch=4))
    with pytest.raises(ValueError, match="is of another model"):
        refit(Batches(), wide=True)
    with pytest.raises(ValueError, match=r"the run had no loader with a place; use the same kind"):
        refit(StatefulBatches())
    refit(Batches(), log_every=7, save_every=5)
    trainer = Trainer(make_model(), config, tmp_path / "new", batch_size=4)
    with pytest.raises(ValueError, match=r"nothing\.pt: there is no such checkpoint"):
        trainer.fit(Batches(), resume=tmp_path / "nothing.pt")
    torch.save(make_model().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights alone are for fine-tuning"):
        trainer.fit(Batches(), resume=tmp_path / "weights.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.pt: damaged"):
        trainer.fit(Batches(), resume=tmp_path / "cut.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(
    make_model: MakeModel, make_config: MakeConfig, tmp_path: Path, bad: float
) -> None:
    class Spoilt(Batches):
        def __iter__(self) -> Iterator[Batch]:
            for number, batch in enumerate(super().__iter__()):
                if (self.epoch, number) == (1, 2):
                    batch.images[1, 0, 0, 0] = bad
                yield batch

    config = make_config(save_every=9)
    with pytest.raises(NonFiniteLossError, match=r"the loss of step 9 is nan; the keys.*step0000009_rank0\.json"):
        Trainer(make_model(), config, tmp_path, batch_size=4).fit(Spoilt())
    report = json.loads((tmp_path / "nonfinite_step0000009_rank0.json").read_text())
    assert report["keys"] == [f"batch1002/sample{number}" for number in range(4)]
    assert read_checkpoint(tmp_path / "last.pt")["progress"]["step"] == 6
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(tmp_path / "last.pt")["state_dict"].values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(base_lr=0), "optimizer.base_lr must be a finite number above 0, got 0"),
        (lambda: OptimizerConfig(lr_batch=0), "optimizer.lr_batch must be an integer of at least 1"),
        (lambda: OptimizerConfig(weight_decay=-1), "optimizer.weight_decay must be a finite number of 0 or more"),
        (lambda: OptimizerConfig(clip_grad=0), "optimizer.clip_grad must be"),
        (lambda: ScheduleConfig(epochs=5, warmup_epochs=5), "all 5 epochs would be warm-up"),
        (lambda: ScheduleConfig(min_lr=float("nan")), "schedule.min_lr"),
        (lambda: LossConfig(keep_tokens=0), "loss.keep_tokens must be a number above 0"),
        (lambda: LossConfig(smoothing=1.5), "loss.smoothing must be a number in 0..1"),
        (lambda: TrainerConfig(precision="fp8"), "trainer.precision must be one of 'fp32', 'bf16', 'fp16'"),  # type: ignore[arg-type]
        (lambda: TrainerConfig(accumulate=0), "trainer.accumulate must be an integer"),
        (lambda: TrainerConfig(ema_decay=1.0), "trainer.ema_decay must be None or between 0 and 1"),
    ],
)
def test_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_optimizer_that_timm_does_not_know(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(optimizer=OptimizerConfig(name="adamx"))
    with pytest.raises(ValueError, match=r"optimizer\.name 'adamx'"):
        Trainer(make_model(), config, tmp_path, batch_size=4)
