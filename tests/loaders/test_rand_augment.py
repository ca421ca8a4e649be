"""What RandAugment draws, against timm: strings, levels, chances; and its geometry as one map."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import auto_augment
from torch import Tensor

from loaders.augment_ops import COLOR_OPS, Op
from loaders.rand_augment import NOT_APPLIED, UNIFORMS_PER_LAYER, AugmentDraw, RandAugment
from tokenlabels.affine import apply_affine, rotation, shear, translation

ENHANCED = ("Color", "Contrast", "Brightness", "Sharpness")
DEFAULT = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", *ENHANCED)
GEOMETRIC = ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
INCREASING = [f"{name}Increasing" if name in ("Posterize", "Solarize", *ENHANCED) else name for name in DEFAULT]
OP_OF = {
    "TranslateXRel": Op.TRANSLATE_X,
    "TranslateYRel": Op.TRANSLATE_Y,
    "ShearX": Op.SHEAR_X,
    "ShearY": Op.SHEAR_Y,
    "AutoContrast": Op.AUTO_CONTRAST,
    "SolarizeAdd": Op.SOLARIZE_ADD,
} | {
    name: Op[name.removesuffix("Increasing").upper()]
    for name in {*DEFAULT, *INCREASING} - {"AutoContrast", "SolarizeAdd"}
}
SIZE_PX = (48, 64)


def random_numbers(num: int, augment: RandAugment, seed: int = 0) -> Tensor:
    return torch.rand(num, augment.num_uniforms, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_op(op: Op, argument: float, num_layers: int = 1) -> AugmentDraw:
    ops = torch.full((1, num_layers), NOT_APPLIED)
    ops[0, -1] = op
    arguments = torch.zeros(1, num_layers)
    arguments[0, -1] = argument
    return AugmentDraw.from_ops(ops, arguments)


def timm_levels(name: str, magnitude: float, negate: bool, monkeypatch: pytest.MonkeyPatch) -> float:
    """The argument of timm's operation, 0 where it has none."""
    monkeypatch.setattr(random, "random", lambda: 0.75 if negate else 0.25)
    level: Callable[..., tuple[float]] | None = vars(auto_augment)["LEVEL_TO_ARG"][name]
    return 0.0 if level is None else float(level(magnitude, {})[0])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("rand", {"magnitude": 10.0, "num_layers": 2, "prob": 0.5, "magnitude_std": 0.0, "magnitude_max": 10.0}),
        ("rand-m9-mstd0.5-inc1", {"magnitude": 9.0, "magnitude_std": 0.5, "op_names": (*INCREASING, *GEOMETRIC)}),
        ("rand-m9-mstd0.5", {"op_names": (*DEFAULT, *GEOMETRIC), "weights": None}),
        ("rand-n3-p0.8-m5-inc0", {"num_layers": 3, "prob": 0.8, "magnitude": 5.0, "op_names": (*DEFAULT, *GEOMETRIC)}),
        ("rand-mmax15-m12", {"magnitude": 12.0, "magnitude_max": 15.0}),
        ("rand-mstd101", {"magnitude_std": float("inf")}),
    ],
)
def test_strings_are_read_as_timm_does(config: str, expected: dict[str, Any]) -> None:
    augment = RandAugment.parse(config)
    assert {name: getattr(augment, name) for name in expected} == expected


