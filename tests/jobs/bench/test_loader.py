"""The benchmark of the loader, on a handful of small images: what is measured does what it says."""

from pathlib import Path

import numpy as np
import pytest

from jobs.bench import loader as bench
from jobs.bench import loader_limits
from loaders.decode import get_decoder
from tests.loaders.photos import encode, smooth_image, write_tar
from tokenlabels.store import open_store, verify_store

# WebDataset leaves its tars, and a DataLoader its pipes, to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bench.BenchData:
    """Three tars of 8 samples, of five images."""
    monkeypatch.setattr(bench, "SAMPLES_PER_TAR", 8)
    rng = np.random.default_rng(0)
    images = {f"image{number}": {"jpg": encode(smooth_image(rng, 60, 40 + number))} for number in range(5)}
    write_tar(tmp_path / "given.tar", images)
    return bench.prepare([str(tmp_path / "given.tar")], tmp_path / "bench", 20)


def test_the_data_is_the_images_over_and_over_with_labels(data: bench.BenchData) -> None:
    assert (len(data.tars), data.num_images, len(data.images)) == (3, 24, 5)
    assert list(verify_store(data.labels)) == []
    assert sum(len(shard) for shard in open_store(data.labels).shards) == 24
    assert len(list(data.tree.rglob("*.jpg"))) == 5


def test_every_side_does_all_of_its_work(data: bench.BenchData, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, num_decoded = type(get_decoder("torchvision")), []
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda *arguments: num_decoded.append(1) or decode(*arguments))
    bench.decode_all(data, 2, num_images=24)
    assert len(num_decoded) == 24
    plain = bench.TokenLabelLoader(data.tars, batch_size=8, threads=2)
    bench.fill_batches(plain)
    assert len(num_decoded) == 48
    for other in (bench.web_loader, bench.folder_loader):
        batches = [batch for batch, _ in other(data, 1, 8)]
        assert [tuple(batch.shape) for batch in batches] == [(8, 3, 224, 224)] * 3, other
        assert all(batch.is_floating_point() for batch in batches)
        assert abs(float(batches[0].mean())) < 2.5


def test_all_figures_come(data: bench.BenchData) -> None:
    comparisons = list(bench.bench_loader(data, threads=1, batch_size=8, rounds=1))
    assert [comparison.name for comparison in comparisons] == [
        "host: loader / decoding and cropping alone",
        "host: with labels / without",
        "loader / a WebDataset WebLoader",
        "loader / a DataLoader over ImageFolder",
        "all on the CPU: with labels / without",
        "all on the CPU: with labels, MixToken and RandAugment / without",
    ]
    assert all(comparison.ratio > 0 for comparison in comparisons)


@pytest.mark.slow
def test_memory_and_start(data: bench.BenchData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = loader_limits.measure_memory(data.tars, data.labels, threads=1, batch_size=8)
    assert memory.largest_bytes > 50e6
    assert memory.growth > 0.5
    monkeypatch.setattr(loader_limits, "NUM_SHARDS", 3)
    monkeypatch.setattr(loader_limits, "SAMPLES_PER_SHARD", 10)
    start = loader_limits.measure_start(data.images[0], tmp_path / "start", threads=1, batch_size=8)
    assert min(start.fresh, start.resumed) > 0
    assert "3 indexed shards of 10 samples" in str(start)
