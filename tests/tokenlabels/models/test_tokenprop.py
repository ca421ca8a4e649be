"""TokenProp against the plain model and a decoder applied by hand."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from tests.tokenlabels.models.families import NUM_CLASSES, dense, mixtoken, plain, vgg
from tokenlabels.align import TLAlign
from tokenlabels.mixing import MixPlan
from tokenlabels.models import LVViT
from tokenlabels.models.tokenprop import TokenDecoder, TokenProp

WEIGHT = 0.3
SIZES = {"deit": (32, 48), "swin": (64, 32), "pvt": (64, 96), "mixer": (64, 96)}
GRIDS = {"deit": (2, 3), "swin": (16, 8), "pvt": (16, 24), "mixer": (2, 3)}
cases = pytest.mark.parametrize("case", SIZES)


def build(case: str = "deit", **arguments: Any) -> tuple[TokenProp, Tensor]:
    """The wrapper in training, without anything random in its model, and 4 images for it."""
    model = plain(case)
    for part in model.modules():  # of PVT and Swin
        if type(part).__name__ == "DropPath":
            part.drop_prob = 0.0
    torch.manual_seed(1)
    return TokenProp(model, SIZES[case], weight=WEIGHT, **arguments).train(), torch.randn(4, 3, *SIZES[case])


def tokens_of(case: str, model: Any, images: Tensor) -> Tensor:
    """On their grid, channels first."""
    tokens = (model.stem if case == "mixer" else model.patch_embed)(images)
    return tokens.reshape(len(images), *GRIDS[case], -1).permute(0, 3, 1, 2)


def reconstruction_by_hand(tokens: Tensor, images: Tensor, decoder: TokenDecoder) -> Tensor:
    wanted = functional.interpolate(images, (64, 64), mode="bilinear", antialias=True)
    return WEIGHT * (decoder(tokens) - wanted).square().mean()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# The decoder


@pytest.mark.parametrize("width", [1, 2, 4])
def test_table_16_layer_by_layer(width: int) -> None:
    shapes = []
    decoder = TokenDecoder(24, width=width)
    for part in (decoder.proj, *decoder.layers):
        part.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    assert decoder(torch.randn(1, 24, 14, 14)).shape == (1, 3, 64, 64)
    rows = [(256, 16), (256, 16), (64, 32), (64, 32), (16, 64)]
    assert shapes == [(196, 16, 16), *((width * channels, side, side) for channels, side in rows), (3, 64, 64)]
    kernels = [part.kernel_size for part in decoder.layers.modules() if isinstance(part, nn.Conv2d)]
    assert kernels == [(3, 3), (1, 1), (3, 3), (3, 3), (3, 3)]


@pytest.mark.parametrize("scale", [64, 128, 256])
@pytest.mark.parametrize("in_size", [8, 16])
def test_more_upsampling_makes_larger_images(scale: int, in_size: int) -> None:
    assert TokenDecoder(6, scale, in_size=in_size)(torch.randn(1, 6, 3, 5)).shape == (1, 3, scale, scale)


@torch.no_grad()
def test_the_decoder_by_hand() -> None:
    decoder, maps = TokenDecoder(6), torch.randn(2, 6, 16, 16)
    first, second, _, third, _, last = decoder.layers
    x = torch.einsum("oc,bchw->bohw", decoder.proj.weight[:, :, 0, 0], maps) + decoder.proj.bias[:, None, None]

    def conv(block: Any, x: Tensor) -> Tensor:
        return functional.conv2d(x, block.conv.weight, block.conv.bias, padding=1)

    shortcut = torch.einsum("oc,bchw->bohw", first.shortcut.weight[:, :, 0, 0], x)
    x = (shortcut + conv(first, x)).clamp_min(0)
    x = (x + conv(second, x)).clamp_min(0)
    x = x.reshape(2, 64, 2, 2, 16, 16).permute(0, 1, 4, 2, 5, 3).reshape(2, 64, 32, 32)
    x = (x + conv(third, x)).clamp_min(0)
    x = x.reshape(2, 16, 2, 2, 32, 32).permute(0, 1, 4, 2, 5, 3).reshape(2, 16, 64, 64)
    torch.testing.assert_close(decoder(maps), functional.conv2d(x, last.weight, last.bias, padding=1))


@pytest.mark.parametrize("grid", [(14, 14), (56, 56), (1, 1), (7, 40)])
def test_every_token_of_any_grid_counts_and_flat_ones_stay_flat(grid: tuple[int, int]) -> None:
    decoder, maps = TokenDecoder(4), torch.randn(1, 4, *grid, requires_grad=True)
    decoder(maps).square().sum().backward()
    assert maps.grad is not None
    assert maps.grad.abs().sum(dim=1).min() > 0
    flat = torch.ones(1, 4, *grid)
    torch.testing.assert_close(decoder(flat), decoder(torch.ones(1, 4, 16, 16)))
    assert decoder.bfloat16()(maps.detach().bfloat16()).dtype == torch.bfloat16


# The wrapper


@cases
def test_outputs_are_the_models_and_gradients_add_up(case: str) -> None:
    wrapper, images = build(case)
    model = copy.deepcopy(wrapper.model)
    plain_outputs = model(images)
    plain_outputs.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    by_hand = reconstruction_by_hand(tokens_of(case, model, images), images, copy.deepcopy(wrapper.decoder))
    by_hand.backward()

    outputs, reconstruction = wrapper(images)
    assert torch.equal(outputs, plain_outputs)
    torch.testing.assert_close(reconstruction, by_hand)
    (outputs.square().mean() + reconstruction).backward()
    of_embedding = gradients(model)
    assert 0 < len(of_embedding) < len(expected)
    for name, gradient in gradients(wrapper.model).items():
        torch.testing.assert_close(
            gradient, expected[name] + of_embedding.get(name, torch.tensor(0.0)), rtol=1e-3, atol=1e-6
        )
    assert [name for name, p in wrapper.named_parameters() if p.grad is None] == [], "stops distributed training"


@cases
@torch.no_grad()
def test_evaluation_and_the_student_know_nothing_of_it(case: str) -> None:
    wrapper, images = build(case)
    untouched = plain(case)
    assert wrapper.model.state_dict().keys() == untouched.state_dict().keys()
    untouched.load_state_dict(wrapper.model.state_dict())
    wrapper.eval()
    assert torch.equal(wrapper(images), untouched.eval()(images))
    assert torch.equal(wrapper.model(images), untouched(images))
    assert {name.split(".")[0] for name in wrapper.state_dict()} == {"model", "decoder"}


@torch.no_grad()
def test_building_leaves_statistics_and_modes_alone() -> None:
    model = LVViT(32, num_classes=3, embed_dim=24, depth=1, num_heads=2).train()
    before = copy.deepcopy(model.state_dict())
    TokenProp(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("kind", ["dense", "dense-swin", "lvvit", "aligned"])
@torch.no_grad()
def test_tokens_are_taken_before_they_are_mixed(kind: str, make_lvvit: Callable[..., LVViT]) -> None:
    if kind == "lvvit":
        inner: Any = make_lvvit(img_size=(32, 48)).train()
        backbone, images, plan, case = inner, torch.randn(4, 3, 32, 48), mixtoken(inner), "deit"
    else:
        case = "swin" if kind == "dense-swin" else "deit"
        inner, images = dense(case)
        backbone, plan = inner.model, mixtoken(inner)
        inner = TLAlign(inner) if kind == "aligned" else inner
    wrapper = TokenProp(inner, weight=WEIGHT).train()
    assert wrapper.image_size == tuple(images.shape[2:])
    torch.manual_seed(5)  # of dropped paths
    expected = inner(images, plan)
    torch.manual_seed(5)
    outputs, reconstruction = wrapper(images, plan)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert wrapper.training
    if kind == "lvvit":
        backbone = copy.deepcopy(backbone)  # batch norm looks at this batch alone
    by_hand = reconstruction_by_hand(tokens_of(case, backbone, images), images, wrapper.decoder)
    torch.testing.assert_close(reconstruction, by_hand)
    if kind != "aligned":
        mixed = mixtoken_by_hand(plan, tokens_of(case, backbone, images))
        assert abs(reconstruction_by_hand(mixed, images, wrapper.decoder) - by_hand) > 1e-6
        assert wrapper.grid == inner.grid
        assert wrapper.aux_head is inner.aux_head


def mixtoken_by_hand(plan: MixPlan, maps: Tensor) -> Tensor:
    own = functional.interpolate(plan.own[:, None], maps.shape[2:])
    return own * maps + (1 - own) * maps[plan.partner]


@torch.no_grad()
def test_an_embedding_with_a_normalisation_around_it() -> None:
    model = plain("deit")
    model.patch_embed = nn.Sequential(model.patch_embed, nn.LayerNorm(192))
    wrapper = TokenProp(model, (32, 48), weight=WEIGHT).train()
    images = torch.randn(2, 3, 32, 48)
    by_hand = reconstruction_by_hand(tokens_of("deit", model, images), images, wrapper.decoder)
    torch.testing.assert_close(wrapper(images)[1], by_hand)


def test_an_average_of_weights_copies_the_wrapper_and_a_copy_hooks_itself() -> None:
    wrapper, images = build()
    wrapper(images)[1].backward()  # nothing of the graph stays behind
    average = ModelEmaV3(wrapper, decay=0.5)
    average.update(wrapper)
    assert average(images).shape == (4, NUM_CLASSES)
    duplicate: TokenProp = pickle.loads(pickle.dumps(copy.deepcopy(wrapper)))
    expected = wrapper(images)[1]
    with torch.no_grad():
        wrapper.model.patch_embed.proj.weight.zero_()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(duplicate(images)[1], expected)
    assert wrapper._hook.tokens is duplicate._hook.tokens is None
    assert wrapper(images)[1] != expected
    student = copy.deepcopy(wrapper.model).train()
    student(images).sum().backward()
    pickle.dumps(student)


def test_nothing_is_kept_after_a_failure_or_outside_of_the_wrapper() -> None:
    wrapper, images = build()

    def fail(*_: object) -> None:
        raise RuntimeError("in a block")

    with wrapper.model.blocks[1].register_forward_hook(fail), pytest.raises(RuntimeError, match="in a block"):  # type: ignore[index, operator, union-attr]
        wrapper(images)
    wrapper.model(images)
    assert (wrapper._hook.is_on, wrapper._hook.tokens) == (False, None)


def test_one_graph() -> None:
    wrapper, images = build()
    counter = CompileCounter()  # type: ignore[no-untyped-call]
    compiled = torch.compile(wrapper, backend=counter, fullgraph=True)
    for _ in range(2):
        for output, expected in zip(compiled(images), wrapper(images), strict=True):
            torch.testing.assert_close(output, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", ["deit", "swin"])
def test_checkpointed_activations_give_the_same_gradients(case: str) -> None:
    wrapper, images = build(case)
    found = []
    for enable in (False, True):
        wrapper.zero_grad()
        wrapper.set_grad_checkpointing(enable)
        outputs, reconstruction = wrapper(images)
        (outputs.square().sum() + reconstruction).backward()
        found.append(gradients(wrapper))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("case", ["deit", "swin"])
def test_half_precision(case: str) -> None:
    wrapper, images = build(case)
    expected = wrapper(images)[1]
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction = wrapper(images)[1]
    assert reconstruction.dtype == torch.float32
    torch.testing.assert_close(reconstruction, expected, rtol=0.02, atol=0)
    reconstruction.backward()
    halves = TokenProp(plain("deit").bfloat16()).train()
    assert halves.decoder.proj.weight.dtype == torch.bfloat16
    assert halves(torch.randn(2, 3, 32, 48).bfloat16())[1].dtype == torch.float32


def test_what_an_optimiser_and_a_trainer_ask_for() -> None:
    wrapper, _ = build()
    assert wrapper.num_classes == NUM_CLASSES
    assert (wrapper.grid, wrapper.aux_head) == (None, None)
    assert "model.pos_embed" in wrapper.no_weight_decay() & dict(wrapper.named_parameters()).keys()


@pytest.mark.parametrize("kind", ["l1", "perceptual", "contextual"])
def test_every_loss_trains_the_embedding_and_the_decoder(kind: Any) -> None:
    wrapper, images = build(loss=kind, vgg=None if kind == "l1" else vgg())
    compiled = torch.compile(wrapper, backend="eager", fullgraph=True)
    _, reconstruction = compiled(images)
    reconstruction.backward()
    torch.testing.assert_close(reconstruction, wrapper(images)[1])
    trained = {name.split(".")[0] + "." + name.split(".")[1] for name in gradients(wrapper)}
    assert trained == {"model.patch_embed", "decoder.proj", "decoder.layers"}
