"""Every command line of the README and the pages is one that the command line takes."""

from pathlib import Path

import pytest

from tests.docs.commands import Call, call_in, calls, lines_of, parse
from tests.docs.pages import PAGES, ROOT


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path) -> None:
    for call in calls(page):
        parse(call)


def test_there_are_commands() -> None:
    assert sum(len(list(calls(page))) for page in PAGES) > 60


def test_the_script_for_slurm_parses() -> None:
    script = (ROOT / "jobs" / "annotate_array.sbatch").read_text(encoding="utf-8")
    (line,) = (line.removeprefix("exec ") for line in lines_of(script) if line.startswith("exec tokenlabels"))
    given = {"$@": "--preset=dm_nfnet_f6", "$SLURM_ARRAY_TASK_ID": "3", "$SLURM_ARRAY_TASK_COUNT": "16"}
    for variable, value in given.items():
        assert variable in line
        line = line.replace(variable, value)
    call = call_in(line)
    assert call is not None
    parse(call)


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("tokenlabels verify labels/ --json | head", Call(("verify", "labels/", "--json"), True)),
        ("tokenlabels inspect labels/ --json > out.json", Call(("inspect", "labels/", "--json"), True)),
        ("torchrun --nproc-per-node 8 -m jobs.train lvvit_s ...", Call(("train", "lvvit_s"), False)),
        ("python -m jobs.train --list", Call(("train", "--list"), True)),
        ("python -m jobs.analyse tokenizer runs/deit_s", None),
        ("tokenlabels.store reads it", None),
    ],
)
def test_calls_are_found(line: str, call: Call | None) -> None:
    assert call_in(line) == call


@pytest.mark.parametrize(
    "line",
    [
        "tokenlabels verify",
        "tokenlabels verify labels/ --recomputed 3",
        "tokenlabels verify labels/ --recompute many",
        "tokenlabels annotate images/ --out labels/ --resize stretch",
        "tokenlabels annotates images/",
        "tokenlabels train lvvit_xs",
        "tokenlabels train lvvit_s --set data.batchsize=3",
        "torchrun -m jobs.train lvvit_s --label ...",
    ],
)
def test_commands_that_would_fail_are_found(line: str) -> None:
    call = call_in(line)
    assert call is not None
    with pytest.raises(Exception, match=r"."):
        parse(call)
