"""Adding the scaled residual to the kept tokens in Triton: to a copy or in place, and the backward pass.

A place counts the kept tokens [t], a row the tokens of x [T]; without ``rows`` or ``position`` they are one. A program
works on one piece of some rows, as :mod:`dinov2_kernels.residual.triton_kernel` explains.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dinov2_kernels._triton import widen
from dinov2_kernels.residual.triton_tiles import (
    load_tile,
    load_vector,
    place_of,
    row_of,
    scaled_residual,
    store_tile,
)


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
