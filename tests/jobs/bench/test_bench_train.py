"""The benchmark of a training step: what is compared does what it says."""

import pytest
import torch

from jobs.bench.train import _Material, bench_labels, bench_trainer
from tokenlabels.targets import token_targets

CPU = torch.device("cpu")


def test_a_step_makes_its_targets_as_the_loader_does() -> None:
    material = _Material.draw(3, CPU)
    batch = material.with_token_labels()
    maps = material.maps
    unmixed = token_targets(maps.scores, maps.classes, maps.boxes, flip=maps.flip, grid=(14, 14), num_classes=1000)
    torch.testing.assert_close(batch.targets.dense(), batch.plan.mix_targets(unmixed).dense())
    hard = material.with_hard_labels()
    assert hard.targets.grid is None
    assert hard.targets.dense()[:, 0].sum(dim=1).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("bench", [bench_labels, bench_trainer])
def test_figures_come(bench: object) -> None:
    assert callable(bench)
    comparison = bench("lvvit_t", 2, CPU, precision="fp32", steps=1, rounds=2)
    assert len(comparison.ratios) == 2
    assert 0.1 < comparison.ratio < 10
