"""Stochastic depth over a packed batch: the definition every kernel is tested against.

A run has n samples. A set K of them, the kept samples, goes through the residual branch f (DINOv2, arXiv:2304.07193,
section 5, after Huang et al., arXiv:1603.09382):

    y_i = x_i + n / |K| * gamma * f(norm(x_i))    for i in K
    y_i = x_i                                     otherwise

so that the expectation over a uniformly drawn K is the plain residual connection. There are four steps: draw the kept
rows, gather them with a LayerNorm (Ba et al., arXiv:1607.06450), run the branch, and scatter its scaled result. The
operators below define them, except for the branch.

Legend: T tokens of width C, t of them kept; rows [t] int32 are the kept tokens in x; position [T] int32 is the index of
a token among the kept ones, or -1; if rows and position are None, all tokens are kept. S is the number of samples.
Statistics, sums and weights' gradients are float32, or float64 for float64 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype
from dinov2_kernels.packing import PackedLayout

Branch = Callable[[Tensor, PackedLayout], Tensor]


def stochastic_depth(
    x: Tensor,
    layout: PackedLayout,
    branch: Branch,
    kept: Sequence[Sequence[int]],
    gamma: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x: [T, C]; kept: the samples of each run that go through the branch; gamma: [C]; returns [T, C]."""
    sequences = []
    for run, run_kept in zip(layout.unpack(x), kept, strict=True):  # run: [n, N, C]
        for i, sample in enumerate(run):
            if i in run_kept:
                residual = branch(norm(sample) if norm else sample, PackedLayout([(1, len(sample))]))  # [N, C]
                residual = residual if gamma is None else gamma * residual
                sequences.append(sample + len(run) / len(run_kept) * residual)
            else:
                sequences.append(sample)
    return torch.cat(sequences)


