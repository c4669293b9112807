"""Which Triton kernel takes which sequences, in which tiles: decided on the host, once for every layout.

========  ==============================================  ============================================================
tokens    forward                                         backward
========  ==============================================  ============================================================
1..64     one tile                                        one tile, five matrix products
65..272   keys and values resident, full-row softmax      two kernels, blocks of 64 and a tail of 16
longer    keys stream past 128 queries                    the same two kernels, blocks of 128
========  ==============================================  ============================================================

The table is for bfloat16 and float16, heads of up to 64 columns, and Hopper. Elsewhere registers run out earlier, and
tiles are the largest that ptxas does not spill (`python -m tests.aot attention`).

Why two kernels take the backward of 65 to 272 tokens, with seven products instead of five: the gradients of 272 keys
and values are 136 KB of float32, over half of a multiprocessor's registers. Kept there while queries pass by, they
leave one program of eight warps that still spills 200 bytes a thread and more; the two kernels as two passes of one
program spill 160. Apart they spill nothing, and two to three programs share a multiprocessor. Of 257 tokens and 64
columns they move 12 instead of 8 N D e bytes, 92 ns of an H200's memory at most, beside 98 ns of its matrix units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dinov2_kernels.attention.triton_backward import backward_keys, backward_queries, backward_short
from dinov2_kernels.attention.triton_forward import forward_resident, forward_streaming

MOST_RUNS = 2  # that one tile takes in launches of their own: more are cheaper as one launch that reads a table


@dataclass(frozen=True)
class Tile:
    """A kernel and the shape of its blocks.

    Attributes:
        kernel: a Triton kernel.
        block: rows of a sequence that one program takes; None: all.
        shape: names and values of the kernel's constants.
    """

    kernel: Any
    block: int | None
    shape: tuple[tuple[str, Any], ...]
    num_warps: int


@dataclass(frozen=True)
class Run:
    """Sequences of equal length, from the token `start` on."""

    count: int
    length: int
    start: int


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, the number of its programs for each head, and its arguments.

    Attributes:
        sequences: how a program finds its tokens: table, start, length and blocks of
            :func:`dinov2_kernels.attention.triton_tiles.find_block`.
        options: the kernel's constants, and how Triton compiles it.
    """

    kernel: Any
    programs: int
    sequences: tuple[Tensor | None, int, int, int]
    options: dict[str, Any]


