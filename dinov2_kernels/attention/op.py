"""Attention over packed sequences as users call it: argument checks, and one fused attention call per run."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_kernels.packing import PackedLayout


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout | Tensor, *, scale: float | None = None
) -> Tensor:
    """Softmax attention within each sequence of a packed batch, see :mod:`dinov2_kernels.attention.reference`.

    Differentiable; equal to attending to every sequence on its own. Bytes: one read of q, k and v, one write of the
    result; the attention matrix is never stored.

    Args:
        q, k, v: [T, H, D] tokens, heads, width of a head; any floating dtype, any strides with a dense last dimension.
        layout: the sequences, as a :class:`PackedLayout` or as int32 offsets [S + 1] from 0 to T. Offsets are read on
            the host, which waits for their device: prefer a layout.
        scale: factor of the scores; 1 / sqrt(D) by default.

    Returns:
        [T, H, D] in the dtype of v.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check_heads(q, k, v)
    layout = _as_layout(layout, q, "q")
    if layout.total_tokens == 0:
        return v.clone()
    runs = zip(layout.unpack(q), layout.unpack(k), layout.unpack(v), strict=True)
    attended = [_attend(*run, scale) for run in runs if run[0].numel()]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def varlen_attention_qkvpacked(qkv: Tensor, layout: PackedLayout | Tensor, *, scale: float | None = None) -> Tensor:
    """:func:`varlen_attention` for queries, keys and values that one linear layer wrote into one tensor.

    Args:
        qkv: [T, 3, H, D] queries, keys and values.
        layout, scale: as for :func:`varlen_attention`.

    Returns:
        [T, H, D] in the dtype of qkv.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected shape [T, 3, H, D], got {list(qkv.shape)}")
    q, k, v = qkv.unbind(1)  # [T, H, D] each
    return varlen_attention(q, k, v, _as_layout(layout, qkv, "qkv"), scale=scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """One run: q, k, v [S, N, H, D]; returns [S * N, H, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [S, H, N, D]
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)


def _as_layout(layout: PackedLayout | Tensor, tokens: Tensor, name: str) -> PackedLayout:
    if isinstance(layout, Tensor):
        layout = _read_offsets(layout)
    elif not isinstance(layout, PackedLayout):
        raise TypeError(f"layout: expected a PackedLayout or a tensor of offsets, got {type(layout).__name__}")
    layout.check(tokens, name)
    return layout


def _read_offsets(cu_seqlens: Tensor) -> PackedLayout:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ValueError(f"layout: expected offsets of dtype torch.int32 and shape [S + 1], got {got}")
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    if offsets[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"layout: expected offsets that start at 0 and never decrease, got {offsets}")
    return PackedLayout.from_lengths(lengths)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 3:
        raise ValueError(f"q: expected shape [T, H, D], got {list(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(f"{name}: expected the shape of q, {list(q.shape)}, got {list(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {tensor.dtype}")
    if not q.is_floating_point():
        raise TypeError(f"q: expected a floating-point tensor, got {q.dtype}")
