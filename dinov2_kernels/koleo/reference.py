"""KoLeo in plain PyTorch: the definition every kernel is tested against.

The Kozachenko-Leonenko estimate of differential entropy, as a regulariser (Sablayrolles et al., arXiv:1806.03198) that
spreads samples over the unit sphere: with rows x_i scaled to unit length and x_j the nearest other row,

    loss = -1/B sum_i log(||x_i - x_j + eps|| + eps)

The neighbour is chosen by cosine and without gradient; the distance passes its gradient to both ends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_rows(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Rows of x [B, D] scaled to unit length, in float64 for float64 and in float32 otherwise; zero rows stay zero."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1, eps=eps)


@torch.no_grad()
def nearest_neighbors(x: Tensor, candidates: Tensor, k: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Indices [B, k] and cosines [B, k] of the candidates [N, D] nearest to each row of x [B, D], nearest first.

    Both hold unit rows, and row i of x is candidate ``first + i``, which is no neighbour of itself: it comes last, with
    cosine -inf.
    """
    cosine = x @ candidates.T  # [B, N]
    cosine.diagonal(offset=first).fill_(-torch.inf)
    nearest = cosine.topk(k, dim=1)
    return nearest.indices, nearest.values


def koleo_loss(x: Tensor, candidates: Tensor, first: int = 0, eps: float = 1e-8) -> Tensor:
    """KoLeo of unit rows x [B, D] among the candidates [N, D], of which row i of x is number ``first + i``."""
    index, _ = nearest_neighbors(x, candidates, 1, first)
    distance = torch.linalg.vector_norm(x - candidates[index[:, 0]] + eps, dim=1)  # [B]
    return -torch.log(distance + eps).mean()