def residual_kept_rows(keys: Tensor, runs: Sequence[int], kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """rows [t] and position [T] of every draw, one draw after the other, from keys [draws, S].

    A draw keeps the samples with the smallest keys of each run, in the order of the batch. If two keys are equal, the
    first counts as smaller. ``runs`` are (count, length, count, length, ...); ``kept`` has a number for each draw and
    run. Every draw starts at a multiple of 4 numbers, 16 bytes: rows are padded with 0 and positions with -1.
    """
    num_runs = len(runs) // 2
    draws = [_kept_rows_of_a_draw(keys[d], runs, kept[d * num_runs : (d + 1) * num_runs]) for d in range(len(keys))]
    rows, position = zip(*draws, strict=True)
    return _join(rows, 0), _join(position, -1)


def _join(draws: Sequence[Tensor], fill: int) -> Tensor:
    filled_up = [F.pad(numbers, (0, -len(numbers) % 4), value=fill) for numbers in draws[:-1]]
    return torch.cat([*filled_up, draws[-1]])


def _kept_rows_of_a_draw(keys: Tensor, runs: Sequence[int], kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    pieces, sample, token = [], 0, 0
    for count, length, num_kept in zip(runs[::2], runs[1::2], kept, strict=True):
        chosen = keys[sample : sample + count].sort(stable=True).indices[:num_kept].sort().values  # [kept]
        tokens = chosen[:, None] * length + torch.arange(length, device=keys.device)  # [kept, N]
        pieces.append(token + tokens.flatten())
        sample, token = sample + count, token + count * length
    rows = torch.cat([keys.new_empty(0, dtype=torch.int64), *pieces])
    position = torch.full((token,), -1, dtype=torch.int32, device=keys.device)
    position[rows] = torch.arange(len(rows), dtype=torch.int32, device=keys.device)
    return rows.to(torch.int32), position


def residual_gather_norm(
    x: Tensor, rows: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm h [t, C] of the kept rows of x [T, C] in ``dtype``, their mean [t] and 1 / standard deviation [t]."""
    kept, weight, bias = _widen(x, x if rows is None else x[rows], weight, bias)
    mean = kept.mean(dim=1)
    rstd = (kept.var(dim=1, correction=0) + eps).rsqrt()
    h = (kept - mean[:, None]) * rstd[:, None]
    h = h if weight is None else h * weight
    h = h if bias is None else h + bias
    return h.to(dtype), mean, rstd


def residual_gather_norm_backward(
    grad_h: Tensor,
    grad_x: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    rows: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [T, C], weight [C] and bias [C] from grad_h [t, C] and grad_x [T, C].

    grad_x is the gradient that x gets from its other uses. The normalised rows are computed again from x. If x is None,
    they are recovered from h, and are 0 for weight 0.
    """
    kept = x if x is None or rows is None else x[rows]
    grad, total, kept, h, weight, bias = _widen(grad_x, grad_h, grad_x, kept, h, weight, bias)
    if kept is not None:
        normed = (kept - mean[:, None]) * rstd[:, None]  # [t, C]
    else:
        normed = h if bias is None else h - bias
        normed = normed if weight is None else torch.where(weight == 0, 0, normed / weight)
    through = grad if weight is None else grad * weight  # [t, C]
    along = (through * normed).mean(dim=1, keepdim=True)
    dx = (through - through.mean(dim=1, keepdim=True) - normed * along) * rstd[:, None]  # [t, C]
    total = total + dx if rows is None else total.index_add(0, rows, dx)
    return total.to(grad_x.dtype), (grad * normed).sum(dim=0), grad.sum(dim=0)


def residual_scatter(
    x: Tensor,
    residual: Tensor,
    position: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """x [T, C] plus scale * gamma * (residual [t, C] + bias) on the kept rows; scale [t], gamma and bias [C]."""
    rows = None if position is None else position.argsort(stable=True)[len(position) - len(residual) :]
    return _scatter(x, residual, rows, scale, gamma, bias)


def residual_scatter_(
    x: Tensor,
    residual: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    bias: Tensor | None,
) -> None:
    """:func:`residual_scatter` in place: overwrites x."""
    x.copy_(_scatter(x, residual, rows, scale, gamma, bias))


def _scatter(
    x: Tensor, residual: Tensor, rows: Tensor | None, scale: Tensor | None, gamma: Tensor | None, bias: Tensor | None
) -> Tensor:
    r, gamma, bias = _widen(x, residual, gamma, bias)
    r = r if bias is None else r + bias
    r = r if gamma is None else r * gamma
    r = r if scale is None else r * scale[:, None]
    return (x + r).to(x.dtype) if rows is None else x.index_copy(0, rows.long(), (x[rows] + r).to(x.dtype))


def residual_scatter_backward(
    grad: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the residual [t, C] in ``dtype``, of gamma [C] and of bias [C] from that of the result [T, C].

    The residual is only needed with a gamma. If gamma or bias is None, its gradient has size 0.
    """
    kept, r, gamma, bias = _widen(grad, grad if rows is None else grad[rows], residual, gamma, bias)
    kept = kept if scale is None else kept * scale[:, None]  # [t, C]
    dresidual = kept if gamma is None else kept * gamma
    nothing = kept.new_empty(0)
    dgamma = nothing if gamma is None else (kept * (r if bias is None else r + bias)).sum(dim=0)
    dbias = nothing if bias is None else dresidual.sum(dim=0)
    return dresidual.to(dtype), dgamma, dbias


def residual_scatter_gather_norm(
    x: Tensor,
    residual: Tensor,
    position: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    bias: Tensor | None,
    next_rows: Tensor | None,
    next_position: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result y [T, C] of :func:`residual_scatter`, and :func:`residual_gather_norm` of y for the next branch.

    The next branch keeps next_rows [t'], whose inverse is next_position [T].
    """
    y = residual_scatter(x, residual, position, scale, gamma, bias)
    return y, *residual_gather_norm(y, next_rows, weight, norm_bias, eps, dtype)


def residual_scatter_gather_norm_backward(
    grad_h: Tensor,
    grad_y: Tensor,
    y: Tensor | None,
    h: Tensor | None,
    next_rows: Tensor | None,
    next_position: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    rows: Tensor | None,
    position: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [T, C], weight, norm_bias [C], residual [t, C] in ``dtype``, gamma and bias [C].

    grad_h [t', C] is the gradient of h, and grad_y [T, C] is the gradient that y gets from its other uses.
    """
    dx, dweight, dnorm_bias = residual_gather_norm_backward(
        grad_h, grad_y, y, h, next_rows, mean, rstd, weight, norm_bias
    )
    return dx, dweight, dnorm_bias, *residual_scatter_backward(dx, residual, rows, scale, gamma, bias, dtype)


def _widen(x: Tensor, *tensors: Tensor | None) -> list[Any]:
    """The tensors in the accumulation dtype of the tokens x; None stays None."""
    return [None if tensor is None else tensor.to(accumulation_dtype(x)) for tensor in tensors]
