"""Stochastic depth in Triton: the operators of :mod:`dinov2_kernels.residual.reference` for CUDA tensors.

Legend: T tokens of width C, of which t are kept; m = t C and M = T C elements. All tensors are contiguous; tokens,
weights and gradients may be float64, float32, bfloat16 or float16, each on its own. Statistics and sums are float32, or
float64 for float64 tokens. No atomics: results do not change from run to run.

A row is cut into 3 to 5 pieces, each a power of two wide, which make exactly 384, 768, 1024, 1280 or 1536 channels; one
power of two would be up to a third longer. A program holds all pieces of some rows in registers where it needs their
sums, and one piece otherwise. A thread moves 8 or 16 bytes at a time where C is a multiple of 8.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_kernels.residual.reference import accumulation_dtype


def residual_gather_norm(
    x: Tensor, rows: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm h [t, C] of the kept rows of x [T, C], their mean [t] and 1 / standard deviation [t].

    Moves 2 m elements: reads the kept rows of x, once, and writes h.
    """
    C = x.shape[1]
    t = x.shape[0] if rows is None else rows.shape[0]
    h = torch.empty(t, C, dtype=dtype, device=x.device)  # [t, C]
    mean = torch.empty(t, dtype=accumulation_dtype(x), device=x.device)  # [t]
    rstd = torch.empty_like(mean)  # [t]
    shape = _shape_of_rows(C, mean.dtype)
    with torch.cuda.device_of(x):
        _gather_norm[(triton.cdiv(t, shape["ROWS"]),)](x, rows, weight, bias, h, mean, rstd, t, eps, **shape)
    return h, mean, rstd


