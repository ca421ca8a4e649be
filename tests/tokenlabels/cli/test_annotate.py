"""tokenlabels annotate: what it says, what it refuses, and how it exits."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import timm
import torch
from typer.testing import Result

from annotate import schedule
from tokenlabels import files
from tokenlabels.store import open_store, verify_store, writer

Run = Callable[..., Result]

TEACHER = ("--teacher", "test_efficientnet_gn", "--random-weights", "0", "--image-size", "64", "--torch-threads", "1")
NAME = TEACHER[1]
STEMS = ("scenes-0000", "scenes-0001", "scenes-0002")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_run_and_its_rerun(run: Run, pattern: str, out: Path) -> None:
    first = run("annotate", pattern, "--out", out, *TEACHER)
    assert first.exit_code == 0
    assert first.stdout == (f"{out}: 10 images in 3 shards labelled, 0 shards were finished before, 0 images skipped\n")
    assert list(verify_store(out)) == []
    again = run("annotate", pattern, "--out", out, *TEACHER)
    assert again.exit_code == 0
    assert again.stdout == f"{out}: 0 images in 0 shards labelled, 3 shards were finished before, 0 images skipped\n"


def test_the_settings_reach_the_labels(run: Run, pattern: str, out: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"sort {number}\n" for number in range(1000)))
    settings = ("--topk", 3, "--flip", "--resize", "letterbox", "--class-names", names, "--batch-size", 3)
    second = ("--teacher", "test_resnet")
    result = run("annotate", pattern, "--out", out, *TEACHER, *second, *settings, "--decode-threads", 1)
    assert result.exit_code == 0, result.stderr
    info = open_store(out).info
    assert (info.k, info.resize, info.grid, info.teacher.flip) == (3, "letterbox", (2, 2), True)
    assert info.class_names is not None
    assert info.class_names[999] == "sort 999"
    assert [(model.name, model.weights) for model in info.teacher.models] == [
        (NAME, "random, seed 0"),
        ("test_resnet", "random, seed 0"),
    ]


def test_weights_from_a_file(run: Run, pattern: str, out: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model(NAME, num_classes=7).state_dict(), tmp_path / "mine.pth")
    result = run(
        "annotate", pattern, "--out", out, "--teacher", NAME, "--image-size", 64, "--checkpoint", tmp_path / "mine.pth"
    )
    assert result.exit_code == 0, result.stderr
    info = open_store(out).info
    assert (info.num_classes, info.teacher.models[0].weights) == (7, "checkpoint mine.pth")


def test_the_jobs_of_an_array_make_one_label_set(run: Run, pattern: str, out: Path) -> None:
    for index in range(2):
        result = run("annotate", pattern, "--out", out, *TEACHER, "--shard-index", index, "--num-shards", 2)
        assert result.exit_code == 0, result.stderr
    assert len(open_store(out)) == 10
    assert list(verify_store(out)) == []


def test_json_lines(run: Run, pattern: str, out: Path) -> None:
    result = run("annotate", pattern, "--out", out, *TEACHER, "--log-json")
    assert result.exit_code == 0
    assert result.stderr == ""
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event.pop("event") for event in events] == ["start", "written", "written", "written"]
    digest = open_store(out).info.teacher.digest
    assert events[0] == {"num_shards": 3, "grid": [2, 2], "k": 5, "teacher_digest": digest}
    assert [(event["stem"], event["rows"], event["skipped"]) for event in events[1:]] == [
        (stem, rows, []) for stem, rows in zip(STEMS, (5, 3, 2), strict=True)
    ]


@pytest.mark.parametrize("log_json", [False, True], ids=["for people", "for machines"])
def test_a_damaged_tar_exits_with_1_and_the_others_are_done(
    log_json: bool, run: Run, tars: Path, out: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(tars, tmp_path / "images"))
    damaged = images / f"{STEMS[1]}.tar"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    result = run("annotate", f"{images}/*.tar", "--out", out, *TEACHER, *(["--log-json"] if log_json else []))
    assert result.exit_code == 1
    assert "error: 1 shards failed; see to their causes and run the same command again:" in result.stderr
    assert f"\n  {STEMS[1]}: {damaged}" in result.stderr
    assert [shard.stem for shard in open_store(out).shards] == [STEMS[0], STEMS[2]]
    if log_json:
        events = [json.loads(line) for line in result.stdout.splitlines()]
        assert [event["event"] for event in events] == ["start", "written", "failed", "written"]
        assert (events[2]["stem"], events[2]["kind"]) == (STEMS[1], "final")
    else:
        assert "7 images in 2 shards labelled" in result.stdout


def test_max_skip(run: Run, tars: Path, out: Path, tmp_path: Path) -> None:
    tar = Path(shutil.copy(tars / f"{STEMS[2]}.tar", tmp_path))
    content = bytearray(tar.read_bytes())
    content[512:530] = bytes(18)  # the start of the first JPEG, which the tar's checksums do not cover
    tar.write_bytes(content)
    strict = run("annotate", tar, "--out", out, *TEACHER)
    assert strict.exit_code == 1
    assert "1 of 2 images cannot be labelled, 0.10% are allowed (--max-skip):\n  scene_000008: " in strict.stderr
    lenient = run("annotate", tar, "--out", out, *TEACHER, "--max-skip", 0.5)
    assert lenient.exit_code == 0
    assert "1 images in 1 shards labelled, 0 shards were finished before, 1 images skipped" in lenient.stdout


USE = {
    "no teacher": ([], "name a teacher: --teacher NAME"),
    "teacher without weights": (["--teacher", NAME], "nothing says where the weights come from"),
    "two sorts of weights": ([*TEACHER, "--pretrained"], "does not go with a seed"),
    "unknown teacher": (
        ["--teacher", "efficientnet_bo", "--random-weights", 0],
        "has no model 'efficientnet_bo'; near it are ",
    ),
    "unknown preset": (["--preset", "dm_nfnet_f7"], "no preset 'dm_nfnet_f7'; there are dm_nfnet_f6"),
    "missing checkpoint": (
        ["--teacher", NAME, "--checkpoint", "no.pth"],
        "no.pth: there is no such file",
    ),
    "checkpoints without teachers": (
        ["--teacher", NAME, "--checkpoint", "a.pth", "--checkpoint", "b.pth"],
        "2 --checkpoint for 1 teachers",
    ),
    "more classes than there are": ([*TEACHER, "--topk", 2000], "topk must be 1 to 1000; got 2000"),
    "no class": ([*TEACHER, "--topk", 0], "--topk"),
    "unknown resize": ([*TEACHER, "--resize", "stretch"], "--resize"),
    "half precision on a cpu": ([*TEACHER, "--device", "cpu", "--amp", "bf16"], "amp='bf16' needs a CUDA device"),
    "share above 1": ([*TEACHER, "--max-skip", 1.5], "--max-skip"),
    "missing names": ([*TEACHER, "--class-names", "no.txt"], "no.txt"),
    "a folder of names": ([*TEACHER, "--class-names", "/"], "class names /: Is a directory"),
    "no file of names": ([*TEACHER, "--class-names", __file__], "has no name; there is"),
    "workers without ray": ([*TEACHER, "--workers", 2], "--workers and --ray-address need --backend ray"),
    "address without ray": ([*TEACHER, "--ray-address", "auto"], "--workers and --ray-address need --backend ray"),
    "index without number": ([*TEACHER, "--shard-index", 0], "--shard-index and --num-shards go together"),
    "number without index": ([*TEACHER, "--num-shards", 2], "--shard-index and --num-shards go together"),
    "index outside": ([*TEACHER, "--shard-index", 2, "--num-shards", 2], "--shard-index must be in 0..1"),
}


@pytest.mark.parametrize(("options", "message"), USE.values(), ids=USE)
def test_wrong_use_exits_with_2(options: Sequence[object], message: str, run: Run, pattern: str, out: Path) -> None:
    result = run("annotate", pattern, "--out", out, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("nothing/*.tar", "'nothing/*.tar' finds no images: nothing there"),
        ("{0..3}.tar", "4 of its 4 names are not there (the first is '0.tar')"),
        ("{0..3.tar", "unbalanced braces"),
        (__file__, "neither a .tar nor a directory"),
    ],
    ids=["glob", "braces", "unbalanced", "no tar"],
)
def test_images_that_are_not_there_exit_with_2(images: str, message: str, run: Run, out: Path) -> None:
    result = run("annotate", images, "--out", out, *TEACHER)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not out.exists()


def test_other_settings_exit_with_2(run: Run, pattern: str, labels: Path) -> None:
    result = run("annotate", pattern, "--out", labels, *TEACHER, "--flip")
    assert result.exit_code == 2
    assert "made in another way" in result.stderr
    assert "teacher.flip: False != True" in result.stderr


def test_labels_cannot_go_into_a_file(run: Run, pattern: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("annotate", pattern, "--out", tmp_path / "file", *TEACHER)
    assert result.exit_code == 2
    assert str(tmp_path / "file") in result.stderr


def full(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "step"), [(files, "staged_file"), (writer, "fsync_tree")], ids=["at the start", "in a shard"]
)
def test_a_full_disk_exits_with_1(
    module: Any, step: str, run: Run, pattern: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, step, full)
    result = run("annotate", pattern, "--out", out, *TEACHER)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert "Free some space and run the same command again." in result.stderr


def test_a_folder_that_is_closed_to_us_exits_with_1(
    run: Run, pattern: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out))

    monkeypatch.setattr(schedule, "create_label_set", closed)
    result = run("annotate", pattern, "--out", out, *TEACHER)
    assert result.exit_code == 1
    assert f"error: [Errno 13] Permission denied: '{out}'" in result.stderr


def test_control_c_exits_with_130(run: Run, pattern: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(schedule, "annotate_shard", press)
    result = run("annotate", pattern, "--out", out, *TEACHER)
    assert result.exit_code == 130
    assert f"Finished shards in {out} are whole; the same command goes on from there." in result.stderr


def test_a_bug_keeps_its_traceback(run: Run, pattern: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "annotate_shard", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("annotate", pattern, "--out", out, *TEACHER)
