"""The ends of epochs and runs: kills, signals and failures in and around evaluation; going on in another folder."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tokenlabels.trainer.batches import Batch, Batches, StatefulBatches, make_batch
from tokenlabels.models import LVViT
from tokenlabels.trainer import NonFiniteLossError, Trainer, TrainerConfig, TrainingStoppedError
from tokenlabels.trainer import trainer as module
from tokenlabels.trainer.checkpoint import read_checkpoint

MakeModel = Callable[..., LVViT]
MakeConfig = Callable[..., TrainerConfig]
KINDS = pytest.mark.parametrize("kind", [Batches, StatefulBatches], ids=["without a place", "with a place"])


class Failing(list[Batch]):
    """Validation batches that cannot be read."""

    def __iter__(self) -> Iterator[Batch]:
        raise OSError("the validation images are gone")


def assert_same(mine: Path, theirs: Path) -> None:
    one, two = (read_checkpoint(folder / "last.pt") for folder in (mine, theirs))
    assert one["progress"] == two["progress"]
    assert all(torch.equal(tensor, two["state_dict"][name]) for name, tensor in one["state_dict"].items())
    assert (mine / "epochs.csv").read_text() == (theirs / "epochs.csv").read_text()


@KINDS
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_failing_evaluation_costs_no_training(
    make_model: MakeModel, make_config: MakeConfig, tmp_path: Path, kind: type[Batches], accumulate: int
) -> None:
    """The steps of the epoch are saved before; going on repeats the evaluation alone."""
    config, val = make_config(accumulate=accumulate), [make_batch(7)]
    Trainer(make_model(), config, tmp_path / "whole", batch_size=4).fit(kind(), val)
    with pytest.raises(OSError, match="validation images are gone"):
        Trainer(make_model(), config, tmp_path / "failed", batch_size=4).fit(kind(), Failing())
    rest = kind()
    Trainer(make_model(), config, tmp_path / "failed", batch_size=4).fit(rest, val, resume="auto")
    assert rest.num_handed_out == 12
    assert_same(tmp_path / "failed", tmp_path / "whole")


def test_a_kill_between_best_and_last_loses_neither(
    make_model: MakeModel, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, val = make_config(), [make_batch(7, 16)]
    Trainer(make_model(), config, tmp_path / "whole", batch_size=4).fit(Batches(), val)
    with monkeypatch.context() as patch:
        patch.setattr(module.Progress, "end_epoch", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Trainer(make_model(), config, tmp_path / "killed", batch_size=4).fit(Batches(), val)
    Trainer(make_model(), config, tmp_path / "killed", batch_size=4).fit(Batches(), val, resume="auto")
    assert_same(tmp_path / "killed", tmp_path / "whole")
    best = [torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("killed", "whole")]
    assert best[0]["top1"] == best[1]["top1"]


def test_sigterm_during_evaluation_stops_behind_it(
    make_model: MakeModel, make_config: MakeConfig, tmp_path: Path
) -> None:
    class Terminating(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().__iter__()

    batches = Batches()
    trainer = Trainer(make_model(), make_config(), tmp_path, batch_size=4)
    with pytest.raises(TrainingStoppedError, match=r"after step 6, at epoch 1\.00"):
        trainer.fit(batches, Terminating([make_batch(7)]))
    assert batches.num_handed_out == 6
    assert read_checkpoint(tmp_path / "last.pt")["progress"]["epoch"] == 1


@KINDS
@pytest.mark.parametrize(("said", "message"), [(7, "fewer batches"), (5, "more batches")])
def test_loaders_that_have_another_number_of_batches_than_they_say(
    make_model: MakeModel, make_config: MakeConfig, tmp_path: Path, kind: type[Batches], said: int, message: str
) -> None:
    class Liar(kind):  # type: ignore[valid-type, misc]
        def __len__(self) -> int:
            return said

    with pytest.raises(ValueError, match=f"the loader has {message} than its len"):
        Trainer(make_model(), make_config(), tmp_path, batch_size=4).fit(Liar())


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * float("inf")


@pytest.mark.parametrize("step", [3, 6])
def test_a_finite_loss_with_infinite_gradients_spoils_no_checkpoint(
    make_model: MakeModel, make_config: MakeConfig, tmp_path: Path, step: int
) -> None:
    model = make_model()
    num_calls = 0

    def spoil(_: object, __: object, output: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        spoilt: Tensor = _InfiniteGradient.apply(output)  # type: ignore[no-untyped-call]
        return spoilt if num_calls == step else output

    model.norm.register_forward_hook(spoil)
    config = make_config(save_every=1 if step == 3 else 10**6, ema_decay=None)
    with pytest.raises(NonFiniteLossError, match=f"the weights after step {step} are not finite"):
        Trainer(model, config, tmp_path, batch_size=4).fit(Batches())
    assert (tmp_path / "last.pt").exists() == (step == 3)
    if step == 3:
        content = read_checkpoint(tmp_path / "last.pt")
        assert content["progress"]["step"] == 2
        assert all(tensor.isfinite().all() for tensor in content["state_dict"].values())


class TestAnotherFolder:
    """A run can go on from a checkpoint that lies elsewhere."""

    def fit(self, trainer: Trainer, **options: Any) -> None:
        trainer.fit(StatefulBatches(), [make_batch(7, 16)], **options)

    def test_it_leaves_a_whole_folder(self, make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
        class Killed(StatefulBatches):
            def __iter__(self) -> Iterator[Batch]:
                for batch in super().__iter__():
                    if self.num_handed_out == 11:
                        raise KeyboardInterrupt
                    yield batch

        config = make_config(save_every=2)
        with pytest.raises(KeyboardInterrupt):
            Trainer(make_model(), config, tmp_path / "a", batch_size=4).fit(Killed(), [make_batch(7, 16)])
        self.fit(Trainer(make_model(), config, tmp_path / "b", batch_size=4), resume=tmp_path / "a/last.pt")
        self.fit(Trainer(make_model(), config, tmp_path / "whole", batch_size=4))
        names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("b", "whole")]
        assert names[0] == names[1] == ["best.pt", "config.json", "epochs.csv", "last.pt", "steps.jsonl"]
        ends = [read_checkpoint(tmp_path / name / "last.pt")["state_dict"] for name in ("b", "whole")]
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
        rows = (tmp_path / "b/epochs.csv").read_text().splitlines()
        assert [row.partition(",")[0] for row in rows] == ["epoch", "2", "3"]
        with pytest.raises(ValueError, match="holds a run already"):
            self.fit(Trainer(make_model(), config, tmp_path / "whole", batch_size=4), resume=tmp_path / "a/last.pt")

    def test_its_description_is_compared_too(
        self, make_model: MakeModel, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        def trainer(name: str, mix: str, threads: int) -> Trainer:
            description = {"data": {"mix": mix, "threads": threads}}
            options: dict[str, Any] = {"description": description, "free_to_change": ("data.threads",)}
            return Trainer(make_model(), make_config(), tmp_path / name, batch_size=4, **options)

        self.fit(trainer("a", "mixtoken", 2))
        self.fit(trainer("b", "mixtoken", 9), resume=tmp_path / "a/last.pt")
        with pytest.raises(ValueError, match=r"data\.mix: mixtoken != cutmix"):
            self.fit(trainer("c", "cutmix", 2), resume=tmp_path / "a/last.pt")
