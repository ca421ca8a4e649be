"""tokenlabels train: recipes, what is refused with exit code 2, and the demo with its golden losses."""

import json
from pathlib import Path

import pytest

from jobs.recipes import RECIPES
from tests.tokenlabels.cli.conftest import Run

# Of `tokenlabels train lvvit_t --demo` with the settings below. They change with the scenes, the teacher's training,
# the loader's order and random numbers, the model's initial weights, the loss and the optimizer; a change of anything
# else is a mistake.
GOLDEN_LOSSES = [3.5268, 3.5508, 3.6635, 3.5374, 3.4733, 3.4878, 3.4629, 3.4215, 3.4361, 3.3819]
GOLDEN_LOSSES += [3.3714, 3.3632, 3.3347, 3.3438, 3.3260, 3.3251, 3.3176, 3.3535, 3.3011, 3.2942]
TOLERANCE = 5e-3
"""Three times the largest difference between SSE4.1, AVX2 and AVX-512 and between one thread and two."""


def test_list_has_a_line_for_every_recipe(run: Run) -> None:
    result = run("train", "--list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert "83.3 (Tables 1 to 4)" in result.stdout


WRONG = {
    "no recipe": ([], "name a recipe; --list shows them"),
    "unknown recipe": (["lvvit_x"], "there is no recipe 'lvvit_x'; the nearest names are lvvit_"),
    "no images": (["lvvit_s", "--labels", "x"], "name the training images"),
    "no labels": (["lvvit_s", "--images", "x.tar"], "supervision 'token' needs labels"),
    "labels that are not there": (["lvvit_s", "--images", "x.tar", "--labels", "nowhere"], "nowhere/labels.json"),
    "unknown setting": (["lvvit_s", "--set", "data.batchsize=3"], "did you mean data.batch_size?"),
    "bad value": (["lvvit_s", "--set", "data.batch_size=many"], "data.batch_size must be an integer, got 'many'"),
    "no checkpoint": (["lvvit_s_384", "--images", "x.tar"], "give the checkpoint to begin with (--init)"),
    "demo with images": (["lvvit_t", "--demo", "--images", "x.tar"], "--demo brings its own images"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_use_exits_with_2(
    run: Run, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_has_golden_losses(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["trainer.schedule.epochs=1", "trainer.schedule.warmup_epochs=0.5", "trainer.log_every=1"]
    arguments = ["train", "lvvit_t", "--demo", "--device", "cpu"]
    for setting in settings:
        arguments += ["--set", setting]
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "runs/lvvit_t_demo: done, top-1 " in result.stdout
    steps = [json.loads(line) for line in Path("runs/lvvit_t_demo/steps.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in steps] == pytest.approx(GOLDEN_LOSSES, abs=TOLERANCE, rel=0)

    again = run(*arguments)
    assert again.exit_code == 2
    assert "holds a run already; go on with it (--resume auto)" in again.stderr
    finished = run(*arguments, "--resume", "auto")
    assert finished.exit_code == 0, "the scenes and labels of the first run serve again"
    assert "runs/lvvit_t_demo: done" in finished.stdout
