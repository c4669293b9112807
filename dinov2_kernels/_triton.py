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
