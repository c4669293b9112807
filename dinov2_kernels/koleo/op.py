"""KoLeo and nearest neighbours: three operators, their derivative, and the functions that users call."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype, define, differentiably, needs_gradient, place_in
from dinov2_kernels.koleo import reference

_TRITON = "dinov2_kernels.koleo.triton_kernel"


def _fake_nearest(x: Tensor, k: int, n_groups: int, world_size: int, rank: int, eps: float) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0] // world_size, k)  # [B, k]
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=accumulation_dtype(x))


def _fake_forward(x: Tensor, k: int, n_groups: int, world_size: int, rank: int, eps: float) -> tuple[Tensor, Tensor]:
    index, _ = _fake_nearest(x, k, n_groups, world_size, rank, eps)
    return x.new_empty((), dtype=accumulation_dtype(x)), index


def _fake_backward(grad: Tensor, x: Tensor, index: Tensor, rank: int, eps: float) -> Tensor:
    return x.new_empty(x.shape[0] // grad.numel(), x.shape[1])  # [B, D]


# All tensors contiguous; their shapes stand in reference.py.
_nearest = define(
    "koleo_nearest(Tensor x, int k, int n_groups, int world_size, int rank, float eps) -> (Tensor, Tensor)",
    reference=reference.koleo_nearest,
    fake=_fake_nearest,
    triton=f"{_TRITON}:koleo_nearest",
).call
_forward = define(
    "koleo_forward(Tensor x, int k, int n_groups, int world_size, int rank, float eps) -> (Tensor, Tensor)",
    reference=reference.koleo_forward,
    fake=_fake_forward,
    triton=f"{_TRITON}:koleo_forward",
).call
_backward = define(
    "koleo_backward(Tensor grad, Tensor x, Tensor index, int rank, float eps) -> Tensor",
    reference=reference.koleo_backward,
    fake=_fake_backward,
    triton=f"{_TRITON}:koleo_backward",
).call


def koleo_loss(
    x: Tensor, *, k: int = 1, n_groups: int = 1, eps: float = 1e-8, group: dist.ProcessGroup | None = None
) -> Tensor:
    """KoLeo regulariser of DINOv2 (arXiv:2304.07193, section 4): minus the mean log distance to the nearest neighbour.

    The rows are scaled to unit length and each is pushed away from the nearest other one; see
    :mod:`dinov2_kernels.koleo.reference` for the formula. The arithmetic is float32 (float64 for float64 rows) whatever
    the dtype of ``x`` and inside autocast too: in float16 ``eps`` would round to zero and two equal rows give an
    infinite loss; here they give a finite one, and so do rows of zeros. A row with a NaN makes the loss NaN.

    Bytes: forward reads x, writes and reads a copy of it in float32 on CPU, and keeps x and the indices [B, k] for
    backward, which reads x and writes its gradient. The cosines [B, B] are never written.

    Args:
        x: [B, D] with B >= 1; any floating dtype. A single row is its own neighbour: its loss is the constant
            -log(eps * (sqrt(D) + 1)), its gradient zero. A row shorter than eps gets no gradient either.
        k: neighbours per row, whose logarithms are averaged, as in DINOv3; at most one less than a batch has rows.
        n_groups: the rows are so many equal consecutive blocks, each a batch of its own: neighbours are sought in a
            row's own block only. The loss is the mean over all rows, so ``n_groups * koleo_loss(x, n_groups=n_groups)``
            is the sum of the blocks' losses: of DINOv2's global crops, for example, in one call.
        eps: guards the normalisation, the distance and the logarithm.
        group: processes whose rows form one batch, B rows on each; neighbours are found among all of them and
            gradients flow between processes. Block i of all processes together is one batch. The loss is the mean over
            this process's rows: the mean of it over the processes is the loss of the whole batch. None means the rows
            of this process alone.

    Returns:
        Scalar, float32 (float64 for float64 rows).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Examples:
        >>> spread = torch.eye(4)  # four rows at right angles
        >>> crowded = torch.ones(4, 4) + 0.1 * spread
        >>> koleo_loss(spread).shape
        torch.Size([])
        >>> koleo_loss(spread) < koleo_loss(crowded)
        tensor(True)
    """
    world_size, rank = place_in(group)
    members = _check(x, n_groups, world_size)
    if members == 1 and k != 1:
        raise ValueError(f"k: expected 1 neighbour of a row that is alone: itself, got {k}")
    if members > 1:
        _check_neighbors(k, members)
    if not eps > 0:
        raise ValueError(f"eps: expected a number above 0, got {eps}")
    x = x.contiguous()
    if needs_gradient(x):
        return differentiably(_KoLeo, x, k, n_groups, world_size, rank, eps, group)  # type: ignore[no-any-return]
    loss: Tensor = _forward(_all_gather(x, group), k, n_groups, world_size, rank, eps)[0]
    return loss


@torch.no_grad()
def nearest_neighbors(
    x: Tensor, k: int = 1, *, n_groups: int = 1, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """The k other rows with the largest cosine to each row, by exhaustive search and without gradient.

    Bytes: the rows once more in float32 on CPU, and the result; the cosines [B, B] are never written.

    Args:
        x: [B, D]; any floating dtype. The arithmetic is float32 (float64 for float64 rows), inside autocast too.
        k: neighbours per row, at most one less than a batch has rows. A row is no neighbour of itself, equal rows are.
        n_groups, group: as for :func:`koleo_loss`.

    Returns:
        index: [B, k] int64, nearest first, of equally near ones the lowest index first. It numbers the rows of x, also
            where they are several blocks; in a group, row i of process r is number r * B + i.
        cosine: [B, k] float32 (float64 for float64 rows); 0 where a row is zero. NaN where a row holds one, which is
            farther than any other; its index is in range all the same.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
        >>> index, cosine = nearest_neighbors(x)
        >>> index
        tensor([[2],
                [2],
                [0]])
        >>> cosine.shape
        torch.Size([3, 1])
    """
    world_size, rank = place_in(group)
    members = _check(x, n_groups, world_size)
    _check_neighbors(k, members)
    rows = _all_gather(x.contiguous(), group)
    return _nearest(rows, k, n_groups, world_size, rank, 1e-8)  # type: ignore[no-any-return]


class _KoLeo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        k: int,
        n_groups: int,
        world_size: int,
        rank: int,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        rows = _all_gather(x, group)
        loss: Tensor
        loss, index = _forward(rows, k, n_groups, world_size, rank, eps)
        ctx.save_for_backward(rows, index)
        ctx.rank, ctx.eps, ctx.group = rank, eps, group
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, index = ctx.saved_tensors
        # What reaches a row from the rows of other processes, it computes itself: their indices are fewer bytes than
        # gradients [N, D].
        index, grad = _all_gather(index, ctx.group), _all_gather(grad, ctx.group)
        return _backward(grad, rows, index, ctx.rank, ctx.eps), None, None, None, None, None, None


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x [n, ...] of all processes behind each other; a scalar counts as one row."""
    if group is None:
        return x
    x = x.reshape(-1, *x.shape[1:])
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)  # [processes, n, ...]
    dist.all_gather(list(gathered), x, group=group)
    return gathered.flatten(0, 1)


def _check(x: Tensor, n_groups: int, world_size: int) -> int:
    """Raise an error that names the wrong argument, or return the number of rows in each batch."""
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.dim() != 2 or x.shape[0] == 0:
        raise ValueError(f"x: expected shape [B, D] with B >= 1, got {list(x.shape)}")
    if n_groups < 1 or x.shape[0] % n_groups:
        raise ValueError(f"n_groups: expected a divisor of the {x.shape[0]} rows, got {n_groups}")
    return world_size * x.shape[0] // n_groups


def _check_neighbors(k: int, members: int) -> None:
    if not 1 <= k < members:
        raise ValueError(f"k: expected 1 to {members - 1} neighbours of {members} rows, got {k}")
