"""The loader inside PyTorch's DataLoader, Lightning and Accelerate; the recipes of docs/loader.md run."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loaders import TokenLabelBatch, TokenLabelLoader
from tests.loaders.photos import NUM_CLASSES, Photos

DOCUMENT = Path(__file__).parents[2] / "docs" / "loader.md"

foreign = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
"""For what other packages warn of in themselves."""


@pytest.fixture(autouse=True)
def _one_intra_op_thread() -> Iterator[None]:
    """As in the worker processes of a DataLoader: with several threads torch rounds in another order."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture
def make_loader(photos: Photos) -> Callable[..., TokenLabelLoader]:
    """A function that makes a loader of eight batches of 4."""

    def make(**changes: Any) -> TokenLabelLoader:
        options = {"image_size": 32, "batch_size": 4, "threads": 2, "index_dir": photos.index_dir, **changes}
        return TokenLabelLoader(photos.tars, photos.labels, **options)

    return make


def recipe(heading: str) -> str:
    """The code below a heading."""
    text = DOCUMENT.read_text(encoding="utf-8").split(f"\n### {heading}\n")[1].split("\n##")[0]
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return str(code)


def keys_of(batches: Iterable[TokenLabelBatch]) -> list[tuple[str, ...]]:
    return [batch.keys for batch in batches]


def epochs(loader: TokenLabelLoader, num: int) -> list[tuple[str, ...]]:
    return [keys for _ in range(num) for keys in keys_of(loader)]


