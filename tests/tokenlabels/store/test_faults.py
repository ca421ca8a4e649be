"""Writers that are killed, and disks that are full: a shard is absent or whole, and a rerun ends as if nothing was."""

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tokenlabels.files import files_below
from tokenlabels.store import LabelSet, Manifest, create_label_set, manifest_path, shard_path, verify_store
from tokenlabels.types import ScoreMaps

MakeInfo = Callable[..., LabelSet]
MakeMaps = Callable[..., ScoreMaps]
WriteShard = Callable[..., Manifest]
Contents = Callable[[Path], dict[str, bytes]]
Writer = Callable[..., dict[str, Any]]

STEMS = ("a", "b", "c")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def info(make_info: MakeInfo) -> LabelSet:
    return make_info(tars=tuple(f"{stem}.tar" for stem in STEMS))


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, info: LabelSet, make_maps: MakeMaps) -> list[str]:
    """Starts a process that writes shards of 300, 5 and 40 maps on demand."""
    work = info, {stem: make_maps(n, info, seed=1, prefix=stem) for stem, n in zip(STEMS, (300, 5, 40), strict=True)}
    path = tmp_path_factory.mktemp("work") / "work.pickle"
    path.write_bytes(pickle.dumps(work))
    return [sys.executable, str(Path(__file__).with_name("writer_process.py")), str(path)]


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(process: subprocess.Popen[str], labels: Path, **changes: Any) -> dict[str, Any]:
    """One trial of a writer process; `changes` are the fields of its commands."""
    assert process.stdin is not None
    assert process.stdout is not None
    request = {"stems": STEMS, "rewrite": False, "kill_at_step": None, "delay_seconds": 0.0, "max_file_bytes": None}
    process.stdin.write(json.dumps({**request, "labels": str(labels), **changes}) + "\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


@pytest.fixture(scope="module")
def write_elsewhere(command: list[str]) -> Iterator[Writer]:
    with start(command) as process:
        yield lambda labels, **changes: ask(process, labels, **changes)
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(
    write_elsewhere: Writer, tmp_path_factory: pytest.TempPathFactory, contents: Contents
) -> dict[str, bytes]:
    """Content of the label set that nobody interrupted."""
    labels = tmp_path_factory.mktemp("undisturbed")
    assert write_elsewhere(labels)["error"] is None
    assert list(verify_store(labels)) == []
    return contents(labels)


@pytest.fixture
def old_set(tmp_path: Path, info: LabelSet, make_maps: MakeMaps, write_shard: WriteShard) -> Path:
    """A whole label set with other values, to be written over."""
    labels = tmp_path / "old"
    create_label_set(labels, info)
    for stem, num_maps in zip(STEMS, (300, 5, 40), strict=True):
        write_shard(labels, stem, make_maps(num_maps, info, seed=2, prefix=stem), info)
    return labels


def state(labels: Path) -> tuple[str, ...]:
    """The files that are there: two kills that came at different steps leave different ones."""
    return tuple(re.sub(r"\.tmp-\w+", ".tmp", name) for name in files_below(labels))


def assert_absent_or_whole(labels: Path, found: dict[str, bytes], *allowed: dict[str, bytes]) -> None:
    """A group or manifest in its place is, file for file, one of those allowed, and `verify_store` sees it that way."""
    absent = {stem for stem in STEMS if not manifest_path(labels, stem).exists()}
    for part in (*(f"{stem}.zarr/" for stem in STEMS), *(f"manifest/{stem}.json" for stem in STEMS)):
        files, *whole = ({name: tree[name] for name in tree if name.startswith(part)} for tree in (found, *allowed))
        assert not files or files in whole
    if (labels / "labels.json").exists():
        assert [finding.path for finding in verify_store(labels)] == [
            shard_path(labels, stem) for stem in sorted(absent)
        ]
    else:
        assert absent == {*STEMS}


@dataclass
class Killing:
    """Kills writers of one label set, checks what they left, and runs them again."""

    write: Writer
    start: Path | None
    scratch: Path
    undisturbed: dict[str, bytes]
    contents: Contents
    num_killed: int = 0
    states: set[tuple[str, ...]] = field(default_factory=set)

    def begin(self) -> Path:
        labels = self.scratch / "labels"
        shutil.rmtree(labels, ignore_errors=True)
        return Path(shutil.copytree(self.start, labels)) if self.start else labels

    def num_steps(self) -> int:
        return int(self.write(self.begin(), rewrite=True)["num_steps"])

    def trial(self, step: int, delay_seconds: float | None) -> None:
        labels, old = self.begin(), self.contents(self.start) if self.start else {}
        answer = self.write(labels, rewrite=True, kill_at_step=step, delay_seconds=delay_seconds)
        self.num_killed += answer["killed"]
        self.states.add(state(labels))
        assert_absent_or_whole(labels, self.contents(labels), self.undisturbed, old)
        assert self.write(labels, rewrite=self.start is not None)["error"] is None
        assert self.contents(labels) == self.undisturbed


@pytest.fixture(params=["over nothing", "over an old set"])
def killing(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    write_elsewhere: Writer,
    undisturbed: dict[str, bytes],
    old_set: Path,
    contents: Contents,
) -> Killing:
    start = old_set if request.param == "over an old set" else None
    return Killing(write_elsewhere, start, tmp_path, undisturbed, contents)


@pytest.mark.parametrize("num_trials", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_at_random_instants(num_trials: int, killing: Killing) -> None:
    draw, num_steps = random.Random(num_trials), killing.num_steps()
    for trial in range(num_trials):
        step = 1 + int((trial + draw.random()) * num_steps / num_trials)
        killing.trial(step, delay_seconds=draw.choice([0.0, draw.uniform(0, 0.005)]))
    assert killing.num_killed >= num_trials / 2, "the kills came too late to interrupt anything"
    # Kills that come between two new files, or while things are removed again, leave the same state.
    assert len(killing.states) >= max(2, num_trials / 5), "the kills came at too few different instants"


@pytest.mark.parametrize("stride", [119, pytest.param(5, marks=pytest.mark.slow)])
def test_kill_9_before_each_change_to_the_file_system(stride: int, killing: Killing) -> None:
    num_steps = killing.num_steps()
    steps = {*range(1, num_steps, stride), num_steps - 1, num_steps}
    for step in sorted(steps):
        killing.trial(step, delay_seconds=None)
    assert killing.num_killed == len(steps)
    assert len(killing.states) >= len(steps) / 2
    # The last shard's group renamed and not yet confirmed: the narrowest of all stages.
    assert any("c.zarr/zarr.json" in state and "manifest/c.json" not in state for state in killing.states)


@pytest.fixture(params=["over nothing", "over an old shard"])
def lacking_space(request: pytest.FixtureRequest, old_set: Path) -> Path:
    """A label set whose shard b is about to be written, and there may be a shard b already."""
    if request.param == "over nothing":
        shutil.rmtree(shard_path(old_set, "b"))
        manifest_path(old_set, "b").unlink()
    return old_set


def test_a_file_size_limit_leaves_nothing_of_a_shard(
    lacking_space: Path, write_elsewhere: Writer, undisturbed: dict[str, bytes], contents: Contents
) -> None:
    """RLIMIT_FSIZE of many sizes, so that each file of the shard is once the one that does not fit."""
    labels, before = lacking_space, contents(lacking_space)
    largest = max(len(content) for name, content in undisturbed.items() if name.startswith(("b.", "manifest/b")))
    for limit in range(0, largest, 200):
        kind, message = write_elsewhere(labels, stems=["b"], rewrite=True, max_file_bytes=limit)["error"]
        assert kind == "DiskFullError"
        assert "b.zarr: File too large" in message
        assert "Free some space" in message
        assert contents(labels) == before, f"after an error with a limit of {limit} bytes"
    assert write_elsewhere(labels, stems=["b"], rewrite=True, max_file_bytes=largest)["error"] is None
    assert list(verify_store(labels)) == []
    assert contents(labels)["manifest/b.json"] == undisturbed["manifest/b.json"]


def test_a_label_set_that_does_not_fit(tmp_path: Path, write_elsewhere: Writer, contents: Contents) -> None:
    kind, message = write_elsewhere(tmp_path, max_file_bytes=100)["error"]
    assert (kind, contents(tmp_path)) == ("DiskFullError", {})
    assert "labels.json: File too large" in message


@pytest.fixture
def small_disk(command: list[str], tmp_path: Path) -> Iterator[tuple[Path, Writer]]:
    """A tmpfs of 8 MB, and a writer that works on it. It is mounted where only that process sees it."""
    mount = 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"'
    for namespace in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        if subprocess.run([*namespace, "sh", "-c", mount, str(tmp_path), "true"], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("mounting is not permitted here, not even in a namespace of our own")
    with start([*namespace, "sh", "-c", mount, str(tmp_path), *command]) as process:
        assert ask(process, tmp_path / "warm-up", stems=[])["error"] is None
        inside = Path(f"/proc/{process.pid}/root{tmp_path}")
        yield inside, lambda name, **changes: ask(process, tmp_path / name, **changes)
        process.kill()


def test_a_full_disk_leaves_nothing_of_a_shard(
    small_disk: tuple[Path, Writer], undisturbed: dict[str, bytes], lacking_space: Path, contents: Contents
) -> None:
    """At every number of free pages, so that the disk is full once at every step of the writer."""
    disk, write = small_disk
    labels = Path(shutil.copytree(lacking_space, disk / "labels"))
    before, ballast, free_pages = contents(labels), disk / "ballast", 0
    while True:
        ballast.unlink(missing_ok=True)
        ballast.write_bytes(bytes((os.statvfs(disk).f_bfree - free_pages) * PAGE_BYTES))
        error = write("labels", stems=["b"], rewrite=True)["error"]
        if error is None:
            break
        assert error[0] == "DiskFullError", error
        assert "b.zarr: No space left on device" in error[1]
        assert contents(labels) == before, f"after an error with {free_pages} free pages"
        free_pages += 1
    assert free_pages >= sum(name.startswith(("b.", "manifest/b.")) for name in undisturbed)
    assert list(verify_store(labels)) == []
    ballast.unlink()
    assert write("labels", rewrite=True)["error"] is None
    assert contents(labels) == undisturbed
