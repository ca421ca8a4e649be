"""MoTo is equation 5 of the paper, for any map, in any precision, compiled and not."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jobs.bench.moto import literal_modulation, literal_moto
from tokenlabels.models.moto import MoTo, Partition, sampling_grid

HALF_WIDE = [torch.float16, torch.bfloat16]
partitions = pytest.mark.parametrize("partition", ["soft", "hard"])


def make(channels: int = 6, num_entities: int = 4, partition: Partition = "soft", **arguments: Any) -> MoTo:
    """With weights that no symmetry hides, and layouts that are not nearly even."""
    torch.manual_seed(0)
    moto = MoTo(channels, num_entities, partition, **{"temperature": 2.0, **arguments})
    with torch.no_grad():
        moto.beta.normal_()
        moto.alpha.normal_()
    return moto


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def passes(run: Any, x: Tensor, moto: MoTo) -> list[Tensor]:
    """What comes out, and the gradients of the map and of all weights that have one."""
    x = x.detach().requires_grad_()
    out = run(x)
    weights = [weight for weight in moto.parameters() if weight.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, [x, *weights], noise(*out.shape, dtype=out.dtype))]


class TestAgainstTheLoop:
    @given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_values_and_gradients(self, batch: int, c: int, height: int, width: int, n: int, last: bool) -> None:
        moto = make(c, min(n, height * width)).double()
        x = noise(batch, c, height, width)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        # with one position there is no deviation, and the loop's gradient of it is infinite
        if height * width == 1:
            torch.testing.assert_close(moto(x), literal_moto(moto, x), rtol=0, atol=1e-11)
            return
        for ours, loop in zip(passes(moto, x, moto), passes(lambda y: literal_moto(moto, y), x, moto), strict=True):
            torch.testing.assert_close(ours, loop, rtol=1e-11, atol=1e-11)

    def test_a_hard_partition(self) -> None:
        moto = make(partition="hard").double()
        x = noise(2, 6, 11, 9)
        assert (moto.layout(x).sum(dim=(2, 3)) > 0).all()  # without a position the loop divides by nothing
        for ours, loop in zip(passes(moto, x, moto), passes(lambda y: literal_moto(moto, y), x, moto), strict=True):
            torch.testing.assert_close(ours, loop, rtol=1e-11, atol=1e-11)

    def test_gradients_of_a_small_map_are_those_of_differences(self) -> None:
        moto = make(2, 2).double()
        assert torch.autograd.gradcheck(moto, (noise(1, 2, 3, 2).requires_grad_(),))

    @pytest.mark.parametrize("channels", [16, 384])
    def test_an_offset_of_100_as_it_is_initialised(self, channels: int) -> None:
        for seed in range(5):
            torch.manual_seed(seed)
            moto, x = MoTo(channels), torch.randn(1, channels, 14, 14) + 100
            ours = moto(x)
            torch.testing.assert_close(ours, literal_moto(moto.double(), x.double()).float(), rtol=0, atol=1e-4)

    @partitions
    @pytest.mark.parametrize("noise_std", [1e-2, 1e-3, 1e-4])
    def test_a_flat_entity_far_from_the_mean_of_its_channel(self, partition: Partition, noise_std: float) -> None:
        """Half of the map is sky. What little varies there is its standard deviation."""
        torch.manual_seed(0)
        moto = MoTo(3, 2, partition, temperature=10.0)
        x = torch.randn(1, 3, 8, 8) * noise_std
        x[..., :4] += 5
        ours, layout = moto(x), moto.layout(x)
        expected = literal_modulation(moto.double(), x.double(), layout.double())
        assert expected.abs().max() < 10
        torch.testing.assert_close(ours, expected.float(), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
    def test_an_offset_costs_no_digits(self, offset: float) -> None:
        moto = make(num_entities=8, temperature=0.1)
        with torch.no_grad():
            moto.u.mul_(1e-3)  # else the offset, squared, leaves entities without any probability, and the loop 0 / 0
        x = noise(2, 6, 20, 24, dtype=torch.float32) * torch.linspace(0.5, 2, 6)[:, None, None] + offset
        ours, layout = moto(x), moto.layout(x)
        moto.double()
        for expected in (literal_moto(moto, x.double()), literal_modulation(moto, x.double(), layout.double())):
            torch.testing.assert_close(ours, expected.float(), rtol=0, atol=1e-4)


class TestLayout:
    @partitions
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF_WIDE], ids=str)
    def test_shares_of_a_position_sum_to_one(self, partition: Partition, dtype: torch.dtype) -> None:
        layout = make(partition=partition).to(dtype).layout(noise(2, 6, 5, 7).to(dtype))
        assert (layout.shape, layout.dtype) == ((2, 4, 5, 7), torch.float32)
        torch.testing.assert_close(layout.sum(dim=1), torch.ones(2, 5, 7))
        assert (partition == "hard") == bool(((layout == 0) | (layout == 1)).all())

    def test_hard_is_the_most_probable_of_soft(self) -> None:
        x = noise(2, 6, 5, 7, dtype=torch.float32)
        soft, hard = (make(partition=partition).layout(x) for partition in ("soft", "hard"))
        assert torch.equal(soft.argmax(dim=1), hard.argmax(dim=1))

    def test_a_low_temperature_is_nearly_even(self) -> None:
        layout = make(temperature=1e-6).layout(noise(1, 6, 5, 7, dtype=torch.float32))
        torch.testing.assert_close(layout, torch.full_like(layout, 0.25), rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        ("num_points", "size", "grid"),
        [
            pytest.param(8, (14, 14), (2, 4), id="square: wider of two"),
            pytest.param(8, (28, 14), (4, 2), id="tall"),
            pytest.param(8, (4, 60), (1, 8), id="very wide"),
            pytest.param(16, (7, 7), (4, 4), id="square number"),
            pytest.param(7, (14, 14), (1, 7), id="prime"),
            pytest.param(7, (14, 7), (7, 1), id="prime, tall"),
            pytest.param(8, (2, 6), (2, 4), id="as the map has room"),
            pytest.param(6, (2, 100), (1, 6), id="squarest cells"),
            pytest.param(7, (3, 3), (1, 7), id="no room: cells share positions"),
            pytest.param(1, (1, 1), (1, 1), id="one"),
        ],
    )
    def test_points_are_on_a_grid(self, num_points: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
        assert sampling_grid(num_points, size) == grid


class TestHalfWide:
    @partitions
    @pytest.mark.parametrize("dtype", HALF_WIDE, ids=str)
    @pytest.mark.parametrize("offset", [0.0, 1e3, 3e4])
    def test_large_offsets_make_no_nan(self, partition: Partition, dtype: torch.dtype, offset: float) -> None:
        moto = make(partition=partition).to(dtype)
        out, *gradients = passes(moto, (noise(2, 6, 8, 8) + offset).to(dtype), moto)
        assert out.dtype == dtype
        assert out.isfinite().all()
        # what remains of the noise is rounded to nothing in places; gradients there are above the largest half
        assert not any(gradient.isnan().any() for gradient in gradients)

    @pytest.mark.parametrize("dtype", HALF_WIDE, ids=str)
    def test_inside_it_is_float32(self, dtype: torch.dtype) -> None:
        moto = make().to(dtype)
        x = noise(2, 6, 8, 8).to(dtype)
        torch.testing.assert_close(moto(x), copy.deepcopy(moto).float()(x.float()).to(dtype), rtol=0, atol=0)

    def test_autocast_changes_nothing(self) -> None:
        moto, x = make(), noise(2, 6, 8, 8, dtype=torch.float32)
        expected = moto(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(moto(x), expected)
            assert torch.equal(moto.layout(x), make().layout(x))
            narrow = moto(x.bfloat16())
        assert narrow.dtype == torch.bfloat16


class TestExtremes:
    @partitions
    @pytest.mark.parametrize("value", [0.0, 100.1])
    def test_no_variance(self, partition: Partition, value: float) -> None:
        moto = make(partition=partition)
        x = torch.full((2, 6, 5, 5), value)
        out, *gradients = passes(moto, x, moto)
        torch.testing.assert_close(out, torch.einsum("nc,bnhw->bchw", moto.alpha, moto.layout(x)), atol=1e-4, rtol=0)
        assert all(gradient.isfinite().all() for gradient in gradients)

    def test_entities_without_positions(self) -> None:
        moto = make(num_entities=8, partition="hard")
        with torch.no_grad():
            moto.f.bias[3] = 1e6
        x = noise(2, 6, 5, 5, dtype=torch.float32)
        assert (moto.layout(x).sum(dim=(2, 3)) > 0).sum() == 2
        out, *gradients = passes(moto, x, moto)
        normal = torch.nn.functional.instance_norm(x, eps=0)
        expected = normal * moto.beta[3, :, None, None] + moto.alpha[3, :, None, None]
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
        assert all(gradient.isfinite().all() for gradient in gradients)

    def test_entities_of_vanishing_probability(self) -> None:
        moto = make(num_entities=8)
        with torch.no_grad():
            moto.f.bias[:4] = torch.tensor([15.0, 30.0, 45.0, 1e4])  # shares down to 1e-38 and 0
        for value in passes(moto, noise(2, 6, 5, 5, dtype=torch.float32), moto):
            assert value.isfinite().all()

    @partitions
    def test_one_pixel(self, partition: Partition) -> None:
        moto = make(num_entities=1, partition=partition)
        out, *gradients = passes(moto, noise(3, 6, 1, 1, dtype=torch.float32), moto)
        torch.testing.assert_close(out, moto.alpha[0].expand(3, -1)[:, :, None, None].detach())
        assert all(gradient.isfinite().all() for gradient in gradients)


class TestParameters:
    @pytest.mark.parametrize(("channels", "num_entities"), [(3, 1), (96, 8), (384, 16)])
    def test_their_number(self, channels: int, num_entities: int) -> None:
        convolutions = 3 * num_entities * (9 * channels + 1)
        expected = convolutions + num_entities + 2 * num_entities * channels
        assert sum(weight.numel() for weight in MoTo(channels, num_entities).parameters()) == expected

    def test_beta_is_one_and_alpha_zero_in_the_beginning(self) -> None:
        moto = MoTo(5, 3)
        assert torch.equal(moto.beta, torch.ones(3, 5))
        assert torch.equal(moto.alpha, torch.zeros(3, 5))
        assert len(set(moto.u.tolist())) == 3

    def test_a_soft_partition_trains_all_and_a_hard_one_its_affine_part(self) -> None:
        for partition, expected in (("soft", 9), ("hard", 2)):
            moto = make(partition=partition)  # type: ignore[arg-type]
            moto(noise(2, 6, 5, 5, dtype=torch.float32)).square().sum().backward()
            grads = {name: weight.grad for name, weight in moto.named_parameters() if weight.requires_grad}
            assert len(grads) == expected
            assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())


class TestTools:
    def test_one_graph(self) -> None:
        moto, x = make(), noise(2, 6, 8, 6, dtype=torch.float32)
        torch.compiler.reset()
        compiled = torch.compile(moto, backend="aot_eager", fullgraph=True)
        for ours, eager in zip(passes(compiled, x, moto), passes(moto, x, moto), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
        torch.compiler.reset()

    def test_export(self) -> None:
        moto, x = make().eval(), noise(2, 6, 8, 6, dtype=torch.float32)
        torch.testing.assert_close(torch.export.export(moto, (x,)).module()(x), moto(x))

    def test_a_copy_is_equal(self) -> None:
        moto, x = make(), noise(2, 6, 8, 6, dtype=torch.float32)
        assert torch.equal(copy.deepcopy(moto)(x), moto(x))
        assert "6, 4, partition='soft', temperature=2.0" in repr(moto)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_the_memory_format_stays(self, memory_format: torch.memory_format) -> None:
        moto, x = make(), noise(2, 6, 8, 9, dtype=torch.float32)
        out = moto(x.contiguous(memory_format=memory_format))
        assert out.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(out, moto(x))

    @pytest.mark.gpu
    def test_on_a_gpu(self, cuda: torch.device) -> None:
        moto, x = make(), noise(2, 6, 8, 9, dtype=torch.float32)
        expected = moto(x)
        torch.testing.assert_close(moto.to(cuda)(x.to(cuda)).cpu(), expected, rtol=1e-2, atol=1e-2)


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            pytest.param({"channels": 0}, "channels must be an integer of at least 1, got 0", id="channels"),
            pytest.param(
                {"num_entities": 2.0}, "num_entities must be an integer of at least 1, got 2.0", id="entities"
            ),
            pytest.param({"partition": "firm"}, "partition must be one of 'soft', 'hard', got 'firm'", id="partition"),
            pytest.param({"temperature": 0}, r"temperature must be a number above 0 .*, got 0", id="no temperature"),
            pytest.param({"temperature": float("nan")}, "temperature must be a number above 0", id="nan"),
            pytest.param({"temperature": "hot"}, "temperature must be a number above 0", id="text"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MoTo(**{"channels": 4, **arguments})

    @pytest.mark.parametrize("method", ["forward", "layout"])
    @pytest.mark.parametrize(
        ("x", "message"),
        [
            pytest.param(torch.ones(2, 9, 9, 6), r"6 channels.*permute\(0, 3, 1, 2\)", id="channels last"),
            pytest.param(torch.ones(2, 5, 9, 9), r"6 channels, \[B, 6, H, W\], got float32 .*MoTo\(5\)", id="channels"),
            pytest.param(torch.ones(2, 81, 6), "tokens .* go back to their grid first", id="tokens"),
            pytest.param(torch.ones(2, 6, 9, 9, dtype=torch.int64), "floating map", id="integers"),
            pytest.param(torch.ones(2, 6, 1, 3), "4 entities are more than the 1 x 3 positions", id="few positions"),
            pytest.param(torch.ones(2, 6, 0, 3), "4 entities are more than the 0 x 3 positions", id="no positions"),
            pytest.param([[1.0]], "x must be a torch.Tensor", id="a list"),
        ],
    )
    def test_maps(self, method: str, x: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            getattr(make(), method)(x)
