"""SwiGLU: two operators, their derivative, and the function that users call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_kernels._library import define, differentiably, needs_gradient
from dinov2_kernels.swiglu import reference

_TRITON = "dinov2_kernels.swiglu.triton_kernel"


def _fake_forward(x12: Tensor) -> Tensor:
    return x12.new_empty(*x12.shape[:-1], x12.shape[-1] // 2)


def _fake_backward(grad: Tensor, x12: Tensor) -> Tensor:
    return torch.empty_like(x12)


_forward = define(
    "swiglu(Tensor x12) -> Tensor",
    reference=reference.swiglu,
    fake=_fake_forward,
    triton=f"{_TRITON}:swiglu",
).call
_backward = define(
    "swiglu_backward(Tensor grad, Tensor x12) -> Tensor",
    reference=reference.swiglu_backward,
    fake=_fake_backward,
    triton=f"{_TRITON}:swiglu_backward",
).call


def swiglu(x12: Tensor) -> Tensor:
    """Gate one half of the features by the SiLU of the other, see :mod:`dinov2_kernels.swiglu.reference`.

    Bytes: forward reads x12 and writes the result, which is half as large; backward reads x12 and the gradient and
    writes x12's. Nothing but x12 is kept for it.

    Args:
        x12: [..., 2H] gate (first half) and value (second half); any floating dtype.

    Returns:
        [..., H] in the dtype of x12.

    Raises:
        TypeError, ValueError: x12 is not floating-point, or its last dimension is odd.
    """
    if x12.dim() == 0 or x12.shape[-1] % 2:
        raise ValueError(f"x12: expected a last dimension of even size, got shape {list(x12.shape)}")
    if not x12.is_floating_point():
        raise TypeError(f"x12: expected a floating-point tensor, got {x12.dtype}")
    x12 = x12.contiguous()
    if needs_gradient(x12):
        return differentiably(_SwiGLU, x12)  # type: ignore[no-any-return]
    y: Tensor = _forward(x12)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x12: Tensor) -> Tensor:
        ctx.save_for_backward(x12)
        y: Tensor = _forward(x12)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x12,) = ctx.saved_tensors
        dx12: Tensor = _backward(grad.contiguous(), x12)
        return dx12
