"""What becomes of a full batch: rows that cannot be used are left out, or kept as problems."""

import numpy as np
import pytest
import torch

from loaders.batch import HostBatch, SampleError
from loaders.finish import FinishBatch, OnError
from loaders.label_windows import LabelBlock
from tokenlabels.vocabulary import find_vocabulary

NUM_ROWS, NUM_CLASSES = 5, 12
ROW = np.arange(NUM_ROWS)


def problem(text: str, is_of_tar: bool = False) -> SampleError:
    error = SampleError(text)
    error.is_of_tar = is_of_tar
    return error


def host_of(problems: dict[int, SampleError], *, with_maps: bool = True) -> HostBatch:
    """Rows whose every part says which row it is."""
    ids = np.tile(ROW[:, None, None, None], (1, 2, 3, 2)).astype(np.uint16)
    ids[..., 1] += NUM_ROWS
    maps = LabelBlock(
        scores=np.zeros(ids.shape, np.float16) + ROW[:, None, None, None].astype(np.float16),
        classes=ids,
        tail=np.zeros(ids.shape[:3], np.float16),
        views=np.tile(np.array([0, 0, 1, 1], np.float32), (NUM_ROWS, 1)),
        problems={},
    )
    return HostBatch(
        number=3,
        keys=tuple(f"k{row}" for row in ROW),
        labels=ROW.astype(np.int64),
        boxes=np.tile(ROW[:, None], 4) / 10,
        flip=ROW % 2 == 1,
        warp=np.tile(ROW[:, None, None], (1, 2, 3)).astype(np.float64),
        is_warped=ROW > 2,
        hash=7,
        maps=maps if with_maps else None,
        images=torch.arange(NUM_ROWS, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3).contiguous(),
        problems=problems,
    )


def assert_rows(host: HostBatch, rows: list[int]) -> None:
    """Every part of the batch is of these rows."""
    assert host.keys == tuple(f"k{row}" for row in rows)
    assert host.labels.tolist() == rows
    assert host.images.shape == (len(rows), 4, 4, 3)
    assert host.images[:, 0, 0, 0].tolist() == rows
    assert np.array_equal(host.boxes, np.tile(np.array(rows, np.float64)[:, None], 4) / 10)
    assert host.flip.tolist() == [row % 2 == 1 for row in rows]
    assert host.is_warped.tolist() == [row > 2 for row in rows]
    assert host.warp[:, 0, 0].tolist() == rows
    if host.maps is not None:
        assert host.maps.classes[:, 0, 0, 0].tolist() == rows
        assert host.maps.scores[:, 1, 2, 1].tolist() == rows


@pytest.mark.parametrize("keeps_size", [True, False])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_good_batch_stays_and_gets_its_vocabulary(on_error: OnError, keeps_size: bool) -> None:
    host = host_of({})
    FinishBatch(on_error, keeps_size, NUM_CLASSES)(host)
    assert_rows(host, [0, 1, 2, 3, 4])
    assert host.maps is not None
    assert host.vocabulary is not None
    expected = find_vocabulary(torch.from_numpy(host.maps.classes.astype(np.int32)), NUM_CLASSES)
    assert torch.equal(host.vocabulary.classes, expected.classes)
    assert host.vocabulary.num_distinct.tolist() == [2] * NUM_ROWS
    assert host.skipped == ()


@pytest.mark.parametrize(
    ("bad", "rows"),
    [
        pytest.param([2], [0, 1, 0, 3, 4], id="one"),
        pytest.param([0, 1], [2, 3, 2, 3, 4], id="the first"),
        pytest.param([0, 1, 2, 4], [3, 3, 3, 3, 3], id="all but one"),
        pytest.param([1, 3, 4], [0, 0, 2, 2, 0], id="more than half"),
    ],
)
def test_others_take_the_places_of_bad_rows(bad: list[int], rows: list[int]) -> None:
    host = host_of({row: problem(f"a.tar: sample 'k{row}': read: gone") for row in bad})
    place = host.images.data_ptr()
    FinishBatch("skip", True, NUM_CLASSES)(host)
    assert_rows(host, rows)
    assert host.images.data_ptr() == place, "images stay in the ring"
    assert (len(host.skipped), host.problems) == (len(bad), {})
    assert [str(error) for error in host.skipped] == [f"a.tar: sample 'k{row}': read: gone" for row in bad]
    assert host.vocabulary is not None
    assert host.vocabulary.classes[:, :2].tolist() == [[row, row + NUM_ROWS] for row in rows]


@pytest.mark.parametrize("bad", [[0], [1, 4], [0, 1, 2, 3], [0, 1, 2, 3, 4]], ids=str)
def test_a_batch_that_may_get_shorter_does(bad: list[int]) -> None:
    host = host_of({row: problem("gone") for row in bad}, with_maps=False)
    FinishBatch("skip", False, None)(host)
    assert_rows(host, [row for row in range(NUM_ROWS) if row not in bad])
    assert len(host.skipped) == len(bad)


def test_a_batch_without_a_good_row_keeps_its_problems() -> None:
    host = host_of({row: problem("gone") for row in range(NUM_ROWS)})
    FinishBatch("skip", True, NUM_CLASSES)(host)
    assert len(host.problems) == NUM_ROWS
    assert host.skipped == ()


def test_raising_leaves_the_batch_as_it_is() -> None:
    problems = {1: problem("gone"), 3: problem("gone too")}
    host = host_of(dict(problems))
    FinishBatch("raise", True, NUM_CLASSES)(host)
    assert host.problems == problems
    assert_rows(host, [0, 1, 2, 3, 4])


@pytest.mark.parametrize("keeps_size", [True, False])
def test_a_bad_tar_is_never_skipped_and_comes_before_images_that_would_be(keeps_size: bool) -> None:
    host = host_of({0: problem("corrupt"), 2: problem("cut off", True), 3: problem("cut off", True)})
    FinishBatch("skip", keeps_size, NUM_CLASSES)(host)
    assert sorted(host.problems) == [2, 3]
    assert host.skipped == ()
