"""SwiGLU in Triton: the two operators of :mod:`dinov2_kernels.swiglu.reference` for CUDA tensors.

Legend: x12 [..., 2H] contiguous, R rows of gate and value; float64, float32, bfloat16 or float16. Arithmetic is in
float32, or in float64 for float64. Without sums, a program works on a tile of 2048 gates, whose width divides H if
possible. No atomics: results are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype
from dinov2_kernels._triton import grid_of_sums, sigmoid, widen


def swiglu(x12: Tensor) -> Tensor:
    """silu(x1) * x2 [..., H]. Moves 3 R H elements: reads x12, writes the result."""
    y = x12.new_empty(*x12.shape[:-1], x12.shape[-1] // 2)  # [..., H]
    grid, shape = _tiles(y)
    with torch.cuda.device_of(x12):
        _forward[grid](x12, y, **shape)
    return y


def swiglu_backward(grad: Tensor, x12: Tensor) -> Tensor:
    """Gradient of x12 [..., 2H] from grad [..., H]. Moves 5 R H elements: reads x12 and grad, writes the gradient."""
    dx12 = torch.empty_like(x12)  # [..., 2H]
    grid, shape = _tiles(grad)
    with torch.cuda.device_of(x12):
        _backward[grid](grad, x12, dx12, **shape)
    return dx12


def swiglu_backward_(grad: Tensor, x12: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of x12 [..., 2H] and its sum [2H] over all rows; grad [..., H] is overwritten with the result.

    Moves 6 R H elements: reads x12 and grad, writes the gradient and the result. Programs sum the gradient over their
    own rows, and PyTorch sums the programs.
    """
    dx12 = torch.empty_like(x12)  # [..., 2H]
    H = grad.shape[-1]
    rows = grad.numel() // max(1, H)
    dtype = accumulation_dtype(x12)
    grid, shape = grid_of_sums(rows, H, dtype, x12.device, resident=7)
    sums = torch.empty(grid[1], 2 * H, dtype=dtype, device=x12.device)  # [programs, 2H]
    with torch.cuda.device_of(x12):
        _backward_with_sums[grid](grad, x12, dx12, sums, rows, H, **shape)
    return dx12, sums.sum(dim=0)


def _tiles(y: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the sizes for the kernels, for a result y [..., H]."""
    H = y.shape[-1]
    rows = y.numel() // max(1, H)
    width = min(1024, max(128, H & -H))  # the power of two in H
    tile_rows = 2048 // width
    grid = triton.cdiv(rows, tile_rows) * triton.cdiv(H, width)
    return (grid,), {"R": rows, "H": H, "ROWS": tile_rows, "WIDTH": width}


@triton.jit(do_not_specialize=["R"])
def _forward(x12, y, R, H, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, column, inside = _tile(R, H, ROWS, WIDTH)
    gate = row * 2 * H + column  # [ROWS, WIDTH]
    x1 = widen(tl.load(x12 + gate, mask=inside, other=0.0))
    x2 = widen(tl.load(x12 + gate + H, mask=inside, other=0.0))
    tl.store(y + row * H + column, x1 * tl.sigmoid(x1) * x2, mask=inside)


@triton.jit(do_not_specialize=["R"])
def _backward(grad, x12, dx12, R, H, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, column, inside = _tile(R, H, ROWS, WIDTH)
    gate = row * 2 * H + column  # [ROWS, WIDTH]
    x1 = widen(tl.load(x12 + gate, mask=inside, other=0.0))
    x2 = widen(tl.load(x12 + gate + H, mask=inside, other=0.0))
    g = widen(tl.load(grad + row * H + column, mask=inside, other=0.0))
    s, rest = sigmoid(x1)
    tl.store(dx12 + gate, g * x2 * s * (1 + x1 * rest), mask=inside)
    tl.store(dx12 + gate + H, g * x1 * s, mask=inside)


@triton.jit(do_not_specialize=["R"])
def _backward_with_sums(grad, x12, dx12, sums, R, H, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    program, programs = tl.program_id(1), tl.num_programs(1)
    sum1 = tl.zeros([ROWS, WIDTH], sums.dtype.element_ty)
    sum2 = tl.zeros([ROWS, WIDTH], sums.dtype.element_ty)
    for start in range(program * ROWS, R, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < R)[:, None] & (column < H)[None, :]
        row = row.to(tl.int64)[:, None]
        gate, place = row * 2 * H + column[None, :], row * H + column[None, :]  # [ROWS, WIDTH]
        x1 = widen(tl.load(x12 + gate, mask=inside, other=0.0))
        x2 = widen(tl.load(x12 + gate + H, mask=inside, other=0.0))
        g = widen(tl.load(grad + place, mask=inside, other=0.0))
        s, rest = sigmoid(x1)
        dx1, dx2 = g * x2 * s * (1 + x1 * rest), g * x1 * s
        sum1 += dx1
        sum2 += dx2
        tl.store(grad + place, x1 * s * x2, mask=inside)
        tl.store(dx12 + gate, dx1, mask=inside)
        tl.store(dx12 + gate + H, dx2, mask=inside)
    sums += program.to(tl.int64) * 2 * H + column
    tl.store(sums, tl.sum(sum1, 0), mask=column < H)
    tl.store(sums + H, tl.sum(sum2, 0), mask=column < H)


@triton.jit
def _tile(R, H, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The rows [ROWS, 1] and columns [1, WIDTH] of a program, and which elements exist."""
    pieces = tl.cdiv(H, WIDTH)
    row = (tl.program_id(0) // pieces * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) % pieces * WIDTH + tl.arange(0, WIDTH))[None, :]
    return row.to(tl.int64), column, (row < R) & (column < H)
