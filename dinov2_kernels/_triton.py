"""What the Triton kernels of several operators share."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl


@triton.jit
def widen(x):
    """float64 as it is, everything narrower in float32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Of the GPU; of an H200 where Triton's interpreter runs, or its compiler alone."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def grid_of_sums(
    rows: int, H: int, dtype: torch.dtype, device: torch.device, resident: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (pieces, programs) and tile of a kernel that adds up the columns of [rows, H] in ``dtype``.

    A program works on one piece of some rows, whose width divides H where it can, then on those that lie as many rows
    further as all programs take together. A tile has 1024 numbers, 8 for each of 128 threads; half of them in float64,
    and half of them where H leaves rows unaligned, so that every number has its own address.

    Args:
        rows, H: of what is added up.
        dtype: of the sums.
        device: where they lie.
        resident: programs that a multiprocessor has room for.
    """
    width = min(1024, max(128, H & -H))  # the power of two in H
    numbers = 1024 // (2 if dtype == torch.float64 else 1) // (2 if H % 8 else 1)
    tile_rows = max(1, numbers // width)
    pieces = triton.cdiv(H, width)
    programs = min(triton.cdiv(rows, tile_rows), resident * num_multiprocessors(device) // max(1, pieces))
    return (pieces, max(1, programs)), {"ROWS": tile_rows, "WIDTH": width}


# In float32, Triton's `/` and tl.sqrt become div.full and sqrt.approx, whose results may lie one or two numbers beside
# the nearest one. That is enough for most formulas, but x / x is then not 1, nor the root of x * x the size of x.


@triton.jit
def div_rn(x, y):
    """x / y rounded to the nearest number: ``tl.div_rn``, for float64 too."""
    return tl.div_rn(x, y) if y.dtype == tl.float32 else x / y


@triton.jit
def sqrt_rn(x):
    """The root rounded to the nearest number: ``tl.sqrt_rn``, for float64 too."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def sigmoid(x):
    """s = 1 / (1 + exp(-x)), and 1 - s.

    A division leaves an error of its own, and a difference from 1 would be nothing else where s is near: so each has a
    formula.
    """
    small = tl.exp(-tl.abs(x))
    larger = 1 / (1 + small)
    smaller = small * larger
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)
