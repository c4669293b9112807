"""Attention within each sequence of a packed tensor: the definition every kernel is tested against.

For the tokens of one sequence and each head (Vaswani et al., arXiv:1706.03762, equation 1):

    s_ij = scale * q_i . k_j    lse_i = log sum_j exp(s_ij)    p_ij = exp(s_ij - lse_i)    o_i = sum_j p_ij v_j

and, with the gradient g_i of o_i and delta_i = g_i . o_i,

    dv_j = sum_i p_ij g_i       ds_ij = p_ij (g_i . v_j - delta_i)
    dq_i = scale * sum_j ds_ij k_j        dk_j = scale * sum_i ds_ij q_i

Tokens of different sequences do not see each other. Arithmetic is float32, or float64 for float64 tokens.

Legend: T tokens, H heads of width D; a run is S sequences of N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, runs: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """The result [T, H, D] and lse [H, T], float32 or float64, from q, k, v [T, H, D].

    cu_seqlens [S + 1] describes the sequences; if it is None, runs (count, length, count, length, ...) do.
    """
    out = [q.new_empty(0, *q.shape[1:])]  # [T, H, D], run by run
    lse = [q.new_empty(q.shape[1], 0, dtype=accumulation_dtype(q))]  # [H, T]
    for tokens, count in split_into_runs(cu_seqlens, runs):
        q_run, k_run, v_run = (_widen(x[tokens], count) for x in (q, k, v))  # [S, H, N, D] each
        scores = q_run @ k_run.transpose(2, 3) * scale  # [S, H, N, N]
        out.append(_tokens(scores.softmax(dim=-1) @ v_run).to(q.dtype))
        lse.append(scores.logsumexp(dim=-1).transpose(0, 1).flatten(1))
    return torch.cat(out), torch.cat(lse, dim=1)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    runs: Sequence[int],
    scale: float,
) -> Tensor:
    """Gradients [T, 3, H, D] of q, k and v from grad [T, H, D], the gradient of the result."""
    dqkv = [q.new_empty(0, 3, *q.shape[1:])]  # [T, 3, H, D], run by run
    for tokens, count in split_into_runs(cu_seqlens, runs):
        g, q_run, k_run, v_run, o = (_widen(x[tokens], count) for x in (grad, q, k, v, out))  # [S, H, N, D] each
        p = (q_run @ k_run.transpose(2, 3) * scale).softmax(dim=-1)  # [S, H, N, N]
        delta = (g * o).sum(dim=-1, keepdim=True)  # [S, H, N, 1]
        ds = p * (g @ v_run.transpose(2, 3) - delta) * scale  # [S, H, N, N]
        dq, dk, dv = ds @ k_run, ds.transpose(2, 3) @ q_run, p.transpose(2, 3) @ g  # [S, H, N, D] each
        dqkv.append(torch.stack([_tokens(dq), _tokens(dk), _tokens(dv)], dim=1).to(q.dtype))
    return torch.cat(dqkv)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """The result alone, in differentiable PyTorch: q, k, v [T, H, D] with T = sum(lengths); returns [T, H, D]."""
    sequences = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([attention(*sequence, scale) for sequence in sequences])


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One sequence: q, k, v [N, H, D]; returns [N, H, D]."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale  # [H, N, N]
    return torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), v)


def split_into_runs(cu_seqlens: Tensor | None, runs: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """For each run with tokens: its tokens, and its number of sequences. Offsets describe runs of one sequence."""
    if cu_seqlens is not None:
        pairs = [(1, end - start) for start, end in pairwise(cu_seqlens.tolist())]
    else:
        pairs = list(zip(runs[::2], runs[1::2], strict=True))
    start = 0
    for count, length in pairs:
        if count * length:
            yield slice(start, start + count * length), count
        start += count * length


def _widen(x: Tensor, count: int) -> Tensor:
    """The sequences [S, H, N, D] of a run [S * N, H, D], in the dtype of arithmetic."""
    return x.to(accumulation_dtype(x)).reshape(count, -1, *x.shape[1:]).transpose(1, 2)


def _tokens(sequences: Tensor) -> Tensor:
    """The tokens [S * N, H, D] of sequences [S, H, N, D]."""
    _, H, _, D = sequences.shape
    return sequences.transpose(1, 2).reshape(-1, H, D)
