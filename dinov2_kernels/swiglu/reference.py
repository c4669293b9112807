"""SwiGLU (Shazeer, arXiv:2002.05202) between its two linear layers: the definition every kernel is tested against.

y = silu(x1) * x2    with [x1, x2] = x12, silu(x) = x s and s = 1 / (1 + exp(-x))

and, with the gradient g of y,

dx1 = g x2 s (1 + x1 (1 - s))        dx2 = g silu(x1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype


def swiglu(x12: Tensor) -> Tensor:
    """x12: [..., 2H]; returns [..., H]."""
    x1, x2 = x12.chunk(2, dim=-1)
    return x1 * torch.sigmoid(x1) * x2


def swiglu_backward(grad: Tensor, x12: Tensor) -> Tensor:
    """Gradient [..., 2H] of x12 from grad [..., H], the gradient of the result."""
    x1, x2 = x12.chunk(2, dim=-1)
    s = torch.sigmoid(x1)
    return torch.cat([grad * x2 * s * (1 + x1 * (1 - s)), grad * x1 * s], dim=-1)


def swiglu_backward_(grad: Tensor, x12: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [..., 2H] of x12, and its sum [2H] over all rows in the accumulation dtype.

    ``grad`` [..., H] becomes swiglu(x12).
    """
    dx12 = swiglu_backward(grad, x12)
    grad.copy_(swiglu(x12))
    return dx12, dx12[None].flatten(0, -2).sum(dim=0, dtype=accumulation_dtype(x12))
