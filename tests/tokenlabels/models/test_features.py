"""Layouts of features, from one to the other. Which models have which is asked in tests/annotate/test_cells.py."""

import pytest
import torch
from torch import nn

from tokenlabels.models.features import FeatureError, FeatureFormat, Layout, count_classes, probe_features


@pytest.mark.parametrize(("layout", "num_prefix_tokens"), [("NCHW", 0), ("NHWC", 0), ("NLC", 0), ("NLC", 2)])
def test_cells_are_the_same_in_every_layout(layout: Layout, num_prefix_tokens: int) -> None:
    cells = torch.randn(2, 3, 4, 5)
    prefix = torch.randn(2, 5)
    feature_format = FeatureFormat(layout, (3, 4), 5, num_prefix_tokens)
    features = feature_format.features(cells, prefix)
    expected = {"NCHW": (2, 5, 3, 4), "NHWC": (2, 3, 4, 5), "NLC": (2, num_prefix_tokens + 12, 5)}
    assert features.shape == expected[layout]
    assert torch.equal(feature_format.cells(features), cells)
    if layout == "NLC":
        assert torch.equal(features[1, num_prefix_tokens + 4 * 2 + 3], cells[1, 2, 3]), "row-major"
        assert all(torch.equal(features[:, p], prefix) for p in range(num_prefix_tokens))


class _Fails(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.error = error

    def forward_features(self, _images: torch.Tensor) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(AssertionError("height"), r"does not take 8 x 9 images \(height\); give", id="size"),
        pytest.param(
            torch.OutOfMemoryError("full"), "one 8 x 9 image does not fit into the memory of cpu", id="memory"
        ),
    ],
)
def test_what_fails_is_explained(error: Exception, message: str) -> None:
    with pytest.raises(FeatureError, match=f"^mine: .*{message}") as caught:
        probe_features(_Fails(error), "mine", (8, 9))
    assert caught.value.__cause__ is error


def test_no_model_of_timm() -> None:
    with pytest.raises(FeatureError, match=r"^mine: it has no forward_features"):
        count_classes(nn.Linear(2, 2), "mine")
