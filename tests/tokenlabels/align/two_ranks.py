"""What `test_ranks.py` runs in two processes under torchrun: ``two_ranks.py FOLDER CASES``."""

import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tests.tokenlabels.align.cases import CASES, NUM_CLASSES, build, images_of
from tokenlabels.align import TLAlign
from tokenlabels.losses import token_label_loss
from tokenlabels.mixing import MixPlan
from tokenlabels.models import DenseClassifier
from tokenlabels.sparse_targets import TokenTargets
from tokenlabels.trainer.ranks import leave_ranks


def part_of(rank: int, num_ranks: int, case: str) -> tuple[Tensor, MixPlan, TokenTargets]:
    """One rank's samples of the same four: partners are neighbours, and so on the same rank."""
    generator = torch.Generator().manual_seed(0)
    size = CASES[case][1]
    own = MixPlan.cutmix(4, image_size=size, generator=generator).own
    whole = MixPlan(torch.tensor([1, 0, 3, 2]), own)
    part = slice(rank * 4 // num_ranks, (rank + 1) * 4 // num_ranks)
    dense = torch.rand(4, 1, NUM_CLASSES, generator=generator).softmax(dim=-1)
    plan = MixPlan(torch.tensor([1, 0, 3, 2])[: 4 // num_ranks], own[part])
    return whole.mix(images_of(case))[part], plan, TokenTargets.from_dense(dense[part], None)


def step(model: nn.Module, rank: int, num_ranks: int, case: str) -> dict[str, object]:
    """Two steps of SGD; what is aligned, and the weights that come out."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, plan, targets = part_of(rank, num_ranks, case)
    shares, gradients = [], {}
    for _ in range(2):
        optimizer.zero_grad()
        logits, share = model(images, plan)
        loss = token_label_loss(
            logits[0] if isinstance(logits, tuple) else logits, None, plan.mix_targets(targets, share)
        )
        if isinstance(logits, tuple):
            loss = loss + logits[1].square().mean()
        loss.backward()
        gradients = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        shares.append(share)
    return {"share": torch.stack(shares), "gradients": gradients}


def make(case: str) -> nn.Module:
    model = build(case)
    return TLAlign(DenseClassifier(model, CASES[case][1])).train() if case == "distilled" else TLAlign(model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for case in sys.argv[2:]:
        torch.manual_seed(rank)  # DDP makes all ranks start from the first one's weights
        model = DistributedDataParallel(make(case))
        torch.save(step(model, rank, 2, case), Path(sys.argv[1]) / f"{case}-{rank}.pt")
    leave_ranks()
