"""The operators on a chunk of :mod:`dinov2_kernels.prototype_cross_entropy.chunked` in Triton, for CUDA tensors.

Legend: c columns of a chunk; teacher logits [M, c] with row stride `stride`, and student logits [N, c], in float64,
float32, bfloat16 or float16; bias [c], targets [M, c], norm [2, M] and state [4, N] in the accumulation dtype. A
program has one row or a piece of a row. Sums go along rows only, and no two programs add to the same number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_kernels._triton import div_rn, widen

COLUMNS = 2048  # columns of a tile: 16 for each thread
_LOWEST = tl.constexpr(-3.0e38)  # start of a running maximum: -inf would give exp(-inf + inf)


def prototype_target_norm(teacher_logits: Tensor, bias: Tensor, temperature: float) -> Tensor:
    """Norm [2, M]. Reads the teacher's logits [M, K] once."""
    M, K = teacher_logits.shape
    norm = bias.new_empty(2, M)
    with torch.cuda.device_of(bias):
        _target_norm[(M,)](
            teacher_logits, bias, norm, teacher_logits.stride(0), M, K, 1 / temperature, COLUMNS=4096, num_warps=8
        )
    return norm


def prototype_targets_(targets: Tensor, teacher_logits: Tensor, bias: Tensor, norm: Tensor, temperature: float) -> None:
    """Reads the teacher's logits, writes the targets."""
    (M, c), stride = targets.shape, teacher_logits.stride(0)
    grid = (M, triton.cdiv(c, COLUMNS))
    with torch.cuda.device_of(targets):
        _targets[grid](teacher_logits, targets, bias, norm, stride, M, c, 1 / temperature, COLUMNS=COLUMNS)


def prototype_accumulate_(
    state: Tensor, logits: Tensor, targets: Tensor, index: Tensor | None, temperature: float
) -> None:
    """Reads the student's logits, and J rows of targets for each row."""
    N, c = logits.shape
    J = 1 if index is None else index.shape[1]
    with torch.cuda.device_of(logits):
        _accumulate[(N,)](logits, state, targets, index, N, J, c, 1 / temperature, COLUMNS=COLUMNS)


def prototype_gradient_(
    logits: Tensor, state: Tensor, targets: Tensor, index: Tensor | None, row_scale: Tensor, temperature: float
) -> None:
    """Reads and writes the student's logits, and reads J rows of targets for each row."""
    N, c = logits.shape
    J = 1 if index is None else index.shape[1]
    grid = (N, triton.cdiv(c, COLUMNS))
    with torch.cuda.device_of(logits):
        _gradient[grid](logits, state, targets, index, row_scale, N, J, c, 1 / temperature, COLUMNS=COLUMNS)


# `scale` is 1 / T. Triton passes a Python float as float32 by default; float64 logits need all of its digits.


@triton.jit(do_not_specialize=["M"])
def _target_norm(teacher_logits, bias, norm, stride, M, K, scale: tl.float64, COLUMNS: tl.constexpr):
    dtype: tl.constexpr = norm.dtype.element_ty
    row = tl.program_id(0)
    scale = tl.full([], scale, dtype)
    # Each lane has its own maximum and sum. Rows are long, so the lanes are combined only once, at the end.
    maximum = tl.full([COLUMNS], _LOWEST, dtype)
    total = tl.full([COLUMNS], 0.0, dtype)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < K
        t = widen(tl.load(teacher_logits + row.to(tl.int64) * stride + column, mask=inside, other=0.0))
        z = tl.where(inside, t * scale + tl.load(bias + column, mask=inside, other=0.0), -float("inf"))
        larger = tl.maximum(maximum, z)
        total = total * tl.exp(maximum - larger) + tl.exp(z - larger)
        maximum = larger
    largest = tl.max(maximum, 0)
    tl.store(norm + row, largest)
    tl.store(norm + M + row, tl.sum(total * tl.exp(maximum - largest), 0))


@triton.jit(do_not_specialize=["M"])
def _targets(teacher_logits, targets, bias, norm, stride, M, c, scale: tl.float64, COLUMNS: tl.constexpr):
    dtype: tl.constexpr = norm.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < c
    t = widen(tl.load(teacher_logits + row * stride + column, mask=inside, other=0.0))
    z = t * tl.full([], scale, dtype) + tl.load(bias + column, mask=inside, other=0.0)
    maximum, total = tl.load(norm + row), tl.load(norm + M + row)
    tl.store(targets + row * c + column, tl.exp(z - maximum) / total, mask=inside)


@triton.jit(do_not_specialize=["N", "J"])
def _accumulate(logits, state, targets, index, N, J, c, scale: tl.float64, COLUMNS: tl.constexpr):
    dtype: tl.constexpr = state.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    scale = tl.full([], scale, dtype)
    maximum, total = tl.load(state + row), tl.load(state + N + row)
    mass, cross = tl.load(state + 2 * N + row), tl.load(state + 3 * N + row)
    for start in range(0, c, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < c
        s = tl.where(inside, widen(tl.load(logits + row * c + column, mask=inside, other=0.0)), -float("inf"))
        q = _sum_of_targets(targets, index, row, J, c, column)
        larger = tl.maximum(maximum, tl.max(s, 0))
        centred = s - larger
        rise = larger - maximum
        total = total * tl.exp(-rise * scale) + tl.sum(tl.exp(centred * scale), 0)
        cross += tl.sum(tl.where(inside, q * centred, 0.0), 0) - mass * rise
        mass += tl.sum(q, 0)
        maximum = larger
    tl.store(state + row, maximum)
    tl.store(state + N + row, total)
    tl.store(state + 2 * N + row, mass)
    tl.store(state + 3 * N + row, cross)


@triton.jit(do_not_specialize=["N", "J"])
def _gradient(logits, state, targets, index, row_scale, N, J, c, scale: tl.float64, COLUMNS: tl.constexpr):
    dtype: tl.constexpr = state.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < c
    maximum, total, mass = tl.load(state + row), tl.load(state + N + row), tl.load(state + 2 * N + row)
    s = widen(tl.load(logits + row * c + column, mask=inside, other=0.0))
    p = tl.exp((s - maximum) * tl.full([], scale, dtype)) * div_rn(mass, total)  # with one prototype exactly q
    q = _sum_of_targets(targets, index, row, J, c, column)
    tl.store(logits + row * c + column, tl.load(row_scale + row) * (p - q), mask=inside)


@triton.jit
def _sum_of_targets(targets, index, row, J, c, column):
    """The sum [COLUMNS] of the J target rows of a row; 0 past the last column."""
    inside = column < c
    if index is None:
        q = tl.load(targets + row * c + column, mask=inside, other=0.0)
    else:
        q = tl.zeros(column.shape, targets.dtype.element_ty)
        for j in range(J):
            q += tl.load(targets + tl.load(index + row * J + j) * c + column, mask=inside, other=0.0)
    return q
