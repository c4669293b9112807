"""Soft-target cross-entropy in Triton: the operators of :mod:`dinov2_kernels.cross_entropy.reference` for CUDA tensors.

Legend: student [N, K] and teacher [M, K] contiguous, float64 both or neither; index [N, J] int64; bias [K], weight and
grad [N], norms [N, 2] and [M, 2] and the loss in the accumulation dtype. No atomics: results are the same in every run.
The J teacher rows of a student row are the rows of a tile [JS, COLUMNS], where JS is the next power of two; rows past J
count as 0.

A tile has 4096 columns of one student row: each thread loads 32 or 64 bytes from the student and as many from the
teacher.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype

_LOWEST = tl.constexpr(-3.0e38)  # start of a running maximum: -inf would give exp(-inf + inf)


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, index: Tensor | None, bias: Tensor | None, weight: Tensor | None,
    student_temperature: float, teacher_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss [N], norms of students [N, 2] and of teachers [M, 2].

    Bytes: one read of the students, and J reads of a teacher row for every student row. Shared teacher rows come from
    L2 (class tokens: 128 rows of 65,536 in bfloat16 are 17 MB); in iBOT each row is read once.
    """
    N, M, K, dtype = student.shape[0], teacher.shape[0], student.shape[1], accumulation_dtype(student)
    loss = torch.empty(N, dtype=dtype, device=student.device)  # [N]
    student_norm = torch.empty(N, 2, dtype=dtype, device=student.device)  # [N, 2]
    teacher_norm = torch.zeros(M, 2, dtype=dtype, device=student.device)  # [M, 2]; unused teacher rows stay 0
    shape = _tile(index, columns=4096)
    scales = 1 / student_temperature, 1 / teacher_temperature
    with torch.cuda.device_of(student):
        _forward[(N,)](
            student, teacher, index, bias, weight, loss, student_norm, teacher_norm, K, *scales, num_warps=8, **shape
        )
    return loss, student_norm, teacher_norm


def soft_cross_entropy_backward(grad: Tensor, student: Tensor, *args: Any) -> Tensor:
    """Gradient of the student logits [N, K]. Bytes: the reads of forward, and one write of the students' size."""
    dstudent = torch.empty_like(student)  # [N, K]
    _write_gradient(dstudent, student, grad, *args)
    return dstudent


def soft_cross_entropy_backward_(student: Tensor, grad: Tensor, *args: Any) -> None:
    """:func:`soft_cross_entropy_backward`, written over the student logits."""
    _write_gradient(student, student, grad, *args)


def _write_gradient(
    out: Tensor, student: Tensor, grad: Tensor,
    teacher: Tensor, index: Tensor | None, bias: Tensor | None, weight: Tensor | None,
    student_temperature: float, teacher_temperature: float,
    student_norm: Tensor, teacher_norm: Tensor,
) -> None:  # fmt: skip
    N, K = student.shape
    shape = _tile(index, columns=4096)
    pieces = triton.cdiv(K, shape["COLUMNS"])
    tensors = (student, teacher, index, bias, weight, grad, student_norm, teacher_norm, out)
    scales = 1 / student_temperature, 1 / teacher_temperature
    with torch.cuda.device_of(student):
        _backward[(N * pieces,)](*tensors, K, pieces, *scales, num_warps=8, **shape)


