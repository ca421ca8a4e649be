"""Runs on random batches: what they leave, against a bare loop, and going on after any step."""

import csv
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from tests.tokenlabels.trainer.batches import Batch, Batches, StatefulBatches, make_batch
from tokenlabels.losses import token_label_loss
from tokenlabels.models import LVViT, load_checkpoint
from tokenlabels.trainer import (
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    Trainer,
    TrainerConfig,
    TrainingStoppedError,
)
from tokenlabels.trainer.checkpoint import read_checkpoint
from tokenlabels.trainer.ranks import seed_step

MakeModel = Callable[..., LVViT]
MakeConfig = Callable[..., TrainerConfig]


def trained(model: nn.Module, config: TrainerConfig, folder: Path, batches: Batches, **fit: Any) -> Trainer:
    trainer = Trainer(model, config, folder, batch_size=4)
    trainer.fit(batches, **fit)
    return trainer


def assert_same(mine: nn.Module, theirs: nn.Module) -> None:
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def rows(folder: Path) -> list[dict[str, float]]:
    """steps.jsonl without the speed, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def epochs(folder: Path) -> list[dict[str, str]]:
    with (folder / "epochs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_is_a_bare_loop(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(ema_decay=None)
    trained(model := make_model(), config, tmp_path, Batches())

    twin = make_model().train()
    optimizer = create_optimizer_v2(twin, opt="adamw", lr=1e-2, weight_decay=0.05)
    lr = optimizer.param_groups[0]["lr"]
    losses = []
    for step in range(18):
        time = step / 6
        warm = 1e-6 + (lr - 1e-6) * time / 0.5
        cosine = 1e-5 + 0.5 * (lr - 1e-5) * (
            1 + torch.cos(torch.tensor(torch.pi * time / 3, dtype=torch.float64)).item()
        )
        for group in optimizer.param_groups:
            group["lr"] = warm if time < 0.5 else cosine
        batch = make_batch(1000 * (step // 6) + step % 6)
        seed_step(0, step)
        image_logits, token_logits = twin(batch.images, batch.plan)
        assert batch.targets is not None
        loss = token_label_loss(image_logits, token_logits, batch.targets.smooth(0.1), dense_weight=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert [row["loss"] for row in rows(tmp_path)] == pytest.approx(losses[1::2], rel=1e-4)
    assert min(losses[-6:]) < min(losses[:6])


def test_what_a_run_leaves(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = trained(make_model(), make_config(), tmp_path, Batches(), val=[make_batch(7, 8), make_batch(8, 3)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.pt",
        "config.json",
        "epochs.csv",
        "last.pt",
        "steps.jsonl",
    ]
    assert [row["step"] for row in rows(tmp_path)] == list(range(2, 19, 2))
    assert rows(tmp_path)[-1]["epoch"] == 3
    table = epochs(tmp_path)
    assert [(row["epoch"], row["step"]) for row in table] == [("1", "6"), ("2", "12"), ("3", "18")]
    assert all(0 <= float(row[name]) <= 1 for row in table for name in ("top1", "top5", "ema_top1", "ema_top5"))
    assert table[0]["real_top1"] == ""
    best = max(float(row[name]) for row in table for name in ("top1", "ema_top1"))
    assert trainer.progress.best_top1 == best
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    assert content["top1"] == best
    load_checkpoint(make_model(), tmp_path / "best.pt")
    load_checkpoint(averaged := make_model(), tmp_path / "last.pt")
    assert trainer.state.ema is not None
    assert_same(averaged, trainer.state.ema.module)
    assert set(content["versions"]) >= {"tokenlabels", "torch", "timm"}


def test_the_best_weights_are_those_of_the_best_epoch(
    make_model: MakeModel, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenlabels.trainer import trainer as module
    from tokenlabels.trainer.evaluation import Accuracy

    found = iter([0.3, 0.1, 0.2, 0.6, 0.5, 0.4])  # model, average, model, average, ...
    states: list[dict[str, Tensor]] = []

    def pretend(model: nn.Module, *_: object, **__: object) -> Accuracy:
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return Accuracy(next(found), 1.0, 10)

    monkeypatch.setattr(module, "evaluate", pretend)
    accuracy = Trainer(make_model(), make_config(), tmp_path, batch_size=4).fit(Batches(), val=[make_batch(0)])
    assert accuracy is not None
    assert accuracy.top1 == 0.5
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (content["top1"], content["epoch"]) == (0.6, 2)
    assert all(torch.equal(tensor, states[3][name]) for name, tensor in content["state_dict"].items())


@dataclass
class Killed(StatefulBatches):
    """Ends the process's work in front of a batch, as a kill does: nothing is cleaned up."""

    after: int = 10**9

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if self.num_handed_out > self.after:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("kind", [Batches, StatefulBatches], ids=["without a place", "with a place"])
@pytest.mark.parametrize("killed_after", [1, 6, 8, 17])
def test_a_killed_run_goes_on_bit_for_bit(
    make_model: MakeModel, make_config: MakeConfig, tmp_path: Path, killed_after: int, kind: type[Batches]
) -> None:
    config = make_config(save_every=3, optimizer=OptimizerConfig(base_lr=1e-2, lr_batch=4, clip_grad=1.0))
    val = [make_batch(7, 8)]
    whole = trained(make_model(), config, tmp_path / "whole", kind(), val=val)

    class Kill(kind):  # type: ignore[valid-type, misc]
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                if self.num_handed_out > killed_after:
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        trained(make_model(), config, tmp_path / "killed", Kill(), val=val)
    torch.manual_seed(99)  # nothing of the dead process is left
    again = trained(make_model(), config, tmp_path / "killed", kind(), val=val, resume="auto")
    assert_same(again.state.model, whole.state.model)
    assert again.state.ema is not None
    assert whole.state.ema is not None
    assert_same(again.state.ema.module, whole.state.ema.module)
    assert again.progress == whole.progress
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert epochs(tmp_path / "killed") == epochs(tmp_path / "whole")


