"""The Sinkhorn-Knopp step: one operator for one process; for several processes, passes with all-reduces between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype, contiguous, define, place_in
from dinov2_kernels._numbers import check_above_0, is_whole
from dinov2_kernels.sinkhorn import reference

_TRITON = "dinov2_kernels.sinkhorn.triton_kernel"


def _fake_columns(logits: Tensor, temperature: float, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[1], dtype=accumulation_dtype(logits))  # [K]


def _fake_assign(logits: Tensor, temperature: float, bias: Tensor) -> Tensor:
    return torch.empty_like(logits, dtype=bias.dtype)  # [B, K]


_sinkhorn_bias = define(
    "sinkhorn_bias(Tensor logits, float temperature, int n_iterations) -> Tensor",
    reference=reference.sinkhorn_bias,
    fake=_fake_columns,
    triton=f"{_TRITON}:sinkhorn_bias",
).call
_column_logsumexp = define(
    "sinkhorn_column_logsumexp(Tensor logits, float temperature) -> Tensor",
    reference=reference.column_logsumexp,
    fake=_fake_columns,
    triton=f"{_TRITON}:column_logsumexp",
).call
_column_mass = define(
    "sinkhorn_column_mass(Tensor logits, float temperature, Tensor bias) -> Tensor",
    reference=reference.column_mass,
    fake=_fake_columns,
    triton=f"{_TRITON}:column_mass",
).call
_assign = define(
    "sinkhorn_assign(Tensor logits, float temperature, Tensor bias) -> Tensor",
    reference=reference.assign,
    fake=_fake_assign,
    triton=f"{_TRITON}:assign",
).call


@torch.no_grad()
def sinkhorn_bias(
    logits: Tensor, temperature: float, *, n_iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Prototype bias of Sinkhorn-Knopp centring: the targets are ``softmax(logits / temperature + bias)``.

    This is the scaling-vector form of the Sinkhorn-Knopp step of DINOv2 (arXiv:2304.07193) and SwAV (arXiv:2006.09882),
    see :mod:`dinov2_kernels.sinkhorn.reference`. It works in the log domain: any finite logits and any temperature give
    a finite bias, and adding a constant to all logits changes nothing.

    Bytes: ``n_iterations`` reads of the logits and a few vectors [K] and [B]; no [B, K] intermediate. With a process
    group, each iteration reduces one vector [K] over the processes.

    Args:
        logits: [B, K] teacher logits of this process, float64, float32, bfloat16 or float16; K >= 1. B may differ
            between processes and may be 0. Leave out padding rows: ``logits[:n]`` copies nothing.
        temperature: temperature T > 0 of the teacher.
        n_iterations: number of Sinkhorn-Knopp iterations, at least 1.
        group: processes whose rows form one batch; None means the rows of this process alone.

    Returns:
        [K] float32, log u, without gradient. It is zero for a prototype that no row can choose, and for all prototypes
        if the whole batch is empty.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Examples:
        >>> logits = torch.randn(6, 4)  # 6 samples, 4 prototypes
        >>> bias = sinkhorn_bias(logits, 0.5, n_iterations=50)
        >>> bias.shape
        torch.Size([4])
        >>> targets = torch.softmax(logits / 0.5 + bias, dim=1)
        >>> torch.allclose(targets.sum(dim=0), torch.tensor(6 / 4), rtol=1e-3)  # prototypes share the samples equally
        True
    """
    (bias,) = _biases([logits], temperature, n_iterations, group)
    return bias.float()