def test_weighted_choice_keeps_timm_s_weights() -> None:
    policy = auto_augment.rand_augment_transform("rand-m7-tweights")
    augment = RandAugment.parse("rand-m7-tweights")
    assert augment.weights == tuple(policy.choice_weights)
    assert augment.op_names == tuple(op.name for op in policy.ops)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("augmix-m5-w4", "AutoAugment, AugMix and 3-Augment are not built"),
        ("original-mstd0.5", "AutoAugment, AugMix and 3-Augment are not built"),
        ("", "'rand' and"),
        ("rand-t3a", "no Desaturate, GaussianBlur"),
        ("rand-t3aw", "no Desaturate, GaussianBlur"),
        ("rand-tmine", "got 'tmine'"),
        ("rand-w0", "got 'w0'"),
        ("rand-m9.5", "got 'm9.5'"),
        ("rand-mstdinf", "got 'mstdinf'"),
        ("rand-m9-color", "got 'color'"),
        ("rand--m9", "got ''"),
        ("rand-m9-m5", "got m twice"),
        ("rand-n0", "num_layers"),
        ("rand-p2", "prob"),
        ("rand-n16-tweights", "at most the number of operations"),
    ],
)
def test_what_is_not_understood_is_refused(config: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandAugment.parse(config)


@pytest.mark.parametrize("changes", [{"magnitude": float("nan")}, {"magnitude_std": -1.0}, {"magnitude_max": "10"}])
def test_strengths_must_be_numbers(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        RandAugment(("Rotate",), **changes)


def test_weights_must_fit_the_operations() -> None:
    with pytest.raises(ValueError, match="2 numbers, one per operation"):
        RandAugment(("Rotate", "ShearX"), weights=(1.0,))


@pytest.mark.parametrize("negate", [False, True], ids=["positive", "negative"])
@pytest.mark.parametrize("name", sorted({*DEFAULT, *INCREASING, *GEOMETRIC}))
def test_arguments_are_timm_s(name: str, negate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    augment = RandAugment((name,), 1, prob=1, magnitude=15, magnitude_std=float("inf"), magnitude_max=13)
    shares = torch.linspace(0, 1, 301, dtype=torch.float64)[:-1]
    uniforms = torch.stack([shares, shares, shares, torch.full_like(shares, 0.75 if negate else 0.25)], dim=1)
    draw = augment.draw(uniforms)
    expected = [timm_levels(name, min(15 * share, 13.0), negate, monkeypatch) for share in shares.tolist()]
    if name.startswith("Posterize"):
        expected = [max(bits, 1) for bits in expected]
    torch.testing.assert_close(draw.arguments[:, 0], torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert (draw.ops == OP_OF[name]).all()


def test_a_draw_follows_its_random_numbers_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    augment = RandAugment.parse("rand-m6-mstd101-n3-p0.4-inc1")
    uniforms = random_numbers(60, augment)
    draw = augment.draw(uniforms)
    for sample, numbers in enumerate(uniforms.tolist()):
        for layer in range(3):
            choice, apply, strength, sign = numbers[layer * UNIFORMS_PER_LAYER :][:UNIFORMS_PER_LAYER]
            name = augment.op_names[int(choice * 15)]
            op, argument = NOT_APPLIED, 0.0
            if apply < 0.4:
                op, argument = OP_OF[name], timm_levels(name, 6 * strength, sign > 0.5, monkeypatch)
            assert draw.ops[sample, layer] == op
            assert draw.arguments[sample, layer] == pytest.approx(argument, rel=1e-6)


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-53], ids=["lowest", "highest"])
@pytest.mark.parametrize("config", ["rand-m9-mstd0.5-inc1-p1", "rand-m9-mstd0.5-tweights-n15-p1"])
def test_the_ends_of_the_random_numbers_are_drawn_too(config: str, extreme: float) -> None:
    augment = RandAugment.parse(config)
    draw = augment.draw(torch.full((2, augment.num_uniforms), extreme, dtype=torch.float64))
    assert draw.arguments.isfinite().all()
    assert (draw.ops >= 0).all()
    if augment.weights is not None:
        assert draw.ops[0].sort().values.tolist() == list(range(15))


def timm_draws(config: str, num: int) -> list[list[tuple[str, float]]]:
    """What timm applies to each of `num` images, in order: operation and argument."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    policy = auto_augment.rand_augment_transform(config)
    for op in policy.ops:
        op.aug_fn = lambda done, *argument, _name=op.name, **_: [
            *done,
            (_name, float(argument[0]) if argument else 0.0),
        ]
    return [policy([]) for _ in range(num)]


def our_draws(config: str, num: int) -> list[list[tuple[str, float]]]:
    augment = RandAugment.parse(config)
    draw = augment.draw(random_numbers(num, augment))
    names = {OP_OF[name]: name for name in augment.op_names}
    return [
        [(names[Op(op)], argument) for op, argument in zip(ops, arguments, strict=True) if op != NOT_APPLIED]
        for ops, arguments in zip(draw.ops.tolist(), draw.arguments.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    "config", ["rand-m9-mstd0.5-inc1", "rand-m8-mstd101-n3-p0.7", "rand-m9-mstd1-tweights-n4-p0.9"]
)
def test_chances_are_those_of_timm(config: str) -> None:
    num = 6000
    theirs, ours = timm_draws(config, num), our_draws(config, num)
    for count in range(6):  # how many of the layers were applied; 5 standard deviations are below 0.05
        share, our_share = (sum(len(done) == count for done in draws) / num for draws in (theirs, ours))
        assert our_share == pytest.approx(share, abs=0.05)
    for place in (0, 1):  # which operation came first, second
        counts, our_counts = (
            Counter(done[place][0] for done in draws if len(done) > place) for draws in (theirs, ours)
        )
        for name in counts | our_counts:
            assert our_counts[name] / num == pytest.approx(counts[name] / num, abs=0.04)
    for name in ("Rotate", "ShearX"):  # how strong it was, sign included
        arguments, our_arguments = (
            np.sort([argument for done in draws for op, argument in done if op == name]) for draws in (theirs, ours)
        )
        assert len(our_arguments) > 300
        levels = np.linspace(-30, 30, 241) * (1 if name == "Rotate" else 0.01)
        cdf, our_cdf = (np.searchsorted(values, levels) / len(values) for values in (arguments, our_arguments))
        assert np.abs(cdf - our_cdf).max() < 0.15


@pytest.mark.parametrize("config", ["rand-m5-mstd1.5-p1", "rand-m9-mstd2-p1", "rand-m9-mstd2-mmax12-p1"])
def test_strengths_scatter_as_with_timm(config: str) -> None:
    shares = np.linspace(0.02, 0.98, 25)
    theirs, ours = (
        np.quantile([abs(argument) / 3 for done in draws for op, argument in done if op == "Rotate"], shares)
        for draws in (timm_draws(config, 20_000), our_draws(config, 100_000))
    )
    assert np.abs(theirs - ours).max() < 0.3  # standard deviations of quantiles of 2,600 values are below 0.09


def test_weighted_operations_come_once() -> None:
    for done in our_draws("rand-m9-tweights-n6-p1", 200):
        assert len({name for name, _ in done}) == 6


@pytest.mark.parametrize(
    "uniforms",
    [
        torch.zeros(2, 8),
        torch.zeros(2, 7, dtype=torch.float64),
        torch.zeros(8, dtype=torch.float64),
        torch.ones(2, 8, dtype=torch.float64),
        np.zeros((2, 8)),
    ],
    ids=["float32", "too few", "one sample", "1 itself", "numpy"],
)
def test_other_random_numbers_are_refused(uniforms: Any) -> None:
    with pytest.raises(ValueError, match="uniforms must be"):
        RandAugment.parse("rand").draw(uniforms)


def test_runs_name_every_color_operation_once() -> None:
    augment = RandAugment.parse("rand-m9-mstd0.5-inc1-n3")
    draw = augment.draw(random_numbers(200, augment))
    listed = {
        (sample, run.layer): run.op
        for run in draw.color_runs
        for sample in draw.color_rows[run.start : run.stop].tolist()
    }
    assert len(listed) == len(draw.color_rows)
    assert listed == {
        (sample, layer): op
        for sample, ops in enumerate(draw.ops.tolist())
        for layer, op in enumerate(ops)
        if op in COLOR_OPS
    }
    assert [run.layer for run in draw.color_runs] == sorted(run.layer for run in draw.color_runs)


@pytest.mark.parametrize(
    ("ops", "arguments"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 2)),
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 1)),
        (torch.full((2, 2), 15), torch.zeros(2, 2)),
        (torch.full((2, 2), -2), torch.zeros(2, 2)),
    ],
    ids=["int32", "shapes", "unknown operation", "below none"],
)
def test_other_draws_are_refused(ops: Tensor, arguments: Tensor) -> None:
    with pytest.raises(ValueError, match=r"(ops|arguments) must be"):
        AugmentDraw.from_ops(ops, arguments)


def test_an_empty_batch_is_drawn() -> None:
    draw = RandAugment.parse("rand").draw(torch.empty(0, 8, dtype=torch.float64))
    assert len(draw) == 0
    assert draw.affine(SIZE_PX).shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("op", "argument", "expected"),
    [
        (Op.ROTATE, 30.0, rotation(torch.tensor(30.0), SIZE_PX)),
        (Op.SHEAR_X, 0.3, shear(torch.tensor(0.3), torch.tensor(0.0), SIZE_PX)),
        (Op.SHEAR_Y, -0.2, shear(torch.tensor(0.0), torch.tensor(-0.2), SIZE_PX)),
        (Op.TRANSLATE_X, -0.4, translation(torch.tensor(-0.4), torch.tensor(0.0))),
        (Op.TRANSLATE_Y, 0.1, translation(torch.tensor(0.0), torch.tensor(0.1))),
        (Op.INVERT, 0.0, torch.eye(2, 3)),
        (Op.COLOR, 1.9, torch.eye(2, 3)),
    ],
)
def test_one_operation_is_its_map(op: Op, argument: float, expected: Tensor) -> None:
    draw = one_op(op, argument, num_layers=2)
    torch.testing.assert_close(draw.affine(SIZE_PX)[0], expected, rtol=0, atol=1e-7)
    assert draw.is_geometric.tolist() == [op not in COLOR_OPS]
    assert draw.geometric_rows.tolist() == ([0] if op not in COLOR_OPS else [])


@settings(deadline=None, max_examples=30)
@given(
    layers=st.lists(st.tuples(st.sampled_from(list(Op)), st.floats(-0.5, 0.5, width=32)), min_size=1, max_size=4),
    size_px=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
)
def test_layers_are_followed_from_the_last_to_the_first(
    layers: list[tuple[Op, float]], size_px: tuple[int, int]
) -> None:
    draw = AugmentDraw.from_ops(
        torch.tensor([[op for op, _ in layers]]), torch.tensor([[argument for _, argument in layers]])
    )
    points = torch.rand(7, 2, generator=torch.Generator().manual_seed(0))
    expected = points
    for op, argument in reversed(layers):  # what was done last is undone first
        expected = apply_affine(one_op(op, argument).affine(size_px)[0], expected)
    height, width = size_px
    aspect = max(height / width, width / height)
    torch.testing.assert_close(apply_affine(draw.affine(size_px)[0], points), expected, rtol=1e-5, atol=1e-6 * aspect)


def test_a_sample_has_a_size_of_its_own() -> None:
    augment = RandAugment.parse("rand-m9-mstd0.5-p1")
    draw = augment.draw(random_numbers(20, augment))
    for row in range(20):
        assert torch.equal(draw.sample_affine(row, width_px=640, height_px=480), draw.affine((480, 640))[row])


@pytest.mark.gpu
def test_a_draw_moves_to_the_device(cuda: torch.device) -> None:
    augment = RandAugment.parse("rand-m9-mstd0.5-inc1")
    draw = augment.draw(random_numbers(64, augment))
    moved = draw.to(cuda, non_blocking=True)
    assert {t.device.type for t in (moved.ops, moved.arguments, moved.color_rows, moved.geometric_rows)} == {"cuda"}
    assert torch.equal(moved.is_geometric.cpu(), draw.is_geometric)
    torch.testing.assert_close(moved.affine(SIZE_PX).cpu(), draw.affine(SIZE_PX))