def forward_tiles(length: int | None, D: int, dtype: torch.dtype, hopper: bool) -> tuple[Tile, ...]:
    """The kernel for sequences of this length, or of any where it is None."""
    half, narrow = dtype != torch.float32, D <= 64
    if length is not None:
        for parts in ((16,), (32,), (64,), (64, 16), (128,), (128, 16), (256,), (256, 16)):
            if length <= sum(parts) <= _longest_resident(half, narrow, hopper):
                queries = min(parts[0], 64)
                # A warp takes 16 rows; float32 in three products of TF32 needs more registers, and so more warps.
                return (_tile(forward_resident, queries // 16 if half else 4, QUERIES=queries, PARTS=parts),)
    if not half:
        return (_streaming(forward_streaming, 32, 32, 4),)
    if hopper and narrow:
        return (_streaming(forward_streaming, 128, 128, 8) if length else _streaming(forward_streaming, 64, 64, 4),)
    return (_streaming(forward_streaming, 128, 64, 8),)


def _longest_resident(half: bool, narrow: bool, hopper: bool) -> int:
    """Tokens whose scores fit into registers beside everything else."""
    if not half:
        return 32
    if not hopper:
        return 64
    return 272 if narrow else 144


def backward_tiles(length: int | None, D: int, dtype: torch.dtype, hopper: bool) -> tuple[Tile, ...]:
    """The kernels for sequences of this length, or of any where it is None, in their order."""
    half, narrow = dtype != torch.float32, D <= 64
    if length is not None:
        for rows in (16, 32, 64) if half else (16, 32):
            if length <= rows:
                return (_tile(backward_short, rows // 16 if half else 4, ROWS=rows),)
    if not half:
        return _streaming(backward_queries, 16, 16, 4), _streaming(backward_keys, 16, 16, 4)
    if not hopper and not narrow:
        return _streaming(backward_queries, 32, 32, 4), _streaming(backward_keys, 32, 32, 4)
    if hopper and narrow and length is not None and length > 272:
        return _streaming(backward_queries, 128, 64, 8), _streaming(backward_keys, 64, 128, 8)
    return _streaming(backward_queries, 64, 64, 4), _streaming(backward_keys, 64, 64, 4 if hopper and narrow else 8)


def _tile(kernel: Any, num_warps: int, *, block: int | None = None, **shape: Any) -> Tile:
    return Tile(kernel, block, tuple(shape.items()), num_warps)


def _streaming(kernel: Any, queries: int, keys: int, num_warps: int) -> Tile:
    block = keys if kernel is backward_keys else queries
    return _tile(kernel, num_warps, block=block, QUERIES=queries, KEYS=keys, OFFSETS=False)


def forward_launches(cu_seqlens: Tensor | None, runs: Sequence[int], q: Tensor) -> Sequence[Launch]:
    """What to launch for sequences of q [T, H, D], given as operators take them."""
    if cu_seqlens is None:
        return _launches_for_runs(forward_tiles, tuple(runs), q.shape[2], q.dtype, q.device)
    return _launches_for_offsets(forward_tiles, cu_seqlens, q)


def backward_launches(cu_seqlens: Tensor | None, runs: Sequence[int], q: Tensor) -> Sequence[Launch]:
    """What to launch for the gradients of sequences of q [T, H, D], in this order."""
    if cu_seqlens is None:
        return _launches_for_runs(backward_tiles, tuple(runs), q.shape[2], q.dtype, q.device)
    return _launches_for_offsets(backward_tiles, cu_seqlens, q)


Tiles = Callable[[int | None, int, torch.dtype, bool], tuple[Tile, ...]]


@lru_cache(maxsize=256)
def _launches_for_runs(
    tiles: Tiles, runs: tuple[int, ...], D: int, dtype: torch.dtype, device: torch.device
) -> list[Launch]:
    hopper = _is_hopper(device)
    groups: dict[tuple[Tile, ...], list[Run]] = {}
    start = 0
    for count, length in zip(runs[::2], runs[1::2], strict=True):
        if count * length:
            groups.setdefault(tiles(length, D, dtype, hopper), []).append(Run(count, length, start))
        start += count * length
    launches = []
    sequences: list[tuple[int, Tensor | None, int, int]]
    for kernels, group in groups.items():
        if len(group) <= MOST_RUNS:
            sequences = [(run.count, None, run.start, run.length) for run in group]
        else:
            rows = [(run.start + index * run.length, run.length) for run in group for index in range(run.count)]
            lengths = torch.tensor(rows, dtype=torch.int32, device=device)  # [n, 2]
            sequences = [(len(rows), lengths, 0, max(run.length for run in group))]
        for count, table, start, longest in sequences:
            for tile in kernels:
                blocks = -(-longest // tile.block) if tile.block else 1
                launches.append(_launch(tile, count * blocks, (table, start, longest, blocks), D))
    return launches


def _launches_for_offsets(tiles: Tiles, cu_seqlens: Tensor, q: Tensor) -> list[Launch]:
    """For lengths that only the device knows: as many programs as there may be blocks."""
    T, S, D = q.shape[0], len(cu_seqlens) - 1, q.shape[2]
    kernels = _tiles_for_any_length(tiles, D, q.dtype, q.device) if T else ()
    sequences = (cu_seqlens, 0, 0, S)
    return [_launch(tile, T // (tile.block or T) + S, sequences, D, OFFSETS=True) for tile in kernels]


@lru_cache(maxsize=256)
def _tiles_for_any_length(tiles: Tiles, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tile, ...]:
    return tiles(None, D, dtype, _is_hopper(device))


def _is_hopper(device: torch.device) -> bool:
    """Whether matrix instructions read operands from shared memory, as in Hopper and its successor for data centres.

    Then registers and shared memory have room for more. The interpreter, on a CPU, takes the same tiles.
    """
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _launch(
    tile: Tile, programs: int, sequences: tuple[Tensor | None, int, int, int], D: int, **options: Any
) -> Launch:
    shape = {"D": D, **dict(tile.shape), "num_warps": tile.num_warps, "num_stages": 2, **options}
    return Launch(tile.kernel, programs, sequences, shape)
