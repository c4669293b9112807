"""Functions that the attention kernels in Triton share: tiles of rows, their products, and the search for a sequence.

A tile is a tuple of one or two chunks: [rows, D0], and [rows, D1] if the width of a head is not a power of two. So 80
columns cost 64 + 16 and not 128 (in float32 64 + 32). Columns past D are loaded as zeros and not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
# 1 / LN2, as a factor: a division has an error of up to 2 units in the last place, which is visible in exp2 of large
# scores.
LOG2E = tl.constexpr(1.4426950408889634)
# Products of float32 are float32, as in PyTorch by default; narrower operands have only one precision.
PRECISION = tl.constexpr("tf32x3")
# Rows of the smallest block: class and register tokens, beyond the 256 patches of a crop.
TAIL = tl.constexpr(16)


@triton.constexpr_function
def main_width(D, dtype):
    """Columns of the first chunk: 16, 32, 64, or the widest if 64 + 32 are too few."""
    widest = 64 if dtype == tl.float32 else 128  # 128 columns of three-part operands would fill the registers
    return 16 if D <= 16 else 32 if D <= 32 else 64 if D <= 96 else widest


@triton.constexpr_function
def rest_width(D, dtype):
    """Columns of the second chunk; 0 if the first chunk has all columns."""
    rest = D - main_width(D, dtype)
    narrowest = 32 if dtype == tl.float32 else 16  # warps cannot share products of 16 rows and 16 columns
    return 0 if rest <= 0 else narrowest if rest <= narrowest else 32 if rest <= 32 else 64


@triton.jit
def load_tile(x, first, end, row_stride, ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of the matrix at x from row `first` on; rows from `end` on are zero. MASKED is False if there are none."""
    x += tl.cast(row_stride, tl.int64) * first  # within a tile, 32 bits suffice
    main_columns: tl.constexpr = main_width(D, x.dtype.element_ty)
    rest_columns: tl.constexpr = rest_width(D, x.dtype.element_ty)
    main = _load_chunk(x, end - first, row_stride, ROWS, D, 0, main_columns, MASKED)
    if rest_columns == 0:
        return (main,)
    else:
        return (main, _load_chunk(x, end - first, row_stride, ROWS, D, main_columns, rest_columns, MASKED))


@triton.jit
def _load_chunk(
    x, end, row_stride, ROWS: tl.constexpr,
    D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    address = x + row * row_stride + column
    if MASKED and FIRST + WIDTH > D:
        return tl.load(address, mask=(row < end) & (column < D), other=0.0)
    elif MASKED:
        return tl.load(address, mask=row < end, other=0.0)
    elif FIRST + WIDTH > D:
        return tl.load(address, mask=column < D, other=0.0)
    else:
        return tl.load(address)


@triton.constexpr_function
def total(parts, number=None):
    """Number of rows in the first `number` parts of a sequence, or in all parts."""
    return sum(parts[:number])


@triton.jit
def load_parts(x, end, row_stride, PARTS: tl.constexpr, D: tl.constexpr):
    """All rows of a matrix as tiles of PARTS[i] rows; only the last tile is padded with zeros, from `end` on."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts += (load_tile(x, total(PARTS, i), end, row_stride, PARTS[i], D, i == len(PARTS) - 1),)
    return parts


@triton.jit
def store_tile(x, first, end, row_stride, tile, D: tl.constexpr):
    """Write the rows `first` to `end` - 1 of a tile, rounded to the dtype of x."""
    x += tl.cast(row_stride, tl.int64) * first
    _store_chunk(x, end - first, row_stride, tile[0], D, 0)
    if len(tile) == 2:
        _store_chunk(x, end - first, row_stride, tile[1], D, tile[0].shape[1])


@triton.jit
def _store_chunk(x, end, row_stride, chunk, D: tl.constexpr, FIRST: tl.constexpr):
    row = tl.arange(0, chunk.shape[0])[:, None]
    column = FIRST + tl.arange(0, chunk.shape[1])[None, :]
    tl.store(x + row * row_stride + column, chunk.to(x.dtype.element_ty), mask=(row < end) & (column < D))


@triton.jit
def zeros_like(tile, ROWS: tl.constexpr):
    """Zeros [ROWS, D] in float32, in the chunks of a tile."""
    if len(tile) == 1:
        return (tl.zeros([ROWS, tile[0].shape[1]], tl.float32),)
    else:
        return (tl.zeros([ROWS, tile[0].shape[1]], tl.float32), tl.zeros([ROWS, tile[1].shape[1]], tl.float32))


@triton.jit
def transposed_zeros_like(tile, ROWS: tl.constexpr):
    """Zeros [D, ROWS], the transpose of :func:`zeros_like`."""
    if len(tile) == 1:
        return (tl.zeros([tile[0].shape[1], ROWS], tl.float32),)
    else:
        return (tl.zeros([tile[0].shape[1], ROWS], tl.float32), tl.zeros([tile[1].shape[1], ROWS], tl.float32))


@triton.jit
def transpose(tile):
    if len(tile) == 1:
        return (tl.trans(tile[0]),)
    else:
        return (tl.trans(tile[0]), tl.trans(tile[1]))


@triton.jit
def scale_rows(tile, factor):
    """Each row multiplied by its element of factor [rows]."""
    if len(tile) == 1:
        return (tile[0] * factor[:, None],)
    else:
        return (tile[0] * factor[:, None], tile[1] * factor[:, None])


@triton.jit
def scale_tile(tile, factor):
    """The tile multiplied by a number."""
    if len(tile) == 1:
        return (tile[0] * factor,)
    else:
        return (tile[0] * factor, tile[1] * factor)


@triton.jit
def row_products(x, y):
    """sum_d x_id y_id [rows], in float32."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    if len(x) == 2:
        total += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 1)
    return total


