"""SwiGLU in Triton: the two operators of :mod:`dinov2_kernels.swiglu.reference` for CUDA tensors.

Legend: x12 [..., 2H] contiguous, R rows of gate and value; float64, float32, bfloat16 or float16. Arithmetic is in
float32, or in float64 for float64. A program works on a tile of 2048 gates, whose width divides H where it can.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_kernels._triton import widen


def swiglu(x12: Tensor) -> Tensor:
    """silu(x1) * x2 [..., H]. Moves 3 R H elements: reads x12, writes the result."""
    y = x12.new_empty(*x12.shape[:-1], x12.shape[-1] // 2)  # [..., H]
    grid, shape = _tiles(y)
    with torch.cuda.device_of(x12):
        _forward[grid](x12, y, **shape)
    return y


def swiglu_backward(grad: Tensor, x12: Tensor) -> Tensor:
    """Gradient of x12 [..., 2H], given that of the result [..., H]. Moves 5 R H elements: reads both, writes one."""
    dx12 = torch.empty_like(x12)  # [..., 2H]
    grid, shape = _tiles(grad)
    with torch.cuda.device_of(x12):
        _backward[grid](grad, x12, dx12, **shape)
    return dx12


def _tiles(y: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and what the kernels take, for a result y [..., H]."""
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
    # A division leaves an error of its own, and 1 - s of a large gate would be nothing else: so each has a formula.
    small = tl.exp(-tl.abs(x1))
    larger = 1 / (1 + small)
    s = tl.where(x1 < 0, small * larger, larger)
    rest = tl.where(x1 < 0, larger, small * larger)  # 1 - s
    tl.store(dx12 + gate, g * x2 * s * (1 + x1 * rest), mask=inside)
    tl.store(dx12 + gate + H, g * x1 * s, mask=inside)


@triton.jit
def _tile(R, H, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, WIDTH] of a program, and which of them exist."""
    pieces = tl.cdiv(H, WIDTH)
    row = (tl.program_id(0) // pieces * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) % pieces * WIDTH + tl.arange(0, WIDTH))[None, :]
    return row.to(tl.int64), column, (row < R) & (column < H)
