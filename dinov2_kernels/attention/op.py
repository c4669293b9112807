"""Attention over packed sequences: forward and backward operators, autograd, and the functions that users call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dinov2_kernels._autograd import (
    KernelFunction,
    differentiably,
    in_pytorch,
    is_beyond_kernels,
    leaves_pytorch,
    needs_gradient,
)
from dinov2_kernels._library import accumulation_dtype, autocast_dtype, contiguous, define, dense
from dinov2_kernels.attention import reference
from dinov2_kernels.packing import PackedLayout

_TRITON = "dinov2_kernels.attention.triton_kernel"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 128


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q))  # [H, T]
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _fake_backward(grad: Tensor, q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], 3, *q.shape[1:])  # [T, 3, H, D]


# q, k, v [T, H, D] have a dense last dimension and any other strides; grad and out are contiguous. cu_seqlens [S + 1]
# describes the sequences; if it is None, runs (count, length, count, length, ...) on the host do.
_forward = define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, SymInt[] runs, float scale) "
    "-> (Tensor, Tensor)",
    reference=reference.attention_forward,
    fake=_fake_forward,
    triton=f"{_TRITON}:attention_forward",
).call
_backward = define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_seqlens, "
    "SymInt[] runs, float scale) -> Tensor",
    reference=reference.attention_backward,
    fake=_fake_backward,
    triton=f"{_TRITON}:attention_backward",
).call


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout | Tensor,
    *,
    scale: float | None = None,
    validate: bool = False,
) -> Tensor:
    """Softmax attention within each sequence of a packed batch, see :mod:`dinov2_kernels.attention.reference`.

    It is differentiable and deterministic, and gives the same result as a separate attention for each sequence. Under
    autocast it computes in autocast's dtype, as ``F.scaled_dot_product_attention`` does.

    Bytes, with e bytes per element: forward reads q, k and v and writes the result, 4 T H D e, and 4 T H of
    log-sum-exps; backward reads all of these and the gradient, and writes three gradients, 8 T H D e. The attention
    matrix is never stored.

    Args:
        q, k, v: [T, H, D] tokens, heads, width of a head; equal floating dtypes; any strides with a dense last
            dimension (others are copied). There are kernels for float32, bfloat16 and float16 with D up to 128;
            float64 and wider heads run in plain PyTorch.
        layout: the sequences, as a :class:`PackedLayout` or as int32 offsets [S + 1] from 0 to T on the device of q.
            A PackedLayout is faster: its lengths, which the host knows, decide which kernels run.
        scale: factor of the scores; 1 / sqrt(D) by default.
        validate: check the values of offsets on a GPU too; the host then waits for the GPU. Offsets on a CPU are
            always checked.

    Returns:
        [T, H, D], contiguous, in the dtype of v.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Examples:
        >>> layout = PackedLayout([(2, 5), (3, 2)])  # two sequences of 5 tokens, then three of 2
        >>> q, k, v = torch.randn(3, layout.total_tokens, 4, 64)  # 4 heads of width 64
        >>> varlen_attention(q, k, v, layout).shape
        torch.Size([16, 4, 64])
        >>> varlen_attention(q, k, v, layout.cu_seqlens("cpu")).shape  # the same, given by offsets
        torch.Size([16, 4, 64])
    """
    _check_heads(q, k, v)
    cu_seqlens, runs = _sequences(layout, q, "q", validate)
    if q.dtype != (dtype := autocast_dtype(q)):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    q, k, v = dense(q), dense(k), dense(v)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if needs_gradient(q, k, v):
        return differentiably(_Attention, q, k, v, cu_seqlens, runs, scale)  # type: ignore[no-any-return]
    return _run_forward(q, k, v, cu_seqlens, runs, scale)[0]


def varlen_attention_qkvpacked(
    qkv: Tensor, layout: PackedLayout | Tensor, *, scale: float | None = None, validate: bool = False
) -> Tensor:
    """:func:`varlen_attention` for queries, keys and values in one tensor, as one linear layer makes them.

    The kernels read q, k and v with their strides and write the gradient as one tensor, so nothing is copied.

    Args:
        qkv: [T, 3, H, D] queries, keys and values.
        layout, scale, validate: as for :func:`varlen_attention`.

    Returns:
        [T, H, D], contiguous, in the dtype of qkv.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Examples:
        >>> layout = PackedLayout([(2, 5), (3, 2)])
        >>> project = nn.Linear(256, 3 * 256)
        >>> qkv = project(torch.randn(layout.total_tokens, 256)).view(16, 3, 4, 64)
        >>> varlen_attention_qkvpacked(qkv, layout).shape
        torch.Size([16, 4, 64])
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected shape [T, 3, H, D], got {list(qkv.shape)}")
    _check_floating(qkv, "qkv")
    cu_seqlens, runs = _sequences(layout, qkv, "qkv", validate)
    if qkv.dtype != (dtype := autocast_dtype(qkv)):
        qkv = qkv.to(dtype)
    qkv = dense(qkv)
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    if needs_gradient(qkv):
        return differentiably(_PackedAttention, qkv, cu_seqlens, runs, scale)  # type: ignore[no-any-return]
    return _run_forward(*qkv.unbind(1), cu_seqlens, runs, scale)[0]


