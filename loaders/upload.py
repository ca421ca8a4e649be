"""From the host to the device without waiting for what is queued there."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on another device. To CUDA it goes by pinned memory: copies from other memory make the host
    wait for all that was queued before them.
    """
    device = torch.device(device)
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
