"""KoLeo in plain PyTorch: the definition every kernel is tested against.

KoLeo is the Kozachenko-Leonenko estimate of differential entropy, used as a regulariser (Sablayrolles et al.,
arXiv:1806.03198) that spreads samples over the unit sphere: with u_i the rows scaled to unit length and j(i, t) the
t-th nearest other row,

    loss = -1/(B k) sum_i sum_t log(||u_i - u_j(i,t) + eps|| + eps)

DINOv2 takes k = 1, DINOv3 k > 1. Neighbours are chosen by cosine, without gradient: the nearest first, then the lowest
row number first, and NaN last. Both rows of a pair get a gradient from their distance. A row shorter than eps has no
direction, and gets no gradient.

Legend: x [N, D] are the rows of all processes, B = N / world_size of each. The rows of a process are n_groups equal
blocks of consecutive rows. Block g of all processes together is one batch: neighbours are in the same batch. Row i of
process r has number r * B + i. Results are for the rows of one process, `rank`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype, autocast_disabled


def unit_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows [N, D] scaled to unit length, and their lengths [N, 1]; in float64 for float64 and in float32 otherwise."""
    x = x.to(accumulation_dtype(x))
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / length.clamp_min(eps), length


def koleo_nearest(x: Tensor, k: int, n_groups: int, world_size: int, rank: int, eps: float) -> tuple[Tensor, Tensor]:
    """Row numbers [B, k] int64 and cosines [B, k] of the k nearest neighbours of this process's rows, nearest first.

    A row itself comes last, so it is its own neighbour only if it is alone.
    """

    def in_batches(rows: Tensor) -> Tensor:
        """[N, ...] as [n_groups, members, ...]."""
        return rows.view(world_size, n_groups, -1, *rows.shape[1:]).transpose(0, 1).flatten(1, 2)

    unit = in_batches(unit_rows(x, eps)[0])
    number = in_batches(torch.arange(x.shape[0], device=x.device))  # [n_groups, members]
    own = unit.shape[1] // world_size  # rows of this process in each batch
    with autocast_disabled(x.device.type):
        cosine = unit[:, rank * own : (rank + 1) * own] @ unit.mT  # [n_groups, own, members]
    key = cosine.nan_to_num(nan=torch.finfo(cosine.dtype).min)
    key.diagonal(offset=rank * own, dim1=1, dim2=2).fill_(-torch.inf)
    nearest = key.argsort(dim=2, descending=True, stable=True)[..., :k]
    index = number[:, None].expand(cosine.shape).gather(2, nearest)
    return index.flatten(0, 1), cosine.gather(2, nearest).flatten(0, 1)


def koleo_forward(x: Tensor, k: int, n_groups: int, world_size: int, rank: int, eps: float) -> tuple[Tensor, Tensor]:
    """The KoLeo loss of this process's rows, a scalar, and the row numbers [B, k] of their neighbours."""
    index, _ = koleo_nearest(x, k, n_groups, world_size, rank, eps)
    unit, _ = unit_rows(x, eps)
    own = unit.unflatten(0, (world_size, -1))[rank]
    distance = torch.linalg.vector_norm(own[:, None] - unit[index] + eps, dim=2)  # [B, k]
    return -torch.log(distance + eps).mean(), index


def koleo_backward(grad: Tensor, x: Tensor, index: Tensor, rank: int, eps: float) -> Tensor:
    """Gradient [B, D] of the rows of this process, from the distances to their neighbours and from theirs to them.

    ``grad`` holds one scalar for each process, the gradient of its loss; ``index`` [N, k] the neighbours of all rows.
    """
    unit, length = unit_rows(x, eps)
    difference = unit[:, None] - unit[index] + eps  # [N, k, D]
    distance = torch.linalg.vector_norm(difference, dim=2)  # [N, k]
    per_row = grad.reshape(-1, 1).expand(-1, len(x) // grad.numel()).reshape(-1, 1)  # [N, 1]
    slope = -per_row * grad.numel() / index.numel() / (distance * (distance + eps))
    pull = slope.masked_fill(distance == 0, 0)[..., None] * difference  # [N, k, D]
    g = pull.sum(dim=1).index_add(0, index.flatten(), pull.flatten(0, 1), alpha=-1)  # [N, D], of the unit rows
    dx: Tensor = (g - unit * (unit * g).sum(dim=1, keepdim=True)) / length
    return dx.masked_fill(length < eps, 0).to(x.dtype).chunk(grad.numel())[rank].clone()
