"""Attention within each sequence of a packed tensor: the definition every kernel is tested against.

For the tokens of one sequence and each head (Vaswani et al., arXiv:1706.03762, equation 1):

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j

Tokens of different sequences do not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """q, k, v: [T, H, D] with T = sum(lengths); returns [T, H, D]."""
    sequences = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([attention(*sequence, scale) for sequence in sequences])


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One sequence: q, k, v [N, H, D]; returns [N, H, D]."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale  # [H, N, N]
    return torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), v)
