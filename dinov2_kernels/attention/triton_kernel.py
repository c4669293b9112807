"""Attention in Triton: the two operators of :mod:`dinov2_kernels.attention.reference` for CUDA tensors.

Legend: T tokens, H heads of width D <= 128; q, k, v [T, H, D] in float32, bfloat16 or float16 with a dense last
dimension; grad and out [T, H, D] contiguous; lse [H, T] float32. No atomics: results are the same in every run.

The host chooses kernels and tiles by the lengths of the sequences, once for every layout:

========  ==============================================  ============================================================
tokens    forward                                         backward
========  ==============================================  ============================================================
1..64     one tile                                        one tile, five matrix products
65..272   keys and values resident, full-row softmax      one kernel, two roles, blocks of 64 and a tail of 16
longer    keys stream past 128 queries                    the same kernel, blocks of 128
========  ==============================================  ============================================================

The table is for bfloat16 and float16, heads of up to 64 columns, and Hopper. Elsewhere registers run out earlier, and
tiles are the largest that ptxas does not spill (`python -m tests.aot attention`).

Beyond 64 tokens, the number of a backward program decides its role: it takes a block of queries (dq: three products) or
a block of keys (dk and dv: four). In one launch, the two roles of a sequence share their reads in L2, and memory moves
the minimum, 8 N D e bytes. This costs seven products instead of five. What ptxas reports for sm_90 and 64 columns shows
no other way:

- The gradients of 272 keys and values are 136 KB of float32, over half of a multiprocessor's registers. If they stay
  there for all queries, only one program of eight warps fits, and it still spills 200 bytes per thread and more.
- With a whole sequence in shared memory (86 KB), a role reads it once and not once for every block. The role of queries
  then takes 245 registers, but the role of keys spills 416 bytes, and 1280 if it keeps delta. One program that does
  both in turn spills 628. Neither parts of 32 rows nor eight warps help.
- Two roles in blocks of 64 spill nothing: they take 250 registers and 48 KB, so two programs of four warps share a
  multiprocessor. Steps of 32 take 154, and three programs fit, but matrix instructions of 32 columns wait for shared
  memory.

Both roles compute delta, from a result that is in L2. This costs less than another kernel before them or waiting for
another program. With b blocks per sequence, programs read (3 + 2 b) N D e and (2 + 3 b) N D e bytes, mostly from L2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dinov2_kernels._tables import table_cache
from dinov2_kernels.attention.triton_backward import backward_blocks, backward_short
from dinov2_kernels.attention.triton_forward import forward_resident, forward_streaming

MOST_RUNS = 2  # runs of one tile that get a launch each: for more runs, one launch that reads a table is cheaper


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, runs: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """The result [T, H, D] and lse [H, T]. cu_seqlens [S + 1] describes the sequences; if it is None, runs do.

    Bytes, with e per element: one read of q, k and v and one write of the result, 4 T H D e, and 4 T H for lse. If keys
    and values do not fit on the chip, every block of queries reads them again, mostly from L2.
    """
    T, H, D = q.shape
    q, k, v = _with_equal_strides(q, k, v)
    out = torch.empty((T, H, D), dtype=q.dtype, device=q.device)  # [T, H, D]
    lse = torch.empty((H, T), dtype=torch.float32, device=q.device)  # [H, T]
    token_stride, head_stride, _ = q.stride()
    with torch.cuda.device_of(q):
        for launch in forward_launches(cu_seqlens, runs, q):
            launch.kernel[(launch.programs * H,)](
                q, k, v, out, lse, *launch.sequences, token_stride, head_stride, T, H, scale, **launch.options
            )
    return out, lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, runs: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    """Gradients [T, 3, H, D] of q, k and v from grad [T, H, D], the gradient of the result.

    Bytes, with e per element: 8 T H D e. In sequences of more than 64 tokens, the blocks of a sequence read each other
    again, from L2.
    """
    T, H, D = q.shape
    q, k, v = _with_equal_strides(q, k, v)
    dqkv = torch.empty((T, 3, H, D), dtype=q.dtype, device=q.device)  # [T, 3, H, D]
    tensors = (grad, q, k, v, out, lse, dqkv)
    token_stride, head_stride, _ = q.stride()
    with torch.cuda.device_of(q):
        for launch in backward_launches(cu_seqlens, runs, q):
            launch.kernel[(launch.programs * H,)](
                *tensors, *launch.sequences, token_stride, head_stride, T, H, scale, **launch.options
            )
    return dqkv


def _with_equal_strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with equal strides. Views of one packed tensor and separate tensors have them; others are copied.

    One set of offsets then serves all three tensors, which saves up to a fifth of a kernel's registers.
    """
    if q.stride() == k.stride() == v.stride():
        return q, k, v
    return q.contiguous(), k.contiguous(), v.contiguous()


