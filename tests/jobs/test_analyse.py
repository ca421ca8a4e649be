"""python -m jobs.analyse: figures of runs that were trained, and what is refused with exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from jobs import analyse
from jobs.analyse import Images, TrainedTokenizer, app
from jobs.build import build_model
from jobs.config import RunConfig
from jobs.overrides import as_dict
from jobs.train import train
from loaders import EvaluationLoader
from tests.loaders.photos import Photos
from tokenlabels.analysis import reconstruct, token_similarity
from tokenlabels.trainer.checkpoint import BEST_FILE, CONFIG_FILE, save_checkpoint

MakeRun = Callable[..., RunConfig]
VIT = ("model.name=test_vit", "model.args={}")
CPU = torch.device("cpu")


def analyse_tokenizers(*arguments: object) -> Result:
    """The command in this process; an exception that it lets out is raised."""
    runner = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "FORCE_COLOR": None})
    words = ["tokenizer", *map(str, arguments), "--device", "cpu"]
    return runner.invoke(app, words, catch_exceptions=False)


@pytest.fixture
def make_folder(make_run: MakeRun, tmp_path: Path) -> Callable[..., Path]:
    """A function of a recipe's name and settings: the folder of such a run, untrained."""

    def make(recipe: str = "deit_s_token_labels", *settings: str, file: str = BEST_FILE) -> Path:
        config = make_run(recipe, *settings)
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        folder.mkdir()
        (folder / CONFIG_FILE).write_text(json.dumps(as_dict(config)))
        torch.manual_seed(0)
        save_checkpoint(folder / file, {"state_dict": build_model(config, 20).state_dict()})
        return folder

    return make


@pytest.fixture
def images(photos: Photos) -> tuple[str, ...]:
    """Options: where to learn and to measure, shortly."""
    return ("--images", photos.tars[0], "--val", photos.tars[1], "--epochs", "1", "--batch-size", "4")


def test_the_table_of_runs_that_were_trained(make_run: MakeRun, tmp_path: Path, images: tuple[str, ...]) -> None:
    one_epoch = ("trainer.schedule.epochs=1", "trainer.schedule.warmup_epochs=0")
    train(make_run("lvvit_t", *one_epoch), tmp_path / "lvvit", device="cpu")
    aligned = make_run("deit_s_token_labels", *one_epoch, *VIT, "data.mix=mixup", "align.method=tl_align")
    train(aligned, tmp_path / "vit", device="cpu")
    result = analyse_tokenizers(tmp_path / "lvvit", tmp_path / "vit", *images)
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stdout.split())
    for text in ("ConvPatchEmbed", "PatchEmbed", "2 x 2 x 24", "2 x 2 x 64", "8 images; one colour for all pixels has"):
        assert text in shown
    assert result.stderr == "", "no bar where there is no terminal"


