"""Released and own checkpoints: the forms they come in, other sizes, and what is refused."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tokenlabels.align import TLAlign
from tokenlabels.models import CheckpointError, DenseClassifier, LVViT, load_checkpoint

MakeLVViT = Callable[..., LVViT]
State = dict[str, Tensor]


def averaged(state: State) -> State:
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def parallel(state: State) -> State:
    return {f"module.{name}": tensor for name, tensor in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "of DistributedDataParallel": parallel,
    "training checkpoint": lambda state: {"epoch": 3, "arch": "lvvit_s", "state_dict": state},
    "training checkpoint of DistributedDataParallel": lambda state: {"state_dict": parallel(state), "version": 2},
    "with the arguments of timm's script": lambda state: {"state_dict": state, "args": argparse.Namespace(lr=1e-3)},
}


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".pt"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads(make_lvvit: MakeLVViT, tmp_path: Path, form: str, suffix: str) -> None:
    source, path = make_lvvit(), tmp_path / f"lvvit{suffix}"
    torch.save(FORMS[form](source.state_dict()), path)
    torch.manual_seed(1)
    model = LVViT(img_size=32, num_classes=10, embed_dim=24, depth=2, num_heads=2)
    load_checkpoint(model, path)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), source.eval()(images), rtol=0, atol=0)


def test_safetensors_load(make_lvvit: MakeLVViT, tmp_path: Path) -> None:
    source = make_lvvit(aux_head=False)
    save_file(source.state_dict(), tmp_path / "lvvit.safetensors")
    model = make_lvvit(aux_head=False)
    model.reset_classifier(10)
    load_checkpoint(model, tmp_path / "lvvit.safetensors")
    torch.testing.assert_close(model.head.weight, source.head.weight)


@pytest.mark.parametrize("use_ema", [True, False])
def test_averaged_weights_are_a_choice(make_lvvit: MakeLVViT, tmp_path: Path, use_ema: bool) -> None:
    state = make_lvvit().state_dict()
    torch.save({"state_dict": state, "state_dict_ema": parallel(averaged(state))}, tmp_path / "both.pth.tar")
    model = make_lvvit()
    load_checkpoint(model, tmp_path / "both.pth.tar", use_ema=use_ema)
    torch.testing.assert_close(model.head.bias, state["head.bias"] + use_ema)


@pytest.mark.parametrize("size", [32, 64, (48, 80)])
def test_position_embeddings_follow_the_image_size(
    make_lvvit: MakeLVViT, tmp_path: Path, size: int | tuple[int, int]
) -> None:
    source, model = make_lvvit(img_size=48), make_lvvit(img_size=size)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "lvvit.pth")
    load_checkpoint(model, tmp_path / "lvvit.pth")
    maps = source.pos_embed[:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    resized = functional.interpolate(maps, size=model.grid, mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed[:, 1:], resized.flatten(2).mT)
    torch.testing.assert_close(model.pos_embed[:, :1], source.pos_embed[:, :1])
    torch.testing.assert_close(model.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)


def test_dense_students_fine_tune_at_other_sizes(tmp_path: Path) -> None:
    def student(size: int) -> DenseClassifier:
        return DenseClassifier(timm.create_model("test_vit", num_classes=5, img_size=size), size)

    torch.save(student(64).state_dict(), tmp_path / "student.pt")
    larger = student(96)
    load_checkpoint(larger, tmp_path / "student.pt")
    assert larger(torch.randn(1, 3, 96, 96))[1].shape == (1, 36, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"num_classes": 7}, "it has 10 classes, the model 7", id="class count"),
        pytest.param({"depth": 3}, r"tensors missing \(blocks\.2\.", id="deeper"),
        pytest.param({"depth": 1}, r"not of this model \(blocks\.1\.", id="shallower"),
        pytest.param(
            {"embed_dim": 48}, r"of another shape \(cls_token \[1, 1, 24\] instead of \[1, 1, 48\]", id="wider"
        ),
        pytest.param({"aux_head": False}, r"not of this model \(aux_head\.weight", id="no token head"),
        pytest.param({"stem_kernels": (), "stem_strides": ()}, "patch_embed.proj.weight", id="other patch embedding"),
    ],
)
def test_checkpoints_of_other_models(
    make_lvvit: MakeLVViT, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    path = tmp_path / "lvvit.pth"
    torch.save(averaged(make_lvvit().state_dict()), path)
    model = make_lvvit(**arguments)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(model, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "untouched"


def test_position_embeddings_of_no_square_are_refused(make_lvvit: MakeLVViT, tmp_path: Path) -> None:
    torch.save(make_lvvit(img_size=(32, 48)).state_dict(), tmp_path / "lvvit.pth")
    with pytest.raises(CheckpointError, match="no square grid"):
        load_checkpoint(make_lvvit(img_size=64), tmp_path / "lvvit.pth")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "TLAlign": TLAlign,
    "DenseClassifier": lambda model: DenseClassifier(model, 32),
    "both": lambda model: TLAlign(DenseClassifier(model, 32)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_inside_wrappers_loads(tmp_path: Path, wrapper: str, form: str) -> None:
    source, model = (timm.create_model("test_vit", img_size=32, num_classes=5) for _ in range(2))
    torch.save(FORMS[form](WRAPPERS[wrapper](source).state_dict()), tmp_path / "best.pt")
    load_checkpoint(model, tmp_path / "best.pt")
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_student_with_token_classifier_comes_out_of_its_wrapper(make_lvvit: MakeLVViT, tmp_path: Path) -> None:
    source, model = make_lvvit(), make_lvvit(depth=2)
    torch.save(averaged(TLAlign(source).state_dict()), tmp_path / "best.pt")
    load_checkpoint(model, tmp_path / "best.pt")
    assert model.aux_head is not None
    torch.testing.assert_close(model.aux_head.weight, averaged(source.state_dict())["aux_head.weight"])


def test_wrappers_load_their_own_checkpoints(tmp_path: Path) -> None:
    source, other = (TLAlign(DenseClassifier(timm.create_model("test_vit", img_size=32), 32)) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "best.pt")
    load_checkpoint(other, tmp_path / "best.pt")
    load_checkpoint(other.model, tmp_path / "best.pt")
    torch.testing.assert_close(other.aux_head.weight, source.aux_head.weight, rtol=0, atol=0)


def test_other_models_inside_wrappers_are_refused(make_lvvit: MakeLVViT, tmp_path: Path) -> None:
    torch.save(TLAlign(make_lvvit()).state_dict(), tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"not of this model \(blocks\.1\."):
        load_checkpoint(make_lvvit(depth=1), tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="tensors missing"):
        load_checkpoint(make_lvvit(depth=3), tmp_path / "best.pt")


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"])
def test_the_number_of_classes_is_taken_over_if_asked(tmp_path: Path, name: str) -> None:
    source, model = timm.create_model(name, num_classes=6), timm.create_model(name)
    torch.save(TLAlign(source).state_dict(), tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="it has 6 classes, the model 1000"):
        load_checkpoint(model, tmp_path / "best.pt")
    load_checkpoint(model, tmp_path / "best.pt", take_classes=True)
    assert model.num_classes == 6
    for tensor_name, tensor in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[tensor_name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pth", lambda path: None, "there is no such file"),  # noqa: ARG005
        ("a.npz", lambda path: path.write_bytes(b"x"), "checkpoints end in"),
        ("a.pth", lambda path: path.write_bytes(b"PK\3\4 cut off"), "cannot be read"),
        ("a.pth", lambda path: torch.save({"state_dict": {}}, path), "holds no state dict"),
        ("a.pth", lambda path: torch.save({"lr": 0.1}, path), "holds no state dict"),
    ],
)
def test_files_that_are_no_checkpoints(
    make_lvvit: MakeLVViT, tmp_path: Path, name: str, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(make_lvvit(), tmp_path / name)


def test_timm_opens_ours(tmp_path: Path) -> None:
    source = timm.create_model("lvvit_t", depth=1, img_size=32, num_classes=3)
    torch.save({"state_dict": source.state_dict(), "format": 1}, tmp_path / "best.pt")
    model = timm.create_model("lvvit_t", depth=1, img_size=32, num_classes=3, checkpoint_path=str(tmp_path / "best.pt"))
    torch.testing.assert_close(model.head.weight, source.head.weight)
