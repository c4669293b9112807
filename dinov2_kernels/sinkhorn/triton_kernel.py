"""Sinkhorn-Knopp in Triton: the operators of :mod:`dinov2_kernels.sinkhorn.reference` for CUDA tensors.

Legend: logits [B, K] contiguous, float64, float32, bfloat16 or float16; bias [K] and every result in the accumulation
dtype, float64 for float64 logits and float32 otherwise. No atomics: results are the same in every run.

For sums over columns, a program owns a *strip*, some neighbouring columns with all rows, and reads it in tiles
[DEPTH, ROWS, COLUMNS]. A thread holds DEPTH rows of its columns and sums them alone; threads combine their sums once,
at the end of the strip. A tile has 4096 or 8192 logits: each thread loads 64 bytes of bfloat16 at once, enough to keep
an H200's memory busy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype

MANY_ROWS = 1024  # from this number on, rows share a read of the bias: there is enough work for every multiprocessor
PROGRAMS = 264  # programs that own strips at once: two on each of the 132 multiprocessors of an H100 or H200
L2_BYTES = 50 * 2**20  # L2 cache of an H100 or H200
SECTOR_BYTES = 32  # the smallest unit of a memory read

_LOWEST = tl.constexpr(-3.0e38)  # start of a running maximum: -inf would give exp(-inf + inf)


def sinkhorn_bias(logits: Tensor, temperature: float, n_iterations: int) -> Tensor:
    """log u [K] after the iterations, for a batch that one process holds.

    Bytes: one read of the logits per iteration. Every iteration except the last reads every strip a second time, while
    L2 holds it. The programs' partial results for the rows, [2, 264, B], are updated once per strip, also in L2: 10 MB
    for 4900 rows.
    """
    B, K = logits.shape
    columns = _strip_columns(logits)
    programs = min(triton.cdiv(K, columns), PROGRAMS)
    bias = torch.empty(K, dtype=accumulation_dtype(logits), device=logits.device)  # [K]
    row_norm = torch.empty(2, B, dtype=bias.dtype, device=logits.device)  # [2, B]: maximum, sum of exponentials
    partial = torch.empty(2, programs, B, dtype=bias.dtype, device=logits.device)  # [2, P, B]: row_norm of a program
    with torch.cuda.device_of(logits):
        for i in range(n_iterations):
            is_last = i == n_iterations - 1
            _balance[(programs,)](
                logits, bias, row_norm, partial, B, K, 1 / temperature,
                IS_FIRST=i == 0, IS_LAST=is_last, **_strip_shape(columns, logits.dtype),
            )  # fmt: skip
            if not is_last and B > 0:
                _merge_row_norms[(triton.cdiv(B, 8),)](
                    partial, row_norm, B, programs, ROWS=8, PROGRAMS=triton.next_power_of_2(programs)
                )
    return bias


def column_logsumexp(logits: Tensor, temperature: float) -> Tensor:
    """log sum_b exp(x_bk / T) [K]; -inf if B = 0.

    Bytes: one read of the logits, one write of [K].
    """
    B, K = logits.shape
    out = torch.empty(K, dtype=accumulation_dtype(logits), device=logits.device)  # [K]
    with torch.cuda.device_of(logits):
        _column_logsumexp[(triton.cdiv(K, 128),)](logits, out, B, K, 1 / temperature, **_strip_shape(128, logits.dtype))
    return out


def column_mass(logits: Tensor, temperature: float, bias: Tensor) -> Tensor:
    """sum_b softmax_k(x_b / T + bias) [K].

    Bytes: two reads of the logits (the second from L2 if they fit, as the class tokens do: [128, 65536] bfloat16 are
    17 MB), B / 4 reads of the bias, mostly from L2, and the vectors [K] and [2, B].
    """
    B, K = logits.shape
    row_norm = torch.empty(2, B, dtype=bias.dtype, device=logits.device)  # [2, B]: maximum, sum of exponentials
    out = torch.empty(K, dtype=bias.dtype, device=logits.device)  # [K]
    rows = 1 if B < MANY_ROWS else 4  # rows of a program
    shape = {"ROWS": rows, "COLUMNS": 8192 // rows, "num_warps": 8}
    with torch.cuda.device_of(logits):
        _row_norm[(triton.cdiv(B, rows),)](logits, bias, row_norm, B, K, 1 / temperature, **shape)
        _column_mass[(triton.cdiv(K, 128),)](
            logits, bias, row_norm, out, B, K, 1 / temperature, **_strip_shape(128, logits.dtype)
        )
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


def _strip_columns(logits: Tensor) -> int:
    """Columns of a strip that is read twice: a power of two with which the strips of all programs fit into L2."""
    fitting = L2_BYTES // (PROGRAMS * max(len(logits), 1) * logits.element_size())
    return min(256, max(SECTOR_BYTES // logits.element_size(), 1 << fitting.bit_length() >> 1))


def _strip_shape(columns: int, dtype: torch.dtype) -> dict[str, int]:
    """Each of 256 threads holds 8 neighbouring columns of 4 rows; 2 rows in float64, which takes more registers.

    With 4 rows in float64, Triton 3.6 spills 1 to 3 KB of registers.
    """
    depth = 2 if dtype == torch.float64 else 4
    return {"DEPTH": depth, "ROWS": 2048 // columns, "COLUMNS": columns, "num_warps": 8}


# `scale` is 1 / T. Triton passes a Python float as float32 by default; float64 logits need all of its digits. B, the
# number of masked patches, changes in every step: if B were specialised, Triton would compile kernels for B = 1 and for
# multiples of 16 in the middle of training.


@triton.jit(do_not_specialize=["B"])
def _balance(
    logits, bias, row_norm, partial, B, K, scale: tl.float64,
    IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One iteration: the new bias of every column, and the sums of every row with the new bias."""
    dtype: tl.constexpr = bias.dtype.element_ty
    scale = tl.full([1], scale, dtype)
    for first in range(tl.program_id(0) * COLUMNS, K, tl.num_programs(0) * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        if IS_FIRST:
            offset = -_zero_if_empty(_strip_logsumexp(logits, column, B, K, scale, dtype, DEPTH, ROWS))
        else:
            offset = tl.load(bias + column, mask=column < K, other=0.0)  # [COLUMNS]
            mass = _strip_mass(logits, row_norm, column, offset, B, K, scale, dtype, DEPTH, ROWS)
            offset -= _zero_if_empty(tl.log(mass))
        tl.store(bias + column, offset, mask=column < K)
        if not IS_LAST:
            _add_row_norms(logits, partial, first, column, offset, B, K, scale, dtype, DEPTH, ROWS)
            tl.debug_barrier()  # the next strip reads values that other threads of this program wrote


@triton.jit(do_not_specialize=["B", "programs"])
def _merge_row_norms(partial, row_norm, B, programs, ROWS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Merge the programs' partial results [2, P, B] into [2, B]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    program = tl.arange(0, PROGRAMS)
    inside = (program < programs)[:, None] & (row < B)[None, :]
    maximum = tl.load(partial + program.to(tl.int64)[:, None] * B + row[None, :], mask=inside, other=_LOWEST)
    total = tl.load(partial + (programs + program.to(tl.int64))[:, None] * B + row[None, :], mask=inside, other=0.0)
    largest = tl.max(maximum, 0)  # [ROWS]
    tl.store(row_norm + row, largest, mask=row < B)
    tl.store(row_norm + B + row, tl.sum(total * tl.exp(maximum - largest[None, :]), 0), mask=row < B)


@triton.jit(do_not_specialize=["B"])
def _column_logsumexp(
    logits, out, B, K, scale: tl.float64, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    dtype: tl.constexpr = out.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.full([1], scale, dtype)
    tl.store(out + column, _strip_logsumexp(logits, column, B, K, scale, dtype, DEPTH, ROWS), mask=column < K)


@triton.jit(do_not_specialize=["B"])
def _row_norm(logits, bias, out, B, K, scale: tl.float64, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    maximum, total = _softmax_norm(logits, bias, row, B, K, scale, COLUMNS)
    tl.store(out + row, maximum, mask=row < B)
    tl.store(out + B + row, total, mask=row < B)


@triton.jit(do_not_specialize=["B"])
def _column_mass(
    logits, bias, row_norm, out, B, K, scale: tl.float64, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    dtype: tl.constexpr = out.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.full([1], scale, dtype)
    offset = tl.load(bias + column, mask=column < K, other=0.0)  # [COLUMNS]
    mass = _strip_mass(logits, row_norm, column, offset, B, K, scale, dtype, DEPTH, ROWS)
    tl.store(out + column, mass, mask=column < K)


@triton.jit(do_not_specialize=["B"])
def _assign(logits, bias, out, B, K, scale: tl.float64, COLUMNS: tl.constexpr):
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0) + tl.arange(0, 1)
    maximum, norm = _softmax_norm(logits, bias, row, B, K, scale, COLUMNS)  # [1]
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = _load(logits, row[:, None], column[None, :], B, K, dtype)  # [1, COLUMNS]
        offset = tl.load(bias + column, mask=column < K, other=0.0)  # [COLUMNS]
        p = tl.exp(x * tl.full([1], scale, dtype) + offset[None, :] - maximum[:, None]) / norm[:, None]
        tl.store(out + row.to(tl.int64)[:, None] * K + column[None, :], p, mask=(column < K)[None, :])


# ----------------------------------------------------------------------------------------------------- parts of kernels


@triton.jit
def _strip_logsumexp(logits, column, B, K, scale, dtype: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr):
    """log sum_b exp(x_bk / T) [COLUMNS] of a strip."""
    maximum = tl.full([ROWS, column.shape[0]], _LOWEST, dtype)
    total = tl.full([ROWS, column.shape[0]], 0.0, dtype)
    for start in range(0, B, DEPTH * ROWS):
        x = _load(logits, _rows(start, DEPTH, ROWS)[:, :, None], column[None, None, :], B, K, dtype)
        # The maximum is that of the logits, not of x / T: x - maximum is small, and nearly exact, where it matters.
        larger = tl.maximum(maximum, tl.max(x, 0))  # [ROWS, COLUMNS]
        total = total * tl.exp((maximum - larger) * scale) + tl.sum(tl.exp((x - larger[None, :, :]) * scale), 0)
        maximum = larger
    largest = tl.max(maximum, 0)  # [COLUMNS]
    return largest * scale + tl.log(tl.sum(total * tl.exp((maximum - largest[None, :]) * scale), 0))


@triton.jit
def _strip_mass(
    logits, row_norm, column, offset, B, K, scale, dtype: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr
):
    """sum_b p_bk [COLUMNS] of a strip whose columns have the bias `offset` [COLUMNS]."""
    total = tl.full([ROWS, column.shape[0]], 0.0, dtype)
    for start in range(0, B, DEPTH * ROWS):
        row = _rows(start, DEPTH, ROWS)  # [DEPTH, ROWS]
        x = _load(logits, row[:, :, None], column[None, None, :], B, K, dtype)
        maximum = tl.load(row_norm + row, mask=row < B, other=0.0)  # [DEPTH, ROWS]
        inverse = 1 / tl.load(row_norm + B + row, mask=row < B, other=1.0)  # [DEPTH, ROWS]
        p = tl.exp(x * scale + offset[None, None, :] - maximum[:, :, None]) * inverse[:, :, None]
        total += tl.sum(p, 0)
    return tl.sum(total, 0)


@triton.jit
def _add_row_norms(
    logits, partial, first, column, offset, B, K, scale, dtype: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr
):
    """Add the strip's share to this program's maximum and sum of exponentials of every row, [2, P, B].

    The last rows come first, because they were read last and L2 still holds them.
    """
    own = partial + tl.program_id(0).to(tl.int64) * B  # [B]
    to_total = tl.num_programs(0).to(tl.int64) * B
    is_new = first == tl.program_id(0) * column.shape[0]  # the program's first strip: nothing was added yet
    for i in range(0, tl.cdiv(B, DEPTH * ROWS)):
        row = _rows((tl.cdiv(B, DEPTH * ROWS) - 1 - i) * DEPTH * ROWS, DEPTH, ROWS)  # [DEPTH, ROWS]
        x = _load(logits, row[:, :, None], column[None, None, :], B, K, dtype)
        z = x * scale + offset[None, None, :]  # [DEPTH, ROWS, COLUMNS]
        known = (row < B) & (not is_new)
        maximum = tl.load(own + row, mask=known, other=_LOWEST)  # [DEPTH, ROWS]
        total = tl.load(own + to_total + row, mask=known, other=0.0)
        larger = tl.maximum(maximum, tl.max(z, 2))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(z - larger[:, :, None]), 2)
        tl.store(own + row, larger, mask=row < B)
        tl.store(own + to_total + row, total, mask=row < B)


@triton.jit
def _softmax_norm(logits, bias, row, B, K, scale, COLUMNS: tl.constexpr):
    """For some rows b, the maximum of z_bk = x_bk / T + bias_k over k, and sum_k exp(z_bk - maximum_b).

    They are two numbers and not one log-sum-exp: at |z| = 1e5 its rounding alone would change the softmax by 1 %.
    """
    dtype: tl.constexpr = bias.dtype.element_ty
    maximum = tl.full(row.shape, _LOWEST, dtype)
    total = tl.full(row.shape, 0.0, dtype)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        offset = tl.load(bias + column, mask=column < K, other=0.0)  # [COLUMNS]
        x = _load(logits, row[:, None], column[None, :], B, K, dtype)
        z = x * tl.full([1], scale, dtype) + offset[None, :]  # [rows, COLUMNS]
        larger = tl.maximum(maximum, tl.max(z, 1))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(z - larger[:, None]), 1)
        maximum = larger
    return maximum, total


@triton.jit
def _rows(start, DEPTH: tl.constexpr, ROWS: tl.constexpr):
    """Row numbers [DEPTH, ROWS] of a tile that begins with row `start`."""
    return start + tl.arange(0, DEPTH)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]


@triton.jit
def _load(logits, row, column, B, K, dtype: tl.constexpr):
    """Logits at (row, column) in the accumulation dtype; outside the matrix -inf, which adds nothing to any sum."""
    address = logits + row.to(tl.int64) * K + column  # B * K may exceed 2^31
    return tl.load(address, mask=(row < B) & (column < K), other=float("-inf")).to(dtype)


@triton.jit
def _zero_if_empty(log_mass):
    """:func:`reference.zero_if_empty`."""
    return tl.where(log_mass == float("-inf"), 0.0, log_mass)
