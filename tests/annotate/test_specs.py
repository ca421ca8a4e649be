"""Specs say where weights come from, or say what is missing; presets name real weights of timm."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm

from annotate.cells import TeacherError
from annotate.specs import PRESETS, TeacherSpec, preset


@pytest.mark.parametrize(
    ("arguments", "weights", "shown"),
    [
        pytest.param({"name": "resnet18", "weights": "pretrained"}, "pretrained", "pretrained", id="pretrained"),
        pytest.param({"name": "hf-hub:timm/resnet18.a1_in1k"}, "pretrained", "pretrained", id="hub"),
        pytest.param({"name": "local-dir:/models/mine"}, "pretrained", "pretrained", id="folder"),
        pytest.param(
            {"name": "resnet18", "checkpoint": Path("/a/b.pth")}, "checkpoint", "checkpoint b.pth", id="checkpoint"
        ),
        pytest.param(
            {"name": "local-dir:/models/mine", "checkpoint": Path("c.pt")}, "checkpoint", "checkpoint c.pt", id="both"
        ),
        pytest.param({"name": "resnet18", "seed": 0}, "random", "random, seed 0", id="seed"),
        pytest.param({"name": "resnet18", "weights": "random", "seed": 3}, "random", "random, seed 3", id="random"),
    ],
)
def test_weights_are_given_or_follow(arguments: dict[str, Any], weights: str, shown: str) -> None:
    spec = TeacherSpec(**arguments)
    assert spec.weights == weights
    assert spec.weights_shown == shown
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({}, "nothing says where the weights come from; allowed are .*pretrained", id="nothing"),
        pytest.param({"weights": "imagenet"}, "got weights='imagenet'; allowed are", id="unknown"),
        pytest.param({"weights": "checkpoint"}, "needs a checkpoint", id="no-file"),
        pytest.param({"weights": "random"}, "needs a seed", id="no-seed"),
        pytest.param({"weights": "pretrained", "seed": 1}, "'pretrained' does not go with a seed", id="useless-seed"),
        pytest.param(
            {"weights": "pretrained", "checkpoint": Path("a.pth")}, "does not go with a checkpoint", id="two-origins"
        ),
        pytest.param({"checkpoint": Path("a.pth"), "seed": 1}, "does not go with a seed", id="file-and-seed"),
        pytest.param({"seed": 1, "image_size": 0}, "image_size is a side in pixels", id="no-pixels"),
    ],
)
def test_contradictions_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=f"^resnet18: .*{message}"):
        TeacherSpec("resnet18", **arguments)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_weights_of_timm_at_their_own_size(name: str) -> None:
    spec = preset(name)
    config = timm.get_pretrained_cfg(spec.name, allow_unregistered=False)
    assert spec.weights == "pretrained"
    assert spec.name.partition(".")[0] == name
    assert config.num_classes == 1000
    assert spec.image_size == (config.test_input_size or config.input_size)[-1]


def test_only_l2_saw_more_than_imagenet() -> None:
    extra = [name for name, (full_name, _) in PRESETS.items() if "jft" in full_name or not full_name.endswith("in1k")]
    assert extra == ["tf_efficientnet_l2"]


def test_presets_take_another_size() -> None:
    assert preset("dm_nfnet_f6") == TeacherSpec("dm_nfnet_f6.dm_in1k", weights="pretrained", image_size=576)
    assert preset("dm_nfnet_f6", image_size=448).image_size == 448


def test_unknown_presets_are_refused_with_those_that_exist() -> None:
    with pytest.raises(TeacherError, match=r"no preset 'resnet50'; there are dm_nfnet_f6, .*, resnest269e"):
        preset("resnet50")
