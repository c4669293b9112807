"""Backward attention in Triton: one kernel for sequences whose keys stay on the chip, two for longer ones.

No atomics and no float32 copy of a gradient in memory: every gradient is summed in registers, in a fixed order, and
written once. The gradient is one tensor dqkv [T, 3, H, D].

All three are launched with the same arguments. delta [H, T], grad_i . out_i, passes from the second to the third; the
first, which has all it needs in one tile, keeps it to itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dinov2_kernels.attention.triton_tiles import (
    LN2,
    TAIL,
    add_product,
    find_block,
    find_sequence,
    inner_products,
    load_tile,
    row_products,
    scale_tile,
    store_tile,
    zero_tile,
)


@triton.jit(do_not_specialize=["start", "length", "blocks"])
def backward_short(
    grad,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dqkv,
    table,
    start: tl.int64,
    length: tl.int32,
    blocks: tl.int32,
    token_stride,
    head_stride,
    T,
    H,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program takes one sequence of at most ROWS tokens and one head, in one tile: five matrix products, no loop.

    Probabilities are kept transposed, [keys, queries]: two of the products then find their left operand in registers.
    """
    program = tl.program_id(0)
    head = program % H
    first, length = find_sequence(program // H, table, start, length)
    q += first * token_stride + head.to(tl.int64) * head_stride
    k += first * token_stride + head.to(tl.int64) * head_stride
    v += first * token_stride + head.to(tl.int64) * head_stride
    grad += (first * H + head) * D
    out += (first * H + head) * D
    dqkv += (first * 3 * H + head) * D
    lse += head.to(tl.int64) * T + first

    row = tl.arange(0, ROWS)
    queries = load_tile(q, 0, length, token_stride, ROWS, D, True)
    keys = load_tile(k, 0, length, token_stride, ROWS, D, True)
    values = load_tile(v, 0, length, token_stride, ROWS, D, True)
    grads = load_tile(grad, 0, length, H * D, ROWS, D, True)
    norm, row_delta = _load_queries(grads, out, lse, 0, length, H * D, ROWS, D)
    p, ds = _probabilities(keys, queries, values, grads, norm[None, :], row_delta[None, :], scale)  # [keys, queries]
    there = (row < length)[:, None]
    p = tl.where(there, p, 0.0).to(queries[0].dtype)
    ds = tl.where(there, ds, 0.0).to(queries[0].dtype)
    store_tile(dqkv + 2 * H * D, 0, length, 3 * H * D, add_product(p, grads, zero_tile(ROWS, D)), D)
    dk = add_product(ds, queries, zero_tile(ROWS, D))
    store_tile(dqkv + H * D, 0, length, 3 * H * D, scale_tile(dk, scale), D)
    dq = add_product(tl.trans(ds), keys, zero_tile(ROWS, D))
    store_tile(dqkv, 0, length, 3 * H * D, scale_tile(dq, scale), D)


@triton.jit
def _load_queries(grads, out, lse, first, end, row_stride, ROWS: tl.constexpr, D: tl.constexpr):
    """lse in units of log 2, and delta [ROWS]; lse is infinite for a query that is not there: it attends to nothing."""
    row = first + tl.arange(0, ROWS)
    norm = tl.load(lse + row, mask=row < end, other=float("inf")) / LN2
    return norm, row_products(grads, load_tile(out, first, end, row_stride, ROWS, D, True))


@triton.jit
def _probabilities(x, y, gx, gy, norm, delta, scale):
    """p and ds, from queries and keys as x and y, or as y and x; gradients and values as gx and gy alike."""
    p = tl.exp2(inner_products(x, y) * (scale / LN2) - norm)
    return p, p * (inner_products(gx, gy) - delta)


@triton.jit(do_not_specialize=["start", "length", "blocks"])
def backward_queries(
    grad,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dqkv,
    table,
    start: tl.int64,
    length: tl.int32,
    blocks: tl.int32,
    token_stride,
    head_stride,
    T,
    H,
    scale,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """A program takes one block of queries of one sequence and one head; keys stream past. Writes delta [H, T] too."""
    program = tl.program_id(0)
    head = program % H
    first, length, first_row = find_block(program // H, table, start, length, blocks, QUERIES, OFFSETS)
    if first_row >= length:
        return
    q += first * token_stride + head.to(tl.int64) * head_stride
    k += first * token_stride + head.to(tl.int64) * head_stride
    v += first * token_stride + head.to(tl.int64) * head_stride
    grad += (first * H + head) * D
    out += (first * H + head) * D
    dqkv += (first * 3 * H + head) * D
    lse += head.to(tl.int64) * T + first
    delta += head.to(tl.int64) * T + first

    row = first_row + tl.arange(0, QUERIES)
    queries = load_tile(q, first_row, length, token_stride, QUERIES, D, True)
    grads = load_tile(grad, first_row, length, H * D, QUERIES, D, True)
    norm, row_delta = _load_queries(grads, out, lse, first_row, length, H * D, QUERIES, D)
    tl.store(delta + row, row_delta, mask=row < length)
    dq = zero_tile(QUERIES, D)
    rest = length % KEYS
    for key in range(0, length - rest, KEYS):
        dq = _visit_keys(queries, grads, k, v, token_stride, norm, row_delta, dq, key, length, scale, D, KEYS, False)
    if rest > TAIL:
        key = length - rest
        dq = _visit_keys(queries, grads, k, v, token_stride, norm, row_delta, dq, key, length, scale, D, KEYS, True)
    elif rest > 0:
        key = length - rest
        dq = _visit_keys(queries, grads, k, v, token_stride, norm, row_delta, dq, key, length, scale, D, TAIL, True)
    store_tile(dqkv, first_row, length, 3 * H * D, scale_tile(dq, scale), D)


@triton.jit
def _visit_keys(
    queries,
    grads,
    k,
    v,
    token_stride,
    norm,
    delta,
    dq,
    first_key,
    length,
    scale,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    key = first_key + tl.arange(0, KEYS)
    keys = load_tile(k, first_key, length, token_stride, KEYS, D, MASKED)
    values = load_tile(v, first_key, length, token_stride, KEYS, D, MASKED)
    _, ds = _probabilities(queries, keys, grads, values, norm[:, None], delta[:, None], scale)  # [QUERIES, KEYS]
    if MASKED:
        ds = tl.where((key < length)[None, :], ds, 0.0)
    return add_product(ds.to(keys[0].dtype), keys, dq)


@triton.jit(do_not_specialize=["start", "length", "blocks"])
def backward_keys(
    grad,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dqkv,
    table,
    start: tl.int64,
    length: tl.int32,
    blocks: tl.int32,
    token_stride,
    head_stride,
    T,
    H,
    scale,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """A program takes one block of keys of one sequence and one head; queries stream past."""
    program = tl.program_id(0)
    head = program % H
    first, length, first_key = find_block(program // H, table, start, length, blocks, KEYS, OFFSETS)
    if first_key >= length:
        return
    q += first * token_stride + head.to(tl.int64) * head_stride
    k += first * token_stride + head.to(tl.int64) * head_stride
    v += first * token_stride + head.to(tl.int64) * head_stride
    grad += (first * H + head) * D
    dqkv += (first * 3 * H + head) * D
    lse += head.to(tl.int64) * T + first
    delta += head.to(tl.int64) * T + first

    keys = load_tile(k, first_key, length, token_stride, KEYS, D, True)
    values = load_tile(v, first_key, length, token_stride, KEYS, D, True)
    dk = zero_tile(KEYS, D)
    dv = zero_tile(KEYS, D)
    rest = length % QUERIES
    for row in range(0, length - rest, QUERIES):
        dk, dv = _visit_queries(
            keys, values, q, grad, lse, delta, token_stride, H * D, dk, dv, row, length, scale, D, QUERIES, False
        )
    if rest > TAIL:
        row = length - rest
        dk, dv = _visit_queries(
            keys, values, q, grad, lse, delta, token_stride, H * D, dk, dv, row, length, scale, D, QUERIES, True
        )
    elif rest > 0:
        row = length - rest
        dk, dv = _visit_queries(
            keys, values, q, grad, lse, delta, token_stride, H * D, dk, dv, row, length, scale, D, TAIL, True
        )
    store_tile(dqkv + H * D, first_key, length, 3 * H * D, scale_tile(dk, scale), D)
    store_tile(dqkv + 2 * H * D, first_key, length, 3 * H * D, dv, D)


@triton.jit
def _visit_queries(
    keys,
    values,
    q,
    grad,
    lse,
    delta,
    token_stride,
    grad_token,
    dk,
    dv,
    first_row,
    length,
    scale,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    MASKED: tl.constexpr,
):
    row = first_row + tl.arange(0, QUERIES)
    queries = load_tile(q, first_row, length, token_stride, QUERIES, D, MASKED)
    grads = load_tile(grad, first_row, length, grad_token, QUERIES, D, MASKED)
    if MASKED:  # infinity for a query that is not there: it attends to nothing
        norm = tl.load(lse + row, mask=row < length, other=float("inf")) / LN2
        row_delta = tl.load(delta + row, mask=row < length, other=0.0)
    else:
        norm = tl.load(lse + row) / LN2
        row_delta = tl.load(delta + row)
    p, ds = _probabilities(keys, queries, values, grads, norm[None, :], row_delta[None, :], scale)  # [KEYS, QUERIES]
    dv = add_product(p.to(keys[0].dtype), grads, dv)
    return add_product(ds.to(keys[0].dtype), queries, dk), dv
