"""`torch.compile`: one graph for all plans, with the numbers of eager code."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.tokenlabels.align.cases import build, cutmix, images_of, mixed
from tokenlabels.align import TLAlign, TransMix
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    """Graphs of other models make torch guess sizes that change, and give up after some."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("case", ["vit", "swin-padded", "swin2", "pvt-linear", "mixer", "convnext"])
def test_one_graph_for_all_plans(case: str) -> None:
    model = TLAlign(build(case))
    counter = CompileCounter()  # type: ignore[no-untyped-call]
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in (1, 2, 3):
        plan = cutmix(case, seed)
        images = plan.mix(images_of(case, seed))
        ours, eager = (run(images, plan, return_token_share=True) for run in (compiled, model))
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_batches_of_other_sizes_need_one_graph_more() -> None:
    """As the plain model: one for the first size, one for all others."""
    model = TLAlign(build("vit"))
    compiled = torch.compile(model, backend=(counter := CompileCounter()), fullgraph=True)  # type: ignore[no-untyped-call]
    for num_images in (4, 6, 8, 3, 10):
        plan = MixPlan.cutmix(num_images, image_size=(32, 48), generator=torch.Generator().manual_seed(num_images))
        images = plan.mix(torch.randn(num_images, 3, 32, 48))
        torch.testing.assert_close(compiled(images, plan)[1], model(images, plan)[1], rtol=0, atol=1e-5)
    assert counter.frame_count <= 2


def test_compiled_gradients() -> None:
    model = TLAlign(DenseClassifier(build("distilled"), (32, 48)), backend="padded").train()
    images, plan = mixed("distilled")
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        logits, share = run(images, plan)
        assert not share.requires_grad
        sum(part.square().sum() for part in logits).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)


def test_transmix_in_one_graph() -> None:
    model = TransMix(build("vit"))
    compiled = torch.compile(model, backend=(counter := CompileCounter()), fullgraph=True)  # type: ignore[no-untyped-call]
    for seed in (1, 2):
        plan = cutmix("vit", seed)
        images = plan.mix(images_of("vit", seed))
        torch.testing.assert_close(compiled(images, plan)[1], model(images, plan)[1], rtol=0, atol=1e-5)
    assert counter.frame_count == 1
