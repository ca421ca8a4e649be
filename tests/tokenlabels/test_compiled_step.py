"""Targets, mixing and loss in one compiled graph."""

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import tokenlabels as tl

GRID, NUM_CLASSES = (4, 4), 50


def step(
    image_logits: Tensor,
    token_logits: Tensor,
    maps: tuple[Tensor, Tensor],
    boxes: Tensor,
    vocabulary: tl.Vocabulary,
    plan: tl.MixPlan,
) -> Tensor:
    targets = tl.token_targets(*maps, boxes, grid=GRID, num_classes=NUM_CLASSES, vocabulary=vocabulary)
    return tl.token_label_loss(image_logits, token_logits, targets.smooth(0.1), plan)


def test_batches_of_any_size_share_one_graph() -> None:
    counter = CompileCounter()  # type: ignore[no-untyped-call]
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for num_images in (4, 6, 7, 8, 11):
        classes = torch.rand(num_images, 6, 6, 10, generator=generator).argsort(dim=-1)[..., :3]
        inputs = (
            torch.randn(num_images, NUM_CLASSES, generator=generator).requires_grad_(),
            torch.randn(num_images, 16, NUM_CLASSES, generator=generator).requires_grad_(),
            (torch.randn(classes.shape, generator=generator), classes),
            torch.tensor([[0.1, 0.2, 0.9, 0.7]]).repeat(num_images, 1),
            tl.find_vocabulary(classes, NUM_CLASSES),
            tl.MixPlan.mixtoken(num_images, grid=GRID, generator=generator),
        )
        torch.testing.assert_close(compiled(*inputs), step(*inputs))
    assert counter.frame_count == 2, "one for the first size, one for all others"
