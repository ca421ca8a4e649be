"""tokenlabels show --layout: what is drawn of which images, and what is refused with exit code 2."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.tokenlabels.cli.conftest import Run
from tokenlabels.models import DenseClassifier
from tokenlabels.models.modulation import modulate, modulations
from tokenlabels.views.layout import ImageLayouts

LAYOUT = ("show", "--layout", "--device", "cpu")
VIT = ("--model", "test_vit", "--image-size", "64")
PVT = ("--model", "pvt_v2_b0", "--image-size", "64")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ImageLayouts, list[str], int, str]]:
    """What the command draws, image by image, with the titles of the layouts, number of entities and title."""
    import tokenlabels.views.layout as pictures

    calls: list[tuple[ImageLayouts, list[str], int, str]] = []
    draw_layouts = pictures.draw_layouts

    def record(images: list[ImageLayouts], titles: list[str], num_entities: int, title: str) -> Image.Image:
        calls.extend((one, titles, num_entities, title) for one in images)
        return draw_layouts(images, titles, num_entities, title)

    monkeypatch.setattr(pictures, "draw_layouts", record)
    return calls


def vit(num_entities: int = 8) -> Any:
    """A modulated test_vit for 64 pixels and 7 classes."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=64, num_classes=7)
    return modulate(model, "moto", num_entities=num_entities).eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of `vit`, as a run leaves it."""
    torch.save({"state_dict": vit().state_dict(), "epoch": 3}, tmp_path / "best.pt")
    return tmp_path / "best.pt"


def test_a_layout_of_the_first_images_of_all_tars(
    run: Run, pattern: str, tmp_path: Path, checkpoint: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the pixels that are shown to the entities, once more by hand."""
    monkeypatch.chdir(tmp_path)
    result = run(*LAYOUT, *VIT, "--checkpoint", checkpoint, "--images", pattern)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "picture: layout.png\n"
    with Image.open("layout.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
    assert [one.name for one, *_ in drawn] == ["scene_000000", "scene_000005", "scene_000008", "scene_000001"]
    shown, titles, num_entities, title = drawn[0]
    assert (titles, num_entities) == (["patch_embed, 4 x 4"], 8)
    assert title == f"test_vit ({checkpoint}), 64 x 64 px, 8 entities"
    model = vit()
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    pixels = torch.from_numpy(shown.image.copy()).permute(2, 0, 1)[None] / 255
    embedding = model.patch_embed.wrapped((pixels - mean) / std)
    layout = modulations(model)[0].layout(embedding.permute(0, 3, 1, 2))  # type: ignore[operator]
    np.testing.assert_array_equal(shown.entities[0], layout[0].argmax(dim=0).numpy())
    assert len(np.unique(shown.entities[0])) > 1


def test_every_stage_and_the_first_alone(run: Run, pattern: str, tmp_path: Path, drawn: list[Any]) -> None:
    arguments = (*LAYOUT, *PVT, "--random-weights", "0", "--entities", "3", "--images", pattern, "--num", "1")
    assert run(*arguments, "--out", tmp_path / "a.webp").exit_code == 0
    assert run(*arguments, "--placement", "first", "--out", tmp_path / "b.png").exit_code == 0
    (every, titles, *_), (first, first_titles, *_) = drawn
    assert titles == [
        "patch_embed, 16 x 16",
        "stages.1.downsample, 8 x 8",
        "stages.2.downsample, 4 x 4",
        "stages.3.downsample, 2 x 2",
    ]
    assert [layout.shape for layout in every.entities] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert max(layout.max() for layout in every.entities) <= 2
    assert first_titles == titles[:1]
    assert len(first.entities) == 1


def test_a_hard_partition_is_followed(run: Run, pattern: str, tmp_path: Path, drawn: list[Any]) -> None:
    """It changes what the second MoTo gets, and not what the first one finds."""
    arguments = (*LAYOUT, *PVT, "--random-weights", "0", "--entities", "2", "--images", pattern, "--num", "1")
    for partition in ("soft", "hard"):
        assert run(*arguments, "--partition", partition, "--out", tmp_path / "a.png").exit_code == 0
    (soft, *_), (hard, *_) = drawn
    np.testing.assert_array_equal(soft.entities[0], hard.entities[0])
    assert any((one != other).any() for one, other in zip(soft.entities[1:], hard.entities[1:], strict=True))


def test_checkpoints_with_a_classifier_of_tokens(
    run: Run, pattern: str, tmp_path: Path, checkpoint: Path, drawn: list[Any]
) -> None:
    torch.save({"state_dict": DenseClassifier(vit(), 64).state_dict()}, tmp_path / "dense.pt")
    options = ("--images", pattern, "--key", "scene_000002", "--out", tmp_path / "a.png")
    for weights in (checkpoint, tmp_path / "dense.pt"):
        assert run(*LAYOUT, *VIT, "--checkpoint", weights, *options).exit_code == 0
    (plain, *_), (dense, *_) = drawn
    assert plain.name == "scene_000002"
    np.testing.assert_array_equal(plain.entities[0], dense.entities[0])


def test_the_random_state_is_left_alone(run: Run, pattern: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    options = ("--random-weights", "0", "--images", pattern, "--num", "1", "--out", tmp_path / "a.png")
    assert run(*LAYOUT, *VIT, *options).exit_code == 0
    assert torch.equal(torch.get_rng_state(), before)


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "checkpoint without MoTo": (
        ("--checkpoint", "PLAIN"),
        "plain.pt holds a model without MoTo, which finds no layouts; train one with it",
    ),
    "other entities": (
        ("--checkpoint", "BEST", "--entities", "4"),
        "patch_embed.modulation.u [8] instead of [4]",
    ),
    "what to do about them": (
        ("--checkpoint", "BEST", "--entities", "4"),
        "--placement and --entities say how (here every, 4)",
    ),
    "no stem": (("--checkpoint", "BEST", "--placement", "stem"), "has no convolutional stem"),
    "more entities than colours": (("--checkpoint", "BEST", "--entities", "37"), "colours for 36 entities, got 37"),
    "more entities than positions": (
        ("--random-weights", "0", "--entities", "17"),
        "17 entities are more than the 4 x 4 positions",
    ),
    "options of another mode": (("--checkpoint", "BEST", "--mix", "cutmix"), "--mix is for --aligned; leave it out"),
    "a seed of mixing": (
        ("--checkpoint", "BEST", "--seed", "0"),
        "--seed is for --aligned and LABELS --epoch; leave it out with --layout",
    ),
    "unknown placement": (("--checkpoint", "BEST", "--placement", "last"), "'last' is not one of"),
    "no weights": ((), "--checkpoint FILE, or --random-weights 0"),
    "no file": (("--checkpoint", "none.pt"), "none.pt: there is no such file"),
    "ending": (("--checkpoint", "BEST", "--out", "a.txt"), "a.txt: pictures are written as .png"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_use_exits_with_2(
    run: Run,
    pattern: str,
    checkpoint: Path,
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_vit", img_size=64, num_classes=7).state_dict(), tmp_path / "plain.pt")
    files = {"BEST": str(checkpoint), "PLAIN": "plain.pt"}
    result = run(*LAYOUT, *VIT, "--images", pattern, *(files.get(word, word) for word in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "plain.pt"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param("test_resnet", "ResNet has no patch embedding", id="convolutions"),
        pytest.param("deit_smal_patch16_224", "near it: deit_small_patch16_224", id="unknown"),
    ],
)
def test_models_that_are_refused(run: Run, pattern: str, tmp_path: Path, model: str, message: str) -> None:
    result = run(*LAYOUT, "--model", model, "--random-weights", "0", "--images", pattern, "--out", tmp_path / "a.png")
    assert result.exit_code == 2
    assert message in result.stderr
