"""GELU's backward pass: one operator, and the function that calls it."""

from __future__ import annotations

from torch import Tensor

from dinov2_kernels._autograd import needs_gradient
from dinov2_kernels._library import accumulation_dtype, define
from dinov2_kernels.gelu import reference


def _fake_backward_(grad: Tensor, z: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape[-1], dtype=accumulation_dtype(z))


_backward_ = define(
    "gelu_backward_(Tensor(a!) grad, Tensor z, bool tanh) -> (Tensor, Tensor)",
    reference=reference.gelu_backward_,
    fake=_fake_backward_,
    triton="dinov2_kernels.gelu.triton_kernel:gelu_backward_",
).call


def gelu_backward_(grad: Tensor, z: Tensor, *, approximate: str = "none") -> tuple[Tensor, Tensor]:
    """Backward of GELU inside a feed-forward layer: one pass over the features between two matrix products.

    With ``z = linear(x)`` and ``y = linear(gelu(z))``, backward needs the gradient of z, its sum over the rows for the
    first bias, and gelu(z) again for the second weight. See :mod:`dinov2_kernels.gelu.reference`.

    Bytes: reads ``grad`` and z, writes gelu(z) and, over ``grad``, the gradient of z. Sums have a fixed order, so
    results are the same in every run and for every number of threads.

    Args:
        grad: [..., H] contiguous, gradient of gelu(z); overwritten with the gradient of z.
        z: [..., H] contiguous; any floating dtype, the same as ``grad``.
        approximate: ``"none"`` for the exact GELU or ``"tanh"``, as in ``nn.GELU``.

    Returns:
        gelu(z) [..., H] in the dtype of z, and the sum [H] of the gradient of z over all rows, in float32, or in
        float64 for float64.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: autograd would have to record the call.

    Examples:
        >>> z, grad = torch.randn(5, 8), torch.ones(5, 8)
        >>> h, dz_sum = gelu_backward_(grad, z)
        >>> torch.allclose(h, nn.functional.gelu(z), atol=1e-6)
        True
        >>> torch.allclose(dz_sum, grad.sum(dim=0), atol=1e-6)  # grad is now the gradient of z
        True
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    if not z.is_floating_point():
        raise TypeError(f"z: expected a floating-point tensor, got {z.dtype}")
    if z.dim() == 0:
        raise ValueError("z: expected shape [..., H], got []")
    if grad.dtype != z.dtype or grad.device != z.device:
        got = f"{grad.dtype} on {grad.device}"
        raise TypeError(f"grad: expected dtype and device of z, {z.dtype} on {z.device}, got {got}")
    if grad.shape != z.shape:
        raise ValueError(f"grad: expected the shape of z, {list(z.shape)}, got {list(grad.shape)}")
    for name, tensor in (("grad", grad), ("z", z)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if needs_gradient(grad, z):
        raise RuntimeError("gelu_backward_: expected tensors that need no gradient, because autograd cannot record it")
    result: tuple[Tensor, Tensor] = _backward_(grad, z, approximate == "tanh")
    return result
