"""KoLeo and nearest neighbours: three operators, autograd, and the functions that users call."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_kernels._autograd import KernelFunction, differentiably, in_pytorch, is_beyond_kernels, needs_gradient
from dinov2_kernels._library import accumulation_dtype, contiguous, define, place_in
from dinov2_kernels._numbers import check_above_0, is_whole
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


# All tensors are contiguous; reference.py has their shapes.
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

    The rows are scaled to unit length, and each row is pushed away from its nearest neighbour; see
    :mod:`dinov2_kernels.koleo.reference` for the formula. The arithmetic is float32 (float64 for float64 rows) for
    every dtype of ``x``, and under autocast too: in float16, ``eps`` would round to zero and two equal rows would give
    an infinite loss. Here equal rows and rows of zeros give a finite loss. A row with a NaN makes the loss NaN.

    Bytes: forward reads x, on CPU also writes and reads a copy of it in float32, and keeps x and the indices [B, k] for
    backward. Backward reads x and writes its gradient. The cosines [B, B] are never stored.

    Args:
        x: [B, D] with B >= 1; any floating dtype. A single row is its own neighbour: its loss is the constant
            -log(eps * (sqrt(D) + 1)), and its gradient is zero. A row shorter than eps gets no gradient either.
        k: neighbours per row; the loss averages the logarithms of their distances, as in DINOv3. At most the number of
            rows in a batch minus 1.
        n_groups: number of equal blocks of consecutive rows. Each block is a batch of its own: a row's neighbours are
            in its block. The loss is the mean over all rows, so ``n_groups * koleo_loss(x, n_groups=n_groups)`` is the
            sum of the blocks' losses, for example of both of DINOv2's global crops.
        eps: guards the normalisation, the distance and the logarithm.
        group: processes whose rows form one batch, with B rows on each. Neighbours come from all of them, and
            gradients flow between processes. Block i of all processes together is one batch. The loss is the mean over
            this process's rows; its mean over the processes is the loss of the whole batch. None means the rows of
            this process alone.

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
        raise ValueError(f"k: expected 1, because a single row is its own only neighbour, got {k}")
    if members > 1:
        _check_neighbors(k, members)
    check_above_0("eps", eps)
    x = contiguous(x)
    if needs_gradient(x):
        return differentiably(_KoLeo, x, k, n_groups, world_size, rank, eps, group)  # type: ignore[no-any-return]
    loss: Tensor = _forward(_all_gather(x, group), k, n_groups, world_size, rank, eps)[0]
    return loss


@torch.no_grad()
def nearest_neighbors(
    x: Tensor, k: int = 1, *, n_groups: int = 1, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest neighbours of each row by cosine: exhaustive search, without gradient.

    Bytes: reads the rows, writes the result, and on CPU also a copy of the rows in float32. The cosines [B, B] are
    never stored.

    Args:
        x: [B, D]; any floating dtype. The arithmetic is float32 (float64 for float64 rows), under autocast too.
        k: neighbours per row, at most the number of rows in a batch minus 1. A row is not its own neighbour; an equal
            row is its neighbour.
        n_groups, group: as for :func:`koleo_loss`.

    Returns:
        index: [B, k] int64, the nearest neighbour first; if two are equally near, the lower index first. An index is a
            row number in x, with several blocks too; in a group, row i of process r has number r * B + i.
        cosine: [B, k] float32 (float64 for float64 rows); 0 for a row of zeros. A row with a NaN has cosine NaN and
            counts as the farthest; its index is still in range.

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
    rows = _all_gather(contiguous(x), group)
    return _nearest(rows, k, n_groups, world_size, rank, 1e-8)  # type: ignore[no-any-return]


class _KoLeo(KernelFunction):
    @staticmethod
    def definition(x: Tensor, k: int, n_groups: int, world_size: int, rank: int, eps: float, group: Any) -> Tensor:
        _refuse_group(group)
        return reference.koleo_forward(x, k, n_groups, world_size, rank, eps)[0]

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
        if is_beyond_kernels():
            _refuse_group(ctx.group)
            gradient = in_pytorch(reference.koleo_backward, grad, rows, index, ctx.rank, ctx.eps)
            return gradient, None, None, None, None, None, None
        # Each process computes the whole gradient of its rows, also the part that comes from other processes' losses:
        # their indices are fewer bytes than gradients [N, D].
        index, grad = _all_gather(index, ctx.group), _all_gather(grad, ctx.group)
        return _backward(grad, rows, index, ctx.rank, ctx.eps), None, None, None, None, None, None


def _refuse_group(group: dist.ProcessGroup | None) -> None:
    if group is not None:
        raise NotImplementedError(
            "group: expected None under torch.func, in forward mode and for gradients of gradients, because such "
            "derivatives do not pass between processes, got a process group"
        )


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x [n, ...] of all processes, concatenated; a scalar counts as one row."""
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
    if not is_whole(k) or not 1 <= k < members:
        raise ValueError(f"k: expected 1 to {members - 1} neighbours of {members} rows, got {k!r}")
