"""What annotate_shard writes, keeps, makes again and refuses; test_shard.py is about the maps themselves."""

import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from annotate.shard import SHOWN_REASONS, AnnotateConfig, ShardError, ShardReport, annotate_shard
from tokenlabels.files import files_below
from tokenlabels.images import TarShard
from tokenlabels.store import (
    LabelStoreError,
    ShardBusyError,
    SkippedRecord,
    claim_shard,
    manifest_path,
    open_store,
    shard_path,
    verify_store,
)
from tokenlabels.store.writer import LOCK_FOLDER
from tokenlabels.tars import TarError

MakeTeacher = Callable[..., Any]
WriteTar = Callable[[Path, Mapping[str, bytes]], TarShard]

STEM = "scenes-0001"


@pytest.fixture
def shard(scene_tars: Path, tmp_path: Path) -> TarShard:
    """A tar of three scenes of this test's own."""
    return TarShard(str(shutil.copy(scene_tars / f"{STEM}.tar", tmp_path)))


@pytest.fixture
def labels(shard: TarShard, pixel_teacher: MakeTeacher, tmp_path: Path) -> Path:
    """Its finished labels."""
    annotate_shard(shard, tmp_path / "labels", pixel_teacher(), AnnotateConfig())
    return tmp_path / "labels"


def contents(labels: Path) -> dict[str, bytes]:
    names = [name for name in files_below(labels) if not name.startswith(LOCK_FOLDER)]
    return {name: (labels / name).read_bytes() for name in names}


def test_the_report_is_that_of_the_files(shard: TarShard, pixel_teacher: MakeTeacher, tmp_path: Path) -> None:
    report = annotate_shard(shard, tmp_path / "labels", pixel_teacher(), AnnotateConfig())
    group = shard_path(tmp_path / "labels", STEM)
    size_bytes = sum((group / name).stat().st_size for name in files_below(group))
    assert report == ShardReport(STEM, "written", 3, (), size_bytes, report.seconds)
    assert report.seconds > 0
    manifest = open_store(tmp_path / "labels").shards[0].manifest
    assert manifest.source.model_dump() == {
        "name": f"{STEM}.tar",
        "size_bytes": Path(shard.path).stat().st_size,
        "num_samples": 3,
        "num_ignored": 0,
    }


def test_shards_join_one_set(scene_tars: Path, pixel_teacher: MakeTeacher, tmp_path: Path) -> None:
    for number in (2, 0, 1):
        shard = TarShard(str(scene_tars / f"scenes-{number:04d}.tar"))
        annotate_shard(shard, tmp_path / "labels", pixel_teacher(), AnnotateConfig())
    store = open_store(tmp_path / "labels")
    assert [(shard.stem, len(shard)) for shard in store.shards] == [
        ("scenes-0000", 5),
        ("scenes-0001", 3),
        ("scenes-0002", 2),
    ]
    assert list(store.keys()) == [f"scene_{number:06d}" for number in range(10)]
    assert list(verify_store(tmp_path / "labels")) == []


class TestFinishedBefore:
    def test_it_is_not_made_again(self, shard: TarShard, labels: Path, pixel_teacher: MakeTeacher) -> None:
        files = {path: path.stat().st_mtime_ns for path in labels.rglob("*")}
        teacher = pixel_teacher()
        report = annotate_shard(shard, labels, teacher, AnnotateConfig())
        assert (report.status, report.rows, report.redone) == ("finished before", 3, None)
        assert report.size_bytes == open_store(labels).shards[0].manifest.size_bytes
        assert teacher.batch_sizes == []
        assert {path: path.stat().st_mtime_ns for path in labels.rglob("*")} == files

    def test_what_was_skipped_is_still_said(
        self, shard: TarShard, write_tar: WriteTar, pixel_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        jpeg = next(iter(shard.images())).data
        assert jpeg is not None
        source, config = write_tar(tmp_path / "t.tar", {"a.jpg": jpeg, "b.jpg": b""}), AnnotateConfig(max_skip=0.5)
        for status in ("written", "finished before"):
            report = annotate_shard(source, tmp_path / "out", pixel_teacher(), config)
            assert (report.status, report.rows) == (status, 1)
            assert report.skipped == (SkippedRecord(key="b", reason="empty file"),)

    @pytest.mark.parametrize(
        "config",
        [AnnotateConfig(batch_size=1), AnnotateConfig(decode_threads=1, queue_bytes=1), AnnotateConfig(max_skip=1)],
        ids=["batch", "threads", "max-skip"],
    )
    def test_settings_that_change_no_label_may_change(
        self, config: AnnotateConfig, shard: TarShard, labels: Path, pixel_teacher: MakeTeacher
    ) -> None:
        assert annotate_shard(shard, labels, pixel_teacher(), config).status == "finished before"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"rows": 3', b'"rows": 4'))


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "damage", "reason"),
        [
            pytest.param(f"{STEM}.zarr/scores/c/0/0/0/0", truncate, "scores/c/0/0/0/0: has ", id="array-truncated"),
            pytest.param(f"{STEM}.zarr/keys/c/0", Path.unlink, "keys/c/0: missing", id="array-missing"),
            pytest.param(f"{STEM}.zarr/tail/zarr.json", truncate, "tail/zarr.json: has ", id="metadata"),
            pytest.param(f"{STEM}.zarr", shutil.rmtree, f"{STEM}.zarr: missing", id="group-missing"),
            pytest.param(f"manifest/{STEM}.json", truncate, "damaged", id="manifest-truncated"),
            pytest.param(f"manifest/{STEM}.json", edit, "edited by hand", id="manifest-edited"),
        ],
    )
    def test_a_damaged_shard_is_made_again(
        self,
        name: str,
        damage: Callable[[Path], None],
        reason: str,
        shard: TarShard,
        labels: Path,
        pixel_teacher: MakeTeacher,
    ) -> None:
        before = contents(labels)
        damage(labels / name)
        report = annotate_shard(shard, labels, pixel_teacher(), AnnotateConfig())
        assert report.status == "written"
        assert reason in (report.redone or "")
        assert contents(labels) == before

    def test_a_group_without_manifest_is_made_again_without_a_word(
        self, shard: TarShard, labels: Path, pixel_teacher: MakeTeacher
    ) -> None:
        before = contents(labels)
        manifest_path(labels, STEM).unlink()
        report = annotate_shard(shard, labels, pixel_teacher(), AnnotateConfig())
        assert (report.status, report.redone) == ("written", None)
        assert contents(labels) == before


