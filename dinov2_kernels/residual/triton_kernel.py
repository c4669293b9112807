"""Stochastic depth in Triton: the operators of :mod:`dinov2_kernels.residual.reference` for CUDA tensors.

Legend: T tokens of width C, t of them kept; m = t C and M = T C elements. All tensors are contiguous. Tokens, weights
and gradients may each be float64, float32, bfloat16 or float16. Statistics and sums are float32, or float64 for float64
tokens. No atomics: results are the same in every run.

A row is split into 3 to 5 pieces whose widths are powers of two. They fit 384, 768, 1024, 1280 and 1536 channels
exactly; a single power of two would be up to a third longer. A program that needs the sums of its rows holds all their
pieces in registers, other programs hold one piece. A thread moves 8 or 16 bytes at a time if C is a multiple of 8.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype
from dinov2_kernels._tables import table_cache
from dinov2_kernels._triton import num_multiprocessors
from dinov2_kernels.residual.triton_passes import (
    gather_norm,
    gather_norm_backward,
    kept_rows,
    scatter,
    scatter_backward,
    scatter_gather_norm,
    scatter_gather_norm_backward,
    scatter_in_place,
)


def residual_kept_rows(keys: Tensor, runs: list[int], kept: list[int]) -> tuple[Tensor, Tensor]:
    """rows [t] and position [T] of every draw: the samples with the smallest keys [draws, S] of their runs.

    Keys are in [0, 1). There is one launch. Every program finds the largest key that a draw keeps in a run, and then
    writes a few tokens of each sample. Bytes: 4 (t + T) per draw, and the keys of a run for each of its programs, from
    L2.
    """
    counts, lengths = runs[::2], runs[1::2]
    with torch.cuda.device_of(keys):
        table = _table(tuple(counts), tuple(lengths), tuple(kept), keys.device)
        rows = torch.empty(table.num_rows, dtype=torch.int32, device=keys.device)
        position = torch.empty(table.num_places, dtype=torch.int32, device=keys.device)
        if table.num_places:
            samples = triton.next_power_of_2(max(counts))
            tokens = min(16, max(1, 4096 // samples))  # tokens of each sample in one program
            grid = (triton.cdiv(max(lengths), tokens), len(kept))
            warps = min(16, max(4, samples // 512))
            kept_rows[grid](keys, table.numbers, rows, position, SAMPLES=samples, TOKENS=tokens, num_warps=warps)
    return rows, position


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
        gather_norm[(triton.cdiv(t, shape["ROWS"]),)](x, rows, weight, bias, h, mean, rstd, t, eps, **shape)
    return h, mean, rstd


def residual_gather_norm_backward(
    grad_h: Tensor, grad_x: Tensor, x: Tensor | None, h: Tensor | None, rows: Tensor | None,
    mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x [T, C], weight [C] and bias [C]; the normalised rows come from x, or from h if x is None.

    Moves 2 m + 2 M elements: reads grad_h, grad_x and the kept rows of x (or h), writes the gradient of x. Programs sum
    the gradients of weight and bias over their own rows, and PyTorch sums the programs.
    """
    T, C = grad_x.shape
    t = grad_h.shape[0]
    dx = torch.empty_like(grad_x)  # [T, C]
    shape = _shape_of_rows(C, mean.dtype)
    programs, registers = _persistent(T, shape, grad_x.device)
    sums = torch.empty(2, programs, C, dtype=mean.dtype, device=grad_x.device)  # [2, programs, C]: weight, bias
    with torch.cuda.device_of(grad_x):
        gather_norm_backward[(programs,)](
            grad_h, grad_x, x, h, rows, mean, rstd, weight, bias, dx, sums,
            T, t, t.bit_length(), **shape, maxnreg=registers,
        )  # fmt: skip
    dweight, dbias = sums.sum(dim=1).unbind()
    return dx, dweight, dbias