def test_going_on_reads_no_batch_twice(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(save_every=3)
    with pytest.raises(KeyboardInterrupt):
        trained(make_model(), config, tmp_path, Killed(after=10))
    rest = StatefulBatches()
    trained(make_model(), config, tmp_path, rest, resume="auto")
    assert rest.num_handed_out == 18 - 9


def test_sigterm_saves_and_leaves(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    whole = trained(make_model(), config, tmp_path / "whole", StatefulBatches())

    class Terminated(StatefulBatches):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                if self.num_handed_out == 9:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStoppedError, match=r"after step 9, at epoch 1\.50.*last\.pt.*--resume auto"):
        trained(make_model(), config, tmp_path / "stopped", Terminated())
    assert signal.getsignal(signal.SIGTERM) is before
    assert read_checkpoint(tmp_path / "stopped" / "last.pt")["progress"]["step"] == 9
    again = trained(make_model(), config, tmp_path / "stopped", StatefulBatches(), resume="auto")
    assert_same(again.state.model, whole.state.model)


def test_accumulated_batches_are_one_large_one(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    """Without batch statistics and stochastic depth, two batches of 4 are one of 8; the learning rate is the same."""
    plain = {"stem_kernels": (), "stem_strides": (), "drop_path_rate": 0.0}
    optimizer = OptimizerConfig(name="sgd", base_lr=1e-2, lr_batch=8)
    accumulating = make_config(accumulate=2, optimizer=optimizer, ema_decay=None)

    class Large(Batches):
        def __iter__(self) -> Iterator[Batch]:
            for number in range(0, 6, 2):
                pair = [make_batch(1000 * self.epoch + number + offset, mix=False) for offset in (0, 1)]
                assert all(batch.targets is not None for batch in pair)
                dense = torch.cat([batch.targets.dense() for batch in pair if batch.targets is not None])
                from tokenlabels import TokenTargets

                images = torch.cat([batch.images for batch in pair])
                yield make_batch(0, 8, mix=False, images=images, targets=TokenTargets.from_dense(dense))

    small = trained(make_model(**plain), accumulating, tmp_path / "a", Batches(changes={"mix": False}))
    large = Trainer(make_model(**plain), make_config(optimizer=optimizer, ema_decay=None), tmp_path / "b", batch_size=8)
    large.fit(Large(length=3))
    assert small.progress.step == large.progress.step == 9
    for name, tensor in small.state.model.state_dict().items():
        torch.testing.assert_close(tensor, large.state.model.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_a_step_of_fewer_batches_ends_an_epoch(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = trained(make_model(), make_config(accumulate=4), tmp_path, batches := Batches())
    assert (trainer.progress.step, batches.num_handed_out) == (6, 18)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path, precision: str) -> None:
    trained(make_model(), make_config(), tmp_path / "fp32", Batches())
    half = make_config(precision=precision)
    trainer = trained(model := make_model(), half, tmp_path / "half", Batches())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("half", "fp32")]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert losses[0] != losses[1]
    assert trainer.state.scaler.is_enabled() == (precision == "fp16")
    again = Trainer(make_model(), half, tmp_path / "half", batch_size=4)
    again.fit(Batches(), resume="auto")
    assert again.state.scaler.state_dict() == trainer.state.scaler.state_dict()


@pytest.mark.slow
def test_a_compiled_run_is_the_same(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    plain = {"drop_path_rate": 0.0}
    eager = trained(make_model(**plain), make_config(), tmp_path / "eager", Batches())
    compiled = trained(make_model(**plain), make_config(compile=True), tmp_path / "compiled", Batches())
    for name, tensor in compiled.state.model.state_dict().items():
        torch.testing.assert_close(tensor, eager.state.model.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert set(torch.load(tmp_path / "compiled" / "last.pt")["state_dict"]) == set(make_model().state_dict())


def test_channels_last_is_the_same(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    first = trained(make_model(), make_config(), tmp_path / "a", Batches(length=2))
    last = trained(make_model(), make_config(channels_last=True), tmp_path / "b", Batches(length=2))
    assert last.state.model.patch_embed.conv2.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    for name, tensor in last.state.model.state_dict().items():
        torch.testing.assert_close(tensor, first.state.model.state_dict()[name], rtol=1e-2, atol=1e-3)


def test_the_average_of_weights(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    """timm's: it begins as the weights after the first step, and then follows them."""
    seen: list[Tensor] = []

    class Watching(Batches):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                seen.append(model.head.weight.detach().clone())
                yield batch

    trainer = trained(model := make_model(), make_config(), tmp_path, Watching())
    expected = seen[1]
    for weights in [*seen[2:], model.head.weight.detach()]:
        expected = 0.9 * expected + 0.1 * weights
    assert trainer.state.ema is not None
    torch.testing.assert_close(trainer.state.ema.module.head.weight, expected)


def test_participation_of_tokens_draws_from_the_step(
    make_model: MakeModel, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(loss=LossConfig(keep_tokens=0.5))
    first = trained(make_model(), config, tmp_path / "a", Batches())
    second = trained(make_model(), config, tmp_path / "b", Batches())
    other = trained(make_model(), make_config(loss=LossConfig(keep_tokens=0.5), seed=1), tmp_path / "c", Batches())
    assert_same(first.state.model, second.state.model)
    assert not torch.equal(first.state.model.state_dict()["head.weight"], other.state.model.state_dict()["head.weight"])


def test_a_finished_run_has_nothing_left_to_do(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    trained(make_model(), make_config(), tmp_path, Batches())
    before = (tmp_path / "steps.jsonl").read_text()
    batches = Batches()
    assert Trainer(make_model(), make_config(), tmp_path, batch_size=4).fit(batches, resume="auto") is None
    assert batches.num_handed_out == 0
    assert (tmp_path / "steps.jsonl").read_text() == before


def test_more_epochs_are_another_run(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    trained(make_model(), make_config(), tmp_path, Batches())
    longer = make_config(schedule=ScheduleConfig(epochs=9, warmup_epochs=0.5))
    with pytest.raises(ValueError, match=r"other settings \(saved != now\): schedule.epochs: 3 != 9"):
        trained(make_model(), longer, tmp_path, Batches(), resume="auto")


@pytest.mark.gpu
def test_a_run_on_a_gpu(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path, cuda: torch.device) -> None:
    class Moved(StatefulBatches):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                assert batch.targets is not None
                assert batch.plan is not None
                targets, plan = batch.targets.to(cuda), batch.plan.to(cuda)
                yield make_batch(0, images=batch.images.to(cuda), targets=targets, plan=plan, keys=batch.keys)

    config = make_config(precision="bf16", channels_last=True, compile=True)
    trained(make_model().to(cuda), config, tmp_path, Moved())
    losses = [row["loss"] for row in rows(tmp_path)]
    assert min(losses[-3:]) < min(losses[:3])
