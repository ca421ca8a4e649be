"""Accuracy against counting by hand, and the labels of ImageNet-ReaL."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tokenlabels.trainer.batches import Batch, make_batch
from tokenlabels.trainer import RealLabels, evaluate


class Oracle(nn.Module):
    """Gives the logits that the first pixels of an image are."""

    def __init__(self, num_classes: int, *, as_pair: bool = False) -> None:
        super().__init__()
        self.num_classes, self.as_pair = num_classes, as_pair
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        assert not self.training
        logits = images.flatten(1)[:, : self.num_classes] * self.scale
        return (logits, logits[:, None]) if self.as_pair else logits


def batches_of(logits: Tensor, labels: list[int], keys: list[str] | None = None) -> list[Batch]:
    images = torch.zeros(len(labels), 3, 32, 32)
    images.flatten(1)[:, : logits.shape[1]] = logits
    names = tuple(keys or map(str, range(len(labels))))
    whole = make_batch(0, images=images, labels=torch.tensor(labels), keys=names)
    half = len(labels) // 2
    parts = (slice(0, half), slice(half, None))
    return [make_batch(0, images=whole.images[part], labels=whole.labels[part], keys=names[part]) for part in parts]


@pytest.mark.parametrize("as_pair", [False, True])
@pytest.mark.parametrize("num_classes", [3, 12])
def test_accuracy_is_what_counting_says(num_classes: int, as_pair: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(41, num_classes)
    labels = torch.randint(-1, num_classes, (41,)).tolist()
    model = Oracle(num_classes, as_pair=as_pair).train()
    accuracy = evaluate(model, batches_of(logits, labels))
    assert model.training
    ranked = logits.argsort(dim=1, descending=True).tolist()
    labelled = [(row, label) for row, label in zip(ranked, labels, strict=True) if label >= 0]
    assert accuracy.num_images == len(labelled) < 41
    assert accuracy.top1 == sum(row[0] == label for row, label in labelled) / len(labelled)
    assert accuracy.top5 == sum(label in row[:5] for row, label in labelled) / len(labelled)
    assert accuracy.real_top1 is None
    assert "top-1" in str(accuracy)


def test_nothing_is_learnt_from_evaluating() -> None:
    model = Oracle(4)
    evaluate(model, batches_of(torch.randn(6, 4), [0, 1, 2, 3, 0, 1]))
    assert model.scale.grad is None


def test_real_labels(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json.dumps([[0], [1, 2], [], [3]]))
    real = RealLabels(tmp_path / "real.json")
    logits = torch.eye(4)[[0, 2, 1, 0]]
    keys = [f"val/ILSVRC2012_val_0000000{number}" for number in (1, 2, 3, 4)]
    accuracy = evaluate(Oracle(4), batches_of(logits, [0, 1, 1, 3], keys), real=real)
    assert (accuracy.real_top1, accuracy.num_real) == (2 / 3, 3)
    assert accuracy.top1 == 2 / 4
    assert "ReaL 66.67% of 3" in str(accuracy)


def test_the_published_file_is_read() -> None:
    """timm carries it."""
    path = Path(str(files("timm.data") / "_info" / "imagenet_real_labels.json"))
    real = RealLabels(path)
    assert real.of("ILSVRC2012_val_00000293.JPEG") == set(json.loads(path.read_text())[292])
    assert sum(not real.of(f"ILSVRC2012_val_{number:08d}") for number in range(1, 50_001)) == 50_000 - 46_837


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{", "not JSON"), ('{"a": [1]}', "a list with a list of classes"), ("[1]", "real.json")],
)
def test_files_that_are_no_real_labels(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "real.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        RealLabels(tmp_path / "real.json")


@pytest.mark.parametrize("key", ["n01440764_10026", "ILSVRC2012_val_00000003", "ILSVRC2012_val_00000000"])
def test_keys_without_real_labels(tmp_path: Path, key: str) -> None:
    (tmp_path / "real.json").write_text("[[0], [1]]")
    with pytest.raises(ValueError, match=f"{key}.*up to 00000002"):
        RealLabels(tmp_path / "real.json").of(key)


def test_what_cannot_be_evaluated() -> None:
    with pytest.raises(ValueError, match="1 images have labels that the model has no class for"):
        evaluate(Oracle(3), batches_of(torch.randn(4, 3), [0, 1, 2, 3]))
    with pytest.raises(ValueError, match="none of the images has a label"):
        evaluate(Oracle(3), batches_of(torch.randn(4, 3), [-1] * 4))
    with pytest.raises(ValueError, match="none of the images has a label"):
        evaluate(Oracle(3), [])
