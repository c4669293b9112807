"""GELU's backward pass (Hendrycks and Gimpel, arXiv:1606.08415): the definition every kernel is tested against.

gelu(z) = z P(z)    gelu'(z) = P(z) + z P'(z)

where P is the distribution function of the normal distribution, or an approximation of it:

exact    P(z) = (1 + erf(z / sqrt(2))) / 2                                        P'(z) = exp(-z^2 / 2) / sqrt(2 pi)
tanh     P(z) = (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (z + 0.044715 z^3)        P'(z) = (1 - tanh(u)^2) u' / 2
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype


def gelu_backward_(grad: Tensor, z: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """gelu(z) [..., H], and the sum [H] of z's gradient over all rows; ``grad`` becomes z's gradient.

    The sum is in the accumulation dtype and takes the gradient before it is rounded to the dtype of ``grad``.
    """
    wide = z.to(accumulation_dtype(z))
    P, slope = _tanh(wide) if tanh else _exact(wide)
    dz = grad * (P + wide * slope)
    grad.copy_(dz)
    return (wide * P).to(z.dtype), dz[None].flatten(0, -2).sum(dim=0)


def _exact(z: Tensor) -> tuple[Tensor, Tensor]:
    """P and its derivative."""
    return (1 + torch.erf(z * math.sqrt(0.5))) / 2, torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    """P and its derivative."""
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (z + 0.044715 * z**3))
    return (1 + t) / 2, (1 - t * t) * k * (1 + 3 * 0.044715 * z * z) / 2
