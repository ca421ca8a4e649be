"""Whole runs of `jobs.train`: what they leave, other settings refused, and going on after kill -9 in a real process."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jobs.config import RunConfig
from jobs.overrides import as_dict, from_dict
from jobs.train import train
from tests.jobs.conftest import SETTINGS
from tests.loaders.photos import Photos
from tokenlabels.trainer.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[2]
MakeRun = Callable[..., RunConfig]


def test_what_a_run_leaves(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run()
    accuracy = train(config, tmp_path / "run", device="cpu")
    assert accuracy is not None
    assert accuracy.num_images == 8
    assert from_dict(json.loads((tmp_path / "run/config.json").read_text())) == config
    content = read_checkpoint(tmp_path / "run/last.pt")
    assert from_dict(content["description"]) == config
    assert content["loader"]["epoch"] == content["progress"]["epoch"] == 3
    with (tmp_path / "run/epochs.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]


MOTO_SWIN = (
    "model.image_size=64",
    "model.args={'embed_dim': 12, 'depths': (1, 1), 'num_heads': (1, 2), 'window_size': 4}",
    "tokenizer.num_entities=4",
)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        pytest.param("relabel", (), id="ReLabel"),
        pytest.param("hard_labels", ("data.labels=none", "data.num_classes=20"), id="hard labels alone"),
        pytest.param("hard_labels_cutmix", (), id="CutMix in turns with MixUp"),
        pytest.param("lvvit_s_mixtoken_mixup", (), id="MixToken and MixUp"),
        pytest.param("lvvit_s_tokens_20", ("data.rand_augment=rand-m9-mstd0.5-inc1",), id="a fifth of the tokens"),
        pytest.param("deit_s_token_labels", ("model.name=test_vit", "model.args={}"), id="a ViT of timm"),
        pytest.param("resnest50_token_labels", ("model.name=test_resnet", "model.args={}"), id="convolutions"),
        pytest.param("lvvit_t", ("trainer.ema_decay=none", "trainer.optimizer.name=sgd"), id="SGD without average"),
        pytest.param("deit_s_tl_align", ("model.name=test_vit", "model.args={}"), id="TL-Align"),
        pytest.param("deit_s_random_tl_align", ("model.name=test_vit", "model.args={}"), id="TL-Align, random patches"),
        pytest.param("swin_t_moto_token_prop", MOTO_SWIN, id="MoTo and TokenProp, Swin"),
        pytest.param(
            "lvvit_t", ("tokenizer.norm=moto", "tokenizer.num_entities=2", "token_prop.weight=0.001"), id="MoTo, LV-ViT"
        ),
        pytest.param("deit_s_transmix", ("model.name=test_vit", "model.args={}"), id="TransMix"),
        pytest.param("lvvit_t", ("data.mix=cutmix", "align.method=tl_align"), id="TL-Align of every token, LV-ViT"),
        pytest.param(
            "deit_s_token_labels",
            ("model.name=test_vit", "model.args={}", "data.mix=mixup", "align.method=tl_align"),
            id="TL-Align of every token, ViT",
        ),
    ],
)
def test_every_kind_of_run(make_run: MakeRun, tmp_path: Path, recipe: str, settings: tuple[str, ...]) -> None:
    one_epoch = ("trainer.schedule.epochs=1", "trainer.schedule.warmup_epochs=0")
    assert train(make_run(recipe, *one_epoch, *settings), tmp_path / "run", device="cpu") is not None


def test_a_run_goes_on_with_its_own_settings(make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(make_run(), out, device="cpu")
    with pytest.raises(ValueError, match="holds a run already"):
        train(make_run(), out, device="cpu")
    with pytest.raises(ValueError, match=r"data.erase_prob: 0.25 != 0.5; data.mix: mixtoken != None"):
        train(make_run("lvvit_t", "data.erase_prob=0.5", "data.mix=none"), out, resume="auto", device="cpu")
    with pytest.raises(ValueError, match=r"seed: 0 != 3"):
        train(make_run("lvvit_t", "trainer.seed=3"), out, resume="auto", device="cpu")
    before = (out / "config.json").read_bytes()
    assert train(make_run("lvvit_t", "data.threads=1"), out, resume="auto", device="cpu") is None
    assert from_dict(json.loads(before)) == make_run()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loader_s_place_at_the_end_of_an_epoch(
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accumulate: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Five batches per epoch, interrupted in the first evaluation: the epoch is not trained again."""
    settings = (f"trainer.accumulate={accumulate}", f"data.batch_size={4 * accumulate}", "trainer.save_every=1")
    config = make_run("lvvit_t", *settings)
    train(config, tmp_path / "whole", device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr("tokenlabels.trainer.trainer.evaluate", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            train(config, tmp_path / "cut", device="cpu")
    train(config, tmp_path / "cut", resume="auto", device="cpu")
    assert "given up" not in caplog.text
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_fewer_ranks_evaluate_what_more_had_trained(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks stop in the evaluation; one goes on, for which nothing is left of the epoch."""
    config = make_run("lvvit_t", "data.batch_size=2", "trainer.schedule.epochs=2")
    with monkeypatch.context() as patch:
        patch.setattr("tokenlabels.trainer.trainer.evaluate", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            train(config, tmp_path / "run", device="cpu")
    content = torch.load(tmp_path / "run/last.pt", weights_only=True)
    content["world_size"] = content["loader"]["world_size"] = 2
    content["loader"]["batch"] = content["progress"]["batch"] = content["progress"]["num_batches"] = 5  # of 4 samples
    torch.save(content, tmp_path / "run/last.pt")
    assert train(config, tmp_path / "run", resume="auto", device="cpu") is not None
    with (tmp_path / "run/epochs.csv").open(newline="") as file:
        assert [(row["epoch"], row["step"]) for row in csv.DictReader(file)] == [("1", "10"), ("2", "20")]


def test_data_that_do_not_fit_leave_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name their own class"):
        train(make_run("lvvit_t", "data.min_agreement=none"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def start(photos: Photos, out: Path, *more: str) -> subprocess.Popen[str]:
    """python -m jobs.train, as a user starts it."""
    settings = [*SETTINGS, "trainer.save_every=1", "trainer.schedule.epochs=4", "data.shuffle_shards=1"]
    command = [sys.executable, "-m", "jobs.train", "lvvit_t", "--images", *photos.tars[:1], "--images", photos.tars[1]]
    command += ["--labels", str(photos.labels), "--val", photos.tars[1], "--out", str(out), "--device", "cpu"]
    for setting in (*settings, f"data.index_dir={photos.index_dir}"):
        command += ["--set", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *more], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    steps = out / "steps.jsonl"
    while not steps.exists() or len(steps.read_text().splitlines()) < step:
        assert process.poll() is None, finish(process)
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(photos: Photos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, printed, err = finish(start(photos, out))
    assert code == 0, err
    assert f"{out}: done, top-1 " in printed
    return out


def assert_same_run(mine: Path, theirs: Path) -> None:
    """Weights, averages, optimizer and logs, bit for bit."""
    one, two = (read_checkpoint(folder / "last.pt") for folder in (mine, theirs))
    for kind in ("state_dict", "state_dict_ema"):
        assert one[kind].keys() == two[kind].keys()
        assert all(torch.equal(tensor, two[kind][name]) for name, tensor in one[kind].items())
    for index, state in one["optimizer"]["state"].items():
        assert all(torch.equal(value, two["optimizer"]["state"][index][name]) for name, value in state.items())
    assert (one["progress"], one["loader"]) == (two["progress"], two["loader"])
    assert (mine / "epochs.csv").read_text() == (theirs / "epochs.csv").read_text()
    logs = [
        [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]
        for folder in (mine, theirs)
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_kill_9_in_the_middle_of_epochs_loses_nothing(photos: Photos, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for step in (3, 8, 14):  # epochs have 5 steps
        process = start(photos, out, "--resume", "auto")
        wait_for_step(process, out, step)
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
    code, _, err = finish(start(photos, out, "--resume", "auto"))
    assert code == 0, err
    assert_same_run(out, whole)


@pytest.mark.slow
def test_sigterm_saves_and_says_so(photos: Photos, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(photos, out, "--set", "trainer.save_every=1000")
    wait_for_step(process, out, 7)
    process.terminate()
    code, _, err = finish(process)
    assert code == 143
    assert "stopped by SIGTERM after step" in err
    assert "--resume auto goes on from there" in err
    code, _, err = finish(start(photos, out, "--resume", "auto"))
    assert code == 0, err
    assert_same_run(out, whole)


@pytest.mark.slow
def test_torchrun_starts_the_same_file(photos: Photos, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    script = ["--rdzv-endpoint", "localhost:0", "-m", "jobs.train", "lvvit_t", "--labels", str(photos.labels)]
    for tar in photos.tars:
        script += ["--images", tar]
    for setting in (*SETTINGS, f"data.index_dir={photos.index_dir}"):
        script += ["--set", setting]
    command = [sys.executable, *launcher, *script, "--val", photos.tars[1], "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stderr
    content = read_checkpoint(out / "last.pt")
    assert content["world_size"] == 2
    assert content["loader"]["batch_size"] == 2
    assert content["progress"]["step"] == 15
    assert "top-1" in (out / "epochs.csv").read_text().replace("top1", "top-1")


def test_the_configuration_of_a_run_survives_json(make_run: MakeRun) -> None:
    config = make_run("lvvit_t", "model.args.stem_kernels=(7,3)", "data.val=()")
    assert from_dict(json.loads(json.dumps(as_dict(config)))) == config
