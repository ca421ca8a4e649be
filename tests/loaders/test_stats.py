import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from loaders.decode import TorchvisionDecoder
from loaders.evaluation import EvaluationLoader
from loaders.loader import TokenLabelLoader
from loaders.stats import LoaderStats
from tests.loaders.photos import Photos

NUM_IMAGES, SLOW_SECONDS = 32, 0.02

Loader = TokenLabelLoader | EvaluationLoader


def training(photos: Photos, **options: Any) -> TokenLabelLoader:
    settings = {"image_size": 32, "batch_size": 4, "threads": 2, "index_dir": photos.index_dir}
    return TokenLabelLoader(photos.tars, photos.labels, **{**settings, **options})


def evaluation(photos: Photos, **options: Any) -> EvaluationLoader:
    settings = {"image_size": 32, "batch_size": 4, "threads": 2, "index_dir": photos.index_dir}
    return EvaluationLoader(photos.tars, **{**settings, **options})


@pytest.fixture(params=[training, evaluation], ids=["training", "evaluation"])
def loader(request: pytest.FixtureRequest, photos: Photos) -> Loader:
    made: Loader = request.param(photos)
    return made


def test_without_a_pass_all_is_zero(loader: Loader) -> None:
    assert loader.stats() == LoaderStats()
    assert (loader.stats().seconds, loader.stats().images_per_second) == (0, 0)
    assert str(loader.stats()).startswith("0 images in 0 batches and 0.0 s, 0 images/s")


def test_counts_what_was_handed_out(loader: Loader) -> None:
    for number, batch in enumerate(loader, start=1):
        assert (loader.stats().num_batches, loader.stats().num_images) == (number, number * len(batch))
    stats = loader.stats()
    assert (stats.num_images, stats.num_batches, stats.num_skipped) == (NUM_IMAGES, NUM_IMAGES // 4, 0)
    assert stats.images_per_second == pytest.approx(NUM_IMAGES / stats.seconds)


def test_every_pass_counts_anew(loader: Loader) -> None:
    list(loader)
    first = loader.stats()
    next(iter(loader))
    second = loader.stats()
    assert second is not first
    assert (first.num_batches, second.num_batches) == (NUM_IMAGES // 4, 1)


@pytest.mark.parametrize("end", ["finished", "given up", "failed"])
def test_the_clock_stops_with_the_pass(loader: Loader, end: str) -> None:
    """What comes after it, such as validation, is no part of it."""
    started = time.perf_counter()
    batches = iter(loader)
    next(batches)
    running = loader.stats().seconds
    assert 0 < running < loader.stats().seconds
    if end == "finished":
        list(batches)
    elif end == "given up":
        del batches
    else:
        with pytest.raises(RuntimeError, match="training"):
            batches.throw(RuntimeError("of the training loop"))  # type: ignore[attr-defined]
    elapsed = time.perf_counter() - started
    seconds = loader.stats().seconds
    time.sleep(0.01)
    assert running <= loader.stats().seconds == seconds <= elapsed


class SlowDecoder(TorchvisionDecoder):
    def decode(self, data: Any) -> Any:
        time.sleep(SLOW_SECONDS)
        return super().decode(data)


def with_slow_decoder(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> TokenLabelLoader:
    monkeypatch.setattr("loaders.loader.get_decoder", lambda _: SlowDecoder())
    return training(photos)


def test_waiting_for_a_slow_decoder_is_seen(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = with_slow_decoder(photos, monkeypatch)
    list(loader)
    stats = loader.stats()
    assert stats.wait_seconds > 0.5 * stats.seconds
    assert stats.decode_seconds >= NUM_IMAGES * SLOW_SECONDS
    assert stats.decode_seconds > 2 * (stats.read_seconds + stats.device_seconds)
    assert stats.seconds >= stats.wait_seconds + stats.device_seconds


def test_a_slow_training_loop_does_not_wait(photos: Photos) -> None:
    loader, depths = training(photos, prefetch=2), []
    for _ in loader:
        depths.append(loader.stats().queue_depth)
        time.sleep(4 * SLOW_SECONDS)
    stats = loader.stats()
    assert stats.wait_seconds < 0.5 * stats.seconds
    assert depths[0] == 0, "nothing is ready when the pass begins"
    assert max(depths) >= 2, "what may be read ahead is there"


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_queue_depth_stays_within_the_ring(photos: Photos, prefetch: int) -> None:
    loader = training(photos, prefetch=prefetch, batch_size=2)
    for number, _ in enumerate(loader):
        assert 0 <= loader.stats().queue_depth <= prefetch + 1
        time.sleep(0.01 if number < 4 else 0)


def test_reading_from_another_thread_changes_nothing(photos: Photos) -> None:
    loader, seen, done = training(photos), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            stats = loader.stats()
            seen.append((stats.num_images, stats.images_per_second, str(stats), repr(stats)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        keys = [batch.keys for batch in loader]
    finally:
        done.set()
        watcher.join()
    assert keys == [batch.keys for batch in training(photos)]
    counts = [count for count, *_ in seen]
    assert counts == sorted(counts)
    assert all(rate >= 0 for _, rate, *_ in seen)


def test_skipped_samples_are_counted_apart(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(TorchvisionDecoder):
        def decode(self, data: Any) -> Any:
            if bytes(data) == photos.images[photos.keys[0][3]]:
                raise ValueError("not this one")
            return super().decode(data)

    monkeypatch.setattr("loaders.loader.get_decoder", lambda _: Picky())
    loader = training(photos, on_error="skip")
    list(loader)
    assert (loader.stats().num_skipped, loader.stats().num_images) == (1, NUM_IMAGES)


def test_reads_as_a_sentence_with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[float] = iter([100.0, 110.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    stats = LoaderStats(1280, 10, 3, read_seconds=1.25, decode_seconds=15.5, wait_seconds=2, device_seconds=0.75)
    stats.start()
    stats.stop()
    assert str(stats) == (
        "1280 images in 10 batches and 10.0 s, 128 images/s, 3 skipped; threads: read 1.2 s, decode 15.5 s; "
        "waited 2.0 s, device 0.8 s, 0 batches ready"
    )