def test_figures_equal_those_by_hand(
    make_folder: Callable[..., Path], photos: Photos, images: tuple[str, ...], tmp_path: Path
) -> None:
    run = make_folder("deit_s_token_labels", *VIT)
    out = tmp_path / "new" / "figures.json"
    result = analyse_tokenizers(run, *images, "--seed", "3", "--json", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"figures: {out}\n"
    content = json.loads(out.read_text())
    assert (content["images"], content["val"], content["epochs"]) == ([photos.tars[0]], [photos.tars[1]], 1)
    (found,) = content["runs"]
    tokenizer = TrainedTokenizer.load(run, CPU).tokenizer
    loader = EvaluationLoader(photos.tars[1], image_size=32, batch_size=3, mean=(0, 0, 0), std=(1, 1, 1))
    similarity = torch.cat([token_similarity(tokenizer(batch.images)) for batch in loader])
    assert found["similarity"] == pytest.approx(float(similarity.mean()), abs=1e-6)
    data = Images([photos.tars[0]], [photos.tars[1]], 32, 4, None, 3, CPU)
    made = reconstruct(tokenizer, (2, 2), 64, data.train, data.val, epochs=1, seed=3)
    assert (found["error"], found["before"], found["variance"]) == (made.error, made.before, made.variance)
    assert (found["model"], found["tokenizer"], found["grid"]) == ("test_vit", "PatchEmbed", [2, 2])
    assert (found["channels"], found["num_images"]) == (64, 8)


class TestTrainedTokenizers:
    @pytest.mark.parametrize(
        ("recipe", "settings", "name"),
        [
            pytest.param("lvvit_t", (), "ConvPatchEmbed", id="LV-ViT"),
            pytest.param("deit_s_token_labels", VIT, "PatchEmbed", id="token classifier"),
            pytest.param("hard_labels_cutmix", VIT, "PatchEmbed", id="plain"),
            pytest.param("deit_s_tl_align", VIT, "PatchEmbed", id="TL-Align"),
            pytest.param("deit_s_token_labels", (*VIT, "tokenizer.norm=moto", "tokenizer.num_entities=4"),
                         "PatchEmbed + MoTo", id="MoTo"),
            pytest.param("deit_s_token_labels", (*VIT, "token_prop.weight=0.001"), "PatchEmbed", id="TokenProp"),
        ],
    )  # fmt: skip
    def test_hold_the_weights_of_the_run(
        self, make_folder: Callable[..., Path], recipe: str, settings: tuple[str, ...], name: str
    ) -> None:
        folder = make_folder(recipe, *settings)
        state = torch.load(folder / BEST_FILE, weights_only=True)["state_dict"]
        before = torch.get_rng_state()
        found = TrainedTokenizer.load(folder, CPU)
        assert torch.equal(torch.get_rng_state(), before)
        assert found.tokenizer.name == name
        own = found.tokenizer.embedding.state_dict()
        assert own
        for key, tensor in own.items():
            (saved,) = (value for other, value in state.items() if other.endswith(f"patch_embed.{key}"))
            assert torch.equal(tensor, saved)

    def test_need_neither_labels_nor_what_the_run_began_with(self, make_folder: Callable[..., Path]) -> None:
        folder = make_folder("deit_s_token_labels", *VIT)
        config = json.loads((folder / CONFIG_FILE).read_text())
        config["data"]["labels"], config["model"]["init"] = "/gone", "/gone.pt"
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        assert TrainedTokenizer.load(folder, CPU).image_size == 32

    def test_last_weights_of_a_run_without_evaluation(self, make_folder: Callable[..., Path]) -> None:
        assert TrainedTokenizer.load(make_folder("lvvit_t", file="last.pt"), CPU).image_size == 32


class TestImages:
    @pytest.mark.parametrize(
        ("num_images", "sizes", "val_sizes"),
        [
            pytest.param(None, [4, 4, 4, 1], [4, 4], id="all"),
            pytest.param(6, [4, 2], [4, 2], id="some"),
            pytest.param(3, [3], [3], id="less than a batch"),
            pytest.param(99, [4, 4, 4, 1], [4, 4], id="more than there are"),
        ],
    )
    def test_each_comes_once(
        self, photos: Photos, num_images: int | None, sizes: list[int], val_sizes: list[int]
    ) -> None:
        images = Images([photos.tars[0]], [photos.tars[1]], 16, 4, num_images, 0, CPU)
        for epoch in (0, 1):
            assert [len(batch) for batch in images.train(epoch)] == sizes
            assert [len(batch) for batch in images.val()] == val_sizes
        assert (images.num_train, images.num_val) == (sum(sizes), sum(val_sizes))

    def test_pixels_are_plain_and_epochs_differ(self, photos: Photos) -> None:
        images = Images([photos.tars[0]], [photos.tars[1]], 16, 4, None, 0, CPU)
        first, other, again = (torch.cat(list(images.train(epoch))) for epoch in (0, 1, 0))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert 0 <= first.min() < 0.2
        assert 0.8 < first.max() <= 1


def test_a_bar_in_a_terminal_once_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    clock = iter([0.0, 0.5, 1.5])
    monkeypatch.setattr(analyse.time, "monotonic", lambda: next(clock))
    progress = analyse._Progress()
    monkeypatch.setattr(progress._bar, "refresh", lambda: None)
    (task,) = progress._bar.tasks
    progress.begin("a run", 30)
    for is_visible, completed in ((False, 10), (True, 20)):
        progress.advance(10)
        assert (task.visible, task.completed, task.total) == (is_visible, completed, 30)


class TestRefused:
    @pytest.mark.parametrize(
        ("break_it", "message"),
        [
            pytest.param(lambda run: (run / CONFIG_FILE).unlink(), "holds no run: there is no", id="no config"),
            pytest.param(lambda run: (run / BEST_FILE).unlink(), "has neither best.pt nor last.pt", id="no weights"),
            pytest.param(lambda run: (run / CONFIG_FILE).write_text("{"), "is no configuration of", id="no JSON"),
            pytest.param(
                lambda run: (run / CONFIG_FILE).write_text('{"epochs": 3}'), "there is no field 'epochs'", id="others"
            ),
            pytest.param(
                lambda run: (run / BEST_FILE).write_bytes(b"x"), "is no plain state dict", id="damaged weights"
            ),
        ],
    )
    def test_folders(
        self, make_folder: Callable[..., Path], images: tuple[str, ...], break_it: Callable[[Path], Any], message: str
    ) -> None:
        run = make_folder("lvvit_t")
        break_it(run)
        self.exits_with_2(message, run, *images)

    def test_a_folder_that_is_not_there(self, images: tuple[str, ...], tmp_path: Path) -> None:
        self.exits_with_2(f"{tmp_path / 'none'} holds no run", tmp_path / "none", *images)

    def test_images_that_are_missing(self, make_folder: Callable[..., Path], images: tuple[str, ...]) -> None:
        self.exits_with_2("'none-*.tar' finds no images", make_folder("lvvit_t"), *images, "--images", "none-*.tar")

    def test_models_without_patch_embedding(self, make_folder: Callable[..., Path], images: tuple[str, ...]) -> None:
        run = make_folder("hard_labels_cutmix", "model.name=test_resnet", "model.args={}")
        self.exits_with_2("ResNet: it has no patch embedding", run, *images)

    def test_weights_of_another_model(self, make_folder: Callable[..., Path], images: tuple[str, ...]) -> None:
        run, other = make_folder("deit_s_token_labels", *VIT), make_folder("lvvit_t")
        (other / BEST_FILE).replace(run / BEST_FILE)
        self.exits_with_2("does not fit VisionTransformer", run, *images)

    def test_nothing_is_trained_before_all_runs_are_found(
        self, make_folder: Callable[..., Path], images: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(analyse, "reconstruct", lambda *_, **__: pytest.fail("trained already"))
        self.exits_with_2("none holds no run", make_folder("lvvit_t"), tmp_path / "none", *images)

    @staticmethod
    def exits_with_2(message: str, *arguments: object) -> None:
        result = analyse_tokenizers(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_models_of_other_settings_have_other_figures(
    make_folder: Callable[..., Path], images: tuple[str, ...], tmp_path: Path
) -> None:
    """What normalises tokens is part of the tokenizer."""
    runs = [
        make_folder("hard_labels_cutmix", *VIT),
        make_folder("hard_labels_cutmix", *VIT, "tokenizer.norm=layer_norm"),
    ]
    assert analyse_tokenizers(*runs, *images, "--num-images", "4", "--json", tmp_path / "a.json").exit_code == 0
    plain, normalised = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert normalised["tokenizer"] == "PatchEmbed + LayerNorm2d"
    assert plain["similarity"] != normalised["similarity"]
    assert plain["variance"] == normalised["variance"]
    assert plain["num_images"] == 4