# ------------------------------------------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class Tile:
    """A kernel and the shape of its blocks.

    Attributes:
        kernel: a Triton kernel.
        shape: names and values of the kernel's constants.
        block: rows of a sequence that one program takes; None for all rows.
        roles: number of programs that share a block.
    """

    kernel: Any
    shape: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int = 2
    block: int | None = None
    roles: int = 1


@dataclass(frozen=True)
class Run:
    """Consecutive sequences of equal length; the first one begins at the token `start`."""

    count: int
    length: int
    start: int


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, the number of its programs for each head, and its arguments.

    Attributes:
        sequences: how a program finds its tokens: table, start, length and blocks of
            :func:`dinov2_kernels.attention.triton_tiles.find_block`.
        options: the kernel's constants and Triton's compile options.
    """

    kernel: Any
    programs: int
    sequences: tuple[Tensor | None, int, int, int]
    options: dict[str, Any]


def forward_tile(length: int | None, D: int, dtype: torch.dtype, hopper: bool) -> Tile:
    """The forward kernel for sequences of this length, or of unknown length if it is None."""
    half, narrow = dtype != torch.float32, D <= 64
    if length is not None:
        for parts in ((16,), (32,), (64,), (64, 16), (128,), (128, 16), (256,), (256, 16)):
            if length <= sum(parts) <= _longest_resident(half, narrow, hopper):
                queries = min(parts[0], 64)
                # A warp takes 16 rows. float32, in three TF32 products, needs more registers and so more warps.
                shape = ("PARTS", parts), ("QUERIES", queries)
                return Tile(forward_resident, shape, queries // 16 if half else 4)
    if not half:
        return _streaming(32, 32, 4) if narrow else _streaming(16, 16, 4)
    if hopper and narrow:
        return _streaming(128, 128, 8) if length else _streaming(64, 64, 4)
    return _streaming(128, 64, 8)


def _longest_resident(half: bool, narrow: bool, hopper: bool) -> int:
    """Number of tokens whose scores fit into registers together with all other values."""
    if not half:
        return 32 if narrow else 16
    if not hopper:
        return 64
    return 272 if narrow else 144


def backward_tile(length: int | None, D: int, dtype: torch.dtype, hopper: bool) -> Tile:
    """The backward kernel for sequences of this length, or of unknown length if it is None."""
    half, narrow = dtype != torch.float32, D <= 64
    if length is not None:
        for rows in (16, 32, 64):
            if length <= rows <= (64 if half else 32 if narrow else 16):
                return Tile(backward_short, (("ROWS", rows),), rows // 16 if half else 4)
    if not half:
        return _blocks(16, 16, 8)
    if not hopper:  # operands pass through registers; a second stage would take more of them for addresses
        if narrow:
            return _blocks(64, 32, 4, num_stages=1)
        return _blocks(64, 16, 4, num_stages=1) if D <= 96 else _blocks(32, 32, 8)
    if narrow:
        return _blocks(128, 64, 8) if length and length > 272 else _blocks(64, 64, 4)
    return _blocks(64, 32, 4) if D <= 96 else _blocks(64, 64, 8)


def _streaming(queries: int, keys: int, num_warps: int) -> Tile:
    shape = ("QUERIES", queries), ("KEYS", keys), ("OFFSETS", False)
    return Tile(forward_streaming, shape, num_warps, block=queries)


def _blocks(block: int, step: int, num_warps: int, num_stages: int = 2) -> Tile:
    shape = ("BLOCK", block), ("STEP", step), ("OFFSETS", False)
    return Tile(backward_blocks, shape, num_warps, num_stages, block, roles=2)


def forward_launches(cu_seqlens: Tensor | None, runs: Sequence[int], q: Tensor) -> Sequence[Launch]:
    """The launches of forward for the sequences of q [T, H, D], which are given as in the operators."""
    if cu_seqlens is None:
        return _launches_for_runs(forward_tile, tuple(runs), q.shape[2], q.dtype, q.device)
    return _launches_for_offsets(forward_tile, cu_seqlens, q)


def backward_launches(cu_seqlens: Tensor | None, runs: Sequence[int], q: Tensor) -> Sequence[Launch]:
    """The launches of backward for the sequences of q [T, H, D]."""
    if cu_seqlens is None:
        return _launches_for_runs(backward_tile, tuple(runs), q.shape[2], q.dtype, q.device)
    return _launches_for_offsets(backward_tile, cu_seqlens, q)


ChooseTile = Callable[[int | None, int, torch.dtype, bool], Tile]


@table_cache(maxsize=256)
def _launches_for_runs(
    choose: ChooseTile, runs: tuple[int, ...], D: int, dtype: torch.dtype, device: torch.device
) -> list[Launch]:
    hopper = _is_hopper(device)
    groups: dict[Tile, list[Run]] = {}
    start = 0
    for count, length in zip(runs[::2], runs[1::2], strict=True):
        if count * length:
            groups.setdefault(choose(length, D, dtype, hopper), []).append(Run(count, length, start))
        start += count * length
    launches = []
    sequences: list[tuple[int, Tensor | None, int, int]]
    for tile, group in groups.items():
        if len(group) <= MOST_RUNS:
            sequences = [(run.count, None, run.start, run.length) for run in group]
        else:
            rows = [(run.start + index * run.length, run.length) for run in group for index in range(run.count)]
            lengths = torch.tensor(rows, dtype=torch.int32, device=device)  # [n, 2]
            sequences = [(len(rows), lengths, 0, max(run.length for run in group))]
        for count, table, start, longest in sequences:
            blocks = -(-longest // tile.block) if tile.block else 1
            launches.append(_launch(tile, count * blocks, (table, start, longest, blocks), D))
    return launches


def _launches_for_offsets(choose: ChooseTile, cu_seqlens: Tensor, q: Tensor) -> list[Launch]:
    """The launch for lengths that only the device knows, with enough programs for the largest number of blocks."""
    T, S, D = q.shape[0], len(cu_seqlens) - 1, q.shape[2]
    if T == 0:
        return []
    tile = _tile_for_any_length(choose, D, q.dtype, q.device)
    return [_launch(tile, T // (tile.block or T) + S, (cu_seqlens, 0, 0, S), D, OFFSETS=True)]


@lru_cache(maxsize=256)
def _tile_for_any_length(choose: ChooseTile, D: int, dtype: torch.dtype, device: torch.device) -> Tile:
    return choose(None, D, dtype, _is_hopper(device))


def _is_hopper(device: torch.device) -> bool:
    """Whether matrix instructions read operands from shared memory, as in Hopper and its data-centre successor.

    Then registers and shared memory allow larger tiles. Triton's interpreter, on a CPU, takes the same tiles.
    """
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _launch(tile: Tile, blocks: int, sequences: tuple[Tensor | None, int, int, int], D: int, **options: Any) -> Launch:
    options = {"D": D, **dict(tile.shape), "num_warps": tile.num_warps, "num_stages": tile.num_stages, **options}
    return Launch(tile.kernel, tile.roles * blocks, sequences, options)
