"""The scatter of one residual connection with the gather and LayerNorm of the next one, in Triton, and backward.

A program holds all pieces of some rows of x [T], in lists, as :mod:`dinov2_kernels.residual.triton_kernel` explains. A
place counts the tokens that a connection keeps: ``place`` those of the first, ``next_place`` those of the next one.
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
    scaled_residual,
    store_norm,
    store_tile,
)


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
    before, residuals = [], []  # all loads of a program are under way before any of them is awaited
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
        tokens += [widen(token)]  # as it is read again in backward
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
        # The deviation is 0 where the next connection keeps nothing: the gradient of y passes as it is.
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
