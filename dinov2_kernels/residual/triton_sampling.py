"""The draw of kept samples in Triton: ``residual_kept_rows`` of :mod:`dinov2_kernels.residual.reference`."""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_kernels._tables import table_cache


def residual_kept_rows(keys: Tensor, runs: list[int], kept: list[int]) -> tuple[Tensor, Tensor]:
    """rows [t] and position [T] of every draw: the samples with the smallest keys [draws, S] of their runs.

    Keys lie in [0, 1). One launch. Every program finds the largest key that a draw keeps of a run, and then writes a
    few tokens of each sample. Bytes: 4 (t + T) per draw, and the keys of a run for each of its programs, from L2.
    """
    counts, lengths = runs[::2], runs[1::2]
    with torch.cuda.device_of(keys):
        table = _table(tuple(counts), tuple(lengths), tuple(kept), keys.device)
        rows = torch.empty(table.num_rows, dtype=torch.int32, device=keys.device)
        position = torch.empty(table.num_places, dtype=torch.int32, device=keys.device)
        if table.num_places:
            samples = triton.next_power_of_2(max(counts))
            tokens = min(16, max(1, 4096 // samples))  # of each sample, in one program
            grid = (triton.cdiv(max(lengths), tokens), len(kept))
            warps = min(16, max(4, samples // 512))
            _kept_rows[grid](keys, table.numbers, rows, position, SAMPLES=samples, TOKENS=tokens, num_warps=warps)
    return rows, position


class _Table(NamedTuple):
    """Where things are.

    Attributes:
        numbers: [draws * runs, 10] int32; _kept_rows names the columns.
        num_rows, num_places: sizes of the results.
    """

    numbers: Tensor
    num_rows: int
    num_places: int


@table_cache(maxsize=128)
def _table(counts: tuple[int, ...], lengths: tuple[int, ...], kept: tuple[int, ...], device: torch.device) -> _Table:
    """On the device from the first call on, so that later ones copy nothing.

    Numbers given to Triton by value would make it compile a kernel for every pattern of ones and multiples of 16.
    """
    num_runs, S, T = len(counts), sum(counts), sum(map(mul, counts, lengths))
    samples_before, tokens_before = _before(counts), _before(list(map(mul, counts, lengths)))
    table, end_of_rows, end_of_places = [], 0, 0
    for d in range(len(kept) // num_runs if num_runs else 0):
        kept_counts = kept[d * num_runs : (d + 1) * num_runs]
        num_rows = list(map(mul, kept_counts, lengths))
        row_gap, place_gap = -end_of_rows % 4, -end_of_places % 4  # before this draw
        first_row, first_place = end_of_rows + row_gap, end_of_places + place_gap
        end_of_rows, end_of_places = first_row + sum(num_rows), first_place + T
        for r, rows_before in enumerate(_before(num_rows)):
            of_run = counts[r], lengths[r], kept_counts[r], d * S + samples_before[r], tokens_before[r], rows_before
            gaps = (row_gap, place_gap) if r == 0 else (0, 0)
            table.append((*of_run, first_row, first_place, *gaps))
    numbers = torch.tensor(table, dtype=torch.int32, device=device).view(-1, 10)
    return _Table(numbers, end_of_rows, end_of_places)


def _before(sizes: list[int] | tuple[int, ...]) -> list[int]:
    """The sum of what comes before each of the sizes."""
    return list(accumulate([0, *sizes]))[:-1]


@triton.jit
def _kept_rows(keys, table, rows, position, SAMPLES: tl.constexpr, TOKENS: tl.constexpr):
    numbers = table + 10 * tl.program_id(1)
    count, length, num_kept = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)  # of this run and draw
    first_key, first_token, rows_before = tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5)
    rows += tl.load(numbers + 6)  # those of this draw, as are the positions
    position += tl.load(numbers + 7)
    row_gap, place_gap = tl.load(numbers + 8), tl.load(numbers + 9)  # to be filled before them
    sample = tl.arange(0, SAMPLES)
    key = tl.load(keys + first_key + sample, mask=sample < count, other=float("inf"))
    # The bits of numbers that are not negative are ordered as the numbers are.
    BITS: tl.constexpr = 64 if key.dtype == tl.float64 else 32
    bits = key.to(tl.int64, bitcast=True) if BITS == 64 else key.to(tl.float32).to(tl.int32, bitcast=True)
    # The largest key that is kept is the largest number with fewer than num_kept keys below it: found bit by bit.
    one = tl.full([1], 1, bits.dtype)
    last = one - 1
    for bit in range(2, BITS + 1):
        larger = last | (one << (BITS - bit))
        last = tl.where(tl.sum((bits < larger).to(tl.int32)) < num_kept, larger, last)
    below, equal = bits < last, bits == last
    kept = below | (equal & (tl.cumsum(equal.to(tl.int32)) <= num_kept - tl.sum(below.to(tl.int32))))  # [SAMPLES]
    place = tl.cumsum(kept.to(tl.int32)) - 1  # among the kept samples
    offset = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # in a sample
    inside = (sample < count)[:, None] & (offset < length)[None, :]  # [SAMPLES, TOKENS]
    row = (rows_before + place * length)[:, None] + offset[None, :]
    token = (first_token + sample * length)[:, None] + offset[None, :]
    tl.store(rows + row, token, mask=inside & kept[:, None])
    tl.store(position + token, tl.where(kept[:, None], row, -1), mask=inside)
    if tl.program_id(0) == 0:
        gap = 1 + tl.arange(0, 4)
        tl.store(rows - gap, tl.zeros_like(gap), mask=gap <= row_gap)
        tl.store(position - gap, tl.zeros_like(gap) - 1, mask=gap <= place_gap)