class _Attention(KernelFunction):
    @staticmethod
    def definition(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
        return reference.attention_forward(q, k, v, *args)[0]

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, runs: Sequence[int], scale: float
    ) -> Tensor:
        out, lse = _run_forward(q, k, v, cu_seqlens, runs, scale)
        ctx.save_for_backward(q, k, v, cu_seqlens, out, lse)
        ctx.runs, ctx.scale = runs, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
        dqkv = _run_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.runs, ctx.scale)  # [T, 3, H, D]
        return *dqkv.unbind(1), None, None, None


class _PackedAttention(KernelFunction):
    @staticmethod
    def definition(qkv: Tensor, *args: Any) -> Tensor:
        q, k, v = qkv.unbind(1)
        return reference.attention_forward(q, k, v, *args)[0]

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor | None, runs: Sequence[int], scale: float) -> Tensor:
        out, lse = _run_forward(*qkv.unbind(1), cu_seqlens, runs, scale)
        ctx.save_for_backward(qkv, cu_seqlens, out, lse)
        ctx.runs, ctx.scale = runs, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cu_seqlens, out, lse = ctx.saved_tensors
        dqkv = _run_backward(grad, *qkv.unbind(1), out, lse, cu_seqlens, ctx.runs, ctx.scale)  # [T, 3, H, D]
        return dqkv, None, None, None


def _run_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    operator = _forward if _has_kernel(q) else reference.attention_forward
    result: tuple[Tensor, Tensor] = operator(q, k, v, *args)
    return result


def _run_backward(grad: Tensor, q: Tensor, *args: Any) -> Tensor:
    if is_beyond_kernels(grad):
        return in_pytorch(reference.attention_backward, grad, q, *args)  # type: ignore[no-any-return]
    operator = _backward if _has_kernel(q) else reference.attention_backward
    result: Tensor = operator(grad.contiguous(), q, *args)
    return result


def _has_kernel(q: Tensor) -> bool:
    if q.dtype == torch.float64:
        return False
    if q.shape[-1] > MAX_HEAD_DIM or q.dtype not in KERNEL_DTYPES:
        _warn_once(f"no attention kernel for heads of width {q.shape[-1]} in {q.dtype}: running in plain PyTorch")
        return False
    return True


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def _sequences(
    layout: PackedLayout | Tensor, tokens: Tensor, name: str, validate: bool
) -> tuple[Tensor | None, Sequence[int]]:
    """The sequences as operators take them: offsets, or None and runs."""
    if isinstance(layout, PackedLayout):
        layout.check(tokens, name)
        return None, layout.flat_runs
    if not isinstance(layout, Tensor):
        raise TypeError(f"layout: expected a PackedLayout or a tensor of offsets, got {type(layout).__name__}")
    if layout.dtype != torch.int32 or layout.dim() != 1 or len(layout) == 0:
        got = f"{layout.dtype} {list(layout.shape)}"
        raise ValueError(f"layout: expected offsets of dtype torch.int32 and shape [S + 1], got {got}")
    if layout.device != tokens.device:
        raise ValueError(f"layout: expected offsets on the device of {name}, {tokens.device}, got {layout.device}")
    if leaves_pytorch():  # the definition would make them constants
        raise NotImplementedError(
            "layout: expected a PackedLayout in torch.jit.trace and ONNX export, got offsets, whose values these record"
        )
    if validate or (layout.device.type == "cpu" and not torch.compiler.is_compiling()):
        _check_offsets(layout, tokens, name)
    return contiguous(layout), ()


def _check_offsets(cu_seqlens: Tensor, tokens: Tensor, name: str) -> None:
    if cu_seqlens[0] != 0 or (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        got = cu_seqlens.tolist() if len(cu_seqlens) <= 16 else f"{cu_seqlens[:16].tolist()} and so on"
        raise ValueError(f"layout: expected offsets that start at 0 and never decrease, got {got}")
    if (total := int(cu_seqlens[-1])) != tokens.shape[0]:
        raise ValueError(f"layout: expected offsets that end at the {tokens.shape[0]} tokens of {name}, got {total}")


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 3:
        raise ValueError(f"q: expected shape [T, H, D], got {list(q.shape)}")
    _check_floating(q, "q")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(f"{name}: expected the shape of q, {list(q.shape)}, got {list(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {tensor.device}")


def _check_floating(x: Tensor, name: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if x.shape[-1] == 0 or x.shape[-2] == 0:
        raise ValueError(f"{name}: expected at least one head of width 1 or more, got {list(x.shape)}")
