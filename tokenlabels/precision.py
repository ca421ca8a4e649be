"""Full precision where the user has asked for speed: labels are small, and their rounding would be trained on."""

from contextlib import AbstractContextManager, nullcontext

import torch


def work_dtype() -> torch.dtype:
    """The dtype of matrix products: float32, or float64 where float32 products may be rounded (TF32, bfloat16).

    Compiled code outlives the setting and cannot read it: it takes float64.
    """
    return torch.float32 if not torch.compiler.is_compiling() and _products_are_exact() else torch.float64


def _products_are_exact() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set per backend (torch.backends.*.fp32_precision), which this function cannot answer for
        return False


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """No automatic casting to half precision inside."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
