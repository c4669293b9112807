"""Backward attention in Triton: one kernel for sequences that fit into one tile, one for longer sequences.

There are no atomics and no float32 copy of a gradient in memory: every gradient is summed in registers, in a fixed
order, and written once. The gradient is one tensor dqkv [T, 3, H, D]. Both kernels have the same arguments and compute
delta [queries], grad_i . out_i, themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dinov2_kernels.attention.triton_tiles import (
    LOG2E,
    TAIL,
    add_product,
    find_block,
    find_sequence,
    inner_products,
    load_tile,
    row_products,
    scale_tile,
    store_tile,
    zeros_like,
)


@triton.jit(do_not_specialize=["start", "length", "blocks", "T"])
def backward_short(
    grad, q, k, v, out, lse, dqkv,
    table, start: tl.int64, length: tl.int32, blocks: tl.int32,
    token_stride, head_stride, T, H, scale,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program takes one sequence of at most ROWS tokens and one head, in one tile: five matrix products, no loop.

    Probabilities are transposed, [keys, queries]: the left operand of two products is then in registers.
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
    norm, row_delta = _load_queries(grads, out, lse, 0, length, H * D, ROWS, D, True)
    p, ds = _probabilities(keys, queries, values, grads, norm[None, :], row_delta[None, :], scale)  # [keys, queries]
    there = (row < length)[:, None]
    p = tl.where(there, p, 0.0)
    ds = tl.where(there, ds, 0.0)
    if q.dtype.element_ty == tl.float32:  # ds sums to 0 over the keys, so for a single key only rounding error is left
        ds -= p * tl.sum(ds, 0)[None, :]
    p = p.to(queries[0].dtype)
    ds = ds.to(queries[0].dtype)
    store_tile(dqkv + 2 * H * D, 0, length, 3 * H * D, add_product(p, grads, zeros_like(queries, ROWS)), D)
    dk = add_product(ds, queries, zeros_like(queries, ROWS))
    store_tile(dqkv + H * D, 0, length, 3 * H * D, scale_tile(dk, scale), D)
    dq = add_product(tl.trans(ds), keys, zeros_like(queries, ROWS))
    store_tile(dqkv, 0, length, 3 * H * D, scale_tile(dq, scale), D)


@triton.jit
def _load_queries(grads, out, lse, first, end, row_stride, ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """lse in units of log 2, and delta [ROWS]. A row past the end has an infinite lse, so it attends to nothing."""
    delta = row_products(grads, load_tile(out, first, end, row_stride, ROWS, D, MASKED))
    row = first + tl.arange(0, ROWS)
    if MASKED:
        return tl.load(lse + row, mask=row < end, other=float("inf")) * LOG2E, delta
    else:
        return tl.load(lse + row) * LOG2E, delta


@triton.jit
def _probabilities(x, y, gx, gy, norm, delta, scale):
    """p and ds. x and y are queries and keys, gx and gy gradients and values; or both pairs in the other order."""
    p = tl.exp2(inner_products(x, y) * (scale * LOG2E) - norm)
    return p, p * (inner_products(gx, gy) - delta)


@triton.jit(do_not_specialize=["start", "length", "blocks", "T"])
def backward_blocks(
    grad, q, k, v, out, lse, dqkv,
    table, start: tl.int64, length: tl.int32, blocks: tl.int32,
    token_stride, head_stride, T, H, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Two programs share a block of one sequence and one head: one takes its queries, the other its keys.

    Programs of a sequence are neighbours and run at the same time, so they share their reads in L2.
    """
    program = tl.program_id(0)
    takes_keys = program % 2 == 0  # the role that takes longer starts first
    head = program // 2 % H
    first, length, first_row = find_block(program // 2 // H, table, start, length, blocks, BLOCK, OFFSETS)
    if first_row >= length:
        return
    q += first * token_stride + head.to(tl.int64) * head_stride
    k += first * token_stride + head.to(tl.int64) * head_stride
    v += first * token_stride + head.to(tl.int64) * head_stride
    grad += (first * H + head) * D
    out += (first * H + head) * D
    dqkv += (first * 3 * H + head) * D
    lse += head.to(tl.int64) * T + first
    if takes_keys:
        _take_keys(grad, q, k, v, out, lse, dqkv, first_row, length, token_stride, H, scale, D, BLOCK, STEP)
    else:
        _take_queries(grad, q, k, v, out, lse, dqkv, first_row, length, token_stride, H, scale, D, BLOCK, STEP)


@triton.jit
def _take_queries(
    grad, q, k, v, out, lse, dqkv,
    first_row, length, token_stride, H, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries: three products for each block of keys."""
    queries = load_tile(q, first_row, length, token_stride, QUERIES, D, True)
    grads = load_tile(grad, first_row, length, H * D, QUERIES, D, True)
    norm, delta = _load_queries(grads, out, lse, first_row, length, H * D, QUERIES, D, True)
    dq = zeros_like(queries, QUERIES)
    rest = length % KEYS
    for key in range(0, length - rest, KEYS):
        if q.dtype.element_ty == tl.float32:  # an operand's three parts, kept for all steps, would fill the registers
            queries = load_tile(q, first_row, length, token_stride, QUERIES, D, True)
            grads = load_tile(grad, first_row, length, H * D, QUERIES, D, True)
        dq = _visit_keys(queries, grads, k, v, token_stride, norm, delta, dq, key, length, scale, D, KEYS, False)
    if rest > TAIL:
        key = length - rest
        dq = _visit_keys(queries, grads, k, v, token_stride, norm, delta, dq, key, length, scale, D, KEYS, True)
    elif rest > 0:
        key = length - rest
        dq = _visit_keys(queries, grads, k, v, token_stride, norm, delta, dq, key, length, scale, D, TAIL, True)
    store_tile(dqkv, first_row, length, 3 * H * D, scale_tile(dq, scale), D)


@triton.jit
def _visit_keys(
    queries, grads, k, v, token_stride, norm, delta, dq, first_key, length, scale,
    D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    key = first_key + tl.arange(0, KEYS)
    keys = load_tile(k, first_key, length, token_stride, KEYS, D, MASKED)
    values = load_tile(v, first_key, length, token_stride, KEYS, D, MASKED)
    _, ds = _probabilities(queries, keys, grads, values, norm[:, None], delta[:, None], scale)  # [QUERIES, KEYS]
    if MASKED:
        ds = tl.where((key < length)[None, :], ds, 0.0)
    return add_product(_without_rounding(ds, k, length).to(keys[0].dtype), keys, dq)


@triton.jit
def _without_rounding(ds, tokens, length):
    """ds without rounding errors for a single key: its p is always 1, so ds is 0, and float32 would show the error."""
    if tokens.dtype.element_ty == tl.float32:
        return tl.where(length > 1, ds, 0.0)
    else:
        return ds


@triton.jit
def _take_keys(
    grad, q, k, v, out, lse, dqkv,
    first_key, length, token_stride, H, scale,
    D: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys: for each block of queries, four products, and delta again."""
    keys = load_tile(k, first_key, length, token_stride, KEYS, D, True)
    values = load_tile(v, first_key, length, token_stride, KEYS, D, True)
    dk = zeros_like(keys, KEYS)
    dv = zeros_like(keys, KEYS)
    rest = length % QUERIES
    for row in range(0, length - rest, QUERIES):
        if q.dtype.element_ty == tl.float32:  # see _take_queries
            keys = load_tile(k, first_key, length, token_stride, KEYS, D, True)
            values = load_tile(v, first_key, length, token_stride, KEYS, D, True)
        dk, dv = _visit_queries(
            keys, values, q, grad, out, lse, token_stride, H * D, dk, dv, row, length, scale, D, QUERIES, False
        )
    if rest > TAIL:
        row = length - rest
        dk, dv = _visit_queries(
            keys, values, q, grad, out, lse, token_stride, H * D, dk, dv, row, length, scale, D, QUERIES, True
        )
    elif rest > 0:
        row = length - rest
        dk, dv = _visit_queries(
            keys, values, q, grad, out, lse, token_stride, H * D, dk, dv, row, length, scale, D, TAIL, True
        )
    store_tile(dqkv + H * D, first_key, length, 3 * H * D, scale_tile(dk, scale), D)
    store_tile(dqkv + 2 * H * D, first_key, length, 3 * H * D, dv, D)


@triton.jit
def _visit_queries(
    keys, values, q, grad, out, lse, token_stride, grad_token, dk, dv, first_row, length, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    queries = load_tile(q, first_row, length, token_stride, QUERIES, D, MASKED)
    grads = load_tile(grad, first_row, length, grad_token, QUERIES, D, MASKED)
    norm, delta = _load_queries(grads, out, lse, first_row, length, grad_token, QUERIES, D, MASKED)
    p, ds = _probabilities(keys, queries, values, grads, norm[None, :], delta[None, :], scale)  # [KEYS, QUERIES]
    dv = add_product(p.to(keys[0].dtype), grads, dv)
    return add_product(_without_rounding(ds, q, length).to(keys[0].dtype), queries, dk), dv
