"""The real command, killed, interrupted and run twice at once: nothing is lost and nothing is done twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from annotate.scenes import write_scenes
from annotate.schedule import Job, run_inline
from annotate.shard import AnnotateConfig
from annotate.specs import TeacherSpec
from tokenlabels.files import TEMPORARY_MARK, file_lock
from tokenlabels.images import find_shards
from tokenlabels.store import manifest_path, shard_path, verify_store
from tokenlabels.store.writer import LOCK_FOLDER

MakeRecorder = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]
Start = Callable[..., subprocess.Popen[str]]

STEMS = ("scenes-0000", "scenes-0001", "scenes-0002")
IMAGE_SIZE_PX = 512  # about a second of work per shard: time enough to come in between
OPTIONS = (
    *("--teacher", "test_efficientnet_gn", "--random-weights", "0", "--image-size", str(IMAGE_SIZE_PX)),
    *("--batch-size", "2", "--torch-threads", "1", "--log-json"),
)

pytestmark = pytest.mark.slow
on_ray = pytest.mark.ray


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_scenes(folder, shard_sizes=(24, 16, 8), seed=0)
    return folder


@pytest.fixture
def start(images: Path, tmp_path: Path) -> Start:
    """start(*options) -> the command at work on `labels`, in a process group of its own; stdout holds its events."""

    def run(*options: str) -> subprocess.Popen[str]:
        program = Path(sys.executable).with_name("tokenlabels")
        command = [str(program), "annotate", f"{images}/*.tar", "--out", str(tmp_path / "labels"), *OPTIONS, *options]
        with (tmp_path / "stderr").open("a") as stderr:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True)

    return run


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    return tmp_path / "labels"


@pytest.fixture(scope="module")
def whole(
    images: Path, make_recorder: MakeRecorder, contents: Contents, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What the command makes if nobody disturbs it."""

    num_threads = torch.get_num_threads()
    teacher = TeacherSpec("test_efficientnet_gn", seed=0, image_size=IMAGE_SIZE_PX)
    job = Job(tmp_path_factory.mktemp("whole"), (teacher,), AnnotateConfig(batch_size=2), torch_threads=1)
    run_inline(find_shards([f"{images}/*.tar"]), job, make_recorder())
    torch.set_num_threads(num_threads)
    return contents(job.labels)


def wait_for(process: subprocess.Popen[str], event: str) -> None:
    assert process.stdout is not None
    assert any(json.loads(line)["event"] == event for line in process.stdout), f"it ended without {event!r}"


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """All events of a process that ends well."""
    output, _ = process.communicate()
    assert process.returncode == 0
    return [json.loads(line) for line in output.splitlines()]


def finished_stems(labels: Path) -> set[str]:
    return {stem for stem in STEMS if manifest_path(labels, stem).exists()}


def assert_absent_or_whole(labels: Path, contents: Contents, whole: dict[str, bytes]) -> None:
    """Shards with a manifest are, file for file, those of `whole`, and `verify_store` misses the others only."""
    for stem in STEMS:
        with file_lock(labels / LOCK_FOLDER / stem, wait=True):
            pass  # Ray takes a moment to end the workers of a dead driver
    found = contents(labels)
    for stem in finished_stems(labels):
        files = (f"{stem}.zarr/", f"manifest/{stem}.json")
        assert {name: found[name] for name in found if name.startswith(files)} == {
            name: whole[name] for name in whole if name.startswith(files)
        }
    absent = {*STEMS} - finished_stems(labels)
    assert [finding.path for finding in verify_store(labels)] == [shard_path(labels, stem) for stem in sorted(absent)]


@pytest.mark.parametrize(
    ("options", "delays_seconds"),
    [
        pytest.param((), (0.3, 0.8), id="inline"),
        pytest.param(("--backend", "ray", "--workers", "2", "--ray-address"), (0.5,), id="ray", marks=on_ray),
    ],
)
def test_a_killed_driver_costs_nothing(
    options: tuple[str, ...],
    delays_seconds: tuple[float, ...],
    start: Start,
    labels: Path,
    contents: Contents,
    whole: dict[str, bytes],
    request: pytest.FixtureRequest,
) -> None:
    options = with_address(options, request)
    num_killed_at_work = 0
    for delay_seconds in delays_seconds:
        process = start(*options)
        wait_for(process, "start")
        time.sleep(delay_seconds)
        process.kill()
        process.communicate()
        num_killed_at_work += finished_stems(labels) != {*STEMS}
        assert_absent_or_whole(labels, contents, whole)
    assert num_killed_at_work > 0

    before = finished_stems(labels)
    written = [event["stem"] for event in finish(start(*options)) if event["event"] == "written"]
    assert sorted(written) == sorted({*STEMS} - before)
    assert contents(labels) == whole


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="inline"),
        pytest.param(("--backend", "ray", "--workers", "1", "--ray-address"), id="ray", marks=on_ray),
    ],
)
def test_two_drivers_at_once_share_the_work(
    options: tuple[str, ...],
    start: Start,
    labels: Path,
    contents: Contents,
    whole: dict[str, bytes],
    request: pytest.FixtureRequest,
) -> None:
    options = with_address(options, request)
    runs = [finish(process) for process in [start(*options), start(*options)]]
    written = Counter(event["stem"] for events in runs for event in events if event["event"] == "written")
    assert written == dict.fromkeys(STEMS, 1)
    for events in runs:
        seen = [event["stem"] for event in events if event["event"] in ("written", "finished before")]
        assert sorted(seen) == [*STEMS]
    assert list(verify_store(labels)) == []
    assert contents(labels) == whole


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="inline"),
        pytest.param(("--backend", "ray", "--workers", "2"), id="ray of its own", marks=on_ray),
    ],
)
def test_control_c_leaves_whole_shards_and_says_how_to_go_on(
    options: tuple[str, ...], start: Start, labels: Path, contents: Contents, whole: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(*options)
    wait_for(process, "written")
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes of the command
    process.communicate()
    assert process.returncode == 130
    message = f"stopped. Finished shards in {labels} are whole; the same command goes on from there."
    assert message in (tmp_path / "stderr").read_text()
    assert finished_stems(labels)
    assert_absent_or_whole(labels, contents, whole)
    if not options:
        assert not [name for name in contents(labels) if TEMPORARY_MARK in name]

    finish(start())
    assert contents(labels) == whole


@on_ray
def test_a_cluster_that_is_not_there_is_a_clear_error(start: Start, labels: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    process = start("--backend", "ray", "--ray-address", address)
    process.communicate()
    assert process.returncode == 1
    assert f"error: cannot join the Ray cluster at {address}" in (tmp_path / "stderr").read_text()
    assert not labels.exists()


def with_address(options: tuple[str, ...], request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The options, with the address of the session's Ray if they end with --ray-address."""
    if not options:
        return options
    ray = request.getfixturevalue("ray_cluster")
    return (*options, ray.get_runtime_context().gcs_address)