@torch.no_grad()
def sinkhorn_biases(
    logits: Sequence[Tensor], temperature: float, *, n_iterations: int = 3, group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """:func:`sinkhorn_bias` of several batches at once, which share their reductions over the processes.

    DINOv2 balances class tokens and masked patches separately. Here both together take ``n_iterations`` reductions, not
    twice as many.

    Args:
        logits: tensors [B_i, K_i], each a batch of its own.
        temperature, n_iterations, group: as for :func:`sinkhorn_bias`.

    Returns:
        One bias [K_i] float32 for each batch.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Examples:
        >>> class_tokens, patches = torch.randn(6, 4), torch.randn(20, 4)
        >>> [bias.shape for bias in sinkhorn_biases([class_tokens, patches], 0.07)]
        [torch.Size([4]), torch.Size([4])]
    """
    return [bias.float() for bias in _biases(logits, temperature, n_iterations, group)]


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor, temperature: float, *, n_iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sinkhorn-Knopp assignments of samples to prototypes: ``softmax(logits / temperature + sinkhorn_bias(...))``.

    For training, prefer :func:`sinkhorn_bias` with :func:`soft_cross_entropy`, which never stores the [B, K] result.

    Bytes: those of :func:`sinkhorn_bias`, one more read of the logits and one write of the assignments.

    Args:
        logits, temperature, n_iterations, group: as for :func:`sinkhorn_bias`.

    Returns:
        [B, K] float32 without gradient; every row sums to 1.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Examples:
        >>> assignments = sinkhorn_knopp(torch.randn(6, 4), 0.07)
        >>> assignments.shape
        torch.Size([6, 4])
        >>> torch.allclose(assignments.sum(dim=1), torch.ones(6))
        True
    """
    (bias,) = _biases([logits], temperature, n_iterations, group)
    assignments: Tensor = _assign(contiguous(logits), temperature, bias)
    return assignments.float()


def _biases(
    logits: Sequence[Tensor], temperature: float, n_iterations: int, group: dist.ProcessGroup | None
) -> list[Tensor]:
    for x in logits:
        _check(x, temperature, n_iterations)
    logits = [contiguous(x) for x in logits]
    world_size, _ = place_in(group)
    if world_size == 1:
        return [_sinkhorn_bias(x, temperature, n_iterations) for x in logits]
    return _biases_over(group, logits, temperature, n_iterations)


def _biases_over(
    group: dist.ProcessGroup | None, logits: Sequence[Tensor], temperature: float, n_iterations: int
) -> list[Tensor]:
    """The loop of :func:`reference.sinkhorn_bias` over all processes; all batches share each reduction."""
    widths = [x.shape[1] for x in logits]
    own = torch.cat([_column_logsumexp(x, temperature) for x in logits])  # [sum K_i]
    bias = _zero_if_empty(_logsumexp_over(group, own)).neg_()
    for _ in range(n_iterations - 1):
        pairs = zip(logits, bias.split(widths), strict=True)
        mass = torch.cat([_column_mass(x, temperature, b.to(accumulation_dtype(x))) for x, b in pairs])
        dist.all_reduce(mass, group=group)
        bias -= _zero_if_empty(mass.log_())
    return list(bias.split(widths))


def _zero_if_empty(log_mass: Tensor) -> Tensor:
    """:func:`reference.zero_if_empty` in place, which takes one kernel."""
    return log_mass.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=0.0)


def _logsumexp_over(group: dist.ProcessGroup | None, x: Tensor) -> Tensor:
    """log sum exp of x [K] over the processes of the group.

    Every process gathers one slice of the columns from all processes, combines it, and sends it to all. This moves the
    bytes of one all-reduce; a maximum and a sum would take two.
    """
    world_size, _ = place_in(group)
    slices = torch.nn.functional.pad(x, (0, -len(x) % world_size)).view(world_size, -1)  # [W, K/W]
    gathered = torch.empty_like(slices)
    dist.all_to_all_single(gathered, slices, group=group)
    combined = torch.empty_like(slices)
    dist.all_gather(list(combined), torch.logsumexp(gathered, dim=0), group=group)
    return combined.view(-1)[: len(x)]


def _check(logits: Tensor, temperature: float, n_iterations: int) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected shape [B, K] with K >= 1, got {list(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating-point tensor, got {logits.dtype}")
    check_above_0("temperature", temperature)
    if not is_whole(n_iterations):
        raise ValueError(f"n_iterations: expected a whole number, got {n_iterations!r}")
    if n_iterations < 1:
        raise ValueError(f"n_iterations: expected at least 1, got {n_iterations}")
