"""Models and their weights: names, files, folders, seeds; and what is refused, with which words."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from annotate.cells import TeacherError
from annotate.specs import TeacherSpec
from annotate.weights import build_model, class_names, full_name, image_size, state_digest

NAME, NUM_CLASSES = "test_resnet", 7
State = dict[str, Tensor]
RESIZING_WINDOWS = pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")


@pytest.fixture(scope="module")
def state() -> State:
    """A checkpoint of test_resnet for 7 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return dict(timm.create_model(NAME, num_classes=NUM_CLASSES).state_dict())


def _from(path: Path, name: str = NAME, **arguments: Any) -> nn.Module:
    return build_model(TeacherSpec(name, checkpoint=path, **arguments))


def _assert_same(model: nn.Module, state: State) -> None:
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


WRITERS: dict[str, tuple[str, Callable[[State, Path], None]]] = {
    "safetensors": ("model.safetensors", lambda state, path: save_file(state, path)),
    "pth": ("model.pth", lambda state, path: torch.save(state, path)),
    "pt": ("model.pt", lambda state, path: torch.save(state, path)),
    "training-state": ("last.pth.tar", lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path)),
    "distributed": ("ddp.pth", lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path)),
    "averaged-weights-first": (
        "ema.pth",
        lambda state, path: torch.save(
            {"state_dict": {k: torch.zeros_like(v) for k, v in state.items()}, "state_dict_ema": state}, path
        ),
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_checkpoints_load_with_the_classes_that_are_in_the_file(kind: str, state: State, tmp_path: Path) -> None:
    file_name, write = WRITERS[kind]
    write(state, tmp_path / file_name)
    model: Any = _from(tmp_path / file_name)
    assert model.num_classes == NUM_CLASSES
    assert not model.training
    _assert_same(model, state)


class _Payload:
    """Unpickles to a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_that_carries_code_is_refused_and_not_run(state: State, tmp_path: Path) -> None:
    path, trace = tmp_path / "model.pth", tmp_path / "the-code-ran"
    torch.save({"state_dict": state, "extra": _Payload(trace)}, path)
    with pytest.raises(TeacherError, match=r"test_resnet: .*model\.pth: .*could run code"):
        _from(path)
    assert not trace.exists()


def test_a_folder_whose_pickle_carries_code_is_refused_and_not_run(state: State, tmp_path: Path) -> None:
    _write_folder(tmp_path, state, num_classes=NUM_CLASSES)
    (tmp_path / "model.safetensors").unlink()
    trace = tmp_path / "the-code-ran"
    torch.save({"state_dict": state, "extra": _Payload(trace)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TeacherError, match=r"^local-dir:"):
        build_model(TeacherSpec(f"local-dir:{tmp_path}"))
    assert not trace.exists()


def _write_other_model(path: Path) -> None:
    torch.save(timm.create_model("test_efficientnet").state_dict(), path)


def _write_wider_model(path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3, 8), "fc.bias": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("file_name", "write", "message"),
    [
        pytest.param("a.pth", _write_other_model, "does not fit test_resnet: no classifier in it", id="other-model"),
        pytest.param(
            "a.pth",
            _write_wider_model,
            r"does not fit test_resnet: .* tensors missing \(.*of another shape",
            id="shapes",
        ),
        pytest.param(
            "a.pth",
            lambda path: path.write_bytes(b"PK\3\4 cut off"),
            r"^test_resnet: .*a\.pth: cannot be read",
            id="damaged",
        ),
        pytest.param("a.safetensors", lambda path: path.write_bytes(b"{}"), "cannot be read", id="damaged-safetensors"),
        pytest.param("a.pth", lambda path: torch.save({}, path), "holds no state dict", id="empty"),
        pytest.param("a.pth", lambda path: torch.save({"fc.weight": 3}, path), "holds no state dict", id="no-tensors"),
        pytest.param(
            "a.pth", lambda path: torch.save(torch.zeros(3), path), r"^test_resnet: .*a\.pth: ", id="a-tensor"
        ),
        pytest.param("a.npz", lambda path: path.write_bytes(b""), r"checkpoints end in \.safetensors", id="suffix"),
        pytest.param("a.pth", lambda path: None, "there is no such file", id="missing"),  # noqa: ARG005
    ],
)
def test_files_that_are_not_the_weights_of_this_model(
    file_name: str, write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write(tmp_path / file_name)
    with pytest.raises(TeacherError, match=message) as caught:
        _from(tmp_path / file_name)
    assert str(tmp_path / file_name) in str(caught.value)


def test_pickled_training_objects_that_are_no_tensors_are_named(state: State, tmp_path: Path) -> None:
    with (tmp_path / "a.pth").open("wb") as file:
        pickle.dump({"state_dict": state, "seed": random.Random(0)}, file)
    with pytest.raises(TeacherError, match=r"^test_resnet: .*a\.pth: "):
        _from(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("efficientnet_b9", "has no model 'efficientnet_b9'; near it are .*efficientnet_b", id="close"),
        pytest.param("Swin", "near it are .*swin", id="part-of-a-name"),
        pytest.param("no such thing", "has no model 'no such thing'. Models from elsewhere", id="nothing-near"),
        pytest.param("timm/resnet18.a1_in1k", "hf-hub:OWNER/MODEL", id="hub-id-without-prefix"),
        pytest.param("tf_efficientnet_b3_ns", "use tf_efficientnet_b3.ns_jft_in1k", id="former-name"),
        pytest.param("resnet18.best", "resnet18 has no tag 'best'; it has .*a1_in1k", id="tag"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(name: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        build_model(TeacherSpec(name, weights="pretrained"))


def test_an_architecture_without_pretrained_weights_is_refused() -> None:
    with pytest.raises(TeacherError, match="gmlp_ti16_224: timm has no pretrained weights"):
        build_model(TeacherSpec("gmlp_ti16_224", weights="pretrained"))


def test_weights_that_cannot_be_downloaded_are_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("the network is down")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(TeacherError, match=r"^resnet18: .*\(pretrained\): the network is down"):
        build_model(TeacherSpec("resnet18", weights="pretrained"))


def test_pretrained_weights_come_from_timm_and_are_recorded_with_their_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    create_model = timm.create_model

    def without_network(name: str, *, pretrained: bool, **arguments: Any) -> nn.Module:
        asked.append(pretrained)
        return create_model(name, **arguments)

    monkeypatch.setattr(timm, "create_model", without_network)
    for name in ("test_resnet", "test_resnet.r160_in1k"):
        spec = TeacherSpec(name, weights="pretrained")
        assert full_name(build_model(spec), spec) == "test_resnet.r160_in1k"
    spec = TeacherSpec("test_resnet", seed=0)
    assert full_name(build_model(spec), spec) == "test_resnet"
    assert asked == [True, True, False]


def _write_folder(folder: Path, state: State, *, num_classes: int, **config: object) -> None:
    pretrained_cfg = {"input_size": [3, 96, 96], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "classifier": "fc"}
    content = {"architecture": NAME, "num_classes": num_classes, "pretrained_cfg": pretrained_cfg, **config}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(state, folder / "model.safetensors")


def test_folders_bring_weights_preprocessing_and_class_names(state: State, tmp_path: Path) -> None:
    labels = [f"n{index}" for index in range(NUM_CLASSES)]
    descriptions = {"n0": "great auk", "n6": "quagga"}
    _write_folder(tmp_path, state, num_classes=NUM_CLASSES, label_names=labels, label_descriptions=descriptions)
    spec = TeacherSpec(f"local-dir:{tmp_path}")
    model: Any = build_model(spec)
    _assert_same(model, state)
    assert class_names(model) == ("great auk", "n1", "n2", "n3", "n4", "n5", "quagga")
    assert image_size(model, spec) == (96, 96)
    assert full_name(model, spec) == spec.name


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"^local-dir:.*config\.json"):
        build_model(TeacherSpec(f"local-dir:{tmp_path}"))


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        pytest.param(
            "test_resnet", "tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue", id="imagenet-1k"
        ),
        pytest.param("tiny_vit_5m_224.dist_in22k", "organism, being", None, id="imagenet-22k"),
    ],
)
def test_class_names_of_imagenet(name: str, first: str, last: str | None) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    names = class_names(model)
    assert names is not None
    assert len(names) == model.num_classes
    assert names[0] == first
    assert last is None or names[-1] == last


@pytest.mark.parametrize(
    ("num_classes", "labels", "expected"),
    [
        pytest.param(7, None, None, id="unknown"),
        pytest.param(1000, ["a", "b"], None, id="too-few-names"),
        pytest.param(3, {"10": "c", "0": "a", "2": "b"}, ("a", "b", "c"), id="mapping-in-order-of-id"),
    ],
)
def test_class_names_elsewhere(num_classes: int, labels: Any, expected: tuple[str, ...] | None) -> None:
    model: Any = timm.create_model("test_resnet", num_classes=num_classes)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": labels}
    assert class_names(model) == expected


def test_random_weights_follow_the_seed_and_leave_the_process_alone() -> None:
    def random_states() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    before = random_states()
    digests = [state_digest(build_model(TeacherSpec(NAME, seed=seed))) for seed in (0, 1, 0)]
    assert random_states() == before
    torch.rand(3)
    assert state_digest(build_model(TeacherSpec(NAME, seed=0))) == digests[0]
    assert digests[0] == digests[2] != digests[1]


def test_digest_covers_every_name_dtype_shape_and_byte() -> None:
    class Holder(nn.Module):
        def __init__(self, state: State) -> None:
            super().__init__()
            self.held = state

        def state_dict(self, *_: Any, **__: Any) -> State:
            return self.held

    def digest(**tensors: Tensor) -> str:
        return state_digest(Holder(tensors))

    base = torch.arange(6.0).reshape(2, 3)
    nudged = base.clone()
    nudged[1, 2] = torch.nextafter(nudged[1, 2], torch.tensor(9.0))
    others = [digest(b=base), digest(a=base.reshape(3, 2)), digest(a=base.view(torch.int32)), digest(a=nudged)]
    others.append(digest(a=base, b=base))
    assert len({digest(a=base), *others}) == 6
    assert digest(a=base, b=nudged) == digest(b=nudged, a=base)
    assert digest(a=base.t().contiguous().t()) == digest(a=base)
    assert digest(a=torch.tensor(3, dtype=torch.bfloat16)) != digest(a=torch.tensor(3, dtype=torch.float16))


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        pytest.param("test_resnet", 96, (3, 3), id="any-size"),
        pytest.param("test_vit", 64, (4, 4), id="resized-position-embedding"),
        pytest.param("swin_tiny_patch4_window7_224", 96, (3, 3), id="resized-windows", marks=RESIZING_WINDOWS),
        pytest.param("xcit_nano_12_p16_224", 64, (4, 4), id="rebuilt"),
    ],
)
def test_models_are_made_for_the_size_asked_for(name: str, size: int, grid: tuple[int, int]) -> None:
    spec = TeacherSpec(name, seed=0, image_size=size)
    model: Any = build_model(spec)
    with torch.inference_mode():
        features = model.forward_features(torch.zeros(1, 3, size, size))
    num_cells = features.numel() // model.num_features - getattr(model, "num_prefix_tokens", 0)
    assert num_cells == grid[0] * grid[1]
    assert image_size(model, spec) == (size, size)


def test_a_checkpoint_is_resized_after_it_was_loaded(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", num_classes=3)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    model: Any = _from(tmp_path / "vit.safetensors", "test_vit", image_size=96)
    assert model.pos_embed.shape[1] == 6 * 6 + 1
    assert torch.equal(model.head.weight, source.head.weight)


def test_a_checkpoint_that_only_fits_another_size_is_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("gmlp_ti16_224", num_classes=3).state_dict(), tmp_path / "mlp.safetensors")
    with pytest.raises(TeacherError, match="does not fit gmlp_ti16_224: "):
        _from(tmp_path / "mlp.safetensors", "gmlp_ti16_224", image_size=96)


def test_models_are_evaluated_at_their_test_size() -> None:
    with torch.device("meta"):
        model: Any = timm.create_model("dm_nfnet_f6.dm_in1k")
    assert image_size(model, TeacherSpec("dm_nfnet_f6.dm_in1k", seed=0)) == (576, 576)
    assert image_size(model, TeacherSpec("dm_nfnet_f6.dm_in1k", seed=0, image_size=320)) == (320, 320)
