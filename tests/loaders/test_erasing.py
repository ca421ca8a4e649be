"""Random Erasing against timm's own class, fed with our random numbers, and against counting pixels."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import random_erasing
from torch import Tensor

from loaders.erasing import MAX_AREA, MIN_AREA, NUM_TRIES, NUM_UNIFORMS, EraseMode, draw_boxes, erase, erased_tokens


def random_numbers(num: int, seed: int = 0) -> Tensor:
    return torch.rand(num, NUM_UNIFORMS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Replay:
    """Python's `random`, with given numbers: timm takes the place of a box only where its size fits."""

    def __init__(self, numbers: list[float]) -> None:
        self.apply, *rest = numbers
        self.tries = (rest[start : start + 4] for start in range(0, len(rest), 4))
        self.place: Iterator[float] = iter(())
        self.size: Iterator[float] = iter(())

    def random(self) -> float:
        return self.apply

    def uniform(self, low: float, high: float) -> float:
        number = next(self.size, None)
        if number is None:
            area, aspect, top, left = next(self.tries)
            number, self.size, self.place = area, iter((aspect,)), iter((top, left))
        return low + (high - low) * number

    def randint(self, low: int, high: int) -> int:
        return low + int(next(self.place) * (high - low + 1))


def mask_of(box: list[int], size_px: tuple[int, int]) -> Tensor:
    x0, y0, x1, y1 = box
    mask = torch.zeros(size_px, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize("size_px", [(224, 224), (32, 32), (64, 20), (9, 160), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
def test_boxes_are_those_of_timm(prob: float, size_px: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    uniforms = random_numbers(60)
    boxes = draw_boxes(uniforms, prob, size_px)
    theirs = random_erasing.RandomErasing(probability=prob, device="cpu")  # type: ignore[no-untyped-call]
    for numbers, box in zip(uniforms.tolist(), boxes.tolist(), strict=True):
        monkeypatch.setattr(random_erasing, "random", Replay(numbers))
        erased = theirs(torch.ones(1, *size_px))[0] == 0
        assert torch.equal(mask_of(box, size_px), erased)


def test_a_try_that_fits_ends_the_search() -> None:
    """In a narrow image most boxes are too wide: the first that fits is taken, whatever comes after."""
    uniforms = random_numbers(200)
    boxes = draw_boxes(uniforms, 1.0, (9, 160))
    later = uniforms.clone()
    later[:, -4:] = 0.5
    changed = (draw_boxes(later, 1.0, (9, 160)) != boxes).any(dim=1)
    assert 0 < changed.float().mean() < 0.5
    none_fits = torch.full((1, NUM_UNIFORMS), 0.999, dtype=torch.float64)
    none_fits[:, 0] = 0
    assert draw_boxes(none_fits, 1.0, (9, 160)).tolist() == [[0, 0, 0, 0]]


def test_area_and_place_have_the_chances_that_they_should() -> None:
    boxes = draw_boxes(random_numbers(4000), 0.25, (224, 224)).double()
    x0, y0, x1, y1 = boxes.unbind(1)
    is_erased = x1 > x0
    assert is_erased.double().mean() == pytest.approx(0.25, abs=0.04)
    area = ((x1 - x0) * (y1 - y0) / 224**2)[is_erased]
    assert area.mean() == pytest.approx((MIN_AREA + MAX_AREA) / 2, abs=0.02)
    assert area.min() > MIN_AREA * 0.95
    assert area.max() < MAX_AREA * 1.05
    centres = torch.stack([x0 + x1, y0 + y1])[:, is_erased] / 448
    torch.testing.assert_close(centres.mean(dim=1), torch.full((2,), 0.5, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("uniforms", "prob", "size_px", "message"),
    [
        (random_numbers(2).float(), 0.5, (8, 8), "uniforms must be float64"),
        (random_numbers(2)[:, :NUM_TRIES], 0.5, (8, 8), "uniforms must be float64"),
        (random_numbers(2), 1.5, (8, 8), "prob must be a number in 0..1"),
        (random_numbers(2), 0.5, (8, 0), "size_px must be two positive integers"),
    ],
    ids=["float32", "too few", "probability", "size"],
)
def test_other_draws_are_refused(uniforms: Tensor, prob: float, size_px: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_boxes(uniforms, prob, size_px)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_constant_erasing_fills_zeros(dtype: torch.dtype, inplace: bool) -> None:
    images = torch.randn(30, 3, 24, 40, generator=seeded()).to(dtype)
    before = images.clone()
    boxes = draw_boxes(random_numbers(30), 0.5, (24, 40))
    erased = erase(images, boxes, inplace=inplace)
    for sample, box in enumerate(boxes.tolist()):
        assert torch.equal(erased[sample], before[sample] * ~mask_of(box, (24, 40)))
    assert torch.equal(images, erased if inplace else before)


def test_noise_is_normal_and_stays_within_the_box() -> None:
    images = torch.full((200, 3, 24, 40), 7.0)
    boxes = draw_boxes(random_numbers(200), 0.5, (24, 40))
    erased = erase(images, boxes, "pixel", seeded())
    is_inside = torch.stack([mask_of(box, (24, 40)) for box in boxes.tolist()])[:, None].expand_as(images)
    assert (erased[~is_inside] == 7).all()
    noise = erased[is_inside]
    assert noise.mean().abs() < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert torch.equal(erased, erase(images, boxes, "pixel", seeded()))
    assert not torch.equal(erased, erase(images, boxes, "pixel", seeded(1)))


def test_a_batch_without_boxes_is_left_alone() -> None:
    images = torch.randn(3, 3, 8, 8, generator=seeded())
    for mode in get_args(EraseMode):
        assert torch.equal(erase(images, torch.zeros(3, 4, dtype=torch.int64), mode, seeded()), images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "images must be floating point"),
        ({"boxes": torch.zeros(3, 4, dtype=torch.int64)}, r"boxes must be \[2, 4\]"),
        ({"boxes": torch.zeros(2, 4)}, r"boxes must be int64 \[B, 4\] in pixels"),
        ({"mode": "rand"}, "mode must be one of const, pixel, got 'rand'"),
        ({"generator": 3}, "generator must be a torch.Generator"),
    ],
    ids=["bytes", "another batch", "float boxes", "mode", "generator"],
)
def test_what_cannot_be_erased_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"images": torch.zeros(2, 3, 8, 8), "boxes": torch.zeros(2, 4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        erase(**(arguments | changes))


@settings(deadline=None, max_examples=40)
@given(
    size_px=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    corners=st.tuples(*[st.integers(0, 40)] * 4),
)
def test_tokens_count_by_area(size_px: tuple[int, int], grid: tuple[int, int], corners: tuple[int, ...]) -> None:
    height, width = size_px
    (x0, x1), (y0, y1) = (
        sorted(min(c, size) for c in pair)
        for pair, size in zip((corners[:2], corners[2:]), (width, height), strict=True)
    )
    box = [x0, y0, x1, y1] if x1 > x0 and y1 > y0 else [0, 0, 0, 0]
    fine = mask_of(box, size_px).repeat_interleave(grid[0], 0).repeat_interleave(grid[1], 1)
    share = fine.double().reshape(grid[0], height, grid[1], width).mean(dim=(1, 3))
    assert torch.equal(erased_tokens(torch.tensor([box]), size_px, grid)[0], share > 0.5 + 1e-9)


def test_half_a_token_is_not_more_than_half() -> None:
    boxes = torch.tensor([[0, 0, 8, 16], [0, 0, 9, 16], [0, 0, 0, 0]])
    assert erased_tokens(boxes, (32, 32), (2, 2)).flatten(1).tolist() == [
        [False] * 4,
        [True, False, False, False],
        [False] * 4,
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["const", "pixel"])
def test_cuda_erases_the_same_boxes(cuda: torch.device, mode: EraseMode) -> None:
    images = torch.full((30, 3, 24, 40), 7.0)
    boxes = draw_boxes(random_numbers(30), 0.5, (24, 40))
    on_cuda, boxes_on_cuda = images.to(cuda), boxes.to(cuda)
    generator = torch.Generator(cuda).manual_seed(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        erased = erase(on_cuda, boxes_on_cuda, mode, generator)
        tokens = erased_tokens(boxes_on_cuda, (24, 40), (3, 5))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    is_inside = torch.stack([mask_of(box, (24, 40)) for box in boxes.tolist()])[:, None].expand_as(images)
    assert torch.equal(erased.cpu() != 7, is_inside)
    assert torch.equal(tokens.cpu(), erased_tokens(boxes, (24, 40), (3, 5)))
