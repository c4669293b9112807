"""Functions that the Triton kernels of several operators share."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl


@triton.jit
def widen(x):
    """x in float32; float64 stays float64."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of the GPU; without one (Triton's interpreter or compiler alone), that of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def grid_of_sums(
    rows: int, H: int, dtype: torch.dtype, device: torch.device, resident: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (pieces, programs) and tile of a kernel that adds up the columns of [rows, H] in ``dtype``.

    A program works on one piece of the columns, whose width divides H if possible. It takes some rows, then jumps over
    the rows of all other programs to its next ones. A tile has 1024 numbers, 8 for each of 128 threads. It has half as
    many in float64, and half as many if H leaves rows unaligned, because then every number has its own address.

    Args:
        rows, H: shape of the matrix whose columns are added up.
        dtype: dtype of the sums.
        device: device of the matrix.
        resident: number of programs that a multiprocessor has room for.
    """
    width = min(1024, max(128, H & -H))  # the power of two in H
    numbers = 1024 // (2 if dtype == torch.float64 else 1) // (2 if H % 8 else 1)
    tile_rows = max(1, numbers // width)
    pieces = triton.cdiv(H, width)
    programs = min(triton.cdiv(rows, tile_rows), resident * num_multiprocessors(device) // max(1, pieces))
    return (pieces, max(1, programs)), {"ROWS": tile_rows, "WIDTH": width}


# In float32, Triton's `/` and tl.sqrt become div.full and sqrt.approx, whose results may differ from the nearest number
# by one or two units in the last place. Most formulas allow that, but x / x may then not be 1, and the square root of
# x * x may not be |x|.


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

    Each has its own formula: computed as a difference, 1 - s would be only rounding error for s near 1.
    """
    small = tl.exp(-tl.abs(x))
    larger = 1 / (1 + small)
    smaller = small * larger
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)
