"""Losses between images against loops, and against the layers of VGG networks that they read."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from tests.tokenlabels.models.families import vgg
from tokenlabels.models import reconstruction as module
from tokenlabels.models.reconstruction import contextual_loss, reconstruction_loss


@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("l2", 2)])
def test_losses_of_pixels(kind: Any, power: int) -> None:
    made, wanted = torch.randn(2, 2, 3, 4, 4)
    torch.testing.assert_close(reconstruction_loss(kind)(made, wanted), ((made - wanted).abs() ** power).mean())


def contextual_by_hand(made: Tensor, wanted: Tensor) -> Tensor:
    losses = []
    for x, y in zip(made.flatten(2).transpose(1, 2), wanted.flatten(2).transpose(1, 2), strict=True):
        mean = y.mean(dim=0)
        meant = torch.empty(len(x), len(y), dtype=x.dtype)
        for i in range(len(x)):
            distances = torch.stack(
                [1 - functional.cosine_similarity(x[i] - mean, target - mean, dim=0) for target in y]
            )
            weights = ((1 - distances / (distances.min() + 1e-5)) / 0.5).exp()
            meant[i] = weights / weights.sum()
        losses.append(-meant.amax(dim=0).mean().log())
    return torch.stack(losses).mean()


def test_perceptual_and_contextual_loss_by_hand() -> None:
    network = vgg()
    images = torch.randn(2, 2, 3, 32, 32)
    state = copy.deepcopy(network.state_dict())
    for kind, end in (("perceptual", 13), ("contextual", 30)):
        loss = reconstruction_loss(kind, network).train()  # type: ignore[arg-type]
        assert not any(part.training for part in loss.features.modules())  # type: ignore[union-attr, operator]
        reference = copy.deepcopy(network.features[:end]).eval()
        assert isinstance(reference[-1], nn.ReLU)
        made, wanted = (reference(x) for x in images)
        expected = (made - wanted).square().mean() if kind == "perceptual" else contextual_by_hand(made, wanted)
        assert expected > 0
        torch.testing.assert_close(loss(*images), expected)
        assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters()), "the network that was given stays"
    assert network.training


@pytest.mark.parametrize("num_pairs", [1, 40, 100, 1000])
def test_contextual_loss_in_chunks(num_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, wanted = torch.randn(2, 5, 4, 3, 2, dtype=torch.float64)
    made.requires_grad_()
    expected = contextual_by_hand(made, wanted)
    by_hand = torch.autograd.grad(expected, made)
    monkeypatch.setattr(module, "_CHUNK", num_pairs)
    loss = contextual_loss(made, wanted)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, made), by_hand)


def test_contextual_loss_at_its_ends() -> None:
    features = torch.randn(2, 8, 4, 4)
    places = torch.randperm(16)
    shuffled = features.flatten(2)[:, :, places].reshape(features.shape)
    assert float(contextual_loss(features, features)) < 1e-3
    assert float(contextual_loss(shuffled, features)) < 1e-3, "places do not count"
    flat = torch.ones(2, 8, 4, 4, requires_grad=True)
    loss = contextual_loss(flat, features)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert flat.grad is not None
    assert torch.isfinite(flat.grad).all()
    assert torch.isfinite(contextual_loss(features[..., :1, :1], features[..., :1, :1]))


@pytest.mark.parametrize(("name", "second", "fourth"), [("vgg11", 5, 15), ("vgg16", 9, 21), ("vgg19", 9, 23)])
def test_layers_of_torchvision(name: str, second: int, fourth: int) -> None:
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None)
        assert len(reconstruction_loss("perceptual", network).features) == second  # type: ignore[arg-type]
        assert len(reconstruction_loss("contextual", network).features) == fourth  # type: ignore[arg-type]


def test_a_short_vgg_is_refused() -> None:
    network = vgg()
    network.features = network.features[:15]
    with pytest.raises(ValueError, match="vgg must have a ReLU in its block 4, got 2 blocks"):
        reconstruction_loss("contextual", network)
