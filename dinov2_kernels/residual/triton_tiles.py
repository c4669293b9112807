"""What the kernels of residual connections in Triton share: where kept tokens stand, tiles of tokens, and vectors.

A tile is [ROWS, WIDTH]: one piece of some rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dinov2_kernels._triton import widen


@triton.jit
def row_of(place, rows, inside):
    """Where the kept tokens at these places stand in x."""
    return place if rows is None else tl.load(rows + place, mask=inside, other=0)


@triton.jit
def place_of(row, position, inside):
    """Where these rows of x stand among the kept tokens, and which of them do."""
    place = row if position is None else tl.load(position + row, mask=inside, other=-1)
    return place, inside & (place >= 0)


@triton.jit
def load_tile(tokens, row, inside, column, C: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, columns] of tokens [.., C]; 0 outside."""
    mask = _mask(inside, column, C, WIDTH)
    return tl.load(tokens + row.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(tokens, row, inside, column, values, C: tl.constexpr, WIDTH: tl.constexpr):
    mask = _mask(inside, column, C, WIDTH)
    tl.store(tokens + row.to(tl.int64)[:, None] * C + column[None, :], values, mask=mask)


@triton.jit
def _mask(inside, column, C: tl.constexpr, WIDTH: tl.constexpr):
    """The columns need none where the pieces make exactly a row."""
    return inside[:, None] if C % WIDTH == 0 else inside[:, None] & (column < C)[None, :]


@triton.jit
def load_vector(vector, column, C: tl.constexpr, ROWS: tl.constexpr):
    """A vector [C] for each of the rows, widened; 0 outside.

    Every thread reads its own columns, from L1: a vector read once would reach them through shared memory.
    """
    address = tl.broadcast_to((vector + column)[None, :], [ROWS, column.shape[0]])
    return widen(tl.load(address, mask=(column < C)[None, :], other=0.0))


@triton.jit
def scaled_residual(r, factor, gamma, bias, column, C: tl.constexpr, ROWS: tl.constexpr):
    """factor * gamma * (r + bias), as far as these are there; the factors are those of the rows."""
    if bias is not None:
        r = r + load_vector(bias, column, C, ROWS)
    if gamma is not None:
        r = r * load_vector(gamma, column, C, ROWS)
    if factor is not None:
        r = r * factor
    return r
