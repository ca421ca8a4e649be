"""What `tokenlabels show --epoch` draws: the batches of `jobs.train`, number by number."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.build import build_run
from jobs.config import RunConfig
from jobs.overrides import apply_overrides, as_dict
from jobs.recipes import get_recipe
from jobs.train import train
from loaders import TokenLabelBatch
from loaders.replay import partner_of
from tests.jobs.conftest import SETTINGS
from tests.loaders.photos import NUM_CLASSES, Photos, write_photos
from tokenlabels.cli import replay_inputs
from tokenlabels.cli.show_replay import draw_replay
from tokenlabels.trainer.checkpoint import save_checkpoint
from tokenlabels.views import replayed
from tokenlabels.views.replayed import ReplayedSample

CPU = torch.device("cpu")
NAMES = tuple(f"class {id_}" for id_ in range(NUM_CLASSES))
AUGMENTED = ("data.rand_augment=rand-m9-mstd0.5-inc1", "data.erase_prob=0.5")
VIT = ("model.name=test_vit", "model.args={}")

Drawn = list[tuple[ReplayedSample, str, tuple[str, ...]]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """Two tars of 13 and 11 images, 6 batches of 4."""
    return write_photos(tmp_path_factory.mktemp("photos"), (13, 11))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """All that is drawn: sample, title, facts."""
    seen: Drawn = []
    draw = replayed.draw_replayed

    def record(sample: ReplayedSample, names: Any, title: str, facts: tuple[str, ...]) -> Image.Image:
        seen.append((sample, title, facts))
        return draw(sample, names, title, facts)

    monkeypatch.setattr(replayed, "draw_replayed", record)
    return seen


def settings_of(photos: Photos, *more: str) -> list[str]:
    return [*SETTINGS, f"data.index_dir={photos.index_dir}", *AUGMENTED, *more]


def config_of(photos: Photos, recipe: str, *more: str) -> RunConfig:
    data = (f"data.images={','.join(photos.tars)}", f"data.labels={photos.labels}")
    return apply_overrides(get_recipe(recipe)(), [*settings_of(photos, *more), *data])


def draw(photos: Photos, key: str, *, more: tuple[str, ...] = (), **options: Any) -> Image.Image:
    """With the settings of a small run, but for one that is drawn by its folder."""
    options = {"epoch": 2, "names": NAMES, "device": "cpu"} | options
    if options.get("run") is None:
        options["settings"] = settings_of(photos, *more)
    return draw_replay(photos.labels, photos.tars, key, **options)


def batch_of(photos: Photos, recipe: str, key: str, epoch: int, *more: str) -> tuple[TokenLabelBatch, int]:
    """The batch of a training run that has the key, and its row."""
    train = build_run(config_of(photos, recipe, *more), CPU).train
    train.set_epoch(epoch)
    return next((batch, batch.keys.index(key)) for batch in train if key in batch.keys)


def grey_levels(images: torch.Tensor, mean: float | torch.Tensor, std: float | torch.Tensor) -> np.ndarray:
    return (255 * (images * std + mean)).clamp(0, 255).permute(1, 2, 0).numpy()


IMAGENET = (torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None])
HALF = (0.5, 0.5)


@pytest.mark.parametrize(
    ("recipe", "more", "grid", "pixels"),
    [
        pytest.param("lvvit_t", ("data.mix=cutmix",), (2, 2), IMAGENET, id="CutMix"),
        pytest.param("relabel_cutmix", (), None, IMAGENET, id="ReLabel"),
        pytest.param("hard_labels_cutmix", (), None, IMAGENET, id="hard labels, CutMix in turns with MixUp"),
        pytest.param("lvvit_s_no_mix", (), (2, 2), IMAGENET, id="not mixed"),
        pytest.param("deit_s_token_labels", (*VIT, "data.mix=random"), (2, 2), HALF, id="a ViT of timm"),
        pytest.param("deit_s_token_labels", (*VIT, "data.mix=mixup"), (2, 2), HALF, id="MixUp"),
    ],
)
def test_what_is_drawn_is_what_is_trained_on(
    photos: Photos, drawn: Drawn, recipe: str, more: tuple[str, ...], grid: tuple[int, int] | None, pixels: Any
) -> None:
    num_mixed = 0
    for key in (photos.keys[0][3], photos.keys[1][6]):
        draw(photos, key, recipe=recipe, more=more)
        batch, row = batch_of(photos, recipe, key, 2, *more)
        sample, title, facts = drawn[-1]
        assert title == f"{key} in epoch 2"
        given = sample.own if sample.mixed is None else sample.mixed.input
        assert np.abs(given.pixels - grey_levels(batch.images[row], *pixels)).max() <= 0.51
        assert sample.targets is not None
        assert batch.targets is not None
        assert sample.targets.grid == grid
        np.testing.assert_array_equal(sample.targets.probabilities, batch.targets.dense()[row].numpy())
        np.testing.assert_array_equal(sample.targets.valid, batch.targets.valid[row].numpy())
        np.testing.assert_allclose(sample.box, batch.boxes[row].numpy())
        assert sample.own.lines[:2] == (key, f"class {NAMES[photos.classes[key]]}")
        assert ("mirrored" in sample.source.lines[-1]) == bool(batch.flip[row])
        assert f"row {row} (of 4)" in facts[1]
        partner = partner_of(batch.plan, row)
        assert ("this image stays as it is" in facts[0]) == (partner is None and batch.plan is not None)
        if partner is None:
            assert sample.mixed is None
            continue
        num_mixed += 1
        assert sample.mixed is not None
        assert batch.plan is not None
        np.testing.assert_array_equal(sample.mixed.own_share, batch.plan.own[row].numpy())
        assert sample.mixed.partner.lines[0] == batch.keys[partner]
    assert num_mixed >= (recipe != "lvvit_s_no_mix")


def test_mixed_tokens(photos: Photos, drawn: Drawn) -> None:
    """The pixels of the patches that the model mixes; MixUp comes before."""
    key, more = photos.keys[1][2], ("trainer.loss.smoothing=0",)
    draw(photos, key, recipe="lvvit_s_mixtoken_mixup", more=more)
    batch, row = batch_of(photos, "lvvit_s_mixtoken_mixup", key, 2)
    ((sample, _, facts),) = drawn
    assert batch.plan is not None
    assert sample.mixed is not None
    mixed = grey_levels(batch.plan.mix(batch.images)[row], *IMAGENET)
    assert np.abs(sample.mixed.input.pixels - mixed).max() <= 0.51
    assert sample.mixed.input.lines == ("mixed as patch tokens",)
    assert sample.own.lines[2].startswith("mixup: ")
    assert facts[0] == "lvvit_s_mixtoken_mixup: mixed by mixtoken and mixup, seed 0 on cpu"
    assert len(facts) == 2


def test_mixup_alone_where_no_token_is_the_partner_s(photos: Photos, drawn: Drawn) -> None:
    train = build_run(config_of(photos, "lvvit_s_mixtoken_mixup"), CPU).train
    batch, row = next(
        (batch, row) for batch in train for row in range(4) if batch.plan and partner_of(batch.plan, row) is None
    )
    draw(photos, batch.keys[row], recipe="lvvit_s_mixtoken_mixup", epoch=0)
    ((sample, _, facts),) = drawn
    assert sample.mixed is not None
    assert np.abs(sample.mixed.input.pixels - grey_levels(batch.images[row], *IMAGENET)).max() <= 0.51
    assert sample.mixed.own_share.shape == (1, 1)
    assert sample.mixed.partner.lines[0] in batch.keys
    assert sample.mixed.partner.lines[0] in sample.own.lines[2]
    assert "stays as it is" not in facts[0]


def test_models_that_find_the_shares(photos: Photos, drawn: Drawn) -> None:
    """TL-Align: targets are mixed by area, and the picture says that training does not."""
    key = photos.keys[1][2]
    draw(photos, key, recipe="deit_s_tl_align", more=VIT)
    batch, row = batch_of(photos, "deit_s_tl_align", key, 2, *VIT)
    ((sample, _, facts),) = drawn
    assert batch.plan is not None
    assert batch.targets is not None
    assert sample.targets is not None
    by_area = batch.plan.mix_targets(batch.targets).dense()[row].numpy()
    np.testing.assert_array_equal(sample.targets.probabilities, by_area)
    assert "targets are mixed by area here, and by tl_align in training" in facts


def test_seeds_and_epochs(photos: Photos, drawn: Drawn) -> None:
    key = photos.keys[0][3]
    for options in ({}, {}, {"epoch": 1}, {"seed": 1}):
        draw(photos, key, recipe="lvvit_t", **options)
    (first, *_), (again, *_), (earlier, *_), (other, _, facts) = drawn
    assert first.box == again.box
    assert len({first.box, earlier.box, other.box}) == 3
    assert "seed 1" in facts[0]


def save_run(folder: Path, config: RunConfig, world_size: int = 1, **loader: Any) -> Path:
    """What a run leaves that is read here."""
    run = build_run(config, CPU)
    position = run.train.state_dict() | {"batch_size": config.data.batch_size // world_size} | loader
    content = {"progress": {}, "description": as_dict(config), "world_size": world_size, "loader": position}
    save_checkpoint(folder / "last.pt", content | {"state_dict": {"weight": torch.zeros(1)}})
    return folder


def test_a_run_tells_its_settings(photos: Photos, drawn: Drawn, tmp_path: Path) -> None:
    """One that was really trained."""
    config = config_of(photos, "lvvit_t", "trainer.seed=5", "data.mix=cutmix", "trainer.schedule.epochs=2")
    train(config, tmp_path / "run", device="cpu")
    key = photos.keys[0][3]
    draw(photos, key, run=tmp_path / "run", device="auto")
    draw(photos, key, recipe="lvvit_t", seed=5, more=("data.mix=cutmix",))
    (of_run, _, facts), (of_recipe, *_) = drawn
    assert of_run.mixed is not None
    assert of_recipe.mixed is not None
    np.testing.assert_array_equal(of_run.mixed.input.pixels, of_recipe.mixed.input.pixels)
    assert facts[0].startswith(f"{tmp_path / 'run'}: mixed by cutmix, seed 5")
    assert not any(fact.startswith(("with labels", "changed")) for fact in facts)


def test_what_is_not_as_it_was_in_the_run_is_said(photos: Photos, drawn: Drawn, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", config_of(photos, "lvvit_t"), world_size=1)
    others = tmp_path / "others"
    shutil.copytree(photos.labels, others)
    more = ("data.mix=cutmix",)
    draw_replay(others, photos.tars, photos.keys[0][0], epoch=0, names=NAMES, run=run, settings=more, device="cpu")
    ((*_, facts),) = drawn
    assert f"with labels {others}; the run had {photos.labels}" in facts
    assert "changed: data.mix=cutmix" in facts


def test_a_run_tells_its_images_and_ranks(photos: Photos, drawn: Drawn, tmp_path: Path) -> None:
    run = save_run(tmp_path, config_of(photos, "lvvit_t"), world_size=2)
    keys = [key for tar in photos.keys for key in tar]
    for key in keys[:6]:
        draw_replay(photos.labels, (), key, epoch=0, names=NAMES, run=run, seed=3)
    places = [facts[1] for *_, facts in drawn]
    assert {place.partition(",")[0] for place in places} == {"rank 0 (of 2)", "rank 1 (of 2)"}
    assert all("row 0 (of 2)" in place or "row 1 (of 2)" in place for place in places)


class TestDevices:
    """Mixing is drawn by the generator of the device."""

    @pytest.fixture
    def run(self, photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A run on CUDA, where there is none."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        run = save_run(tmp_path, config_of(photos, "lvvit_t"))
        assert replay_inputs.SavedRun.read(run).device == "cpu"
        monkeypatch.setattr(replay_inputs, "_device_of", lambda _: "cuda")
        return run

    def test_a_run_elsewhere_is_refused(self, photos: Photos, run: Path) -> None:
        with pytest.raises(ValueError, match=r"was trained on CUDA, whose generator drew the mixing, .* --device cpu"):
            draw(photos, photos.keys[0][3], run=run, device="auto")

    def test_unless_it_is_wanted(self, photos: Photos, run: Path, drawn: Drawn) -> None:
        draw(photos, photos.keys[0][3], run=run, device="cpu")
        assert "on cpu" in drawn[0][2][0]

    @pytest.mark.gpu
    def test_checkpoints_of_a_gpu(self, tmp_path: Path, cuda: torch.device) -> None:
        content = {"progress": {}, "state_dict": {"weight": torch.zeros(1, device=cuda), "step": torch.zeros(1)}}
        save_checkpoint(tmp_path / "last.pt", content)
        assert replay_inputs._device_of(tmp_path / "last.pt") == "cuda"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"epoch": -1}, "epoch must be an integer of at least 0, got -1", id="epoch"),
        pytest.param({"recipe": "lvvit_x"}, "there is no recipe 'lvvit_x'; the nearest names are lvvit_", id="recipe"),
        pytest.param({"recipe": "lvvit_t", "run": Path("run")}, "give --run or --recipe, not both", id="both"),
        pytest.param({"run": Path("nowhere")}, "nowhere holds no run: it has no last.pt", id="no run"),
        pytest.param({"more": ("data.mixx=cutmix",)}, "there is no field 'data.mixx'; did you mean data.mix", id="set"),
        pytest.param({"world_size": 3}, "data.batch_size 4 cannot be shared out evenly among 3 ranks", id="ranks"),
        pytest.param(
            {"more": ("data.batch_size=64",)},
            r"24 images are fewer than a batch of lvvit_t, which has 64: .*=24$",
            id="batch size",
        ),
        pytest.param({"more": ("data.num_classes=7",)}, "labels of 20 classes", id="classes"),
    ],
)
def test_what_cannot_be_drawn(photos: Photos, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(photos, photos.keys[0][3], **({} if "run" in options else {"recipe": "lvvit_t"}) | options)


def test_a_key_that_is_not_there(photos: Photos) -> None:
    with pytest.raises(ValueError, match="the images have no key 'train-00/img_0033'; near it are train-00/img_003"):
        draw(photos, "train-00/img_0033", recipe="lvvit_t")


def test_a_key_that_the_epoch_leaves_out(photos: Photos) -> None:
    """24 images in batches of 5."""
    more = ("data.batch_size=5",)
    train = build_run(config_of(photos, "lvvit_t", *more), CPU).train
    train.set_epoch(2)
    left_out = {key for tar in photos.keys for key in tar} - {key for batch in train for key in batch.keys}
    assert len(left_out) == 4
    with pytest.raises(ValueError, match=r"epoch 2 leaves '.*' out: its 4 batches of 5 are 20 of 24 samples"):
        draw(photos, left_out.pop(), recipe="lvvit_t", more=more)


def test_no_images_are_named(photos: Photos) -> None:
    with pytest.raises(ValueError, match="name the training images, all of them: --images"):
        draw_replay(photos.labels, (), "a", epoch=0, names=NAMES)


def test_images_of_another_data_set(photos: Photos, tmp_path: Path) -> None:
    others = write_photos(tmp_path, (3, 4, 5), stem="other-{:02d}")
    with pytest.raises(ValueError, match="other-00"):
        draw_replay(photos.labels, others.tars, others.keys[0][0], epoch=0, names=NAMES, settings=settings_of(photos))
    run = save_run(tmp_path / "run", config_of(photos, "lvvit_t"))
    with pytest.raises(ValueError, match="run had other batches: the state is of another data set"):
        draw_replay(photos.labels, photos.tars[:1], photos.keys[0][0], epoch=0, names=NAMES, run=run)


def test_no_checkpoint(photos: Photos, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"last\.pt: damaged, or no checkpoint"):
        draw(photos, photos.keys[0][3], run=tmp_path)


@pytest.mark.parametrize("missing", [{"description": {}}, {"loader": None}])
def test_a_run_of_another_program(photos: Photos, tmp_path: Path, missing: dict[str, Any]) -> None:
    """`Trainer` with batches and settings of somebody's own."""
    config = config_of(photos, "lvvit_t")
    content = {"progress": {}, "description": as_dict(config), "world_size": 1, "loader": {}} | missing
    save_checkpoint(tmp_path / "last.pt", content)
    with pytest.raises(ValueError, match=r"last\.pt does not say what its batches were"):
        draw(photos, photos.keys[0][3], run=tmp_path)


def test_without_a_checkout(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    really_import: Callable[..., Any] = builtins.__import__

    def installed(name: str, *others: Any) -> Any:
        if name.partition(".")[0] == "jobs":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return really_import(name, *others)

    monkeypatch.setattr(builtins, "__import__", installed)
    with pytest.raises(ValueError, match="is in jobs/, which is not installed; run this from a checkout"):
        draw(photos, photos.keys[0][3])
