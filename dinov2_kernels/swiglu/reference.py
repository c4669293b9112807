"""SwiGLU (Shazeer, arXiv:2002.05202) between its two linear layers: the definition every kernel is tested against.

y = silu(x1) * x2    with [x1, x2] = x12, silu(x) = x s and s = 1 / (1 + exp(-x))

and, with the gradient g of y,

dx1 = g x2 s (1 + x1 (1 - s))        dx2 = g silu(x1)
"""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(x12: Tensor) -> Tensor:
    """x12: [..., 2H]; returns [..., H]."""
    x1, x2 = x12.chunk(2, dim=-1)
    return x1 * torch.sigmoid(x1) * x2


def swiglu_backward(grad: Tensor, x12: Tensor) -> Tensor:
    """Gradient [..., 2H] of x12, given that of the result, grad [..., H]."""
    x1, x2 = x12.chunk(2, dim=-1)
    s = torch.sigmoid(x1)
    return torch.cat([grad * x2 * s * (1 + x1 * (1 - s)), grad * x1 * s], dim=-1)
