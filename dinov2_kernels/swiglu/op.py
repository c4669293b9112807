"""SwiGLU: forward and backward operators, autograd, and the functions that call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_kernels._autograd import KernelFunction, differentiably, in_pytorch, is_beyond_kernels, needs_gradient
from dinov2_kernels._library import accumulation_dtype, contiguous, define
from dinov2_kernels.swiglu import reference

_TRITON = "dinov2_kernels.swiglu.triton_kernel"


def _fake_forward(x12: Tensor) -> Tensor:
    return x12.new_empty(*x12.shape[:-1], x12.shape[-1] // 2)


def _fake_backward(grad: Tensor, x12: Tensor) -> Tensor:
    return torch.empty_like(x12)


def _fake_backward_(grad: Tensor, x12: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x12), x12.new_empty(x12.shape[-1], dtype=accumulation_dtype(x12))


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
_backward_ = define(
    "swiglu_backward_(Tensor(a!) grad, Tensor x12) -> (Tensor, Tensor)",
    reference=reference.swiglu_backward_,
    fake=_fake_backward_,
    triton=f"{_TRITON}:swiglu_backward_",
).call


def swiglu(x12: Tensor) -> Tensor:
    """Multiply one half of the features by the SiLU of the other, see :mod:`dinov2_kernels.swiglu.reference`.

    Bytes: forward reads x12 and writes the result, which is half as large; backward reads x12 and the gradient, and
    writes the gradient of x12. It needs nothing else.

    Args:
        x12: [..., 2H] gate (first half) and value (second half); any floating dtype.

    Returns:
        [..., H] in the dtype of x12.

    Raises:
        TypeError, ValueError: x12 is not floating-point, or its last dimension is odd.

    Examples:
        >>> swiglu(torch.randn(2, 10, 2 * 64)).shape
        torch.Size([2, 10, 64])
        >>> swiglu(torch.tensor([0.0, 2.0, 5.0, 3.0]))  # gates 0 and 2, values 5 and 3
        tensor([0.0000, 5.2848])
    """
    _check(x12)
    x12 = contiguous(x12)
    if needs_gradient(x12):
        return differentiably(_SwiGLU, x12)  # type: ignore[no-any-return]
    y: Tensor = _forward(x12)
    return y


def swiglu_backward_(grad: Tensor, x12: Tensor) -> tuple[Tensor, Tensor]:
    """Backward of SwiGLU inside a feed-forward layer: one pass over the features between two matrix products.

    With ``x12 = linear(x)`` and ``y = linear(swiglu(x12))``, backward needs the gradient of x12, its sum over the rows
    for the first bias, and swiglu(x12) again for the second weight.

    Bytes: reads ``grad`` and x12, writes the gradient of x12 and, over ``grad``, swiglu(x12). Sums have a fixed order,
    so results are the same in every run and for every number of threads.

    Args:
        grad: [..., H] contiguous, gradient of swiglu(x12); overwritten with swiglu(x12).
        x12: [..., 2H] contiguous; any floating dtype, the same as ``grad``.

    Returns:
        The gradient of x12 [..., 2H], and its sum [2H] over all rows in float32, or in float64 for float64.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: autograd would have to record the call.

    Examples:
        >>> x12, grad = torch.randn(5, 2 * 8), torch.ones(5, 8)
        >>> dx12, dx12_sum = swiglu_backward_(grad, x12)
        >>> dx12.shape, dx12_sum.shape
        (torch.Size([5, 16]), torch.Size([16]))
        >>> torch.allclose(grad, swiglu(x12), atol=1e-6)  # overwritten
        True
    """
    _check(x12)
    if grad.dtype != x12.dtype or grad.device != x12.device:
        got = f"{grad.dtype} on {grad.device}"
        raise TypeError(f"grad: expected dtype and device of x12, {x12.dtype} on {x12.device}, got {got}")
    expected = [*x12.shape[:-1], x12.shape[-1] // 2]
    if list(grad.shape) != expected:
        raise ValueError(f"grad: expected shape {expected}, got {list(grad.shape)}")
    for name, tensor in (("grad", grad), ("x12", x12)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if needs_gradient(grad, x12):
        raise RuntimeError(
            "swiglu_backward_: expected tensors that need no gradient, because autograd cannot record it"
        )
    result: tuple[Tensor, Tensor] = _backward_(grad, x12)
    return result


def _check(x12: Tensor) -> None:
    if x12.dim() == 0 or x12.shape[-1] % 2:
        raise ValueError(f"x12: expected a last dimension of even size, got shape {list(x12.shape)}")
    if not x12.is_floating_point():
        raise TypeError(f"x12: expected a floating-point tensor, got {x12.dtype}")


class _SwiGLU(KernelFunction):
    definition = staticmethod(reference.swiglu)

    @staticmethod
    def forward(ctx: Any, x12: Tensor) -> Tensor:
        ctx.save_for_backward(x12)
        y: Tensor = _forward(x12)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x12,) = ctx.saved_tensors
        dx12: Tensor
        if is_beyond_kernels(grad):
            dx12 = in_pytorch(reference.swiglu_backward, grad, x12)
        else:
            dx12 = _backward(grad.contiguous(), x12)
        return dx12
