"""The loss from sparse targets, against plain float64 arithmetic on all classes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenlabels import cross_entropy
from tokenlabels.checks import Grid
from tokenlabels.cross_entropy import soft_cross_entropy
from tokenlabels.losses import chunked_token_label_loss, token_label_loss
from tokenlabels.mixing import MixPlan
from tokenlabels.sparse_targets import TokenTargets

Sparse = tuple[Tensor, Tensor, Tensor]
TINY_PIECE = 40
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_logits(*shape: int, seed: int = 1) -> Tensor:
    return (3 * torch.randn(shape, generator=seeded(seed))).requires_grad_()


def draw_sparse(num_images: int, num_rows: int, num_classes: int, num_listed: int, seed: int = 0) -> Sparse:
    """classes, weights and background: some classes are listed twice, some weights are below 0, some exactly 0."""
    generator = seeded(seed)
    classes = torch.randint(num_classes, (num_images, num_listed), generator=generator)
    weights = torch.rand(num_images, num_rows, num_listed, generator=generator) / num_listed - 0.05
    weights *= torch.rand(weights.shape, generator=generator) < 0.8
    return classes, weights, torch.rand(num_images, num_rows, generator=generator) / num_classes


def draw_targets(num_images: int = 4, grid: Grid = (2, 3), num_classes: int = 11, ignored: float = 0.2) -> TokenTargets:
    classes, weights, background = draw_sparse(num_images, 1 + grid[0] * grid[1], num_classes, 5)
    valid = torch.rand(background.shape, generator=seeded()) >= ignored
    return TokenTargets(classes, weights * valid[..., None], background * valid, valid, grid, num_classes)


def dense_twin(classes: Tensor, weights: Tensor, background: Tensor, num_classes: int) -> Tensor:
    """All classes in float64, image by image and slot by slot."""
    dense = background.double()[..., None].repeat(1, 1, num_classes)
    for image, slots in enumerate(classes.tolist()):
        for slot, class_id in enumerate(slots):
            dense[image, :, class_id] += weights[image, :, slot].double()
    return dense


def loss_twin(logits: Tensor, target: Tensor) -> Tensor:
    """The published form, -sum of target times log-softmax, in float64."""
    return (-target * torch.log_softmax(logits.double(), dim=-1)).sum(dim=-1)


def assert_equals_twin(logits: Tensor, sparse: Sparse) -> None:
    """Losses to float32, gradients to the dtype of the logits."""
    logits = logits.detach().requires_grad_()
    ours, twin = soft_cross_entropy(logits, *sparse), loss_twin(logits, dense_twin(*sparse, logits.shape[-1]))
    assert ours.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), twin, rtol=3e-6, atol=3e-6)
    # Rows of different scale, so that no row can take another one's gradient.
    scale = torch.linspace(-1, 2, ours.numel()).view_as(ours)
    grads, eps = [grad((rows * scale).sum(), logits)[0] for rows in (ours, twin)], torch.finfo(logits.dtype).eps
    torch.testing.assert_close(*grads, rtol=2 * eps, atol=max(eps / 8, 3e-7))


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces in a small batch, some of which end inside an image."""
    monkeypatch.setattr(cross_entropy, "CPU_PIECE", TINY_PIECE)


