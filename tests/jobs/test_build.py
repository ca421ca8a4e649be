"""From a configuration to the model and the loaders that it names."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from jobs.build import batch_size_per_rank, build_model, build_run, images_of, open_labels, train_loader
from jobs.config import DataConfig, RunConfig
from jobs.overrides import apply_overrides
from jobs.recipes import get_recipe
from tokenlabels.images import find_shards
from tokenlabels.models import DenseClassifier, LVViT
from tokenlabels.trainer import ranks

MakeRun = Callable[..., RunConfig]
CPU = torch.device("cpu")
SMALL_VIT = ("model.name=test_vit", "model.args={}")
SMALL_CONVS = ("model.name=test_resnet", "model.args={}", "data.mix=cutmix")


def test_loaders_follow_the_model(make_run: MakeRun) -> None:
    run = build_run(make_run("lvvit_t", "model.image_size=64", "model.args.patch_size=8"), CPU)
    assert isinstance(run.model, LVViT)
    assert run.model.grid == run.train.grid == (8, 8)
    assert run.model.num_classes == run.train.num_classes == 20
    batch = next(iter(run.train))
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.targets is not None
    assert batch.targets.grid == (8, 8)
    assert not batch.is_mixed
    assert run.val is not None
    assert next(iter(run.val)).images.shape == (4, 3, 64, 64)


def test_pixels_are_normalised_as_the_model_wants_them(make_run: MakeRun) -> None:
    """test_vit wants 0.5 and 0.5."""
    config = make_run("lvvit_t", *SMALL_VIT, "model.image_size=32", "data.erase_prob=0")
    assert timm.get_pretrained_cfg("test_vit").mean == (0.5, 0.5, 0.5)
    images = next(iter(build_run(config, CPU).train)).images
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.std() > 0.2


@pytest.mark.parametrize(
    ("recipe", "settings", "kind", "has_aux_head"),
    [
        pytest.param("lvvit_t", (), LVViT, True, id="LV-ViT, token labels"),
        pytest.param("relabel", (), LVViT, False, id="LV-ViT, ReLabel"),
        pytest.param("hard_labels", (), LVViT, False, id="LV-ViT, hard labels"),
        pytest.param("lvvit_t", SMALL_VIT, DenseClassifier, True, id="ViT, token labels"),
        pytest.param("resnest50_token_labels", SMALL_CONVS, DenseClassifier, True, id="convolutions, token labels"),
    ],
)
def test_who_gets_a_classifier_of_tokens(
    make_run: MakeRun, recipe: str, settings: tuple[str, ...], kind: type, has_aux_head: bool
) -> None:
    model = build_model(make_run(recipe, *settings), 20)
    assert type(model) is kind
    assert (model.aux_head is not None) == has_aux_head


def test_plain_models_train_on_plain_labels(make_run: MakeRun) -> None:
    model = build_model(make_run("resnest50_hard_labels", *SMALL_CONVS), 20)
    assert type(model) is type(timm.create_model("test_resnet"))


def test_convolutions_of_any_size_need_no_grid(make_run: MakeRun) -> None:
    run = build_run(make_run("resnest50_hard_labels", *SMALL_CONVS, "model.image_size=40"), CPU)
    batch = next(iter(run.train))
    assert batch.images.shape == (4, 3, 40, 40)
    assert batch.is_mixed


@pytest.mark.parametrize("mix", ["random", "blockwise"])
def test_sizes_without_whole_patches_to_mix(make_run: MakeRun, mix: str) -> None:
    config = make_run(
        "resnest50_hard_labels", *SMALL_CONVS, "data.mixup_alpha=0", f"data.mix={mix}", "model.image_size=40"
    )
    with pytest.raises(ValueError, match=f"data.mix={mix} mixes patches of 16 pixels, which images of 40 pixels"):
        build_run(config, CPU)


@pytest.mark.parametrize(
    ("num_tars", "fraction", "used"),
    [(10, 0.5, [0, 2, 4, 6, 8]), (10, 0.1, [0]), (10, 1.0, range(10)), (3, 0.4, [0]), (5, 0.8, [0, 1, 2, 3])],
)
def test_a_part_of_the_tars(tmp_path: Path, num_tars: int, fraction: float, used: Iterable[int]) -> None:
    for number in range(num_tars):
        (tmp_path / f"train-{number:02d}.tar").touch()
    pattern = str(tmp_path / "train-*.tar")
    found = find_shards(images_of(DataConfig((pattern,), fraction=fraction)))
    assert [Path(shard.path).name for shard in found] == [f"train-{number:02d}.tar" for number in used]


def test_less_than_a_tar_and_parts_of_trees(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    with pytest.raises(ValueError, match=r"data.fraction 0.2 of the training images is of 1 tars, less than one"):
        images_of(DataConfig((str(tmp_path / "a.tar"),), fraction=0.2))
    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "tree" / name / "1.png")
    with pytest.raises(ValueError, match="class folders, which would leave classes out"):
        images_of(DataConfig((str(tmp_path / "tree"),), fraction=0.5))


def test_seeds_make_weights(make_run: MakeRun) -> None:
    def weights(*settings: str) -> torch.Tensor:
        model = build_run(make_run("lvvit_t", *settings), CPU).model
        assert isinstance(model, LVViT)
        return model.blocks[0].mlp.fc1.weight

    torch.testing.assert_close(weights(), weights(), rtol=0, atol=0)
    assert not torch.equal(weights(), weights("trainer.seed=1"))


def test_fine_tuning_begins_with_a_checkpoint_of_another_size(make_run: MakeRun, tmp_path: object) -> None:
    small = build_model(make_run("lvvit_t"), 20)
    torch.save({"state_dict": small.state_dict()}, f"{tmp_path}/best.pt")
    large = build_model(make_run("lvvit_t", "model.image_size=96", f"model.init={tmp_path}/best.pt"), 20)
    assert isinstance(large, LVViT)
    assert large.grid == (6, 6)
    torch.testing.assert_close(large.head.weight, small.get_parameter("head.weight"))


@pytest.mark.parametrize(
    ("world_size", "settings", "expected"),
    [(1, (), 1024), (8, (), 128), (4, ("trainer.accumulate=2",), 128), (2, ("data.batch_size=6",), 3)],
)
def test_the_batch_is_shared_out(
    monkeypatch: pytest.MonkeyPatch, world_size: int, settings: tuple[str, ...], expected: int
) -> None:
    monkeypatch.setattr("jobs.build.rank_and_world_size", lambda: (0, world_size))
    config = apply_overrides(get_recipe("lvvit_s")(), settings)
    assert batch_size_per_rank(config) == expected
    assert config.trainer.optimizer.lr(config.data.batch_size) == pytest.approx(1e-3 * config.data.batch_size / 640)


def test_the_loader_of_any_rank(make_run: MakeRun) -> None:
    """Two ranks take the halves of the batches that one takes."""
    config = make_run("hard_labels")
    model, store = build_model(config, 20), open_labels(config)
    alone = train_loader(config, model, store, CPU)
    shared = [train_loader(config, model, store, CPU, rank=rank, world_size=2) for rank in range(2)]
    for whole, *halves in zip(alone, *shared, strict=True):
        assert whole.keys == halves[0].keys + halves[1].keys
        assert len(halves[0]) == len(halves[1]) == 2


def test_batches_that_cannot_be_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.build.rank_and_world_size", lambda: (0, 3))
    with pytest.raises(ValueError, match=r"data.batch_size 1024 cannot be shared out evenly among 3 ranks"):
        batch_size_per_rank(get_recipe("lvvit_s")())
    assert ranks.rank_and_world_size() == (0, 1)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        pytest.param("lvvit_t", ("data.labels=none",), "supervision 'token' needs labels", id="no labels"),
        pytest.param("relabel", ("data.labels=none",), "supervision 'relabel' needs labels", id="no labels, ReLabel"),
        pytest.param("hard_labels", ("data.labels=none",), "need data.num_classes", id="no number of classes"),
        pytest.param("lvvit_t", ("data.labels=/nowhere",), "/nowhere", id="labels that are not there"),
        pytest.param("lvvit_t", ("model.name=lvvit_x",), "timm .* has no model 'lvvit_x'", id="unknown model"),
        pytest.param("lvvit_t", ("model.args.wings=2",), "cannot be built with .*wings", id="unknown argument"),
        pytest.param("lvvit_t", ("model.init=/nowhere.pt",), "there is no such file", id="no checkpoint"),
        pytest.param(
            "resnest50_token_labels", ("model.args={}", "data.mix=mixtoken", "model.name=test_resnet"), None, id="late"
        ),
        pytest.param(
            "hard_labels",
            ("model.name=test_vit", "model.args={}"),
            "mixes tokens with token labels only",
            id="hard ViT",
        ),
        pytest.param("lvvit_t", ("data.num_classes=7",), "labels of 20 classes", id="another number of classes"),
        pytest.param("lvvit_t", ("data.images=/nowhere-{0..3}.tar",), "finds no images", id="no images"),
    ],
)
def test_what_cannot_be_built(make_run: MakeRun, recipe: str, settings: tuple[str, ...], message: str | None) -> None:
    if message is None:
        run = build_run(make_run(recipe, *settings), CPU)
        batch = next(iter(run.train))
        with pytest.raises(ValueError, match="cannot mix tokens"):
            run.model(batch.images, batch.plan)
        return
    with pytest.raises(ValueError, match=message):
        build_run(make_run(recipe, *settings), CPU)
