"""Products of matrices."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# From this number of multiplications on, oneDNN's products are worth their larger overhead.
MIN_SIZE = 2**20


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two matrices, ``(m, k)`` and ``(k, n)``."""
    if (
        a.shape[0] * b.numel() >= MIN_SIZE
        and a.dtype is torch.float32 is b.dtype
        and a.device.type == "cpu"
        and _prefers_onednn()
    ):
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return torch.mm(a, b)


@cache
def _prefers_onednn() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