class TestRefusals:
    def test_other_images_under_the_same_name(
        self, shard: TarShard, labels: Path, write_tar: WriteTar, pixel_teacher: MakeTeacher
    ) -> None:
        before, old_size = contents(labels), shard.size_bytes
        other = write_tar(Path(shard.path), {"a.jpg": b"x" * 50_000, "b.jpg": b""})
        with pytest.raises(ShardError) as caught:
            annotate_shard(other, labels, pixel_teacher(), AnnotateConfig(max_skip=1))
        for part in (
            f"made from {STEM}.tar of {old_size} bytes",
            f"{STEM}.tar has {other.size_bytes}",
            f"remove {manifest_path(labels, STEM)}",
        ):
            assert part in str(caught.value)
        assert contents(labels) == before

    def test_other_images_in_a_tar_of_the_same_size(
        self, write_tar: WriteTar, pixel_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        """Tars are padded to 10,240 bytes, so that small ones often have one size."""
        first = write_tar(tmp_path / "t.tar", {"a.jpg": b""})
        annotate_shard(first, tmp_path / "labels", pixel_teacher(), AnnotateConfig(max_skip=1))
        other = write_tar(tmp_path / "t.tar", {"b.jpg": b""})
        assert other.size_bytes == first.size_bytes
        with pytest.raises(ShardError, match="other keys"):
            annotate_shard(other, tmp_path / "labels", pixel_teacher(), AnnotateConfig(max_skip=1))

    @pytest.mark.parametrize(
        ("teacher", "config", "differences"),
        [
            pytest.param(
                {"seed": 1},
                {},
                ["teacher.digest: pixels, seed 0 != pixels, seed 1", "teacher.models.0.digest: seed 0 != seed 1"],
                id="teacher",
            ),
            pytest.param({"topk": 3}, {}, ["k: 4 != 3"], id="topk"),
            pytest.param({}, {"resize": "center"}, ["resize: squash != center"], id="resize"),
            pytest.param({"grid": (3, 2)}, {}, ["grid: [2, 3] != [3, 2]"], id="grid"),
        ],
    )
    def test_labels_made_in_another_way(
        self,
        teacher: dict[str, Any],
        config: dict[str, Any],
        differences: list[str],
        shard: TarShard,
        labels: Path,
        pixel_teacher: MakeTeacher,
    ) -> None:
        before = contents(labels)
        with pytest.raises(LabelStoreError) as caught:
            annotate_shard(shard, labels, pixel_teacher(**teacher), AnnotateConfig(**config))
        listed = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
        assert listed == differences
        assert contents(labels) == before

    def test_a_damaged_tar(self, shard: TarShard, pixel_teacher: MakeTeacher, tmp_path: Path) -> None:
        tar = Path(shard.path)
        tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
        with pytest.raises(TarError, match=rf"{STEM}\.tar: "):
            annotate_shard(shard, tmp_path / "labels", pixel_teacher(), AnnotateConfig(max_skip=1))
        assert list(contents(tmp_path / "labels")) == ["labels.json"]

    def test_an_empty_tar(self, write_tar: WriteTar, pixel_teacher: MakeTeacher, tmp_path: Path) -> None:
        with pytest.raises(TarError, match=r"t\.tar: no sample in it"):
            annotate_shard(write_tar(tmp_path / "t.tar", {}), tmp_path / "labels", pixel_teacher(), AnnotateConfig())
        assert list(contents(tmp_path / "labels")) == ["labels.json"]


class TestMaxSkip:
    def tar_of(self, num_whole: int, num_broken: int, shard: TarShard, write_tar: WriteTar, folder: Path) -> TarShard:
        jpeg = next(iter(shard.images())).data
        assert jpeg is not None
        broken = {f"broken{number}.jpg": b"" for number in range(num_broken)}
        return write_tar(folder / "t.tar", {f"whole{number}.jpg": jpeg for number in range(num_whole)} | broken)

    @pytest.mark.parametrize(("num_broken", "num_shown"), [(1, 1), (SHOWN_REASONS, SHOWN_REASONS), (8, SHOWN_REASONS)])
    def test_above_it_the_shard_fails_and_says_which(
        self,
        num_broken: int,
        num_shown: int,
        shard: TarShard,
        write_tar: WriteTar,
        pixel_teacher: MakeTeacher,
        tmp_path: Path,
    ) -> None:
        source = self.tar_of(3, num_broken, shard, write_tar, tmp_path)
        with pytest.raises(ShardError) as caught:
            annotate_shard(source, tmp_path / "labels", pixel_teacher(), AnnotateConfig(max_skip=0.001))
        first, *lines = str(caught.value).splitlines()
        assert first == (
            f"t.tar: {num_broken} of {3 + num_broken} images cannot be labelled, 0.10% are allowed (--max-skip):"
        )
        shown = [f"  broken{number}: empty file" for number in range(num_shown)]
        assert lines == shown + [f"  ... and {num_broken - num_shown} more"] * (num_broken > num_shown)
        assert list(contents(tmp_path / "labels")) == ["labels.json"]

    def test_labels_that_are_there_stay(
        self, shard: TarShard, labels: Path, write_tar: WriteTar, pixel_teacher: MakeTeacher, tmp_path: Path
    ) -> None:
        before = contents(labels)
        with pytest.raises(ShardError, match=r"t\.tar"):
            annotate_shard(
                self.tar_of(0, 1, shard, write_tar, tmp_path), labels, pixel_teacher(), AnnotateConfig(max_skip=0)
            )
        after = contents(labels)
        assert {name: after[name] for name in before if name != "labels.json"} == {
            name: content for name, content in before.items() if name != "labels.json"
        }

    @pytest.mark.parametrize(
        ("num_whole", "num_broken", "max_skip"),
        [(1, 1, 0.5), (71, 29, 0.29), (2, 1, 1 / 3), (0, 2, 1.0)],
        ids=["half", "share-that-float-rounds", "third", "all"],
    )
    def test_exactly_that_share_is_allowed(
        self,
        num_whole: int,
        num_broken: int,
        max_skip: float,
        shard: TarShard,
        write_tar: WriteTar,
        pixel_teacher: MakeTeacher,
        tmp_path: Path,
    ) -> None:
        source = self.tar_of(num_whole, num_broken, shard, write_tar, tmp_path)
        report = annotate_shard(source, tmp_path / "labels", pixel_teacher(), AnnotateConfig(max_skip=max_skip))
        assert (report.rows, len(report.skipped)) == (num_whole, num_broken)


class TestAnotherProcess:
    """Claims are locks of open files, so that two claims of one process are as far apart as those of two."""

    def test_it_is_not_waited_for(self, shard: TarShard, labels: Path, pixel_teacher: MakeTeacher) -> None:
        before = contents(labels)
        with (
            claim_shard(labels, STEM, open_store(labels).info),
            pytest.raises(ShardBusyError, match=rf"{STEM}\.zarr: another process"),
        ):
            annotate_shard(shard, labels, pixel_teacher(), AnnotateConfig())
        assert contents(labels) == before

    def test_it_is_waited_for_if_asked(self, shard: TarShard, labels: Path, pixel_teacher: MakeTeacher) -> None:
        reports: list[ShardReport] = []
        manifest = manifest_path(labels, STEM)

        def annotate() -> None:
            reports.append(annotate_shard(shard, labels, pixel_teacher(), AnnotateConfig(), wait=True))

        with claim_shard(labels, STEM, open_store(labels).info):
            hidden = manifest.rename(manifest.with_suffix(".hidden"))
            waiting = threading.Thread(target=annotate)
            waiting.start()
            waiting.join(0.1)
            assert waiting.is_alive()
            hidden.rename(manifest)  # the other process commits
        waiting.join()
        assert [(report.status, report.rows) for report in reports] == [("finished before", 3)]
