"""Forward attention in Triton: one kernel for sequences whose keys stay on the chip, one for longer sequences.

Scores are in units of log 2, so that the exponential is exp2, one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dinov2_kernels.attention.triton_tiles import (
    LN2,
    LOG2E,
    TAIL,
    add_product,
    add_transposed_product,
    find_block,
    find_sequence,
    inner_products,
    load_parts,
    load_tile,
    scale_rows,
    store_tile,
    total,
    transpose,
    transposed_zeros_like,
    zeros_like,
)


@triton.jit(do_not_specialize=["start", "length", "blocks", "T"])
def forward_resident(
    q, k, v, out, lse,
    table, start: tl.int64, length: tl.int32, blocks: tl.int32,
    token_stride, head_stride, T, H, scale,
    D: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """A program takes one sequence of at most sum(PARTS) tokens and one head.

    All keys and values are read once and stay in shared memory. A block of queries has all of its scores at once, so
    the softmax needs no running maximum. With a tail of 16, 257 keys cost 272.
    """
    program = tl.program_id(0)
    head = program % H
    first, length = find_sequence(program // H, table, start, length)
    q += first * token_stride + head.to(tl.int64) * head_stride
    k += first * token_stride + head.to(tl.int64) * head_stride
    v += first * token_stride + head.to(tl.int64) * head_stride
    out += (first * H + head) * D
    lse += head.to(tl.int64) * T + first

    keys = load_parts(k, length, token_stride, PARTS, D)
    values = load_parts(v, length, token_stride, PARTS, D)
    if total(PARTS) <= QUERIES:
        _attend(q, out, lse, token_stride, H, 0, length, scale, keys, values, D, PARTS, QUERIES)
    else:
        # A rest of few queries, the class and register tokens, gets a block of its size.
        rest = length % QUERIES
        whole = tl.where(rest > TAIL, length, length - rest)
        for first_row in range(0, whole, QUERIES):
            _attend(q, out, lse, token_stride, H, first_row, length, scale, keys, values, D, PARTS, QUERIES)
        if whole < length:
            _attend_few(q, out, lse, token_stride, H, whole, length, scale, keys, values, D, PARTS, TAIL)


@triton.jit
def _attend(
    q, out, lse, token_stride, H, first_row, length, scale, keys, values,
    D: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """A block of queries: all of its scores at once."""
    row = first_row + tl.arange(0, QUERIES)
    queries = load_tile(q, first_row, length, token_stride, QUERIES, D, True)
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    scores = ()
    for i in tl.static_range(len(PARTS)):
        part = inner_products(queries, keys[i]) * (scale * LOG2E)  # [QUERIES, PARTS[i]]
        if i == len(PARTS) - 1:
            there = total(PARTS, i) + tl.arange(0, PARTS[i]) < length
            part = tl.where(there[None, :], part, float("-inf"))
        maximum = tl.maximum(maximum, tl.max(part, 1))
        scores += (part,)
    norm = tl.zeros([QUERIES], tl.float32)
    attended = zeros_like(queries, QUERIES)
    for i in tl.static_range(len(PARTS)):
        p = tl.exp2(scores[i] - maximum[:, None])
        norm += tl.sum(p, 1)
        attended = add_product(p.to(queries[0].dtype), values[i], attended)
    store_tile(out, first_row, length, H * D, scale_rows(attended, 1 / norm), D)
    tl.store(lse + row, (maximum + tl.log2(norm)) * LN2, mask=row < length)


@triton.jit
def _attend_few(
    q, out, lse, token_stride, H, first_row, length, scale, keys, values,
    D: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """The same for fewer than 64 queries, transposed, because Hopper's matrix instructions need 64 rows on the left."""
    row = first_row + tl.arange(0, QUERIES)
    queries = load_tile(q, first_row, length, token_stride, QUERIES, D, True)
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    scores = ()
    for i in tl.static_range(len(PARTS)):
        part = inner_products(keys[i], queries) * (scale * LOG2E)  # [PARTS[i], QUERIES]
        if i == len(PARTS) - 1:
            there = total(PARTS, i) + tl.arange(0, PARTS[i]) < length
            part = tl.where(there[:, None], part, float("-inf"))
        maximum = tl.maximum(maximum, tl.max(part, 0))
        scores += (part,)
    norm = tl.zeros([QUERIES], tl.float32)
    attended = transposed_zeros_like(queries, QUERIES)
    for i in tl.static_range(len(PARTS)):
        p = tl.exp2(scores[i] - maximum[None, :])
        norm += tl.sum(p, 0)
        attended = add_transposed_product(values[i], p.to(queries[0].dtype), attended)
    store_tile(out, first_row, length, H * D, scale_rows(transpose(attended), 1 / norm), D)
    tl.store(lse + row, (maximum + tl.log2(norm)) * LN2, mask=row < length)


@triton.jit(do_not_specialize=["start", "length", "blocks", "T"])
def forward_streaming(
    q, k, v, out, lse,
    table, start: tl.int64, length: tl.int32, blocks: tl.int32,
    token_stride, head_stride, T, H, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """A program takes one block of queries of one sequence and head, and loops over keys with a running maximum."""
    program = tl.program_id(0)
    head = program % H
    first, length, first_row = find_block(program // H, table, start, length, blocks, QUERIES, OFFSETS)
    if first_row >= length:
        return
    q += first * token_stride + head.to(tl.int64) * head_stride
    k += first * token_stride + head.to(tl.int64) * head_stride
    v += first * token_stride + head.to(tl.int64) * head_stride
    out += (first * H + head) * D
    lse += head.to(tl.int64) * T + first

    row = first_row + tl.arange(0, QUERIES)
    queries = load_tile(q, first_row, length, token_stride, QUERIES, D, True)
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    norm = tl.zeros([QUERIES], tl.float32)
    attended = zeros_like(queries, QUERIES)
    rest = length % KEYS
    for key in range(0, length - rest, KEYS):
        maximum, norm, attended = _attend_more(
            queries, k, v, token_stride, key, length, scale, maximum, norm, attended, D, KEYS, False
        )
    if rest > 0:
        maximum, norm, attended = _attend_more(
            queries, k, v, token_stride, length - rest, length, scale, maximum, norm, attended, D, KEYS, True
        )
    store_tile(out, first_row, length, H * D, scale_rows(attended, 1 / norm), D)
    tl.store(lse + row, (maximum + tl.log2(norm)) * LN2, mask=row < length)


@triton.jit
def _attend_more(
    queries, k, v, token_stride, first_key, length, scale, maximum, norm, attended,
    D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    key = first_key + tl.arange(0, KEYS)
    keys = load_tile(k, first_key, length, token_stride, KEYS, D, MASKED)
    scores = inner_products(queries, keys) * (scale * LOG2E)  # [QUERIES, KEYS]
    if MASKED:
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
    larger = tl.maximum(maximum, tl.max(scores, 1))
    p = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(maximum - larger)
    values = load_tile(v, first_key, length, token_stride, KEYS, D, MASKED)
    attended = add_product(p.to(values[0].dtype), values, scale_rows(attended, shrink))
    return larger, norm * shrink + tl.sum(p, 1), attended
