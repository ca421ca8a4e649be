"""tokenlabels doctor, bench and demo: what the commands print and how they exit."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import Result

from annotate import demo
from annotate.demo import DemoMaterial
from annotate.scenes import write_scenes
from annotate.schedule import Job
from annotate.specs import TeacherSpec
from tokenlabels import doctor
from tokenlabels.doctor import Check
from tokenlabels.images import find_shards
from tokenlabels.store import open_store, shard_path

Run = Callable[..., Result]


def test_doctor_shows_what_it_found(run: Run, tmp_path: Path) -> None:
    result = run("doctor", tmp_path)
    checks = doctor.examine(tmp_path)
    assert result.exit_code == int(any(check.status == "bad" for check in checks))
    for name in ("python", "torch", "timm", "zarr", "ray", "disk for labels"):
        assert name in result.stdout


@pytest.mark.parametrize(("status", "exit_code"), [("ok", 0), ("warn", 0), ("bad", 1)], ids=["ok", "warn", "bad"])
def test_doctor_exits_with_1_if_the_main_job_will_fail(
    status: doctor.Status, exit_code: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check("disk for labels", "1 [GB]", status, "" if status == "ok" else "free [some] space")
    monkeypatch.setattr(doctor, "examine", lambda _: (check,))
    result = run("doctor")
    assert result.exit_code == exit_code
    for text in (check.name, check.value, check.advice):
        assert text in result.stdout


@pytest.fixture
def material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoMaterial:
    """The demo's own, but small and with a teacher that has learnt nothing."""
    scenes = write_scenes(tmp_path / "images", shard_sizes=(3, 2), seed=0)
    job = Job(tmp_path / "labels", (TeacherSpec("test_efficientnet_gn", seed=0, image_size=64),))
    made = DemoMaterial(scenes, find_shards([str(tar) for tar in scenes.tars]), job, teacher_accuracy=0.125)
    monkeypatch.setattr(demo, "make_material", lambda *_: made)
    return made


def test_demo_shows_every_step(material: DemoMaterial, run: Run, tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    for line in ("teacher: 12.5% of the cells", "verify: 5 maps, no findings", "labels against the truth: "):
        assert line in result.stdout
    with Image.open(tmp_path / "overlay.png") as picture:
        assert min(picture.size) > 100
    labels = material.job.labels
    (inspect,) = (line.split() for line in result.stdout.splitlines() if "tokenlabels inspect" in line)
    assert inspect[1:4] == ["inspect", str(labels), "--key"]
    assert inspect[4] in open_store(labels)
    assert f"tokenlabels verify {labels} --images '{tmp_path}/images/*.tar'" in result.stdout


def test_demo_exits_with_1_on_findings(material: DemoMaterial, run: Run, tmp_path: Path) -> None:
    assert run("demo", "--out", tmp_path).exit_code == 0
    scores = shard_path(material.job.labels, "scenes-0001") / "scores/c/0/0/0/0"
    content = bytearray(scores.read_bytes())
    content[len(content) // 2] ^= 1
    scores.write_bytes(content)
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert f"error: {scores}: its checksum is not that of the manifest" in result.stderr


@pytest.mark.slow
def test_bench_store_prints_its_figures(run: Run) -> None:
    result = run("bench", "store", "--num-images", 8, "--rounds", 1)
    assert result.exit_code == 0
    for line in ("8 simulated maps", "bytes per image: ", "bulk read / torch.load of each file: ", "peak memory of a"):
        assert line in result.stdout


def test_bench_annotate_prints_its_figures(run: Run, pattern: str) -> None:
    small = ("--teacher", "test_efficientnet_gn", "--image-size", 64, "--batch-size", 2, "--device", "cpu")
    result = run("bench", "annotate", pattern, *small, "--rounds", 1, "--no-ray")
    assert result.exit_code == 0
    assert result.stdout.startswith("inline backend / bare teacher: ")
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.slow
def test_bench_targets_prints_its_figures(run: Run, labels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.bench.targets.NUM_DISTINCT", (255,))
    result = run("bench", "targets", labels, "--num-images", 2, "--rounds", 1)
    assert result.exit_code == 0
    for line in (
        "2 maps of 255 distinct classes",
        "maps to targets, sparse / dense: ",
        "peak memory, sparse / dense: ",
    ):
        assert line in result.stdout
    assert f"{labels}: " in result.stdout


def test_bench_targets_asks_for_a_checkout(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jobs.bench.targets", None)
    monkeypatch.setattr(sys, "path", [])
    result = run("bench", "targets")
    assert result.exit_code == 2
    assert "run this from a checkout" in result.stderr
