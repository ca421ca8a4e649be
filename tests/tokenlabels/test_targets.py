"""Targets of crops: against a dense computation in float64, the published code's output, and what cannot be right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align

from tokenlabels.geometry import affine_from_boxes, box_in_map
from tokenlabels.losses import token_label_loss
from tokenlabels.precision import work_dtype
from tokenlabels.resample import box_operator
from tokenlabels.targets import InterpolationRule, affine_token_targets, token_targets
from tokenlabels.vocabulary import find_vocabulary

RULES: tuple[InterpolationRule, ...] = ("logits", "probs")
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Case:
    """Random maps and crops: B maps of H x W cells, k of `num_mentioned` classes per cell."""

    num_images: int = 3
    cells: tuple[int, int] = (18, 18)
    topk: int = 5
    num_classes: int = 1000
    num_mentioned: int = 12
    offset: float = 4.0
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    seed: int = 0

    def draw(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_images, *self.cells, self.topk)
        mentioned = torch.rand(self.num_images, self.num_classes, generator=generator).argsort(dim=1)
        ranks = torch.rand(*shape[:-1], self.num_mentioned, generator=generator).argsort(dim=-1)[..., : self.topk]
        classes = mentioned.gather(1, ranks.flatten(1)).view(shape)
        scores = (torch.randn(shape, generator=generator) * 2 + self.offset).sort(dim=-1, descending=True).values
        corners = torch.rand(self.num_images, 2, 2, generator=generator).sort(dim=1).values
        low, high = corners[:, 0] * 0.8, corners[:, 1] * 0.8 + 0.2
        return {
            "scores": scores.half(),
            "classes": classes,
            "boxes": torch.tensor(self.boxes) if self.boxes else torch.cat([low, high], dim=1),
            "flip": torch.arange(self.num_images) % 2 == 1,
            "tail": torch.rand(shape[:-1], generator=generator).half(),
        }


CASES = {
    "usual": Case(),
    "batch of one": Case(num_images=1),
    "one class": Case(topk=1, num_mentioned=1),
    "more than 256 classes": Case(num_images=2, num_mentioned=600, seed=2),
    "wide map": Case(cells=(9, 25)),
    "tall map": Case(cells=(31, 6)),
    "map of one cell": Case(cells=(1, 1)),
    "whole map and its border": Case(boxes=((0, 0, 1, 1), (0, 0.4, 0.3, 1), (0.7, 0, 1, 0.2))),
    "smaller than a cell": Case(boxes=((0.5, 0.5, 0.501, 0.502), (0, 0, 0.01, 0.01), (0.99, 0.99, 1, 1))),
    "a point of the border": Case(boxes=((0, 0, 1e-6, 1), (0, 0, 1, 1e-6), (0.5, 0.5, 0.5000001, 0.6))),
    "negative logits": Case(offset=-6.0),
    "large logits": Case(offset=25.0),
    "all classes stored": Case(topk=5, num_classes=5, num_mentioned=5, offset=-30.0),
    "all classes mentioned": Case(topk=3, num_classes=20, num_mentioned=20, offset=-20.0),
    "few classes": Case(topk=2, num_classes=3, num_mentioned=3),
}
GRIDS = [(14, 14), (24, 24), (7, 7), (5, 12), (1, 1)]


def dense_map(scores: Tensor, classes: Tensor, tail: Tensor | None, num_classes: int, rule: str) -> Tensor:
    """One map with all its classes, float64 [K, H, W]: logits, or probabilities."""
    height, width, topk = scores.shape
    dense = torch.zeros(num_classes, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            cell, ids = scores[y, x].double(), classes[y, x].long()
            if rule == "probs":
                mass = 0.0 if tail is None or num_classes == topk else float(tail[y, x])
                dense[:, y, x] = mass / max(1, num_classes - topk)
                cell = cell.softmax(0) * (1 - mass)
            dense[ids, y, x] = cell
    return dense


def dense_twin(
    case: dict[str, Tensor], grid: tuple[int, int], num_classes: int, rule: InterpolationRule, *, with_tail: bool = True
) -> Tensor:
    """Crop every class of every map with torchvision, in float64: [B, 1 + N, K]."""
    rows = []
    for image in range(len(case["scores"])):
        tail = case["tail"][image] if with_tail else None
        dense = dense_map(case["scores"][image], case["classes"][image], tail, num_classes, rule)
        height, width = dense.shape[1:]
        box = case["boxes"][image].double() * torch.tensor([width, height, width, height])
        crops = [
            roi_align(dense[None], [box[None]], size, 1.0, sampling_ratio=-1, aligned=True)[0]
            for size in ((1, 1), grid)
        ]
        if case["flip"][image]:
            crops[1] = crops[1].flip(-1)
        both = torch.cat([crop.flatten(1) for crop in crops], dim=1).T
        rows.append(both.softmax(-1) if rule == "logits" else both)
    return torch.stack(rows)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).abs().max())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_computation(name: str, rule: InterpolationRule) -> None:
    case = CASES[name]
    inputs = case.draw()
    targets = token_targets(**inputs, grid=(14, 14), num_classes=case.num_classes, interpolate=rule)
    dense = targets.dense()
    assert largest_difference(dense, dense_twin(inputs, (14, 14), case.num_classes, rule)) < TOLERANCE
    assert largest_difference(dense.sum(-1), torch.ones(1)) < 5e-6
    assert targets.valid.all()


def test_all_classes_stored_and_most_unlikely() -> None:
    """exp(-300) is 0 in float32: with no class of logit 0 left, the largest logit must set the scale."""
    inputs = Case(topk=5, num_classes=5, num_mentioned=5, offset=-300.0).draw()
    dense = token_targets(**inputs, num_classes=5).dense()
    assert largest_difference(dense, dense_twin(inputs, (14, 14), 5, "logits")) < 5e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_any_grid_of_tokens(grid: tuple[int, int], rule: InterpolationRule) -> None:
    inputs = Case(num_images=2, cells=(18, 13)).draw()
    dense = token_targets(**inputs, grid=grid, num_classes=1000, interpolate=rule).dense()
    assert largest_difference(dense, dense_twin(inputs, grid, 1000, rule)) < TOLERANCE


@settings(max_examples=40, deadline=None)
@given(
    corners=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4, unique=True),
    cells=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    flip=st.booleans(),
)
def test_any_box(corners: list[float], cells: tuple[int, int], grid: tuple[int, int], flip: bool) -> None:
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    inputs = Case(num_images=1, cells=cells, topk=2, num_classes=12, boxes=((x0, y0, x1, y1),)).draw()
    inputs["flip"] = torch.tensor([flip])
    box = inputs["boxes"].double()
    samples = (box[:, 2:] - box[:, :2]) * torch.tensor(cells[::-1]) / torch.tensor(grid[::-1])
    assume(not ((samples % 1) < 1e-9).any())  # on the edge between two numbers of samples any rounding is right
    for rule in RULES:
        dense = token_targets(**inputs, grid=grid, num_classes=12, interpolate=rule).dense()
        assert largest_difference(dense, dense_twin(inputs, grid, 12, rule)) < TOLERANCE


def test_the_output_of_the_published_code(golden: Path) -> None:
    data = np.load(golden / "token_labels_noflip.npz")
    targets = token_targets(
        torch.from_numpy(data["logits_fp16"]),
        torch.from_numpy(data["class_ids"]),
        torch.from_numpy(data["boxes_xyxy_rel"]),
        flip=torch.from_numpy(data["hflip"]),
        num_classes=data["probs"].shape[2],
    )
    dense = targets.dense()
    assert largest_difference(dense, torch.from_numpy(data["probs_f64"])) < TOLERANCE
    assert largest_difference(dense, torch.from_numpy(data["probs"])) < 6e-5  # the published code's own rounding


def test_the_image_level_row_alone() -> None:
    inputs = Case().draw()
    alone = token_targets(**inputs, grid=None, num_classes=1000)
    assert alone.dense().shape == (3, 1, 1000)
    assert largest_difference(alone.dense(), token_targets(**inputs, num_classes=1000).dense()[:, :1].double()) < 1e-7


def test_without_flip_nothing_is_mirrored() -> None:
    inputs = Case().draw()
    flip = inputs.pop("flip")
    plain = token_targets(**inputs, num_classes=1000)
    mirrored = token_targets(**inputs, flip=~torch.zeros_like(flip), num_classes=1000)
    tokens, mirrored_tokens = (side.dense()[:, 1:].unflatten(1, (14, 14)) for side in (plain, mirrored))
    torch.testing.assert_close(mirrored_tokens, tokens.flip(2), rtol=0, atol=1e-7)
    torch.testing.assert_close(plain.dense()[:, 0], mirrored.dense()[:, 0], rtol=0, atol=0)


def test_the_calibrated_rule_does_not_depend_on_the_offset_of_the_logits() -> None:
    inputs = Case().draw()
    shifted = {**inputs, "scores": inputs["scores"].float() - 4}
    probs, logits = (
        [token_targets(**maps, num_classes=1000, interpolate=rule).dense() for maps in (inputs, shifted)]
        for rule in RULES[::-1]
    )
    torch.testing.assert_close(*probs, rtol=0, atol=1e-6)
    assert (logits[0].amax(-1) - logits[1].amax(-1)).mean() > 0.1


def test_without_tail_the_stored_classes_share_everything() -> None:
    inputs = Case().draw()
    inputs.pop("tail")
    targets = token_targets(**inputs, num_classes=1000, interpolate="probs")
    twin = dense_twin({**inputs, "tail": torch.zeros(3, 18, 18)}, (14, 14), 1000, "probs")
    assert largest_difference(targets.dense(), twin) < TOLERANCE
    assert targets.background.abs().max() == 0


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64], ids=lambda dtype: dtype.__name__)
def test_ids_of_any_integer_type(dtype: type[np.integer[Any]]) -> None:
    inputs = Case().draw()
    classes = torch.from_numpy(inputs["classes"].numpy().astype(dtype))
    ours = token_targets(**{**inputs, "classes": classes}, num_classes=1000)
    torch.testing.assert_close(ours.dense(), token_targets(**inputs, num_classes=1000).dense(), rtol=0, atol=0)


def test_a_vocabulary_found_before_changes_nothing() -> None:
    inputs = Case().draw()
    vocabulary = find_vocabulary(inputs["classes"], 1000)
    ours = token_targets(**inputs, num_classes=1000, vocabulary=vocabulary)
    torch.testing.assert_close(ours.dense(), token_targets(**inputs, num_classes=1000).dense(), rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_autocast_does_not_reach_the_targets(rule: InterpolationRule) -> None:
    inputs = Case(num_mentioned=100, offset=15.0).draw()
    twin = dense_twin(inputs, (14, 14), 1000, rule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = token_targets(**inputs, num_classes=1000, interpolate=rule)
    assert largest_difference(targets.dense(), twin) < TOLERANCE


@pytest.fixture
def rounded_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("rounded_products")
@pytest.mark.parametrize("rule", RULES)
def test_rounded_products_do_not_reach_the_targets(rule: InterpolationRule) -> None:
    assert work_dtype() == torch.float64, "not every CPU rounds, so the targets alone could not tell"
    inputs = Case(num_mentioned=100, offset=15.0).draw()
    targets = token_targets(**inputs, num_classes=1000, interpolate=rule)
    assert largest_difference(targets.dense(), dense_twin(inputs, (14, 14), 1000, rule)) < TOLERANCE


def test_precision_set_per_backend_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to give one answer for all backends then."""

    def refuse() -> str:
        raise RuntimeError("checking the matmul precision without a specific backend name")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert work_dtype() == torch.float64


