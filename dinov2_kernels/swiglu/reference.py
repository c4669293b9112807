"""SwiGLU (Shazeer, arXiv:2002.05202) between its two linear layers: the definition every kernel is tested against.

y = silu(x1) * x2    with [x1, x2] = x12 and silu(x) = x / (1 + exp(-x))
"""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(x12: Tensor) -> Tensor:
    """x12: [..., 2H]; returns [..., H]."""
    x1, x2 = x12.chunk(2, dim=-1)
    return x1 * torch.sigmoid(x1) * x2
