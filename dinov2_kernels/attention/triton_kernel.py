"""Attention in Triton: the two operators of :mod:`dinov2_kernels.attention.reference` for CUDA tensors.

Legend: T tokens, H heads of width D <= 128; q, k, v [T, H, D] in float32, bfloat16 or float16 with a dense last
dimension; grad and out [T, H, D] contiguous; lse [H, T] float32. Which kernel takes which sequences is decided in
:mod:`dinov2_kernels.attention.triton_schedule`. No atomics: results do not change from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2_kernels.attention.triton_schedule import backward_launches, forward_launches


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, runs: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """The result [T, H, D] and lse [H, T], of sequences given by cu_seqlens [S + 1], or by runs where it is None.

    Bytes, with e per element: one read of q, k and v and one write of the result, 4 T H D e, and 4 T H for lse. Longer
    sequences than stay on the chip read keys and values again for every block of queries, mostly from L2.
    """
    T, H, D = q.shape
    q, k, v = _with_equal_strides(q, k, v)
    out = torch.empty((T, H, D), dtype=q.dtype, device=q.device)  # [T, H, D]
    lse = torch.empty((H, T), dtype=torch.float32, device=q.device)  # [H, T]
    token_stride, head_stride, _ = q.stride()
    with torch.cuda.device_of(q):
        for launch in forward_launches(cu_seqlens, runs, q):
            launch.kernel[(launch.programs * H,)](
                q, k, v, out, lse, *launch.sequences, token_stride, head_stride, T, H, scale, **launch.options
            )
    return out, lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, runs: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    """Gradients [T, 3, H, D] of q, k and v, given that of the result, grad [T, H, D].

    Bytes, with e per element: 8 T H D e. Beyond 64 tokens a sequence, blocks of it are read again by its other blocks,
    from L2.
    """
    T, H, D = q.shape
    q, k, v = _with_equal_strides(q, k, v)
    dqkv = torch.empty((T, 3, H, D), dtype=q.dtype, device=q.device)  # [T, 3, H, D]
    tensors = (grad, q, k, v, out, lse, dqkv)
    token_stride, head_stride, _ = q.stride()
    with torch.cuda.device_of(q):
        for launch in backward_launches(cu_seqlens, runs, q):
            launch.kernel[(launch.programs * H,)](
                *tensors, *launch.sequences, token_stride, head_stride, T, H, scale, **launch.options
            )
    return dqkv


def _with_equal_strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one packed tensor have them, and so have separate tensors; anything else is copied.

    One set of offsets then serves all three, which saves a kernel up to a fifth of its registers.
    """
    if q.stride() == k.stride() == v.stride():
        return q, k, v
    return q.contiguous(), k.contiguous(), v.contiguous()