def residual_scatter(
    x: Tensor, residual: Tensor, position: Tensor | None,
    scale: Tensor | None, gamma: Tensor | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """x [T, C] plus scale * gamma * (residual [t, C] + bias) on the kept rows.

    Moves m + 2 M elements: reads the residual and x, writes the result.
    """
    T, C = x.shape
    y = torch.empty_like(x)  # [T, C]
    shape = _shape_of_pieces(C, accumulation_dtype(x))
    grid = (shape["PIECES"] * triton.cdiv(T, shape["ROWS"]),)
    with torch.cuda.device_of(x):
        scatter[grid](x, residual, position, scale, gamma, bias, y, T, **shape, maxnreg=64)
    return y


def residual_scatter_(
    x: Tensor, residual: Tensor, rows: Tensor | None,
    scale: Tensor | None, gamma: Tensor | None, bias: Tensor | None,
) -> None:  # fmt: skip
    """:func:`residual_scatter` in place. Moves 3 m elements: reads the residual, reads and writes x."""
    t, C = residual.shape
    shape = _shape_of_pieces(C, accumulation_dtype(x))
    grid = (shape["PIECES"] * triton.cdiv(t, shape["ROWS"]),)
    with torch.cuda.device_of(x):
        scatter_in_place[grid](x, residual, rows, scale, gamma, bias, t, **shape, maxnreg=64)


def residual_scatter_backward(
    grad: Tensor, residual: Tensor | None, rows: Tensor | None,
    scale: Tensor | None, gamma: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the residual [t, C] in ``dtype``, of gamma [C] and of bias [C] from that of the result [T, C].

    Moves 3 m elements: reads the kept rows of grad and, with a gamma, the residual; writes the residual's gradient.
    Programs sum the gradients of gamma and bias over their own rows, and PyTorch sums the programs.
    """
    C = grad.shape[1]
    t = grad.shape[0] if rows is None else rows.shape[0]
    dresidual = torch.empty(t, C, dtype=dtype, device=grad.device)  # [t, C]
    shape = _shape_of_pieces(C, accumulation_dtype(grad))
    resident = 4 * num_multiprocessors(grad.device) // shape["PIECES"]
    programs = max(1, min(triton.cdiv(t, shape["ROWS"]), resident))
    dgamma, dbias = (
        None if of is None else torch.empty(programs, C, dtype=accumulation_dtype(grad), device=grad.device)
        for of in (gamma, bias)
    )  # [programs, C]
    with torch.cuda.device_of(grad):
        scatter_backward[(shape["PIECES"], programs)](
            grad, residual, rows, scale, gamma, bias, dresidual, dgamma, dbias, t, **shape, maxnreg=128
        )
    nothing = torch.empty(0, dtype=accumulation_dtype(grad), device=grad.device)
    dgamma, dbias = (nothing if sums is None else sums.sum(dim=0) for sums in (dgamma, dbias))
    return dresidual, dgamma, dbias


def residual_scatter_gather_norm(
    x: Tensor, residual: Tensor, position: Tensor | None,
    scale: Tensor | None, gamma: Tensor | None, bias: Tensor | None,
    next_rows: Tensor | None, next_position: Tensor | None,
    weight: Tensor | None, norm_bias: Tensor | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`residual_scatter`, and :func:`residual_gather_norm` of its result for the next branch.

    Moves 2 m + 2 M elements: reads the residual and x, writes the result and h.
    """
    T, C = x.shape
    t = T if next_rows is None else next_rows.shape[0]
    y = torch.empty_like(x)  # [T, C]
    h = torch.empty(t, C, dtype=dtype, device=x.device)  # [t', C]
    mean = torch.empty(t, dtype=accumulation_dtype(x), device=x.device)  # [t']
    rstd = torch.empty_like(mean)  # [t']
    shape = _shape_of_rows(C, mean.dtype, 2)
    of_scatter, of_norm = (x, residual, position, scale, gamma, bias), (next_position, weight, norm_bias)
    grid = (triton.cdiv(T, shape["ROWS"]),)
    with torch.cuda.device_of(x):
        scatter_gather_norm[grid](*of_scatter, *of_norm, y, h, mean, rstd, T, eps, **shape)
    return y, h, mean, rstd


def residual_scatter_gather_norm_backward(
    grad_h: Tensor, grad_y: Tensor,
    y: Tensor | None, h: Tensor | None, next_rows: Tensor | None, next_position: Tensor | None,
    mean: Tensor, rstd: Tensor, weight: Tensor | None, norm_bias: Tensor | None,
    residual: Tensor | None, rows: Tensor | None, position: Tensor | None,
    scale: Tensor | None, gamma: Tensor | None, bias: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x [T, C], weight, norm_bias [C], residual [t, C] in ``dtype``, gamma and bias [C].

    Moves 4 m + 2 M elements: reads grad_h, grad_y, the next branch's rows of y (or h) and, with a gamma, the residual;
    writes the gradients of x and of the residual. Programs sum the gradients of the vectors over their own rows, and
    PyTorch sums the programs.
    """
    T, C = grad_y.shape
    t = T if rows is None else rows.shape[0]
    dx = torch.empty_like(grad_y)  # [T, C]
    dresidual = torch.empty(t, C, dtype=dtype, device=grad_y.device)  # [t, C]
    shape = _shape_of_rows(C, mean.dtype, 2)
    programs, registers = _persistent(T, shape, grad_y.device)
    num_sums = 2 if gamma is None and bias is None else 4
    sums = torch.empty(num_sums, programs, C, dtype=mean.dtype, device=grad_y.device)  # one sum per vector, in order
    of_norm = (grad_h, grad_y, y, h, next_position, mean, rstd, weight, norm_bias)
    of_scatter = (residual, position, scale, gamma, bias)
    with torch.cuda.device_of(grad_y):
        scatter_gather_norm_backward[(programs,)](
            *of_norm, *of_scatter, dx, dresidual, sums, T, **shape, maxnreg=registers
        )
    totals = sums.sum(dim=1).unbind()
    nothing = torch.empty(0, dtype=mean.dtype, device=grad_y.device)
    dgamma = nothing if gamma is None else totals[2]
    dbias = nothing if bias is None else totals[3]
    return dx, totals[0], totals[1], dresidual, dgamma, dbias


class _Table(NamedTuple):
    """Table of all draws and runs for the kernel that draws.

    Attributes:
        numbers: [draws * runs, 10] int32; the kernel kept_rows explains the columns.
        num_rows, num_places: sizes of the results.
    """

    numbers: Tensor
    num_rows: int
    num_places: int


@table_cache(maxsize=128)
def _table(counts: tuple[int, ...], lengths: tuple[int, ...], kept: tuple[int, ...], device: torch.device) -> _Table:
    """The table on the device. It is cached, so that later calls copy nothing.

    If these numbers were kernel arguments, Triton would compile a kernel for every pattern of ones and multiples of 16.
    """
    num_runs, S, T = len(counts), sum(counts), sum(map(mul, counts, lengths))
    samples_before, tokens_before = _before(counts), _before(list(map(mul, counts, lengths)))
    table, end_of_rows, end_of_places = [], 0, 0
    for d in range(len(kept) // num_runs if num_runs else 0):
        kept_counts = kept[d * num_runs : (d + 1) * num_runs]
        num_rows = list(map(mul, kept_counts, lengths))
        row_gap, place_gap = -end_of_rows % 4, -end_of_places % 4  # gaps before this draw
        first_row, first_place = end_of_rows + row_gap, end_of_places + place_gap
        end_of_rows, end_of_places = first_row + sum(num_rows), first_place + T
        for r, rows_before in enumerate(_before(num_rows)):
            of_run = counts[r], lengths[r], kept_counts[r], d * S + samples_before[r], tokens_before[r], rows_before
            gaps = (row_gap, place_gap) if r == 0 else (0, 0)
            table.append((*of_run, first_row, first_place, *gaps))
    numbers = torch.tensor(table, dtype=torch.int32, device=device).view(-1, 10)
    return _Table(numbers, end_of_rows, end_of_places)


def _before(sizes: list[int] | tuple[int, ...]) -> list[int]:
    """For each size, the sum of the sizes before it."""
    return list(accumulate([0, *sizes]))[:-1]


def _persistent(rows: int, shape: dict[str, int], device: torch.device) -> tuple[int, int]:
    """Number of programs that walk over the rows at the same time, and the registers of their threads."""
    warps = shape["num_warps"]
    resident = max(1, 12 // warps) * num_multiprocessors(device)
    return max(1, min(triton.cdiv(rows, shape["ROWS"]), resident)), min(168, 2048 // warps)


@lru_cache
def _shape_of_rows(C: int, dtype: torch.dtype, share: int = 1) -> dict[str, int]:
    """Tile of programs that hold whole rows: a thread has up to 24 / share numbers of a tensor in its registers.

    It has up to 16 / share if a piece spans two warps, because the sums of a row then take registers too.
    """
    width, pieces = _cut(C)
    rows = _num_rows(C, dtype, width * pieces, (3072 if width <= 256 else 2048) // share)
    numbers = share * width * pieces * (2 if dtype == torch.float64 else 1)
    warps = min(16, max(4, triton.next_power_of_2(numbers // 768)))
    return {"C": C, "WIDTH": width, "PIECES": pieces, "ROWS": rows, "num_warps": warps}


@lru_cache
def _shape_of_pieces(C: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of programs that work on one piece of some rows: a thread has 16 numbers of a tensor in its registers."""
    width, pieces = _cut(C)
    return {"C": C, "WIDTH": width, "PIECES": pieces, "ROWS": _num_rows(C, dtype, width, 2048), "num_warps": 4}


def _num_rows(C: int, dtype: torch.dtype, length: int, numbers: int) -> int:
    """Number of rows of a length, a power of two, that together have this many numbers.

    There are a quarter as many rows in float64, and half as many if C leaves rows unaligned, because then every number
    has its own address.
    """
    numbers //= (4 if dtype == torch.float64 else 1) * (2 if C % 8 else 1)
    return 1 << max(1, numbers // length).bit_length() - 1


def _cut(C: int) -> tuple[int, int]:
    """Width and number of the pieces of a row; only the last piece may reach past its end."""
    power = max(64, triton.next_power_of_2(C))
    width = power // (8 if 5 * power >= 8 * C else 4)
    return width, triton.cdiv(C, width)