@triton.jit
def inner_products(x, y):
    """x_i . y_j [rows of x, rows of y]."""
    product = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    if len(x) == 2:
        product = tl.dot(x[1], tl.trans(y[1]), product, input_precision=PRECISION)
    return product


@triton.jit
def add_product(weights, tile, total):
    """total + weights @ tile: [n, rows] times [rows, D]."""
    if len(tile) == 1:
        return (tl.dot(weights, tile[0], total[0], input_precision=PRECISION),)
    else:
        main = tl.dot(weights, tile[0], total[0], input_precision=PRECISION)
        return (main, tl.dot(weights, tile[1], total[1], input_precision=PRECISION))


@triton.jit
def add_transposed_product(tile, weights, total):
    """total + tile^T @ weights: [D, rows] times [rows, n], a transposed tile of n rows.

    Hopper's matrix instructions cannot split one side below 64; here this side is the width of a head, 64 or more.
    """
    if len(tile) == 1:
        return (tl.dot(tl.trans(tile[0]), weights, total[0], input_precision=PRECISION),)
    else:
        main = tl.dot(tl.trans(tile[0]), weights, total[0], input_precision=PRECISION)
        return (main, tl.dot(tl.trans(tile[1]), weights, total[1], input_precision=PRECISION))


@triton.jit
def find_sequence(index, table, start, length):
    """First token (64 bits: it will be multiplied by strides) and length of a sequence.

    The sequences are rows (start, length) of a table [n, 2]; if it is None, a run of equal lengths from `start` on.
    """
    if table is None:
        return start + index.to(tl.int64) * length, length
    else:
        return tl.load(table + 2 * index).to(tl.int64), tl.load(table + 2 * index + 1)


@triton.jit
def find_block(item, table, start, length, blocks, BLOCK: tl.constexpr, OFFSETS: tl.constexpr):
    """First token and length of an item's sequence, and the first row of its block; the row may lie past the end.

    It is like :func:`find_sequence`, with `blocks` items for every sequence. With OFFSETS, the table holds the offsets
    of `blocks` sequences, whose lengths the host does not know. The items of sequence s begin at offset_s // BLOCK + s.
    It has at least the items that its length needs, and at most one more; no sum over earlier sequences is needed.

    A step of the search compares 32 sequences at once, one per lane of a warp, and keeps the part that begins with the
    last one before the item. 1024 sequences take two steps, and 32,768 three; each step waits for one load. Predicted:
    less than 1 us at the start of a program; halving would wait for ten loads, 2 to 5 us.
    """
    if OFFSETS:
        low = 0
        size = blocks  # the sequence is one of the `size` sequences from `low` on
        while size > 1:
            part = tl.cdiv(size, 32)
            candidate = low + tl.arange(0, 32) * part
            inside = candidate < blocks
            begins = tl.load(table + candidate, mask=inside, other=0) // BLOCK + candidate
            low += part * (tl.sum((inside & (begins <= item)).to(tl.int32), 0) - 1)
            size = part
        first = tl.load(table + low)
        return first.to(tl.int64), tl.load(table + low + 1) - first, (item - first // BLOCK - low) * BLOCK
    else:
        first, length = find_sequence(item // blocks, table, start, length)
        return first, length, item % blocks * BLOCK