def assert_same(got: Iterable[TokenLabelBatch], expected: Iterable[TokenLabelBatch]) -> None:
    for batch, other in zip(got, expected, strict=True):
        assert isinstance(batch, TokenLabelBatch)
        assert batch.keys == other.keys
        for name in ("images", "labels", "boxes", "flip"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name
        assert batch.targets is not None
        assert other.targets is not None
        assert torch.equal(batch.targets.dense(), other.targets.dense())
        assert batch.plan is not None
        assert other.plan is not None
        assert torch.equal(batch.plan.own, other.plan.own)


class Recorder:
    """What a recipe calls `loss_of` and `make_model`; remembers the keys of all batches."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: list[tuple[str, ...]] = []
        self.stop_after = stop_after

    def make_model(self) -> nn.Module:
        return nn.Linear(3, NUM_CLASSES)

    def loss_of(self, model: nn.Module, batch: TokenLabelBatch) -> Tensor:
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        self.seen.append(batch.keys)
        assert batch.targets is not None
        probabilities: Tensor = model(batch.images.mean(dim=(2, 3))).softmax(dim=-1)
        return (probabilities - batch.targets.dense()[:, 0]).square().sum()


def run_recipe(heading: str, photos: Photos, recorder: Recorder, **names: Any) -> dict[str, Any]:
    names |= {"make_model": recorder.make_model, "loss_of": recorder.loss_of, "num_epochs": 3, "__name__": "recipe"}
    exec(recipe(heading), names | {"tars": photos.tars, "labels": photos.labels})
    return names


@pytest.mark.parametrize(
    ("num_workers", "context"),
    [
        pytest.param(0, None, id="no process"),
        pytest.param(1, "fork", id="a forked process"),
        pytest.param(1, "spawn", id="a spawned process", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_data_loader_gives_the_same_batches(
    num_workers: int, context: str | None, make_loader: Callable[..., TokenLabelLoader]
) -> None:
    options = {"mix": "mixtoken", "rand_augment": "rand-m9-mstd0.5"}
    loader = make_loader(**options)
    wrapped = DataLoader(loader, batch_size=None, num_workers=num_workers, multiprocessing_context=context)
    assert len(wrapped) == 8
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        plain = make_loader(**options)
        plain.set_epoch(epoch)
        assert_same(wrapped, plain)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_more_than_one_worker_process_is_refused(make_loader: Callable[..., TokenLabelLoader]) -> None:
    wrapped = DataLoader(make_loader(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    with pytest.raises(ValueError, match=r"2 worker processes, and each would read every sample.*num_workers=0"):
        next(iter(wrapped))


def test_the_recipe_of_a_data_loader_keeps_the_state(make_loader: Callable[..., TokenLabelLoader]) -> None:
    expected = epochs(make_loader(), 2)
    for stop in (1, 5, 8):
        names: dict[str, Any] = {"loader": make_loader()}
        exec(recipe("torch.utils.data.DataLoader"), names)
        batches = iter(names["wrapped"])
        seen = [next(batches).keys for _ in range(stop)]
        resumed = make_loader()
        resumed.load_state_dict(names["loader"].state_dict())
        rest = DataLoader(resumed, batch_size=None)
        assert seen + keys_of(rest) + keys_of(rest) == expected


def test_passes_of_which_nobody_asks_for_the_end_go_on_with_the_next_epoch(
    make_loader: Callable[..., TokenLabelLoader],
) -> None:
    expected, loader = epochs(make_loader(), 3), make_loader()
    counted = [batch.keys for _ in range(3) for _, batch in zip(range(8), loader, strict=False)]
    assert counted == expected
    loader.set_epoch(2)
    assert [batch.keys for _, batch in zip(range(8), loader, strict=False)] == expected[16:], "the same again"


def test_a_batch_moves_as_a_whole(make_loader: Callable[..., TokenLabelLoader]) -> None:
    for batch in (next(iter(make_loader(mix="cutmix"))), next(iter(make_loader(supervision="hard")))):
        moved = batch.to("meta", non_blocking=True)
        assert moved.keys == batch.keys
        tensors = [moved.images, moved.labels, moved.boxes, moved.flip]
        tensors += [] if moved.plan is None else [moved.plan.own, moved.plan.partner]
        tensors += [] if moved.targets is None else [moved.targets.weights]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert (moved.plan is None, moved.targets is None) == (batch.plan is None, batch.targets is None)


@pytest.mark.parametrize("stop", [1, 6, 8, 11])
@foreign
def test_the_recipe_of_plain_pytorch(
    stop: int, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_loader: Callable[..., Any]
) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    recorders = Recorder(stop), Recorder()
    with pytest.raises(KeyboardInterrupt):
        run_recipe("Plain PyTorch, one or many processes", photos, recorders[0], checkpoint=tmp_path / "c.pt")
    torch.distributed.destroy_process_group()
    run_recipe("Plain PyTorch, one or many processes", photos, recorders[1], checkpoint=tmp_path / "c.pt")
    saved = stop // 2 * 2
    assert recorders[0].seen[:saved] + recorders[1].seen == epochs(make_loader(), 3)


@pytest.mark.parametrize("every", [3, 8], ids=["within epochs", "at ends of epochs"])
@foreign
def test_the_recipe_of_lightning(
    every: int, photos: Photos, tmp_path: Path, make_loader: Callable[..., TokenLabelLoader]
) -> None:
    lightning = pytest.importorskip("lightning")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "run", every_n_train_steps=every if every < 8 else None, enable_version_counter=False
    )
    expected, checkpoint = epochs(make_loader(), 3), tmp_path / "run.ckpt"
    first, second = Recorder(13), Recorder()
    options = {**quiet, "callbacks": [saver]}
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_recipe("Lightning", photos, first, make_loader=make_loader, checkpoint=checkpoint, options=options)
    assert first.seen == expected[:13]
    saved = torch.load(checkpoint, weights_only=False)["global_step"]
    assert saved == 13 // every * every
    options = {**quiet, "enable_checkpointing": False}
    run_recipe("Lightning", photos, second, make_loader=make_loader, checkpoint=checkpoint, options=options)
    assert second.seen == expected[saved:]


@pytest.mark.parametrize("stop", [1, 6, 8, 11])
@foreign
def test_the_recipe_of_accelerate(
    stop: int, photos: Photos, tmp_path: Path, make_loader: Callable[..., TokenLabelLoader]
) -> None:
    accelerate = pytest.importorskip("accelerate")
    recorders, checkpoint = (Recorder(stop), Recorder()), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        run_recipe("Accelerate", photos, recorders[0], checkpoint=checkpoint, options={"cpu": True})
    run_recipe("Accelerate", photos, recorders[1], checkpoint=checkpoint, options={"cpu": True})
    saved = stop // 2 * 2
    assert recorders[0].seen[:saved] + recorders[1].seen == epochs(make_loader(), 3)
    loader = make_loader()
    assert accelerate.Accelerator(cpu=True).prepare(loader) is loader