def residual_gather_norm_backward(
    grad_h: Tensor,
    grad_x: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    rows: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [T, C], weight [C] and bias [C]; the normalised rows come from x, or from h where x is None.

    Moves 2 m + 2 M elements: reads grad_h, grad_x and the kept rows of x (or h), writes the gradient of x. Programs add
    up the gradients of weight and bias over their own rows, and PyTorch adds up the programs.
    """
    T, C = grad_x.shape
    t = grad_h.shape[0]
    dx = torch.empty_like(grad_x)  # [T, C]
    shape = _shape_of_rows(C, mean.dtype)
    warps = shape["num_warps"]
    resident = max(1, 12 // warps) * _num_multiprocessors(grad_x.device)  # all of them at the same time
    programs = max(1, min(triton.cdiv(T, shape["ROWS"]), resident))
    registers = min(168, 2048 // warps)
    sums = torch.empty(2, programs, C, dtype=mean.dtype, device=grad_x.device)  # [2, programs, C]: weight, bias
    with torch.cuda.device_of(grad_x):
        _gather_norm_backward[(programs,)](
            grad_h,
            grad_x,
            x,
            h,
            rows,
            mean,
            rstd,
            weight,
            bias,
            dx,
            sums,
            T,
            t,
            t.bit_length(),
            **shape,
            maxnreg=registers,
        )
    dweight, dbias = sums.sum(dim=1).unbind()
    return dx, dweight, dbias


def residual_scatter(
    x: Tensor,
    residual: Tensor,
    position: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """x [T, C] plus scale * gamma * (residual [t, C] + bias) on the kept rows.

    Moves m + 2 M elements: reads the residual and x, writes the result.
    """
    T, C = x.shape
    y = torch.empty_like(x)  # [T, C]
    shape = _shape_of_pieces(C, accumulation_dtype(x))
    grid = (shape["PIECES"] * triton.cdiv(T, shape["ROWS"]),)
    with torch.cuda.device_of(x):
        _scatter[grid](x, residual, position, scale, gamma, bias, y, T, **shape, maxnreg=64)
    return y


def residual_scatter_(
    x: Tensor,
    residual: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    bias: Tensor | None,
) -> None:
    """:func:`residual_scatter` in place of x. Moves 3 m elements: reads the residual, reads and writes x."""
    t, C = residual.shape
    shape = _shape_of_pieces(C, accumulation_dtype(x))
    grid = (shape["PIECES"] * triton.cdiv(t, shape["ROWS"]),)
    with torch.cuda.device_of(x):
        _scatter_in_place[grid](x, residual, rows, scale, gamma, bias, t, **shape, maxnreg=64)


def residual_scatter_backward(
    grad: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the residual [t, C] in ``dtype``, of gamma [C] and of bias [C], given that of the result [T, C].

    Moves 3 m elements: reads the kept rows of grad, reads the residual where there is a gamma, writes its gradient.
    Programs add up the gradients of gamma and bias over their own rows, and PyTorch adds up the programs.
    """
    C = grad.shape[1]
    t = grad.shape[0] if rows is None else rows.shape[0]
    dresidual = torch.empty(t, C, dtype=dtype, device=grad.device)  # [t, C]
    shape = _shape_of_pieces(C, accumulation_dtype(grad))
    resident = 4 * _num_multiprocessors(grad.device) // shape["PIECES"]
    programs = max(1, min(triton.cdiv(t, shape["ROWS"]), resident))
    dgamma, dbias = (
        None if of is None else torch.empty(programs, C, dtype=accumulation_dtype(grad), device=grad.device)
        for of in (gamma, bias)
    )  # [programs, C]
    with torch.cuda.device_of(grad):
        _scatter_backward[(shape["PIECES"], programs)](
            grad, residual, rows, scale, gamma, bias, dresidual, dgamma, dbias, t, **shape, maxnreg=128
        )
    nothing = torch.empty(0, dtype=accumulation_dtype(grad), device=grad.device)
    dgamma, dbias = (nothing if sums is None else sums.sum(dim=0) for sums in (dgamma, dbias))
    return dresidual, dgamma, dbias


# --------------------------------------------------------------------------------------------------------------- shapes


@lru_cache
def _shape_of_rows(C: int, dtype: torch.dtype) -> dict[str, int]:
    """For programs that hold whole rows: a thread has up to 24 numbers of a tensor in its registers.

    Or 16 where the sums of a row take registers too, because a piece spans two warps.
    """
    width, pieces = _cut(C)
    rows = _num_rows(C, dtype, width * pieces, 3072 if width <= 256 else 2048)
    warps = min(16, max(4, triton.next_power_of_2(width * pieces // 768)))
    return {"C": C, "WIDTH": width, "PIECES": pieces, "ROWS": rows, "num_warps": warps}


@lru_cache
def _shape_of_pieces(C: int, dtype: torch.dtype) -> dict[str, int]:
    """For programs that work on one piece of some rows: a thread has 16 numbers of a tensor in its registers."""
    width, pieces = _cut(C)
    return {"C": C, "WIDTH": width, "PIECES": pieces, "ROWS": _num_rows(C, dtype, width, 2048), "num_warps": 4}


def _num_rows(C: int, dtype: torch.dtype, length: int, numbers: int) -> int:
    """A power of two of rows, each of a length, that have this many numbers.

    A quarter of them in float64, and half where C leaves rows unaligned, so that every number has its own address.
    """
    numbers //= (4 if dtype == torch.float64 else 1) * (2 if C % 8 else 1)
    return 1 << max(1, numbers // length).bit_length() - 1


def _cut(C: int) -> tuple[int, int]:
    """Width and number of the pieces of a row; only the last one may reach beyond it."""
    power = max(64, triton.next_power_of_2(C))
    width = power // (8 if 5 * power >= 8 * C else 4)
    return width, triton.cdiv(C, width)


@lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    """Of the GPU; of an H200 where Triton's interpreter runs, or its compiler alone."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


# ---------------------------------------------------------------------------------------- kernels: gather and LayerNorm


@triton.jit(do_not_specialize=["t"])
def _gather_norm(
    x, rows, weight, bias, h, mean, rstd, t, eps: tl.float64,
    C: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = mean.dtype.element_ty
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < t
    row = _row_of(place, rows, inside)
    tokens, total = [], tl.zeros([ROWS, WIDTH], dtype)
    for piece in tl.static_range(PIECES):
        column = piece * WIDTH + tl.arange(0, WIDTH)
        tokens += [_widen(_load(x, row, inside, column, C, WIDTH))]
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
            normed = normed * _load_vector(weight, column, C, ROWS)
        if bias is not None:
            normed = normed + _load_vector(bias, column, C, ROWS)
        _store(h, place, inside, column, normed, C, WIDTH)
    tl.store(mean + place, average, mask=inside)
    tl.store(rstd + place, scale, mask=inside)


@triton.jit(do_not_specialize=["T", "t", "steps"])
def _gather_norm_backward(
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
        row = _row_of(place, rows, inside)
        average = tl.load(mean + place, mask=inside, other=0.0)[:, None]
        scale = tl.load(rstd + place, mask=inside, other=0.0)[:, None]
        sources, gradients, totals = [], [], []  # all loads of a program are under way before any of them is awaited
        for piece in tl.static_range(PIECES):
            column = piece * WIDTH + tl.arange(0, WIDTH)
            sources += [
                _load(h, place, inside, column, C, WIDTH) if x is None else _load(x, row, inside, column, C, WIDTH)
            ]
            gradients += [_load(grad_h, place, inside, column, C, WIDTH)]
            totals += [_load(grad_x, row, inside, column, C, WIDTH)]
        through, normed, dweight_so_far, dbias_so_far = [], [], dweight, dbias
        dweight, dbias = [], []
        through_total, along_total = tl.zeros([ROWS, WIDTH], dtype), tl.zeros([ROWS, WIDTH], dtype)
        for piece in tl.static_range(PIECES):
            column = piece * WIDTH + tl.arange(0, WIDTH)
            if x is None:
                n = _recover(_widen(sources[piece]), weight, bias, column, C, ROWS)
            else:
                n = (_widen(sources[piece]) - average) * scale
            g = _widen(gradients[piece])
            dweight += [dweight_so_far[piece] + g * n]
            dbias += [dbias_so_far[piece] + g]
            if weight is not None:
                g = g * _load_vector(weight, column, C, ROWS)
            through += [g]
            normed += [n]
            through_total += g
            along_total += g * n
        through_mean = (tl.sum(through_total, 1) * (1 / C))[:, None]
        along_mean = (tl.sum(along_total, 1) * (1 / C))[:, None]
        for piece in tl.static_range(PIECES):
            column = piece * WIDTH + tl.arange(0, WIDTH)
            gradient = (through[piece] - through_mean - normed[piece] * along_mean) * scale
            _store(dx, row, inside, column, _widen(totals[piece]) + gradient, C, WIDTH)
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
                _store(dx, row, inside, column, _load(grad_x, row, inside, column, C, WIDTH), C, WIDTH)


@triton.jit
def _recover(h, weight, bias, column, C: tl.constexpr, ROWS: tl.constexpr):
    """The normalised tokens, given the LayerNorm h of them; 0 where the weight is 0."""
    if bias is not None:
        h = h - _load_vector(bias, column, C, ROWS)
    if weight is not None:
        divisor = _load_vector(weight, column, C, ROWS)
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


# ----------------------------------------------------------------------------------------------------- kernels: scatter


@triton.jit(do_not_specialize=["T"])
def _scatter(
    x, residual, position, scale, gamma, bias, y, T,
    C: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) % PIECES * WIDTH + tl.arange(0, WIDTH)
    row = tl.program_id(0) // PIECES * ROWS + tl.arange(0, ROWS)
    inside = row < T
    tokens = _load(x, row, inside, column, C, WIDTH)
    place = row if position is None else tl.load(position + row, mask=inside, other=-1)
    kept = inside & (place >= 0)
    r = _scaled_residual(residual, place, kept, scale, gamma, bias, column, C, WIDTH, ROWS)
    _store(y, row, inside, column, _widen(tokens) + tl.where(kept[:, None], r, 0.0), C, WIDTH)


@triton.jit(do_not_specialize=["t"])
def _scatter_in_place(
    x, residual, rows, scale, gamma, bias, t,
    C: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) % PIECES * WIDTH + tl.arange(0, WIDTH)
    place = tl.program_id(0) // PIECES * ROWS + tl.arange(0, ROWS)
    inside = place < t
    row = _row_of(place, rows, inside)
    tokens = _load(x, row, inside, column, C, WIDTH)
    r = _scaled_residual(residual, place, inside, scale, gamma, bias, column, C, WIDTH, ROWS)
    _store(x, row, inside, column, _widen(tokens) + r, C, WIDTH)


@triton.jit(do_not_specialize=["t"])
def _scatter_backward(
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
        g = _widen(_load(grad, _row_of(place, rows, inside), inside, column, C, WIDTH))
        if scale is not None:
            g = g * tl.load(scale + place, mask=inside, other=0.0)[:, None]
        if gamma is not None:
            r = _widen(_load(residual, place, inside, column, C, WIDTH))
            if bias is not None:
                r = r + _load_vector(bias, column, C, ROWS)
            gamma_sum += g * r
            g = g * _load_vector(gamma, column, C, ROWS)
        bias_sum += g
        _store(dresidual, place, inside, column, g, C, WIDTH)
    if gamma is not None:
        tl.store(dgamma + program * C + column, tl.sum(gamma_sum, 0), mask=column < C)
    if bias is not None:
        tl.store(dbias + program * C + column, tl.sum(bias_sum, 0), mask=column < C)


@triton.jit
def _scaled_residual(
    residual, place, inside, scale, gamma, bias, column, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    r = _widen(_load(residual, place, inside, column, C, WIDTH))
    if bias is not None:
        r = r + _load_vector(bias, column, C, ROWS)
    if gamma is not None:
        r = r * _load_vector(gamma, column, C, ROWS)
    if scale is not None:
        r = r * tl.load(scale + place, mask=inside, other=0.0)[:, None]
    return r


# ---------------------------------------------------------------------------------------------------- tiles and vectors


@triton.jit
def _row_of(place, rows, inside):
    """Where the kept tokens at these places stand in x."""
    return place if rows is None else tl.load(rows + place, mask=inside, other=0)


@triton.jit
def _load(tokens, row, inside, column, C: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, columns] of tokens [.., C]; 0 outside."""
    mask = _mask(inside, column, C, WIDTH)
    return tl.load(tokens + row.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(tokens, row, inside, column, values, C: tl.constexpr, WIDTH: tl.constexpr):
    mask = _mask(inside, column, C, WIDTH)
    tl.store(tokens + row.to(tl.int64)[:, None] * C + column[None, :], values, mask=mask)


@triton.jit
def _mask(inside, column, C: tl.constexpr, WIDTH: tl.constexpr):
    """The columns need none where the pieces make exactly a row."""
    return inside[:, None] if C % WIDTH == 0 else inside[:, None] & (column < C)[None, :]


@triton.jit
def _load_vector(vector, column, C: tl.constexpr, ROWS: tl.constexpr):
    """A vector [C] for each of the rows, widened; 0 outside.

    Every thread reads its own columns, from L1: a vector read once would reach them through shared memory.
    """
    address = tl.broadcast_to((vector + column)[None, :], [ROWS, column.shape[0]])
    return _widen(tl.load(address, mask=(column < C)[None, :], other=0.0))


@triton.jit
def _widen(x):
    """float64 as it is, everything narrower in float32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)
