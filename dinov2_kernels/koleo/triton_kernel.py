"""KoLeo in Triton: the three operators of :mod:`dinov2_kernels.koleo.reference` for CUDA tensors.

Legend: x [N, D] contiguous, float64, float32, bfloat16 or float16; lengths, cosines and intermediate gradients are in
the accumulation dtype, float64 for float64 and float32 otherwise. A program has ROWS rows of one batch. It computes
their cosines with COLUMNS candidates at a time, from DEPTH values at a time, and never stores them. float32 products
are true float32, not TF32; products of 16-bit rows are exact. No atomics: results are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype
from dinov2_kernels._triton import div_rn, sqrt_rn, widen

MANY_ROWS = 8192  # from this number on, tiles of 64 rows are enough work for every multiprocessor
REGISTERS = 255  # the maximum for a thread; without this limit, ptxas spills registers to keep more threads

_FARTHEST = tl.constexpr(-3.0e38)  # replaces a NaN cosine: the row stays a candidate, but comes last


def koleo_nearest(x: Tensor, k: int, n_groups: int, world_size: int, rank: int, eps: float) -> tuple[Tensor, Tensor]:
    """Row numbers [B, k] and cosines [B, k] of the nearest neighbours.

    Bytes: every program reads its batch, mostly from L2, and writes its share of the result.
    """
    N, D = x.shape
    B = N // world_size
    index = torch.empty(B, k, dtype=torch.int64, device=x.device)
    cosine = torch.empty(B, k, dtype=accumulation_dtype(x), device=x.device)
    grid, tile = _tiles(x, B, B // n_groups, k)
    with torch.cuda.device_of(x):
        _nearest[grid](x, index, cosine, N, D, B, B // n_groups, rank, eps, k, **tile)
    return index, cosine


def koleo_forward(x: Tensor, k: int, n_groups: int, world_size: int, rank: int, eps: float) -> tuple[Tensor, Tensor]:
    """The loss, and the row numbers [B, k] of the neighbours; one launch if a program holds all rows, else two.

    Bytes: those of :func:`koleo_nearest`, and two more reads of the neighbours.
    """
    N, D = x.shape
    B = N // world_size
    index = torch.empty(B, k, dtype=torch.int64, device=x.device)
    grid, tile = _tiles(x, B, B // n_groups, k)
    shares = torch.empty(grid[0] * grid[1], dtype=accumulation_dtype(x), device=x.device)  # loss, program by program
    with torch.cuda.device_of(x):
        _forward[grid](x, index, shares, N, D, B, B // n_groups, rank, eps, k, **tile)
    return shares.view(()) if len(shares) == 1 else shares.sum(), index


def koleo_backward(grad: Tensor, x: Tensor, index: Tensor, rank: int, eps: float) -> Tensor:
    """Gradient [B, D] of the rows of this process, in one launch with a program for each row.

    Bytes: B reads of index [N, k] and about 4 k B reads of rows, mostly from L2, and one write of the result.
    """
    N, D = x.shape
    B, k = N // grad.numel(), index.shape[1]
    dx = torch.empty(B, D, dtype=x.dtype, device=x.device)
    width = triton.next_power_of_2(max(D, 1))
    shape = {"WIDTH": width, "ENTRIES": 1024, "num_warps": 4 if width <= 2048 else 8, "maxnreg": REGISTERS}
    with torch.cuda.device_of(x):
        _backward[(B,)](grad, x, index, dx, N, D, B, k, rank, eps, **shape)
    return dx


def _tiles(x: Tensor, B: int, block: int, k: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, tiles and batches, and the sizes of a tile; this process has ``block`` rows of each batch."""
    rows = 64 if block <= 64 or B >= MANY_ROWS else 16
    rows = max(16, min(rows, triton.next_power_of_2(block)))
    size = x.element_size()
    tile = {"SLOTS": triton.next_power_of_2(k), "ROWS": rows, "COLUMNS": 32 if size == 8 else 64, "DEPTH": 128 // size}
    # Products outside the tensor cores take so many registers that prefetching would spill them.
    tile |= {"num_stages": 1 if size >= 4 else 2, "maxnreg": REGISTERS}
    return (triton.cdiv(block, rows), B // block), tile


# The rows of a batch are constant in a run; the rank of a process is not compiled in, so one kernel serves all of them.


@triton.jit(do_not_specialize=["rank"])
def _nearest(
    x, index, cosine,
    N, D, B, block, rank, eps: tl.float64, k,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    eps = tl.full([], eps, cosine.dtype.element_ty)
    own, inside = _own_rows(block, ROWS)
    row = tl.cast(rank, tl.int64) * B + own
    divisor = _row_divisor(x, row, inside, D, eps, DEPTH)
    slots, numbers = _search(x, row, inside, divisor, N, D, B, block, eps, k, SLOTS, COLUMNS, DEPTH)
    for slot in range(k):
        found, at, slots = _take_nearest(slots, numbers, k, row)
        tl.store(index + own * k + slot, at, mask=inside)
        tl.store(cosine + own * k + slot, tl.where(found < -2, float("nan"), found), mask=inside)


@triton.jit(do_not_specialize=["rank"])
def _forward(
    x, index, shares,
    N, D, B, block, rank, eps: tl.float64, k,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    eps = tl.full([], eps, shares.dtype.element_ty)
    own, inside = _own_rows(block, ROWS)
    row = tl.cast(rank, tl.int64) * B + own
    divisor = _row_divisor(x, row, inside, D, eps, DEPTH)
    slots, numbers = _search(x, row, inside, divisor, N, D, B, block, eps, k, SLOTS, COLUMNS, DEPTH)
    logarithms = tl.zeros([ROWS], eps.dtype)
    for slot in range(k):
        _, at, slots = _take_nearest(slots, numbers, k, row)
        tl.store(index + own * k + slot, at, mask=inside)
        logarithms += tl.log(_distance(x, row, divisor, at, inside, D, eps, DEPTH) + eps)
    share = -tl.sum(tl.where(inside, logarithms, 0.0), 0) / (B * k)
    tl.store(shares + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), share)


@triton.jit
def _own_rows(block, ROWS: tl.constexpr):
    """The program's rows [ROWS] among those of this process, and which of them exist."""
    member = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return tl.program_id(1).to(tl.int64) * block + member, member < block


@triton.jit(do_not_specialize=["rank"])
def _backward(grad, x, index, dx, N, D, B, k, rank, eps: tl.float64, WIDTH: tl.constexpr, ENTRIES: tl.constexpr):
    dtype: tl.constexpr = grad.dtype.element_ty
    eps = tl.full([], eps, dtype)
    own = tl.program_id(0).to(tl.int64)
    n = tl.cast(rank, tl.int64) * B + own
    column = tl.arange(0, WIDTH)
    unit, length = _unit_row(x, n, column, D, eps)
    g = tl.zeros([WIDTH], dtype)  # gradient of the unit row
    scale = -tl.load(grad + n // B) / (B * k)
    for slot in range(k):
        m = tl.load(index + n * k + slot)
        other, _ = _unit_row(x, m, column, D, eps)
        g += _pull(unit, other, column, D, eps, scale, n == m)
    for start in range(0, N * k, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        leads_here = tl.load(index + entry, mask=entry < N * k, other=-1) == n
        for _ in range(tl.sum(leads_here.to(tl.int32), 0)):
            following = tl.min(tl.where(leads_here, entry, N * k), 0)
            leads_here = leads_here & (entry != following)
            m = following.to(tl.int64) // k
            other, _ = _unit_row(x, m, column, D, eps)
            g -= _pull(other, unit, column, D, eps, -tl.load(grad + m // B) / (B * k), n == m)
    gradient = (g - unit * tl.sum(unit * g, 0)) / _at_least(length, eps)
    gradient = tl.where(length < eps, 0.0, gradient)  # such a short row has no direction
    tl.store(dx + own * D + column, gradient.to(dx.dtype.element_ty), mask=column < D)


@triton.jit
def _unit_row(x, n, column, D, eps):
    """The unit row [WIDTH], and the length of the row."""
    values = widen(tl.load(x + n * D + column, mask=column < D, other=0.0))
    length = sqrt_rn(tl.sum(values * values, 0))
    return div_rn(values, _at_least(length, eps)), length


@triton.jit
def _pull(u, v, column, D, eps, scale, same):
    """scale times the gradient of log(||u - v + eps|| + eps) with respect to u [WIDTH].

    It ends with a division, which the compiler cannot fuse into a multiply-add. For two equal rows that are each
    other's neighbours, these gradients are large and must cancel exactly.
    """
    difference = tl.where(column < D, u - v + eps, 0.0)
    apart = tl.sqrt(tl.sum(difference * difference, 0))
    return tl.where(same | (apart == 0), 0.0, div_rn(difference, apart * (apart + eps) / scale))


# ----------------------------------------------------------------------------------------------------- parts of kernels


# The rows of a tile are `row` (row numbers, [ROWS] int64) and `inside` (whether the row exists); `eps` has the
# accumulation dtype. The nearest candidates so far are `(cosine, index)`, both [ROWS, SLOTS], unordered. Until they are
# filled, the first k slots hold -inf and a number past all rows; the other slots hold +inf.


@triton.jit
def _load_rows(x, row, inside, column, D):
    """[rows, columns] of x; 0 outside."""
    return tl.load(x + row[:, None] * D + column[None, :], mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _row_divisor(x, row, inside, D, eps, DEPTH: tl.constexpr):
    """The divisor of each row that makes it a unit row: its length, but at least eps.

    The length is rounded to the nearest number, so a row with a single value becomes exactly 1 or -1.
    """
    squares = tl.zeros([row.shape[0]], eps.dtype)
    for start in range(0, D, DEPTH):
        values = widen(_load_rows(x, row, inside, start + tl.arange(0, DEPTH), D))
        squares += tl.sum(values * values, 1)
    return _at_least(sqrt_rn(squares), eps)


@triton.jit
def _at_least(length, eps):
    """The larger of the two; NaN stays NaN."""
    return tl.where(length < eps, eps, length)


@triton.jit
def _distance(x, row, divisor, other, inside, D, eps, DEPTH: tl.constexpr):
    """||u - v + eps|| [ROWS] of unit rows.

    Unit rows come from divisions, which the compiler cannot fuse into a multiply-add, so equal rows cancel exactly.
    """
    other_divisor = _row_divisor(x, other, inside, D, eps, DEPTH)
    squares = tl.zeros([row.shape[0]], eps.dtype)
    for start in range(0, D, DEPTH):
        column = start + tl.arange(0, DEPTH)
        u = div_rn(widen(_load_rows(x, row, inside, column, D)), divisor[:, None])
        v = div_rn(widen(_load_rows(x, other, inside, column, D)), other_divisor[:, None])
        difference = tl.where((column < D)[None, :], u - v + eps, 0.0)
        squares += tl.sum(difference * difference, 1)
    return tl.sqrt(squares)


@triton.jit
def _search(
    x, row, inside, divisor, N, D, B, block, eps, k, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    """The nearest neighbours of each row in its batch, among the rows of all processes."""
    slot = tl.arange(0, SLOTS).to(tl.int64)[None, :] + tl.zeros([row.shape[0], 1], tl.int64)
    cosine = tl.where(slot < k, float("-inf"), float("inf")).to(eps.dtype)
    index = N + slot
    first = tl.program_id(1).to(tl.int64) * block  # first row of the batch, among the rows of a process
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
    """Cosines [ROWS, COLUMNS]; `scale` [ROWS] is 1 / length.

    The candidates' lengths are computed from the values that the products load anyway. A cosine costs two more products
    and no division; for unit rows these products are exact.
    """
    products = tl.zeros([row.shape[0], column.shape[0]], eps.dtype)
    squares = tl.zeros([column.shape[0]], eps.dtype)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        a = _load_rows(x, row, inside, d, D)
        b = _load_rows(x, column, exists, d, D)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee", out_dtype=eps.dtype)
        squares += tl.sum(widen(b) * widen(b), 1)
    tile = products * scale[:, None] * div_rn(1.0, _at_least(sqrt_rn(squares), eps))[None, :]
    return tl.where(tile == tile, tile, _FARTHEST)


@triton.jit
def _insert(cosine, index, tile, column):
    """Put candidates that are nearer than a slot into it. They come in row order: an equal one does not replace it."""
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
def _take_nearest(cosine, index, k, row):
    """Cosine and row number [ROWS] of the nearest, and the slots without it. A single row is its own neighbour."""
    counted = tl.arange(0, cosine.shape[1])[None, :] < k
    best = tl.max(tl.where(counted, cosine, float("-inf")), 1)
    at = _lowest_of(counted & (cosine == best[:, None]), index)
    rest = tl.where(index == at[:, None], float("-inf"), cosine)
    return best, tl.where(best == float("-inf"), row, at), rest


@triton.jit
def _lowest_of(chosen, number):
    """[ROWS]"""
    return tl.min(tl.where(chosen, number, 0x7FFFFFFFFFFFFFFF), 1)
