"""One small job, what it makes when nothing goes wrong, and one Ray for all tests that need it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from annotate import ledger
from annotate.ledger import ShardFailure
from annotate.schedule import Job, ray_session, run_inline
from annotate.shard import AnnotateConfig, ShardReport
from annotate.specs import TeacherSpec
from tokenlabels.files import files_below
from tokenlabels.images import ImageShard, find_shards
from tokenlabels.store import LabelSet
from tokenlabels.store.writer import LOCK_FOLDER


@dataclass
class Recorder:
    """Keeps what a run says of itself; `on_outcome` and `on_images` may interfere.

    Attributes:
        started: label set and stems, of each start.
        num_images: of each forward pass; `on_images` gets the number of passes so far.
        outcomes: (stem, status or kind of failure, settled) of each shard.
    """

    on_outcome: Callable[[ShardReport | ShardFailure], None] = lambda _: None
    on_images: Callable[[int], None] = lambda _: None
    started: list[tuple[LabelSet, tuple[str, ...]]] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)
    outcomes: list[tuple[str, str, bool]] = field(default_factory=list)

    def start(self, info: LabelSet, shards: Sequence[ImageShard]) -> None:
        self.started.append((info, tuple(shard.stem for shard in shards)))

    def images(self, num_images: int) -> None:
        self.num_images.append(num_images)
        self.on_images(len(self.num_images))

    def outcome(self, outcome: ShardReport | ShardFailure, *, settled: bool) -> None:
        what = outcome.status if isinstance(outcome, ShardReport) else outcome.kind
        self.outcomes.append((outcome.stem, what, settled))
        self.on_outcome(outcome)


@pytest.fixture(scope="session")
def make_recorder() -> Callable[..., Recorder]:
    """make_recorder(on_outcome=, on_images=) -> Progress that keeps what it is told."""
    return Recorder


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """contents(labels) -> every file but the locks, by relative path."""

    def read(labels: Path) -> dict[str, bytes]:
        names = [name for name in files_below(labels) if not name.startswith(LOCK_FOLDER)]
        return {name: (labels / name).read_bytes() for name in names}

    return read


@pytest.fixture
def job(tmp_path: Path, tiny_spec: TeacherSpec) -> Job:
    """Two images per forward pass, one thread: 2 + 2 + 1, 2 + 1 and 2 images in the three tars."""
    return Job(tmp_path / "labels", (tiny_spec,), AnnotateConfig(batch_size=2), torch_threads=1)


@pytest.fixture
def shards(scene_tars: Path) -> list[ImageShard]:
    """scenes-0000 to scenes-0002 with 5, 3 and 2 images."""
    return find_shards([f"{scene_tars}/*.tar"])


@pytest.fixture(scope="session")
def undisturbed_labels(scene_tars: Path, tiny_spec: TeacherSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The label set of an inline run of `job` that nothing went wrong in."""
    num_threads = torch.get_num_threads()
    labels = tmp_path_factory.mktemp("undisturbed")
    job = Job(labels, (tiny_spec,), AnnotateConfig(batch_size=2), torch_threads=1)
    run_inline(find_shards([f"{scene_tars}/*.tar"]), job, Recorder())
    torch.set_num_threads(num_threads)
    return labels


@pytest.fixture(scope="session")
def undisturbed(undisturbed_labels: Path, contents: Callable[[Path], dict[str, bytes]]) -> dict[str, bytes]:
    """Its files."""
    return contents(undisturbed_labels)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed shards are tried again at once."""
    monkeypatch.setattr(ledger, "FIRST_BACKOFF_SECONDS", 0.001)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """Ray on this machine. Starting it takes half a minute, so every run of this session joins the same one."""
    with ray_session(None) as ray:
        yield ray
