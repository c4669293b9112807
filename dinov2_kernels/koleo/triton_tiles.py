"""What the kernels of KoLeo in Triton share: rows, the search for the nearest, and distances.

Rows of a tile stand in ``row`` (their numbers, [ROWS] int64) and ``inside`` (whether there is such a row); ``eps`` has
the dtype of arithmetic. The nearest on the way are ``(cosine, index)``, both [ROWS, SLOTS] and in no order: the first k
slots hold -inf and a number past all rows until they are filled, the others +inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dinov2_kernels._triton import div_rn, sqrt_rn, widen

FARTHEST = tl.constexpr(-3.0e38)  # in place of a cosine that is NaN: a candidate, but the last


@triton.jit
def load_rows(x, row, inside, column, D):
    """[rows, columns] of x; 0 outside."""
    return tl.load(x + row[:, None] * D + column[None, :], mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def row_divisor(x, row, inside, D, eps, DEPTH: tl.constexpr):
    """What divides each row to make it a unit row: its length, but at least eps.

    The length is rounded to the nearest number: a row of one number then becomes exactly 1 or -1.
    """
    squares = tl.zeros([row.shape[0]], eps.dtype)
    for start in range(0, D, DEPTH):
        values = widen(load_rows(x, row, inside, start + tl.arange(0, DEPTH), D))
        squares += tl.sum(values * values, 1)
    return at_least(sqrt_rn(squares), eps)


@triton.jit
def at_least(length, eps):
    """The larger of the two; NaN stays NaN."""
    return tl.where(length < eps, eps, length)


@triton.jit
def distance(x, row, divisor, other, inside, D, eps, DEPTH: tl.constexpr):
    """||u - v + eps|| [ROWS] of unit rows.

    They come from divisions, which no multiply-add can swallow: equal rows cancel exactly.
    """
    other_divisor = row_divisor(x, other, inside, D, eps, DEPTH)
    squares = tl.zeros([row.shape[0]], eps.dtype)
    for start in range(0, D, DEPTH):
        column = start + tl.arange(0, DEPTH)
        u = div_rn(widen(load_rows(x, row, inside, column, D)), divisor[:, None])
        v = div_rn(widen(load_rows(x, other, inside, column, D)), other_divisor[:, None])
        difference = tl.where((column < D)[None, :], u - v + eps, 0.0)
        squares += tl.sum(difference * difference, 1)
    return tl.sqrt(squares)


@triton.jit
def search(
    x, row, inside, divisor, N, D, B, block, eps, k, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    """The nearest to each row, all of one batch, among the rows of all processes."""
    slot = tl.arange(0, SLOTS).to(tl.int64)[None, :] + tl.zeros([row.shape[0], 1], tl.int64)
    cosine = tl.where(slot < k, float("-inf"), float("inf")).to(eps.dtype)
    index = N + slot
    first = tl.program_id(1).to(tl.int64) * block  # of the batch, among the rows of a process
    scale = div_rn(1.0, divisor)
    for process in range(0, N // B):
        for start in range(0, block, COLUMNS):
            member = start + tl.arange(0, COLUMNS)
            column = process * B + first + member
            exists = member < block
            tile = _cosines(x, row, inside, scale, column, exists, D, eps, DEPTH)
            tile = tl.where(exists[None, :] & (column[None, :] != row[:, None]), tile, float("-inf"))
            cosine, index = _insert(cosine, index, tile, column)
    return cosine, index


@triton.jit
def _cosines(x, row, inside, scale, column, exists, D, eps, DEPTH: tl.constexpr):
    """[ROWS, COLUMNS]; `scale` [ROWS] is 1 / length.

    The candidates' lengths are taken from the values that are multiplied anyway. A cosine costs two more products and
    no division; between unit rows these products are exact.
    """
    products = tl.zeros([row.shape[0], column.shape[0]], eps.dtype)
    squares = tl.zeros([column.shape[0]], eps.dtype)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        a = load_rows(x, row, inside, d, D)
        b = load_rows(x, column, exists, d, D)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee", out_dtype=eps.dtype)
        squares += tl.sum(widen(b) * widen(b), 1)
    tile = products * scale[:, None] * div_rn(1.0, at_least(sqrt_rn(squares), eps))[None, :]
    return tl.where(tile == tile, tile, FARTHEST)


@triton.jit
def _insert(cosine, index, tile, column):
    """Candidates nearer than a slot take its place. They come in the order of numbers: an equal one is too late."""
    best, last = tl.max(tile, 1), tl.min(cosine, 1)
    while tl.max((best > last).to(tl.int32), 0) > 0:
        at = _lowest_of(tile == best[:, None], column[None, :])
        leaving = tl.max(tl.where(cosine == last[:, None], index, -1), 1)
        leaves = (best > last)[:, None] & (index == leaving[:, None])
        cosine, index = tl.where(leaves, best[:, None], cosine), tl.where(leaves, at[:, None], index)
        tile = tl.where(column[None, :] == at[:, None], float("-inf"), tile)
        best, last = tl.max(tile, 1), tl.min(cosine, 1)
    return cosine, index


@triton.jit
def take_nearest(cosine, index, k, row):
    """Cosine and number [ROWS] of the nearest, and the slots without it. A row that is alone is its own neighbour."""
    counted = tl.arange(0, cosine.shape[1])[None, :] < k
    best = tl.max(tl.where(counted, cosine, float("-inf")), 1)
    at = _lowest_of(counted & (cosine == best[:, None]), index)
    rest = tl.where(index == at[:, None], float("-inf"), cosine)
    return best, tl.where(best == float("-inf"), row, at), rest


@triton.jit
def _lowest_of(chosen, number):
    """[ROWS]"""
    return tl.min(tl.where(chosen, number, 0x7FFFFFFFFFFFFFFF), 1)
