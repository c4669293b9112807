"""LayerNorm of the kept tokens in Triton, and its backward pass.

A place counts the kept tokens [t], a row the tokens of x [T]; without ``rows`` they are one. A program holds all pieces
of some rows, in lists, as :mod:`dinov2_kernels.residual.triton_kernel` explains.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dinov2_kernels._triton import widen
from dinov2_kernels.residual.triton_tiles import load_tile, load_vector, row_of, store_tile


@triton.jit(do_not_specialize=["t"])
def gather_norm(
    x, rows, weight, bias, h, mean, rstd, t, eps: tl.float64,
    C: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = mean.dtype.element_ty
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < t
    row = row_of(place, rows, inside)
    tokens, total = [], tl.zeros([ROWS, WIDTH], dtype)
    for piece in tl.static_range(PIECES):
        column = piece * WIDTH + tl.arange(0, WIDTH)
        tokens += [widen(load_tile(x, row, inside, column, C, WIDTH))]
        total += tokens[piece]
    average = tl.sum(total, 1) * (1 / C)  # [ROWS]
    centred, squares = [], tl.zeros([ROWS, WIDTH], dtype)
    for piece in tl.static_range(PIECES):
        column = piece * WIDTH + tl.arange(0, WIDTH)
        centred += [tl.where((column < C)[None, :], tokens[piece] - average[:, None], 0.0)]
        squares += centred[piece] * centred[piece]
    scale = tl.rsqrt(tl.sum(squares, 1) * (1 / C) + tl.full([1], eps, dtype))  # [ROWS]
    for piece in tl.static_range(PIECES):
        column = piece * WIDTH + tl.arange(0, WIDTH)
        normed = centred[piece] * scale[:, None]
        if weight is not None:
            normed = normed * load_vector(weight, column, C, ROWS)
        if bias is not None:
            normed = normed + load_vector(bias, column, C, ROWS)
        store_tile(h, place, inside, column, normed, C, WIDTH)
    tl.store(mean + place, average, mask=inside)
    tl.store(rstd + place, scale, mask=inside)


@triton.jit(do_not_specialize=["T", "t", "steps"])
def gather_norm_backward(
    grad_h, grad_x, x, h, rows, mean, rstd, weight, bias, dx, sums, T, t, steps,
    C: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = sums.dtype.element_ty
    program, programs = tl.program_id(0), tl.num_programs(0)
    dweight = [tl.zeros([ROWS, WIDTH], dtype)] * PIECES
    dbias = dweight
    for start in range(program * ROWS, t, programs * ROWS):
        place = start + tl.arange(0, ROWS)
        inside = place < t
        row = row_of(place, rows, inside)
        average = tl.load(mean + place, mask=inside, other=0.0)[:, None]
        scale = tl.load(rstd + place, mask=inside, other=0.0)[:, None]
        sources, gradients, totals = [], [], []  # all loads of a program are under way before any of them is awaited
        for piece in tl.static_range(PIECES):
            column = piece * WIDTH + tl.arange(0, WIDTH)
            sources += [
                load_tile(h, place, inside, column, C, WIDTH)
                if x is None
                else load_tile(x, row, inside, column, C, WIDTH)
            ]
            gradients += [load_tile(grad_h, place, inside, column, C, WIDTH)]
            totals += [load_tile(grad_x, row, inside, column, C, WIDTH)]
        through, normed, dweight_so_far, dbias_so_far = [], [], dweight, dbias
        dweight, dbias = [], []
        through_total, along_total = tl.zeros([ROWS, WIDTH], dtype), tl.zeros([ROWS, WIDTH], dtype)
        for piece in tl.static_range(PIECES):
            column = piece * WIDTH + tl.arange(0, WIDTH)
            if x is None:
                n = recover(widen(sources[piece]), weight, bias, column, C, ROWS)
            else:
                n = (widen(sources[piece]) - average) * scale
            g = widen(gradients[piece])
            dweight += [dweight_so_far[piece] + g * n]
            dbias += [dbias_so_far[piece] + g]
            if weight is not None:
                g = g * load_vector(weight, column, C, ROWS)
            through += [g]
            normed += [n]
            through_total += g
            along_total += g * n
        through_mean = (tl.sum(through_total, 1) * (1 / C))[:, None]
        along_mean = (tl.sum(along_total, 1) * (1 / C))[:, None]
        for piece in tl.static_range(PIECES):
            column = piece * WIDTH + tl.arange(0, WIDTH)
            gradient = (through[piece] - through_mean - normed[piece] * along_mean) * scale
            store_tile(dx, row, inside, column, widen(totals[piece]) + gradient, C, WIDTH)
    for piece in tl.static_range(PIECES):
        column = piece * WIDTH + tl.arange(0, WIDTH)
        tl.store(sums + program * C + column, tl.sum(dweight[piece], 0), mask=column < C)
        tl.store(sums + (programs + program) * C + column, tl.sum(dbias[piece], 0), mask=column < C)
    if rows is not None:
        for start in range(program * 4 * ROWS, T - t, programs * 4 * ROWS):
            place = start + tl.arange(0, 4 * ROWS)
            inside = place < T - t
            row = _dropped_row(place, rows, t, steps)
            for piece in tl.static_range(PIECES):
                column = piece * WIDTH + tl.arange(0, WIDTH)
                store_tile(dx, row, inside, column, load_tile(grad_x, row, inside, column, C, WIDTH), C, WIDTH)


@triton.jit
def recover(h, weight, bias, column, C: tl.constexpr, ROWS: tl.constexpr):
    """The normalised tokens, given the LayerNorm h of them; 0 where the weight is 0."""
    if bias is not None:
        h = h - load_vector(bias, column, C, ROWS)
    if weight is not None:
        divisor = load_vector(weight, column, C, ROWS)
        h = tl.where(divisor == 0, 0.0, h / tl.where(divisor == 0, 1.0, divisor))
    return h


@triton.jit
def _dropped_row(place, rows, t, steps):
    """The rows at these places among those that ``rows`` [t], which ascends, does not hold.

    Before the dropped row of place p come p other dropped rows and as many kept ones as have no more than p dropped
    rows before them: found bit by bit, in as many steps as t has bits.
    """
    kept = tl.zeros_like(place)
    for step in range(1, steps + 1):
        more = kept + (1 << (steps - step))
        row = tl.load(rows + more - 1, mask=more <= t, other=2147483647)
        kept = tl.where(row - more < place, more, kept)
    return place + kept