SIZES = {
    "tokens": (3, 7, 11, 5),
    "one listed class": (2, 5, 7, 1),
    "no listed class": (2, 5, 7, 0),
    "one row": (5, 1, 9, 3),
    "one image": (1, 6, 8, 4),
    "one class": (2, 3, 1, 2),
    "more slots than classes": (2, 4, 3, 9),
    "a row is longer than a piece": (2, 3, 2 * TINY_PIECE, 6),
    "rows do not fill the pieces": (3, 9, 13, 4),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.usefixtures("tiny_pieces")
def test_value_and_gradient_are_those_of_the_dense_form(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_equals_twin(draw_logits(*sizes[:3]).to(dtype), draw_sparse(*sizes))


@given(st.tuples(*[st.integers(1, 6)] * 4), st.integers(1, 80), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_size_in_any_pieces(sizes: tuple[int, int, int, int], piece: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CPU_PIECE", piece)
        assert_equals_twin(draw_logits(*sizes[:3], seed=seed), draw_sparse(*sizes, seed=seed))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "classes before rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows before images": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "slice of rows": lambda x: torch.cat([x, x], dim=1)[:, 2:8],
    "every second class": lambda x: torch.cat([x, x], dim=2)[..., ::2],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("arrange", STRIDES.values(), ids=STRIDES.keys())
@pytest.mark.usefixtures("tiny_pieces")
def test_logits_of_any_strides(arrange: Callable[[Tensor], Tensor]) -> None:
    base, sparse = draw_logits(3, 6, 12), draw_sparse(3, 6, 12, 4)
    assert not arrange(base).is_contiguous()
    ours, twin = soft_cross_entropy(arrange(base), *sparse), loss_twin(arrange(base), dense_twin(*sparse, 12))
    grads = [grad(rows.square().sum(), base)[0] for rows in (ours, twin)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_a_large_offset_of_the_logits_changes_nothing() -> None:
    logits, sparse = (draw_logits(2, 5, 9) * 64).round() / 64, draw_sparse(2, 5, 9, 4)
    assert torch.equal((logits + 1000) - 1000, logits), "the offset must be exact for this test"
    torch.testing.assert_close(soft_cross_entropy(logits + 1000, *sparse), soft_cross_entropy(logits, *sparse))


def test_a_class_that_is_ruled_out_costs_nothing_where_its_target_is_zero() -> None:
    classes, weights = torch.tensor([[0, 3, 3]]), torch.tensor([[[0.7, 0.3, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    logits = draw_logits(1, 3, 4).detach()
    logits[:, :2, 1:3] = logits[:, 1:, 3] = -torch.inf
    logits.requires_grad_()
    ours = soft_cross_entropy(logits, classes, weights, torch.zeros(1, 3))
    torch.testing.assert_close(ours[0, 0].double(), loss_twin(logits[0, 0, [0, 3]], torch.tensor([0.7, 0.3])))
    torch.testing.assert_close(ours[0, 1].double(), loss_twin(logits[0, 1, :1], torch.ones(1)))
    assert ours[0, 2] == torch.inf
    assert grad(ours.sum(), logits)[0].isfinite().all()
    assert soft_cross_entropy(logits, classes, weights, torch.full((1, 3), 0.01)).isinf().all()


def test_logits_that_are_no_numbers_are_not_hidden() -> None:
    logits = draw_logits(1, 2, 5).detach()
    logits[0, 0, 4] = torch.nan
    ours = soft_cross_entropy(logits, torch.tensor([[1]]), torch.ones(1, 2, 1), torch.zeros(1, 2))
    assert ours.isnan().tolist() == [[True, False]]


@pytest.mark.usefixtures("tiny_pieces")
def test_gradcheck() -> None:
    sparse = draw_sparse(2, 3, 17, 4)
    assert torch.autograd.gradcheck(lambda logits: soft_cross_entropy(logits, *sparse), draw_logits(2, 3, 17).double())


def test_there_is_no_second_derivative() -> None:
    logits, sparse = draw_logits(1, 2, 3), draw_sparse(1, 2, 3, 1)
    (first,) = grad(soft_cross_entropy(logits, *sparse).square().sum(), logits, create_graph=True)
    torch.testing.assert_close(first, grad(soft_cross_entropy(logits, *sparse).square().sum(), logits)[0])
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad(first.sum(), logits)


def test_the_first_derivative_of_torch_func() -> None:
    logits, sparse = draw_logits(1, 2, 3), draw_sparse(1, 2, 3, 1)
    (expected,) = grad(soft_cross_entropy(logits, *sparse).sum(), logits)
    ours = torch.func.grad(lambda z: soft_cross_entropy(z, *sparse).sum())(logits.detach())
    torch.testing.assert_close(ours, expected)


def test_targets_and_plans_made_in_inference_mode_train() -> None:
    logits = draw_logits(2, 5, 6)
    with torch.inference_mode():
        targets = TokenTargets.from_dense(torch.rand(2, 5, 6).softmax(-1))
        plan = MixPlan.mixtoken(2, grid=(2, 2))
    for plan_or_none in (None, plan):
        loss = token_label_loss(plan.mix(logits[:, 1:])[:, 0], logits[:, 1:], targets, plan_or_none)
        (gradient,) = grad(loss, logits)
        assert gradient[:, 1:].abs().sum() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_an_ignored_row_holds_reaches_nothing(value: float) -> None:
    dense = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    dense[1, 3] = 0
    targets = TokenTargets.from_dense(dense)
    image_logits, token_logits = draw_logits(2, 1, 6)[:, 0], draw_logits(2, 4, 6).detach()
    token_logits[1, 2] = value
    token_logits.requires_grad_()
    loss = token_label_loss(image_logits, token_logits, targets)
    (gradient,) = grad(loss, token_logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient[1, 2].abs().max() == 0
    assert gradient[0].abs().min() > 0


def test_a_term_without_weight_reaches_nothing() -> None:
    targets = TokenTargets.from_dense(torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)).softmax(-1))
    image_logits, token_logits = draw_logits(2, 1, 6)[:, 0].detach(), draw_logits(2, 4, 6)
    image_logits[0, 0] = -torch.inf
    image_logits.requires_grad_()
    loss = token_label_loss(image_logits, token_logits, targets, image_weight=0.0)
    (gradient,) = grad(loss, image_logits)
    assert loss.isfinite()
    assert gradient.abs().max() == 0


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """All storages that operators make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # Kept alive, so that no address is used twice.
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()).data_ptr() not in given:
                self.made[storage.data_ptr()] = storage
        return out

    def num_bytes(self, at_least: int = 0) -> list[int]:
        return [storage.nbytes() for storage in self.made.values() if storage.nbytes() >= at_least]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("tiny_pieces")
def test_the_gradient_is_the_only_tensor_of_its_size(dtype: torch.dtype) -> None:
    logits, sparse = draw_logits(8, 6, 10).to(dtype), draw_sparse(8, 6, 10, 3)
    with Allocations() as forward:
        loss = soft_cross_entropy(logits, *sparse).sum()
    assert forward.num_bytes(at_least=logits.nbytes // 2) == []
    with Allocations() as backward:
        grad(loss, logits)
    assert backward.num_bytes(at_least=logits.nbytes // 2) == [logits.nbytes]


def test_autograd_keeps_nothing_but_the_inputs() -> None:
    inputs = draw_logits(3, 6, 10), *draw_sparse(3, 6, 10, 4)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(len(kept), x), lambda x: x):
        soft_cross_entropy(*inputs)
    assert [tensor.data_ptr() for tensor in kept.values()] == [tensor.data_ptr() for tensor in inputs]


def dense(targets: TokenTargets) -> Tensor:
    return dense_twin(targets.classes, targets.weights, targets.background, targets.num_classes)


def token_label_twin(image_logits: Tensor, token_logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Equation 4 with beta = 0.5 from dense targets, over the rows that have one."""
    tokens = loss_twin(token_logits, target[:, 1:])[valid[:, 1:]]
    return loss_twin(image_logits, target[:, 0])[valid[:, 0]].mean() + 0.5 * tokens.mean()


def both_logits(num_images: int = 4, num_tokens: int = 6) -> tuple[Tensor, Tensor]:
    return draw_logits(num_images, 11), draw_logits(num_images, num_tokens, 11, seed=2)


def assert_same_loss(ours: Tensor, twin: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.double(), twin.double(), rtol=1e-5, atol=1e-6)
    for ours_grad, twin_grad in zip(grad(ours, inputs), grad(twin, inputs), strict=True):
        torch.testing.assert_close(ours_grad, twin_grad, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_loss_is_equation_4_over_the_rows_that_have_a_target(ignored: float) -> None:
    targets, logits = draw_targets(ignored=ignored), both_logits()
    assert bool(targets.valid.all()) == (ignored == 0)
    twin = token_label_twin(*logits, dense(targets), targets.valid)
    assert_same_loss(token_label_loss(*logits, targets), twin, logits)
    image = token_label_loss(logits[0], None, targets, dense_weight=0)
    tokens = token_label_loss(*logits, targets, image_weight=0, dense_weight=1)
    weighed = token_label_loss(*logits, targets, image_weight=2, dense_weight=3)
    torch.testing.assert_close(weighed, 2 * image + 3 * tokens)


@pytest.mark.parametrize("huge", [1e4, 1e30])
def test_rows_without_a_target_have_no_say(huge: float) -> None:
    targets, logits = draw_targets(ignored=0.4), both_logits()
    ignored = ~targets.valid[:, 0], ~targets.valid[:, 1:]
    noisy = [torch.where(rows[..., None], huge * x.sign(), x) for x, rows in zip(logits, ignored, strict=True)]
    loss = token_label_loss(noisy[0], noisy[1], targets)
    assert torch.equal(loss, token_label_loss(*logits, targets))
    for noisy_grad, rows in zip(grad(loss, noisy), ignored, strict=True):
        assert torch.equal(noisy_grad.eq(0).all(dim=-1), rows)


def test_a_batch_without_any_target_costs_nothing() -> None:
    loss = token_label_loss(*(logits := both_logits()), draw_targets(ignored=1.1))
    assert loss.item() == 0
    assert all(x.eq(0).all() for x in grad(loss, logits))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_labels_give_the_cross_entropy_of_torch(smoothing: float) -> None:
    logits, labels = draw_logits(6, 9), torch.tensor([0, 8, 3, 3, 5, 1])
    ours = token_label_loss(logits, None, TokenTargets.from_labels(labels, 9).smooth(smoothing))
    torch.testing.assert_close(ours, nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing))


@pytest.mark.parametrize(("keep_tokens", "num_kept"), [(0.01, 1), (0.22, 7), (0.5, 15), (0.96, 29), (1.0, 30)])
def test_exactly_so_many_tokens_of_every_sample_take_part(keep_tokens: float, num_kept: int) -> None:
    logits, all_valid = both_logits(8, 30), draw_targets(8, grid=(5, 6), ignored=0)

    def token_loss(targets: TokenTargets) -> Tensor:
        return token_label_loss(
            *logits, targets, image_weight=0, dense_weight=1, keep_tokens=keep_tokens, generator=seeded()
        )

    for targets in (all_valid, draw_targets(8, grid=(5, 6), ignored=0.3)):
        valid = targets.valid[:, 1:]
        taking_part = grad(token_loss(targets), logits[1])[0].ne(0).any(dim=-1)
        assert taking_part.sum(dim=1).tolist() == valid.sum(dim=1).clamp(max=num_kept).tolist()
        assert num_kept == 30 or taking_part.ne(taking_part[0]).any(), "every sample has its own tokens"
        assert not (taking_part & ~valid).any()
        twin = loss_twin(logits[1], dense(targets)[:, 1:])[taking_part].mean()
        torch.testing.assert_close(token_loss(targets).double(), twin, rtol=1e-5, atol=1e-6)


def test_the_default_generator_draws_every_token_equally_often() -> None:
    targets, (image_logits, token_logits) = draw_targets(1000, ignored=0), both_logits(1000)
    torch.manual_seed(0)
    loss = token_label_loss(image_logits, token_logits, targets, keep_tokens=0.5)
    counts = grad(loss, token_logits)[0].ne(0).any(dim=-1).sum(dim=0)
    assert counts.sub(500).abs().max() < 80, "1000 draws of probability 1/2 have a standard deviation of 16"


PLANS = {
    "MixToken": MixPlan.mixtoken(4, grid=(2, 3), generator=seeded()),
    "CutMix": MixPlan.cutmix(4, image_size=(8, 12), generator=seeded()),
    "MixUp": MixPlan.mixup(4, generator=seeded()),
}


@pytest.mark.parametrize("with_labels", [False, True], ids=["teacher", "ground truth"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_labels_are_blended_and_then_all_is_mixed(plan: MixPlan, with_labels: bool) -> None:
    targets, logits, labels = draw_targets(ignored=0), both_logits(), torch.tensor([3, 0, 7, 10])
    target = dense(targets)
    labels[0] = target[0, 0].argmax()
    agrees = target[:, 0].argmax(dim=-1) == labels
    assert 0 < agrees.sum() < 4
    if with_labels:
        weight = torch.where(agrees, 0.7, 0.2)[:, None]
        target[:, 0] = (1 - weight) * target[:, 0] + weight * nn.functional.one_hot(labels, 11)
    own = torch.cat([plan.share()[:, None], plan.coverage((2, 3)).flatten(1)], dim=1)[..., None].double()
    target = own * target + (1 - own) * target[plan.partner]
    given = labels if with_labels else None
    ours = token_label_loss(*logits, targets, plan, ground_truth=given, ground_truth_weights=(0.7, 0.2))
    assert_same_loss(ours, token_label_twin(*logits, target, targets.valid), logits)


def with_head(dropout: float = 0.0, num_classes: int = 11) -> tuple[Tensor, Tensor, nn.Sequential]:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Dropout(dropout), nn.Linear(5, num_classes))
    return draw_logits(4, num_classes), draw_logits(4, 6, 5, seed=2), head


@pytest.mark.parametrize("images_per_chunk", [1, 3, 4, 8])
def test_chunks_give_the_same_loss(images_per_chunk: int) -> None:
    (image_logits, features, head), targets = with_head(), draw_targets()
    same: dict[str, Any] = {"plan": PLANS["CutMix"], "keep_tokens": 0.6, "image_weight": 2.0, "dense_weight": 0.3}
    same["ground_truth"] = torch.tensor([3, 0, 7, 10])
    whole = token_label_loss(image_logits, head(features), targets, generator=seeded(), **same)
    same["images_per_chunk"] = images_per_chunk
    ours = chunked_token_label_loss(image_logits, features, head, targets, generator=seeded(), **same)
    assert_same_loss(ours, whole, (image_logits, features, *head.parameters()))


def test_chunks_repeat_the_dropout_of_the_classifier() -> None:
    (image_logits, features, head), targets = with_head(dropout=0.5), draw_targets()
    torch.manual_seed(1)
    ours = chunked_token_label_loss(image_logits, features, head, targets, images_per_chunk=2)
    torch.manual_seed(1)
    token_logits = torch.cat([head(features[:2]), head(features[2:])])
    torch.manual_seed(2)
    whole = token_label_loss(image_logits, token_logits, targets)
    assert_same_loss(ours, whole, (image_logits, features, *head.parameters()))


def test_chunks_never_hold_all_token_logits() -> None:
    (image_logits, features, head), targets = with_head(num_classes=60), draw_targets(num_classes=60)
    all_logits = 4 * 6 * 60 * 4
    with Allocations() as whole:
        grad(token_label_loss(image_logits, head(features), targets), features)
    assert len(whole.num_bytes(at_least=all_logits)) >= 2
    with Allocations() as chunked:
        loss = chunked_token_label_loss(image_logits, features, head, targets, images_per_chunk=1)
        grad(loss, (features, *head.parameters()))
    assert max(chunked.num_bytes()) == all_logits / 4


def test_autocast_makes_logits_in_half_precision_and_losses_in_float32() -> None:
    (image_logits, features, head), targets = with_head(), draw_targets()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        token_logits = head(features)
        whole = token_label_loss(image_logits, token_logits, targets)
        chunked = chunked_token_label_loss(image_logits, features, head, targets, images_per_chunk=3)
    assert [x.dtype for x in (token_logits, whole, chunked)] == [torch.bfloat16, torch.float32, torch.float32]
    twin = token_label_twin(image_logits, token_logits, dense(targets), targets.valid)
    torch.testing.assert_close(whole.double(), twin, rtol=1e-6, atol=1e-6)
    assert_same_loss(chunked, whole, (features, *head.parameters()), tolerance=2e-2)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(backend: str) -> None:
    (image_logits, features, head), targets = with_head(), draw_targets()

    def both(targets: TokenTargets, plan: MixPlan) -> Tensor:
        whole = token_label_loss(image_logits, head(features), targets, plan)
        return whole + chunked_token_label_loss(image_logits, features, head, targets, plan, images_per_chunk=3)

    compiled = torch.compile(both, fullgraph=True, backend=backend)(targets, PLANS["CutMix"])
    assert_same_loss(compiled, both(targets, PLANS["CutMix"]), (image_logits, features, *head.parameters()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("piece", [TINY_PIECE, 2**25])
def test_cuda_agrees(cuda: torch.device, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "ACCELERATOR_PIECE", piece)
    logits, sparse = draw_logits(3, 7, 11).to(dtype), draw_sparse(3, 7, 11, 5)
    on_cpu = soft_cross_entropy(logits, *sparse)
    on_cuda = soft_cross_entropy(logits.to(cuda), *(tensor.to(cuda) for tensor in sparse)).cpu()
    torch.testing.assert_close(on_cuda, on_cpu, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(grad(on_cuda.sum(), logits), grad(on_cpu.sum(), logits))


@pytest.mark.gpu
def test_cuda_never_waits_and_takes_generators_of_the_cpu(cuda: torch.device) -> None:
    targets, logits, plan = draw_targets(), both_logits(), PLANS["MixToken"]
    on_cpu = token_label_loss(*logits, targets, plan, keep_tokens=0.5, generator=seeded())
    inputs: tuple[Any, ...] = *(x.to(cuda) for x in logits), targets.to(cuda), plan.to(cuda)
    torch.testing.assert_close(token_label_loss(*inputs, keep_tokens=0.5, generator=seeded()).cpu(), on_cpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grad(token_label_loss(*inputs, keep_tokens=0.5), inputs[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
