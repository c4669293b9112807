"""Parts that the Triton kernels of residual connections share: places of kept tokens, tiles of tokens, and LayerNorm.

A tile is [ROWS, WIDTH]: one piece of some rows. A list of tiles holds all pieces of these rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dinov2_kernels._triton import widen


@triton.jit
def row_of(place, rows, inside):
    """Rows in x of the kept tokens at these places."""
    return place if rows is None else tl.load(rows + place, mask=inside, other=0)


@triton.jit
def place_of(row, position, inside):
    """Places of these rows of x among the kept tokens, and which of the rows are kept."""
    place = row if position is None else tl.load(position + row, mask=inside, other=-1)
    return place, inside & (place >= 0)


@triton.jit
def load_tile(tokens, row, inside, column, C: tl.constexpr, WIDTH: tl.constexpr):
    """The tile [rows, columns] of tokens [.., C]; 0 outside."""
    mask = _mask(inside, column, C, WIDTH)
    return tl.load(tokens + row.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(tokens, row, inside, column, values, C: tl.constexpr, WIDTH: tl.constexpr):
    mask = _mask(inside, column, C, WIDTH)
    tl.store(tokens + row.to(tl.int64)[:, None] * C + column[None, :], values, mask=mask)


@triton.jit
def _mask(inside, column, C: tl.constexpr, WIDTH: tl.constexpr):
    """Mask of a tile; the columns need no mask if the pieces fit a row exactly."""
    return inside[:, None] if C % WIDTH == 0 else inside[:, None] & (column < C)[None, :]


@triton.jit
def load_vector(vector, column, C: tl.constexpr, ROWS: tl.constexpr):
    """A vector [C] for each of the rows, widened; 0 outside.

    Every thread reads its own columns from L1. A vector that is read once would reach them through shared memory.
    """
    address = tl.broadcast_to((vector + column)[None, :], [ROWS, column.shape[0]])
    return widen(tl.load(address, mask=(column < C)[None, :], other=0.0))


@triton.jit
def scaled_residual(r, factor, gamma, bias, column, C: tl.constexpr, ROWS: tl.constexpr):
    """factor * gamma * (r + bias), where each of these may be missing; there is one factor per row."""
    if bias is not None:
        r = r + load_vector(bias, column, C, ROWS)
    if gamma is not None:
        r = r * load_vector(gamma, column, C, ROWS)
    if factor is not None:
        r = r * factor
    return r


@triton.jit
def store_norm(
    tokens, total, weight, bias, h, mean, rstd, place, kept, eps,
    C: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write LayerNorm h and statistics of some rows, at the places of the kept ones; ``total`` is the sum of tiles."""
    average = tl.sum(total, 1) * (1 / C)  # [ROWS]
    centred, squares = [], tl.zeros([ROWS, WIDTH], total.dtype)
    for piece in tl.static_range(PIECES):
        column = piece * WIDTH + tl.arange(0, WIDTH)
        centred += [tl.where((column < C)[None, :], tokens[piece] - average[:, None], 0.0)]
        squares += centred[piece] * centred[piece]
    deviation = tl.rsqrt(tl.sum(squares, 1) * (1 / C) + tl.full([1], eps, total.dtype))  # [ROWS]
    for piece in tl.static_range(PIECES):
        column = piece * WIDTH + tl.arange(0, WIDTH)
        normed = centred[piece] * deviation[:, None]
        if weight is not None:
            normed = normed * load_vector(weight, column, C, ROWS)
        if bias is not None:
            normed = normed + load_vector(bias, column, C, ROWS)
        store_tile(h, place, kept, column, normed, C, WIDTH)
    tl.store(mean + place, average, mask=kept)
    tl.store(rstd + place, deviation, mask=kept)


@triton.jit
def norm_backward(
    sources, gradients, average, deviation, weight, bias, kept, dweight, dbias, IS_RESULT: tl.constexpr,
    C: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of LayerNorm's input, and the gradients of its weight and bias so far, in lists of tiles.

    ``sources`` are its input, or its result h. For dropped rows the gradients and the deviation are 0.
    """
    through, normed, dweight_now, dbias_now = [], [], [], []
    through_total, along_total = tl.zeros([ROWS, WIDTH], average.dtype), tl.zeros([ROWS, WIDTH], average.dtype)
    for piece in tl.static_range(PIECES):
        column = piece * WIDTH + tl.arange(0, WIDTH)
        if IS_RESULT:
            n = tl.where(kept[:, None], _recover(widen(sources[piece]), weight, bias, column, C, ROWS), 0.0)
        else:
            n = (widen(sources[piece]) - average[:, None]) * deviation[:, None]
        g = widen(gradients[piece])
        dweight_now += [dweight[piece] + g * n]
        dbias_now += [dbias[piece] + g]
        if weight is not None:
            g = g * load_vector(weight, column, C, ROWS)
        through += [g]
        normed += [n]
        through_total += g
        along_total += g * n
    through_mean = (tl.sum(through_total, 1) * (1 / C))[:, None]
    along_mean = (tl.sum(along_total, 1) * (1 / C))[:, None]
    dx = []
    for piece in tl.static_range(PIECES):
        dx += [(through[piece] - through_mean - normed[piece] * along_mean) * deviation[:, None]]
    return dx, dweight_now, dbias_now


@triton.jit
def _recover(h, weight, bias, column, C: tl.constexpr, ROWS: tl.constexpr):
    """The normalised tokens from their LayerNorm h; 0 if the weight is 0."""
    if bias is not None:
        h = h - load_vector(bias, column, C, ROWS)
    if weight is not None:
        divisor = load_vector(weight, column, C, ROWS)
        h = tl.where(divisor == 0, 0.0, h / tl.where(divisor == 0, 1.0, divisor))
    return h
