"""Sinkhorn-Knopp in Triton: the three operators of :mod:`dinov2_kernels.sinkhorn.reference` for CUDA tensors.

Legend: logits [B, K] contiguous, float64, float32, bfloat16 or float16; bias [K] and every result in the accumulation
dtype, float64 for float64 logits and float32 otherwise. No atomics: results do not change from run to run.

A tile is 4096 or 8192 logits: 64 bytes of bfloat16 in flight per thread, enough to keep an H200's memory busy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype

MANY_ROWS = 1024  # from here on rows share a read of the bias: there are enough of them for every multiprocessor

_LOWEST = tl.constexpr(-3.0e38)  # where a running maximum starts: -inf would give exp(-inf + inf)


def column_logsumexp(logits: Tensor, temperature: float) -> Tensor:
    """log sum_b exp(x_bk / T) [K]; -inf where B = 0.

    Bytes: one read of the logits, one write of [K].
    """
    B, K = logits.shape
    out = torch.empty(K, dtype=accumulation_dtype(logits), device=logits.device)  # [K]
    with torch.cuda.device_of(logits):
        _column_logsumexp[(triton.cdiv(K, 128),)](logits, out, B, K, 1 / temperature, ROWS=32, COLUMNS=128)
    return out


def column_mass(logits: Tensor, temperature: float, bias: Tensor) -> Tensor:
    """sum_b softmax_k(x_b / T + bias) [K].

    Bytes: two reads of the logits (the second from L2 where they fit, as the class tokens do: [128, 65536] bfloat16
    are 17 MB), B / 4 reads of the bias, mostly from L2, and the vectors [K] and [2, B].
    """
    B, K = logits.shape
    row_norm = torch.empty(2, B, dtype=bias.dtype, device=logits.device)  # [2, B]: maximum, sum of exponentials
    out = torch.empty(K, dtype=bias.dtype, device=logits.device)  # [K]
    rows = 1 if B < MANY_ROWS else 4  # of a program
    shape = {"ROWS": rows, "COLUMNS": 8192 // rows, "num_warps": 8}
    with torch.cuda.device_of(logits):
        _row_norm[(triton.cdiv(B, rows),)](logits, bias, row_norm, B, K, 1 / temperature, **shape)
        _column_mass[(triton.cdiv(K, 128),)](logits, bias, row_norm, out, B, K, 1 / temperature, ROWS=32, COLUMNS=128)
    return out


def assign(logits: Tensor, temperature: float, bias: Tensor) -> Tensor:
    """softmax_k(x_b / T + bias) [B, K].

    Bytes: two reads of the logits (a program reads its row twice, the second time from L2) and one write of [B, K].
    """
    B, K = logits.shape
    out = torch.empty(B, K, dtype=bias.dtype, device=logits.device)  # [B, K]
    with torch.cuda.device_of(logits):
        _assign[(B,)](logits, bias, out, B, K, 1 / temperature, COLUMNS=8192, num_warps=8)
    return out


# `scale` is 1 / T. Triton passes a Python float as float32 unless told otherwise; float64 logits need all of it.


@triton.jit
def _column_logsumexp(logits, out, B, K, scale: tl.float64, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    dtype: tl.constexpr = out.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.full([1], scale, dtype)
    maximum = tl.full([COLUMNS], _LOWEST, dtype)
    total = tl.full([COLUMNS], 0.0, dtype)
    for start in range(0, B, ROWS):
        x = _load(logits, start + tl.arange(0, ROWS), column, B, K, dtype)  # [ROWS, COLUMNS]
        # The maximum is taken of the logits themselves: x - maximum is small, and nearly exact, where it matters.
        larger = tl.maximum(maximum, tl.max(x, 0))
        total = total * tl.exp((maximum - larger) * scale) + tl.sum(tl.exp((x - larger[None, :]) * scale), 0)
        maximum = larger
    tl.store(out + column, maximum * scale + tl.log(total), mask=column < K)


@triton.jit
def _row_norm(logits, bias, out, B, K, scale: tl.float64, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    maximum, total = _softmax_norm(logits, bias, row, B, K, scale, COLUMNS)
    tl.store(out + row, maximum, mask=row < B)
    tl.store(out + B + row, total, mask=row < B)


@triton.jit
def _column_mass(logits, bias, row_norm, out, B, K, scale: tl.float64, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    dtype: tl.constexpr = out.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.full([1], scale, dtype)
    offset = tl.load(bias + column, mask=column < K, other=0.0)  # [COLUMNS]
    total = tl.full([COLUMNS], 0.0, dtype)
    for start in range(0, B, ROWS):
        row = start + tl.arange(0, ROWS)
        x = _load(logits, row, column, B, K, dtype)  # [ROWS, COLUMNS]
        maximum = tl.load(row_norm + row, mask=row < B, other=0.0)  # [ROWS]
        norm = tl.load(row_norm + B + row, mask=row < B, other=1.0)  # [ROWS]
        total += tl.sum(tl.exp(x * scale + offset[None, :] - maximum[:, None]) / norm[:, None], 0)
    tl.store(out + column, total, mask=column < K)


@triton.jit
def _assign(logits, bias, out, B, K, scale: tl.float64, COLUMNS: tl.constexpr):
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0) + tl.arange(0, 1)
    maximum, norm = _softmax_norm(logits, bias, row, B, K, scale, COLUMNS)  # [1]
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = _load(logits, row, column, B, K, dtype)  # [1, COLUMNS]
        offset = tl.load(bias + column, mask=column < K, other=0.0)  # [COLUMNS]
        p = tl.exp(x * tl.full([1], scale, dtype) + offset[None, :] - maximum[:, None]) / norm[:, None]
        tl.store(out + row.to(tl.int64)[:, None] * K + column[None, :], p, mask=(column < K)[None, :])


@triton.jit
def _softmax_norm(logits, bias, row, B, K, scale, COLUMNS: tl.constexpr):
    """Of some rows b, the maximum of z_bk = x_bk / T + bias_k over k, and sum_k exp(z_bk - maximum_b).

    Kept apart, not as one log-sum-exp: at |z| = 1e5 its rounding alone would cost the softmax 1 %.
    """
    dtype: tl.constexpr = bias.dtype.element_ty
    maximum = tl.full(row.shape, _LOWEST, dtype)
    total = tl.full(row.shape, 0.0, dtype)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        offset = tl.load(bias + column, mask=column < K, other=0.0)  # [COLUMNS]
        z = _load(logits, row, column, B, K, dtype) * tl.full([1], scale, dtype) + offset[None, :]  # [rows, COLUMNS]
        larger = tl.maximum(maximum, tl.max(z, 1))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(z - larger[:, None]), 1)
        maximum = larger
    return maximum, total


@triton.jit
def _load(logits, row, column, B, K, dtype: tl.constexpr):
    """A tile of the logits in the accumulation dtype; -inf, which adds nothing to any sum, outside the matrix."""
    inside = (row < B)[:, None] & (column < K)[None, :]
    address = logits + row.to(tl.int64)[:, None] * K + column[None, :]  # B * K may pass 2^31
    return tl.load(address, mask=inside, other=float("-inf")).to(dtype)
