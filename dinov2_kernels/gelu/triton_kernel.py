"""GELU's backward pass in Triton: the operator of :mod:`dinov2_kernels.gelu.reference` for CUDA tensors.

Legend: z [..., H] contiguous, R rows of H features; float64, float32, bfloat16 or float16. Arithmetic and sums are in
float32, or in float64 for float64. No atomics: results are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype
from dinov2_kernels._triton import grid_of_sums, sigmoid, widen


def gelu_backward_(grad: Tensor, z: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """gelu(z) [..., H] and the sum [H] of z's gradient; grad [..., H] becomes z's gradient.

    Moves 4 R H elements: reads grad and z, writes gelu(z) and the gradient. Programs sum the gradient over their own
    rows, and PyTorch sums the programs.
    """
    h = torch.empty_like(z)  # [..., H]
    H = z.shape[-1]
    rows = z.numel() // max(1, H)
    dtype = accumulation_dtype(z)
    grid, shape = grid_of_sums(rows, H, dtype, z.device, resident=10)
    sums = torch.empty(grid[1], H, dtype=dtype, device=z.device)  # [programs, H]
    with torch.cuda.device_of(z):
        _backward[grid](grad, z, h, sums, rows, H, TANH=tanh, **shape)
    return h, sums.sum(dim=0)


@triton.jit(do_not_specialize=["R"])
def _backward(grad, z, h, sums, R, H, TANH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    program, programs = tl.program_id(1), tl.num_programs(1)
    total = tl.zeros([ROWS, WIDTH], sums.dtype.element_ty)
    for start in range(program * ROWS, R, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < R)[:, None] & (column < H)[None, :]
        place = row.to(tl.int64)[:, None] * H + column[None, :]  # [ROWS, WIDTH]
        x = widen(tl.load(z + place, mask=inside, other=0.0))
        g = widen(tl.load(grad + place, mask=inside, other=0.0))
        P, slope = _tanh(x) if TANH else _exact(x)
        dz = g * (P + x * slope)
        total += dz
        tl.store(h + place, x * P, mask=inside)
        tl.store(grad + place, dz, mask=inside)
    tl.store(sums + program.to(tl.int64) * H + column, tl.sum(total, 0), mask=column < H)


@triton.jit
def _exact(x):
    """P and its derivative, with the reference's formulas."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476), tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _tanh(x):
    """P = s = 1 / (1 + exp(-2 u)) and its derivative s (1 - s) 2 u'."""
    k: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
    s, rest = sigmoid(x * (k + 0.044715 * k * x * x))
    return s, s * rest * (k + 3 * 0.044715 * k * x * x)