def test_products_are_float32_where_they_are_not_rounded() -> None:
    assert work_dtype() == torch.float32


def test_boxes_may_leave_the_map_by_rounding() -> None:
    inputs = Case(num_images=1, boxes=((-1e-6, 0.0, 1.0, 1.0 + 1e-6),)).draw()
    whole = {**inputs, "boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0]])}
    ours, theirs = (token_targets(**maps, num_classes=1000).dense() for maps in (inputs, whole))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_chunks_make_no_difference(rule: InterpolationRule, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Case(num_images=7, num_mentioned=100).draw()
    whole = token_targets(**inputs, num_classes=1000, interpolate=rule)
    monkeypatch.setattr("tokenlabels.targets.CHUNK_BYTES", 3 * 18 * 18 * 4 * 128)
    parts = token_targets(**inputs, num_classes=1000, interpolate=rule)
    torch.testing.assert_close(parts.dense(), whole.dense(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_waits_for_the_device(rule: InterpolationRule) -> None:
    """Tensors without data: whoever reads a value raises."""
    inputs = {name: tensor.to("meta") for name, tensor in Case().draw().items()}
    vocabulary = find_vocabulary(Case().draw()["classes"], 1000).to("meta")
    views = torch.empty(3, 4, device="meta")
    targets = token_targets(**inputs, num_classes=1000, interpolate=rule, views=views, vocabulary=vocabulary)
    affine = affine_token_targets(
        inputs["scores"],
        inputs["classes"],
        torch.empty(3, 2, 3, device="meta"),
        num_classes=1000,
        interpolate=rule,
        tail=inputs["tail"],
        views=views,
        vocabulary=vocabulary,
    )
    assert targets.weights.shape == affine.weights.shape == (3, 197, 16)


def test_compiles_without_graph_breaks() -> None:
    inputs = Case().draw()
    vocabulary = find_vocabulary(inputs["classes"], 1000)
    compiled: Callable[..., Any] = torch.compile(token_targets, backend="eager", fullgraph=True)
    for rule in RULES:
        options = {"num_classes": 1000, "interpolate": rule, "vocabulary": vocabulary}
        torch.testing.assert_close(
            compiled(**inputs, **options).dense(), token_targets(**inputs, **options).dense(), rtol=0, atol=TOLERANCE
        )


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_cuda_equals_the_cpu(cuda: torch.device, rule: InterpolationRule) -> None:
    inputs = Case(num_images=9, num_mentioned=100).draw()
    there = {name: tensor.to(cuda) for name, tensor in inputs.items()}
    ours = token_targets(**there, num_classes=1000, interpolate=rule).dense().cpu()
    assert largest_difference(ours, dense_twin(inputs, (14, 14), 1000, rule)) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_cuda_never_waits(cuda: torch.device, rule: InterpolationRule) -> None:
    inputs = {name: tensor.to(cuda) for name, tensor in Case().draw().items()}
    vocabulary = find_vocabulary(inputs["classes"], 1000)
    output_to_map = affine_from_boxes(inputs["boxes"])
    options: dict[str, Any] = {"num_classes": 1000, "interpolate": rule, "vocabulary": vocabulary}
    torch.cuda.set_sync_debug_mode("error")
    try:
        targets = token_targets(**inputs, **options)
        affine_token_targets(inputs["scores"], inputs["classes"], output_to_map, tail=inputs["tail"], **options)
        token_label_loss(targets.dense()[:, 0], targets.dense()[:, 1:], targets.smooth(0.1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_bad_box_on_the_device_is_not_silent(cuda: torch.device) -> None:
    inputs = {name: tensor.to(cuda) for name, tensor in Case().draw().items()}
    inputs["boxes"][1] = torch.tensor([0.5, 0.5, 0.2, 1.5], device=cuda)
    finite = token_targets(**inputs, num_classes=1000).dense().isfinite().flatten(1)
    assert finite.any(1).tolist() == [True, False, True]


# Letterboxed maps: the outer cells show padding.


def test_cells_outside_the_image_are_not_read() -> None:
    inputs = Case(num_images=1, cells=(8, 8), num_mentioned=6, boxes=((0, 0.25, 1, 0.75),)).draw()
    views = torch.tensor([[0.0, -0.5, 1.0, 1.5]])
    image = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    torch.testing.assert_close(box_in_map(image, views), inputs["boxes"])
    targets = token_targets(**inputs, num_classes=1000, views=views).dense()
    rows_of_the_image = {name: inputs[name][:, 2:6] for name in ("scores", "classes", "tail")}
    alone = {**inputs, **rows_of_the_image, "boxes": image}
    torch.testing.assert_close(
        targets[:, 1:], token_targets(**alone, num_classes=1000).dense()[:, 1:], rtol=0, atol=TOLERANCE
    )
    inputs["scores"][:, :2] = 60.0
    inputs["scores"][:, 6:] = 60.0
    torch.testing.assert_close(
        token_targets(**inputs, num_classes=1000, views=views).dense(), targets, rtol=0, atol=TOLERANCE
    )
    affine = affine_token_targets(
        inputs["scores"], inputs["classes"], affine_from_boxes(inputs["boxes"]), num_classes=1000, views=views
    )
    torch.testing.assert_close(affine.dense()[:, 1:], targets[:, 1:], rtol=0, atol=TOLERANCE)
    assert affine.valid.all()


# Rows of an operator.


@settings(max_examples=50, deadline=None)
@given(
    ends=st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True),
    num_tokens=st.integers(1, 20),
    num_cells=st.integers(1, 20),
)
def test_rows_of_an_operator_are_means(ends: list[float], num_tokens: int, num_cells: int) -> None:
    low, high = (torch.tensor([end], dtype=torch.float64) for end in sorted(ends))
    rows = box_operator(low, high, num_tokens, num_cells, torch.tensor([0]), torch.tensor([num_cells - 1]))
    assert rows.min() >= 0
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, num_tokens, dtype=torch.float64))


# What cannot be right.


def change(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda inputs: {**inputs, **values}


def set_value(name: str, place: tuple[int, ...], value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(inputs: dict[str, Any]) -> dict[str, Any]:
        inputs[name][place] = value
        return inputs

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(change(scores=torch.zeros(3, 18, 18)), r"float32 \[B, H, W, k\]", id="3-D scores"),
        pytest.param(change(scores=torch.zeros(3, 18, 18, 5, dtype=torch.int32)), "got int32", id="integer scores"),
        pytest.param(change(scores=torch.zeros(0, 18, 18, 5)), "without empty sides", id="empty batch"),
        pytest.param(change(scores=torch.zeros(3, 18, 18, 0)), "without empty sides", id="no classes stored"),
        pytest.param(
            set_value("scores", (1, 2, 3, 4), torch.nan), r"must be finite.*got nan at \[1, 2, 3, 4\]", id="NaN"
        ),
        pytest.param(set_value("scores", (0, 0, 0, 0), torch.inf), "must be finite", id="infinite score"),
        pytest.param(change(classes=torch.zeros(3, 18, 18, 4, dtype=torch.int64)), "classes must be", id="another k"),
        pytest.param(change(classes=torch.zeros(3, 18, 18, 5)), "classes must be integer", id="floating ids"),
        pytest.param(set_value("classes", (0, 0, 0, 0), 1000), r"ids must be in 0\.\.999", id="id too large"),
        pytest.param(set_value("classes", (0, 0, 0, 0), -1), r"ids must be in 0\.\.999, got -1", id="negative id"),
        pytest.param(change(boxes=torch.rand(2, 4)), r"boxes must be float32 \[3, 4\]", id="another number of boxes"),
        pytest.param(change(boxes=torch.zeros(4)), "boxes must be", id="one box for all"),
        pytest.param(change(boxes=torch.zeros(3, 4, dtype=torch.int64)), "boxes must be float32", id="pixel boxes"),
        pytest.param(set_value("boxes", (1, 2), 1.2), "takes crops that reach beyond", id="box outside"),
        pytest.param(set_value("boxes", (1, 0), -0.1), r"0\.\.1 of the map", id="box outside on the left"),
        pytest.param(set_value("boxes", (1, 2), 0.0), "x0 < x1", id="inverted box"),
        pytest.param(set_value("boxes", (1, 2), torch.nan), "boxes must be x0, y0", id="NaN box"),
        pytest.param(change(boxes=[[0.0, 0.0, 1.0, 1.0]] * 3), r"torch\.Tensor, got builtins\.list", id="list"),
        pytest.param(change(tail=np.zeros((3, 18, 18))), r"tail must be a torch\.Tensor, got numpy", id="numpy tail"),
        pytest.param(change(flip=True), r"flip must be a torch\.Tensor, got builtins\.bool", id="one flip"),
        pytest.param(change(vocabulary={}), "vocabulary must come from find_vocabulary, got dict", id="no vocabulary"),
        pytest.param(change(views=torch.tensor([[0.0, -1.0, 1.0, 2.0]] * 3)), "within the image", id="box in padding"),
        pytest.param(change(num_classes=1000.0), "num_classes must be an integer", id="floating number of classes"),
        pytest.param(change(flip=torch.zeros(3)), r"flip must be bool \[3\]", id="floating flip"),
        pytest.param(change(flip=torch.zeros(2, dtype=torch.bool)), "flip must be", id="another number of flips"),
        pytest.param(change(grid=(0, 14)), "grid must be two positive integers", id="empty grid"),
        pytest.param(change(grid=14), "grid must be two positive integers", id="one side of a grid"),
        pytest.param(change(interpolate="bilinear"), "interpolate must be one of", id="unknown rule"),
        pytest.param(change(tail=torch.zeros(3, 18, 18, 5)), "tail must be", id="tail per class"),
        pytest.param(set_value("tail", (0, 1, 2), 1.5), r"tail must be in 0\.\.1", id="tail above 1"),
        pytest.param(set_value("tail", (0, 1, 2), torch.nan), "tail must be", id="NaN tail"),
        pytest.param(change(views=torch.zeros(3, 2)), "views must be", id="views"),
        pytest.param(change(num_classes=0), "num_classes must be an integer of at least 1", id="no classes"),
        pytest.param(change(num_classes=4), "cannot store 5 of 4 classes", id="fewer classes than stored"),
        pytest.param(change(boxes=torch.zeros(3, 4, device="meta")), "boxes must be on cpu", id="boxes elsewhere"),
        pytest.param(
            change(classes=torch.zeros(3, 18, 18, 5, device="meta", dtype=torch.int64)), "on cpu", id="ids elsewhere"
        ),
        pytest.param(
            change(vocabulary=find_vocabulary(torch.arange(5).expand(2, 18, 18, 5), 1000)),
            "find it from these maps",
            id="vocabulary of other maps",
        ),
        pytest.param(
            change(vocabulary=find_vocabulary(torch.arange(5).expand(3, 18, 18, 5), 10)),
            "of 10 classes, got",
            id="vocabulary of other classes",
        ),
    ],
)
def test_bad_input_is_refused(spoil: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_targets(**spoil({"num_classes": 1000, **Case().draw()}))
