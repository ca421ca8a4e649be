"""The dense reference is what the published code computes."""

from pathlib import Path

import numpy as np
import torch

from jobs.bench.dense import dense_loss, dense_targets


def test_targets_of_the_published_code(golden: Path) -> None:
    data = {name: torch.from_numpy(array) for name, array in np.load(golden / "token_labels_noflip.npz").items()}
    target = dense_targets(
        data["logits_fp16"], data["class_ids"].long(), data["boxes_xyxy_rel"], data["hflip"], (14, 14), 1000
    )
    torch.testing.assert_close(target, data["probs"], rtol=0, atol=1e-5)


def test_flip_mirrors_the_tokens_and_leaves_the_image_row() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 6, 6, 2, generator=generator).half()
    classes = torch.rand(2, 6, 6, 9, generator=generator).argsort(dim=-1)[..., :2]
    boxes = torch.tensor([[0.1, 0.2, 0.8, 0.9], [0.0, 0.0, 1.0, 1.0]])
    plain = dense_targets(scores, classes, boxes, torch.tensor([False, False]), (3, 4), 9)
    flipped = dense_targets(scores, classes, boxes, torch.tensor([False, True]), (3, 4), 9)
    torch.testing.assert_close(flipped[0], plain[0], rtol=0, atol=0)
    torch.testing.assert_close(flipped[1, 0], plain[1, 0], rtol=0, atol=0)
    tokens, mirrored = plain[1, 1:].unflatten(0, (3, 4)), flipped[1, 1:].unflatten(0, (3, 4))
    torch.testing.assert_close(mirrored, tokens.flip(1), rtol=0, atol=0)


def test_loss_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = (torch.randn(2, 5, 7, generator=generator).softmax(-1) for _ in range(2))
    loss = dense_loss(logits[:, 0], logits[:, 1:], target, 0.5)
    image = torch.nn.functional.cross_entropy(logits[:, 0], target[:, 0])
    tokens = torch.nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), target[:, 1:].flatten(0, 1))
    torch.testing.assert_close(loss, image + 0.5 * tokens)
