"""Layouts of whole models against each MoTo run by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tokenlabels.models.families import plain
from tokenlabels.analysis import entity_maps
from tokenlabels.models.modulation import modulate, modulations


class TestEntityMaps:
    @pytest.mark.parametrize("placement", ["every", "first"])
    def test_of_every_moto_in_order(self, placement: Any) -> None:
        model = modulate(plain("swin").eval(), "moto", placement=placement, num_entities=2)
        images = torch.randn(2, 3, 64, 32)
        inputs: list[Tensor] = []
        motos: list[Any] = modulations(model)
        hooks = [moto.register_forward_hook(lambda *call: inputs.append(call[1][0])) for moto in motos]
        found = entity_maps(model, images)
        for hook in hooks:
            hook.remove()
        names = ["patch_embed", "layers.1.downsample", "layers.2.downsample"]
        assert list(found) == names[: len(motos)]
        assert [tuple(of.shape) for of in found.values()] == [(2, 16, 8), (2, 8, 4), (2, 4, 2)][: len(motos)]
        for moto, x, entities in zip(motos, inputs, found.values(), strict=True):
            assert entities.dtype == torch.int64
            torch.testing.assert_close(entities, moto.layout(x).argmax(dim=1))

    def test_leaves_no_trace(self) -> None:
        model = modulate(plain("deit"), "moto", num_entities=2)
        images = torch.randn(1, 3, 32, 48, requires_grad=True)
        entity_maps(model, images)
        assert not any(module._forward_pre_hooks for module in model.modules())
        with pytest.raises(AssertionError):
            entity_maps(model, torch.randn(1, 3, 40, 40))
        assert not any(module._forward_pre_hooks for module in model.modules())

    @pytest.mark.parametrize("kind", [None, "layer_norm"])
    def test_models_without_moto_are_refused(self, kind: Any) -> None:
        model = plain("deit")
        if kind is not None:
            modulate(model, kind)
        with pytest.raises(ValueError, match="VisionTransformer has no MoTo"):
            entity_maps(model, torch.randn(1, 3, 32, 48))