def _tile(index: Tensor | None, columns: int) -> dict[str, int]:
    J = 1 if index is None else index.shape[1]
    JS = triton.next_power_of_2(J)
    return {"J": J, "JS": JS, "COLUMNS": max(128, columns // JS)}


# The scales are 1 / T. Triton passes a Python float as float32 by default; float64 logits need all of its digits.


@triton.jit
def _forward(
    student, teacher, index, bias, weight, loss, student_norm, teacher_norm,
    K, student_scale: tl.float64, teacher_scale: tl.float64,
    J: tl.constexpr, JS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One student row: its sum of exponentials, those of its teacher rows, and sum_k e_jk (max - x_k), all online."""
    dtype: tl.constexpr = loss.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    rows, faced = _teachers(index, n, J, JS)  # [JS]
    student_scale = tl.full([1], student_scale, dtype)
    student_max = tl.full([1], _LOWEST, dtype)
    student_sum = tl.full([1], 0.0, dtype)
    teacher_max = tl.full([JS], _LOWEST, dtype)
    teacher_sum = tl.full([JS], 0.0, dtype)
    products = tl.full([JS], 0.0, dtype)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(student + n * K + column, mask=column < K, other=float("-inf")).to(dtype)[None, :]  # [1, COLUMNS]
        z = _teacher_tile(teacher, bias, rows, column, K, teacher_scale, dtype)  # [JS, COLUMNS]
        larger = tl.maximum(teacher_max, tl.max(z, 1))
        shrink = tl.exp(teacher_max - larger)
        e = tl.exp(z - larger[:, None])
        raised = tl.maximum(student_max, tl.max(x, 1))
        student_sum = student_sum * tl.exp((student_max - raised) * student_scale) + tl.sum(
            tl.exp((x - raised[:, None]) * student_scale[:, None]), 1
        )
        # The products are relative to the student's old maximum, so they are corrected when it rises. Before the first
        # tile there are no products.
        rise = tl.where(start == 0, 0.0, raised - student_max)
        distance = tl.where((column < K)[None, :], raised[:, None] - x, 0.0)
        products = (products + rise * teacher_sum) * shrink + tl.sum(e * distance, 1)
        teacher_sum = teacher_sum * shrink + tl.sum(e, 1)
        student_max = raised
        teacher_max = larger
    terms = tl.log(student_sum) + products / teacher_sum * student_scale  # [JS]
    total = tl.sum(tl.where(faced, terms, 0.0), 0)
    if weight is not None:
        total *= tl.load(weight + n)
    tl.store(loss + n, total)
    tl.store(student_norm + 2 * n + tl.arange(0, 1), student_max)
    tl.store(student_norm + 2 * n + 1 + tl.arange(0, 1), student_sum)
    # Student rows that share a teacher row write the same bits.
    tl.store(teacher_norm + 2 * rows, teacher_max, mask=faced)
    tl.store(teacher_norm + 2 * rows + 1, teacher_sum, mask=faced)


@triton.jit
def _backward(
    student, teacher, index, bias, weight, grad, student_norm, teacher_norm, out,
    K, pieces, student_scale: tl.float64, teacher_scale: tl.float64,
    J: tl.constexpr, JS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program takes one tile of one student row."""
    dtype: tl.constexpr = grad.dtype.element_ty
    n = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.program_id(0) % pieces * COLUMNS + tl.arange(0, COLUMNS)
    rows, faced = _teachers(index, n, J, JS)  # [JS]
    student_scale = tl.full([1], student_scale, dtype)
    x = tl.load(student + n * K + column, mask=column < K, other=float("-inf")).to(dtype)  # [COLUMNS]
    z = _teacher_tile(teacher, bias, rows, column, K, teacher_scale, dtype)  # [JS, COLUMNS]
    maximum = tl.load(teacher_norm + 2 * rows)
    norm = tl.load(teacher_norm + 2 * rows + 1)
    q = tl.where(faced[:, None], tl.exp(z - maximum[:, None]) / norm[:, None], 0.0)
    p = tl.exp((x - tl.load(student_norm + 2 * n)) * student_scale) / tl.load(student_norm + 2 * n + 1)
    factor = tl.load(grad + n) * student_scale
    if weight is not None:
        factor *= tl.load(weight + n)
    tl.store(out + n * K + column, (factor * (J * p - tl.sum(q, 0))).to(out.dtype.element_ty), mask=column < K)


@triton.jit
def _teachers(index, n, J: tl.constexpr, JS: tl.constexpr):
    """The teacher rows [JS] of student row n, and which of them exist; the others repeat the first."""
    j = tl.arange(0, JS)
    if index is None:
        return n + tl.zeros([JS], tl.int64), j < J
    else:
        return tl.load(index + n * J + tl.where(j < J, j, 0)), j < J


@triton.jit
def _teacher_tile(teacher, bias, rows, column, K, scale, dtype: tl.constexpr):
    """z = x / T + bias for some rows [JS, COLUMNS]; past the last column -inf, which adds nothing to any sum."""
    address = teacher + rows[:, None] * K + column[None, :]
    z = tl.load(address, mask=(column < K)[None, :], other=float("-inf")).to(dtype) * tl.full([1], scale, dtype)
    if bias is None:
        return z
    else:
        return z + tl.load(bias + column, mask=column < K, other=0.0)[None, :]
