"""LayerNorm of the kept tokens in Triton, and its backward pass.

A place counts the kept tokens [t], a row the tokens of x [T]; without ``rows`` they are one. A program holds all pieces
of some rows, in lists, as :mod:`dinov2_kernels.residual.triton_kernel` explains.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dinov2_kernels._triton import widen
from dinov2_kernels.residual.triton_tiles import load_tile, norm_backward, row_of, store_norm, store_tile


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
    store_norm(tokens, total, weight, bias, h, mean, rstd, place, inside, eps, C, WIDTH, PIECES, ROWS)


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
        average = tl.load(mean + place, mask=inside, other=0.0)
        deviation = tl.load(rstd + place, mask=inside, other=0.0)
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
        through_norm, dweight, dbias = norm_backward(
            sources, gradients, average, deviation, weight, bias, inside, dweight, dbias, x is None,
            C, WIDTH, PIECES, ROWS,
        )  # fmt: skip
        for piece in tl.static_range(PIECES):
            column = piece * WIDTH + tl.arange(0, WIDTH)
            store_tile(dx, row, inside, column, widen(totals[piece]) + through_norm[piece], C, WIDTH)
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
