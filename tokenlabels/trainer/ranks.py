"""The processes that train together, one per device: who is who, and what they agree on.

torchrun starts them and says so in environment variables; without it there is one.
"""

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed, nn

_GLOO_RELEASE_SECONDS = 0.2


def join_ranks(device: str) -> torch.device:
    """Join the other processes if torchrun started this one, and choose its device.

    Args:
        device: "auto" (CUDA where there is a GPU), "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without a GPU, or with fewer GPUs than processes of this machine.
    """
    is_cuda = torch.cuda.is_available() if device == "auto" else torch.device(device).type == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_gpus = torch.cuda.device_count() if is_cuda else 0
    if is_cuda and not num_gpus:
        raise ValueError("torch sees no GPU here; use --device cpu")
    if is_cuda and local_rank >= num_gpus:
        raise ValueError(
            f"process {local_rank} of this machine has no GPU of its own: torch sees {num_gpus}; start fewer with "
            "--nproc-per-node"
        )
    if is_cuda:
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("nccl" if is_cuda else "gloo")
    return torch.device("cuda", local_rank) if is_cuda else torch.device("cpu")


def leave_ranks() -> None:
    """Part from the others."""
    if distributed.is_available() and distributed.is_initialized():
        if distributed.get_backend() == "gloo":
            # Its threads may let go of the last tensors a moment late, and abort if Python ends before they do
            # (pytorch/pytorch#179291).
            time.sleep(_GLOO_RELEASE_SECONDS)
        distributed.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """This process among those that train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' values, on every rank. All ranks must call it alike."""
    if rank_and_world_size()[1] > 1:
        distributed.all_reduce(values)
    return values


def seed_step(seed: int, step: int) -> None:
    """Make the random numbers of an optimizer step a function of (seed, rank, step).

    So a run that goes on draws what it would have drawn, and no checkpoint has to hold the generators of all ranks.
    """
    rank, _ = rank_and_world_size()
    digest = hashlib.blake2b(f"{seed} {rank} {step}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest) >> 1)


def broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0: its batch statistics are the ones that are saved."""
    if rank_and_world_size()[1] > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def is_same_on_all_ranks(value: int, device: torch.device) -> bool:
    """Whether all ranks call this with the same number."""
    if rank_and_world_size()[1] == 1:
        return True
    bounds = torch.tensor([value, -value], device=device)
    distributed.all_reduce(bounds, distributed.ReduceOp.MAX)
    return int(bounds[0]) == -int(bounds[1])


class StopRequest:
    """Whether this process was asked to leave.

    Attributes:
        received: true from the signal on.
    """

    def __init__(self) -> None:
        self.received = False
        # On the CPU, also beside NCCL: to ask must not make the host wait for the GPU.
        self._group: Any = distributed.new_group(backend="gloo") if rank_and_world_size()[1] > 1 else None

    def is_agreed(self) -> bool:
        """Whether all ranks leave now. They see a signal at different steps: all must ask, after every step."""
        if self._group is None:
            return self.received
        flag = torch.tensor(float(self.received))
        distributed.all_reduce(flag, group=self._group)
        return bool(flag)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what signal.signal asks for
        self.received = True


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Take SIGTERM as a request to save and leave. Outside the main thread it is left alone."""
    request = StopRequest()
    try:
        before = signal.signal(signal.SIGTERM, request._receive)
    except ValueError:  # not the main thread
        yield request
        return
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
