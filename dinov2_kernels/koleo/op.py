"""KoLeo and nearest neighbours as users call them: argument checks, precision, several processes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_kernels.koleo import reference


def koleo_loss(x: Tensor, *, eps: float = 1e-8, group: dist.ProcessGroup | None = None) -> Tensor:
    """KoLeo regulariser of DINOv2 (arXiv:2304.07193, section 4): minus the mean log distance to the nearest neighbour.

    The rows are scaled to unit length and each is pushed away from the nearest other one; see
    :mod:`dinov2_kernels.koleo.reference` for the formula. The arithmetic is float32 (float64 for float64 rows) whatever
    the dtype of ``x`` and inside autocast too: in float16 ``eps`` would round to zero and two equal rows give an
    infinite loss; here they give a finite one, and so do rows of zeros.

    Bytes: a few passes over x and the cosines [B, N] with N the rows of all processes.

    Args:
        x: [B, D] with B >= 1; any floating dtype. A single row is its own neighbour: its loss is the constant
            -log(eps * (sqrt(D) + 1)), its gradient zero.
        eps: guards the normalisation, the distance and the logarithm.
        group: processes whose rows form one batch, B rows on each; neighbours are found among all of them and
            gradients flow between processes. The loss is the mean over this process's rows: the mean of it over the
            processes is the loss of the whole batch. None means the rows of this process alone.

    Returns:
        Scalar, float32 (float64 for float64 rows).

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check(x)
    if not eps > 0:
        raise ValueError(f"eps: expected a number above 0, got {eps}")
    with _autocast_disabled(x.device.type):
        rows = reference.unit_rows(x, eps)
        candidates, first = _gather(rows, group)
        return reference.koleo_loss(rows, candidates, first, eps)


def nearest_neighbors(x: Tensor, k: int = 1, *, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """The k other rows with the largest cosine to each row, by exhaustive search and without gradient.

    Bytes: the rows once more in float32 and the cosines [B, N] with N the rows of all processes.

    Args:
        x: [B, D]; any floating dtype. The arithmetic is float32 (float64 for float64 rows), inside autocast too.
        k: neighbours per row, from 1 to N - 1. A row is no neighbour of itself, equal rows are.
        group: processes whose rows form one batch, B rows on each; None means the rows of this process alone.

    Returns:
        index: [B, k] int64, nearest first; in a group, row i of process r is number r * B + i.
        cosine: [B, k] float32 (float64 for float64 rows); 0 where a row is zero.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check(x)
    with torch.no_grad(), _autocast_disabled(x.device.type):
        rows = reference.unit_rows(x)
        candidates, first = _gather(rows, group)
        if not 1 <= k < len(candidates):
            raise ValueError(f"k: expected 1 to {len(candidates) - 1} neighbours of {len(candidates)} rows, got {k}")
        return reference.nearest_neighbors(rows, candidates, k, first)


def _autocast_disabled(device_type: str) -> AbstractContextManager[object]:
    """Keeps the product of float32 rows in float32; the meta device knows no autocast."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _gather(rows: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """Rows of all processes [N, D], differentiable, and the number of this process's first row among them."""
    if group is None:
        return rows, 0
    return _AllGather.apply(rows, group), dist.get_rank(group) * len(rows)  # type: ignore[no-untyped-call]


class _AllGather(torch.autograd.Function):
    """Concatenates the rows [B, D] of all processes; each row's gradient is the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty(dist.get_world_size(group), *rows.shape)  # [processes, B, D]
        dist.all_gather(list(gathered), rows.contiguous(), group=group)
        return gathered.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].unflatten(0, (dist.get_world_size(ctx.group), -1)).clone()  # [processes, B, D]
        dist.all_reduce(gradient, group=ctx.group)  # not reduce-scatter, which not every backend has
        return gradient[dist.get_rank(ctx.group)], None


def _check(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.dim() != 2 or x.shape[0] == 0:
        raise ValueError(f"x: expected shape [B, D] with B >= 1, got {list(x.shape)}")
