"""The kernels of residual connections in Triton: draw, gather with LayerNorm, scatter, and the last two in one pass.

A place is an index among the kept tokens [t], a row is an index among the tokens of x [T]; without ``rows`` or
``position`` they are the same. Programs that need the sums of a row hold all of its pieces, in lists; other programs
work on one piece of some rows, as :mod:`dinov2_kernels.residual.triton_kernel` explains.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dinov2_kernels._triton import widen
from dinov2_kernels.residual.triton_tiles import (
    load_tile,
    load_vector,
    norm_backward,
    place_of,
    row_of,
    scaled_residual,
    store_norm,
    store_tile,
)

# --------------------------------------------------------------------------------------------- draw of the kept samples


@triton.jit
def kept_rows(keys, table, rows, position, SAMPLES: tl.constexpr, TOKENS: tl.constexpr):
    numbers = table + 10 * tl.program_id(1)
    count, length, num_kept = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)  # for this run and draw
    first_key, first_token, rows_before = tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5)
    rows += tl.load(numbers + 6)  # rows of this draw; the same for positions
    position += tl.load(numbers + 7)
    row_gap, place_gap = tl.load(numbers + 8), tl.load(numbers + 9)  # gaps before them, which are padded
    sample = tl.arange(0, SAMPLES)
    key = tl.load(keys + first_key + sample, mask=sample < count, other=float("inf"))
    # The bits of non-negative numbers have the same order as the numbers.
    BITS: tl.constexpr = 64 if key.dtype == tl.float64 else 32
    bits = key.to(tl.int64, bitcast=True) if BITS == 64 else key.to(tl.float32).to(tl.int32, bitcast=True)
    # The largest kept key is the largest number with fewer than num_kept keys below it. It is found bit by bit.
    one = tl.full([1], 1, bits.dtype)
    last = one - 1
    for bit in range(2, BITS + 1):
        larger = last | (one << (BITS - bit))
        last = tl.where(tl.sum((bits < larger).to(tl.int32)) < num_kept, larger, last)
    below, equal = bits < last, bits == last
    kept = below | (equal & (tl.cumsum(equal.to(tl.int32)) <= num_kept - tl.sum(below.to(tl.int32))))  # [SAMPLES]
    place = tl.cumsum(kept.to(tl.int32)) - 1  # index among the kept samples
    offset = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # token in a sample
    inside = (sample < count)[:, None] & (offset < length)[None, :]  # [SAMPLES, TOKENS]
    row = (rows_before + place * length)[:, None] + offset[None, :]
    token = (first_token + sample * length)[:, None] + offset[None, :]
    tl.store(rows + row, token, mask=inside & kept[:, None])
    tl.store(position + token, tl.where(kept[:, None], row, -1), mask=inside)
    if tl.program_id(0) == 0:
        gap = 1 + tl.arange(0, 4)
        tl.store(rows - gap, tl.zeros_like(gap), mask=gap <= row_gap)
        tl.store(position - gap, tl.zeros_like(gap) - 1, mask=gap <= place_gap)


# ------------------------------------------------------------------------------------------------- gather and LayerNorm


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
        sources, gradients, totals = [], [], []  # a program starts all loads before it waits for one of them
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
    """The dropped rows at these places: the rows that are not in ``rows`` [t], which is ascending.

    The dropped row at place p comes after p dropped rows, and after all kept rows that have at most p dropped rows
    before them. The number of these kept rows is found bit by bit, in as many steps as t has bits.
    """
    kept = tl.zeros_like(place)
    for step in range(1, steps + 1):
        more = kept + (1 << (steps - step))
        row = tl.load(rows + more - 1, mask=more <= t, other=2147483647)
        kept = tl.where(row - more < place, more, kept)
    return place + kept


# -------------------------------------------------------------------------------------------------------------- scatter


@triton.jit(do_not_specialize=["T"])
def scatter(
    x, residual, position, scale, gamma, bias, y, T,
    C: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) % PIECES * WIDTH + tl.arange(0, WIDTH)
    row = tl.program_id(0) // PIECES * ROWS + tl.arange(0, ROWS)
    inside = row < T
    tokens = load_tile(x, row, inside, column, C, WIDTH)
    place, kept = place_of(row, position, inside)
    r = widen(load_tile(residual, place, kept, column, C, WIDTH))
    factor = None if scale is None else tl.load(scale + place, mask=kept, other=0.0)[:, None]
    r = scaled_residual(r, factor, gamma, bias, column, C, ROWS)
    store_tile(y, row, inside, column, widen(tokens) + tl.where(kept[:, None], r, 0.0), C, WIDTH)


@triton.jit(do_not_specialize=["t"])
def scatter_in_place(
    x, residual, rows, scale, gamma, bias, t,
    C: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) % PIECES * WIDTH + tl.arange(0, WIDTH)
    place = tl.program_id(0) // PIECES * ROWS + tl.arange(0, ROWS)
    inside = place < t
    row = row_of(place, rows, inside)
    tokens = load_tile(x, row, inside, column, C, WIDTH)
    r = widen(load_tile(residual, place, inside, column, C, WIDTH))
    factor = None if scale is None else tl.load(scale + place, mask=inside, other=0.0)[:, None]
    r = scaled_residual(r, factor, gamma, bias, column, C, ROWS)
    store_tile(x, row, inside, column, widen(tokens) + r, C, WIDTH)


@triton.jit(do_not_specialize=["t"])
def scatter_backward(
    grad, residual, rows, scale, gamma, bias, dresidual, dgamma, dbias, t,
    C: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    program, programs = tl.program_id(1), tl.num_programs(1)
    dtype: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    gamma_sum, bias_sum = tl.zeros([ROWS, WIDTH], dtype), tl.zeros([ROWS, WIDTH], dtype)
    for start in range(program * ROWS, t, programs * ROWS):
        place = start + tl.arange(0, ROWS)
        inside = place < t
        g = widen(load_tile(grad, row_of(place, rows, inside), inside, column, C, WIDTH))
        if scale is not None:
            g = g * tl.load(scale + place, mask=inside, other=0.0)[:, None]
        if gamma is not None:
            r = widen(load_tile(residual, place, inside, column, C, WIDTH))
            if bias is not None:
                r = r + load_vector(bias, column, C, ROWS)
            gamma_sum += g * r
            g = g * load_vector(gamma, column, C, ROWS)
        bias_sum += g
        store_tile(dresidual, place, inside, column, g, C, WIDTH)
    if gamma is not None:
        tl.store(dgamma + program * C + column, tl.sum(gamma_sum, 0), mask=column < C)
    if bias is not None:
        tl.store(dbias + program * C + column, tl.sum(bias_sum, 0), mask=column < C)


# -------------------------------------------------------------- scatter, and the next connection's gather and LayerNorm


# `place` is an index among the tokens that the first connection keeps, `next_place` among those of the next connection.


@triton.jit(do_not_specialize=["T"])
def scatter_gather_norm(
    x, residual, position, scale, gamma, bias, next_position, weight, norm_bias, y, h, mean, rstd, T, eps: tl.float64,
    C: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = mean.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < T
    place, kept = place_of(row, position, inside)
    next_place, next_kept = place_of(row, next_position, inside)
    factor = None if scale is None else tl.load(scale + place, mask=kept, other=0.0)[:, None]
    before, residuals = [], []  # a program starts all loads before it waits for one of them
    for piece in tl.static_range(PIECES):
        column = piece * WIDTH + tl.arange(0, WIDTH)
        before += [load_tile(x, row, inside, column, C, WIDTH)]
        residuals += [load_tile(residual, place, kept, column, C, WIDTH)]
    tokens, total = [], tl.zeros([ROWS, WIDTH], dtype)
    for piece in tl.static_range(PIECES):
        column = piece * WIDTH + tl.arange(0, WIDTH)
        r = scaled_residual(widen(residuals[piece]), factor, gamma, bias, column, C, ROWS)
        token = (widen(before[piece]) + tl.where(kept[:, None], r, 0.0)).to(y.dtype.element_ty)
        store_tile(y, row, inside, column, token, C, WIDTH)
        tokens += [widen(token)]  # the rounded value, which backward reads again
        total += tokens[piece]
    store_norm(
        tokens, total, weight, norm_bias, h, mean, rstd, next_place, next_kept, eps, C, WIDTH, PIECES, ROWS
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def scatter_gather_norm_backward(
    grad_h, grad_y, y, h, next_position, mean, rstd, weight, norm_bias, residual, position, scale, gamma, bias,
    dx, dresidual, sums, T,
    C: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = sums.dtype.element_ty
    program, programs = tl.program_id(0), tl.num_programs(0)
    dweight = [tl.zeros([ROWS, WIDTH], dtype)] * PIECES
    dnorm_bias, dgamma, dbias = dweight, dweight, dweight
    for start in range(program * ROWS, T, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < T
        place, kept = place_of(row, position, inside)
        next_place, next_kept = place_of(row, next_position, inside)
        average = tl.load(mean + next_place, mask=next_kept, other=0.0)
        deviation = tl.load(rstd + next_place, mask=next_kept, other=0.0)
        factor = None if scale is None else tl.load(scale + place, mask=kept, other=0.0)[:, None]
        sources, gradients, totals, residuals = [], [], [], []
        for piece in tl.static_range(PIECES):
            column = piece * WIDTH + tl.arange(0, WIDTH)
            sources += [
                load_tile(h, next_place, next_kept, column, C, WIDTH)
                if y is None
                else load_tile(y, row, next_kept, column, C, WIDTH)
            ]
            gradients += [load_tile(grad_h, next_place, next_kept, column, C, WIDTH)]
            totals += [load_tile(grad_y, row, inside, column, C, WIDTH)]
            if gamma is not None:
                residuals += [load_tile(residual, place, kept, column, C, WIDTH)]
        # If the next connection drops the row, the deviation is 0, and the gradient of y passes unchanged.
        through_norm, dweight, dnorm_bias = norm_backward(
            sources, gradients, average, deviation, weight, norm_bias, next_kept, dweight, dnorm_bias, y is None,
            C, WIDTH, PIECES, ROWS,
        )  # fmt: skip
        dgamma_so_far, dbias_so_far = dgamma, dbias
        dgamma, dbias = [], []
        for piece in tl.static_range(PIECES):
            column = piece * WIDTH + tl.arange(0, WIDTH)
            total = (widen(totals[piece]) + through_norm[piece]).to(dx.dtype.element_ty)
            store_tile(dx, row, inside, column, total, C, WIDTH)
            g = tl.where(kept[:, None], widen(total), 0.0)
            if factor is not None:
                g = g * factor
            if gamma is not None:
                r = widen(residuals[piece])
                if bias is not None:
                    r = r + load_vector(bias, column, C, ROWS)
                dgamma += [dgamma_so_far[piece] + g * r]
                g = g * load_vector(gamma, column, C, ROWS)
            else:
                dgamma += [dgamma_so_far[piece]]
            dbias += [dbias_so_far[piece] + g]
            store_tile(dresidual, place, kept, column, g, C, WIDTH)
    for piece in tl.static_range(PIECES):
        column = piece * WIDTH + tl.arange(0, WIDTH)
        mask = column < C
        tl.store(sums + program * C + column, tl.sum(dweight[piece], 0), mask=mask)
        tl.store(sums + (programs + program) * C + column, tl.sum(dnorm_bias[piece], 0), mask=mask)
        if gamma is not None:
            tl.store(sums + (2 * programs + program) * C + column, tl.sum(dgamma[piece], 0), mask=mask)
        if bias is not None:
            tl.store(sums + (3 * programs + program) * C + column, tl.sum(dbias[piece], 0), mask=mask)
