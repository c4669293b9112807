"""The draw of kept samples in Triton: ``residual_kept_rows`` of :mod:`dinov2_kernels.residual.reference`."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_kernels._tables import table_cache


def residual_kept_rows(keys: Tensor, runs: list[int], kept: list[int]) -> tuple[Tensor, Tensor]:
    """rows [t] and position [T] of the samples that have the smallest keys [S] of their runs; keys lie in [0, 1).

    One launch. Every program finds the largest key that its run keeps, and then writes a few tokens of each sample.
    Bytes: 4 (t + T), and the keys of a run for each of its programs, from L2.
    """
    counts, lengths = runs[::2], runs[1::2]
    rows = torch.empty(sum(map(mul, kept, lengths)), dtype=torch.int32, device=keys.device)  # [t]
    position = torch.empty(sum(map(mul, counts, lengths)), dtype=torch.int32, device=keys.device)  # [T]
    if position.numel() == 0:
        return rows, position
    samples = triton.next_power_of_2(max(counts))
    tokens = min(16, max(1, 4096 // samples))  # of each sample, in one program
    grid = (triton.cdiv(max(lengths), tokens), len(counts))
    warps = min(16, max(4, samples // 512))
    with torch.cuda.device_of(keys):
        table = _run_table(tuple(counts), tuple(lengths), tuple(kept), keys.device)
        _kept_rows[grid](keys, table, rows, position, SAMPLES=samples, TOKENS=tokens, num_warps=warps)
    return rows, position


@table_cache(maxsize=128)
def _run_table(
    counts: tuple[int, ...], lengths: tuple[int, ...], kept: tuple[int, ...], device: torch.device
) -> Tensor:
    """[runs, 6] int32: count, length, kept samples, and how many samples, tokens and kept tokens the runs before have.

    On the device from the first call on, so that later ones copy nothing; numbers given to Triton by value would make
    it compile a kernel for every pattern of ones and multiples of 16 among them.
    """
    sizes = counts, map(mul, counts, lengths), map(mul, kept, lengths)
    before = (accumulate([0, *size][:-1]) for size in sizes)
    return torch.tensor(list(zip(counts, lengths, kept, *before, strict=True)), dtype=torch.int32, device=device)


@triton.jit
def _kept_rows(keys, table, rows, position, SAMPLES: tl.constexpr, TOKENS: tl.constexpr):
    run = table + 6 * tl.program_id(1)
    count, length, num_kept = tl.load(run), tl.load(run + 1), tl.load(run + 2)
    first_sample, first_token, first_row = tl.load(run + 3), tl.load(run + 4), tl.load(run + 5)
    sample = tl.arange(0, SAMPLES)
    key = tl.load(keys + first_sample + sample, mask=sample < count, other=float("inf"))
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
    row = (first_row + place * length)[:, None] + offset[None, :]
    token = (first_token + sample * length)[:, None] + offset[None, :]
    tl.store(rows + row, token, mask=inside & kept[:, None])
    tl.store(position + token, tl.where(kept[:, None], row, -1), mask=inside)
