"""The two halves of a residual connection, around its branch: gather with LayerNorm, and scaled scatter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dinov2_kernels._autograd import (
    KernelFunction,
    differentiably,
    in_pytorch,
    is_beyond_kernels,
    needs_gradient,
    refuse_beyond_kernels,
)
from dinov2_kernels._library import accumulation_dtype, autocast_dtype, contiguous, define
from dinov2_kernels.residual import reference
from dinov2_kernels.residual.sampling import Subset

_TRITON = "dinov2_kernels.residual.triton_kernel"


def _fake_gather_norm(
    x: Tensor, rows: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    kept = x if rows is None else rows
    statistics = [x.new_empty(kept.shape[0], dtype=accumulation_dtype(x)) for _ in range(2)]  # [t]
    return x.new_empty(kept.shape[0], x.shape[1], dtype=dtype), *statistics


def _fake_gather_norm_backward(grad_h: Tensor, grad_x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    sums = [grad_x.new_empty(grad_x.shape[1], dtype=accumulation_dtype(grad_x)) for _ in range(2)]  # [C]
    return torch.empty_like(grad_x), *sums


def _fake_scatter(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_scatter_(x: Tensor, *_: Any) -> None:
    return None


def _fake_scatter_backward(
    grad: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    kept, C = grad if rows is None else rows, grad.shape[1]
    sums = [grad.new_empty(0 if p is None else C, dtype=accumulation_dtype(grad)) for p in (gamma, bias)]
    return grad.new_empty(kept.shape[0], C, dtype=dtype), *sums


def _fake_scatter_gather_norm(
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
) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *_fake_gather_norm(x, next_rows, weight, norm_bias, eps, dtype)


def _fake_scatter_gather_norm_backward(
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
) -> tuple[Tensor, ...]:
    of_scatter = _fake_scatter_backward(grad_y, residual, rows, scale, gamma, bias, dtype)
    return *_fake_gather_norm_backward(grad_h, grad_y), *of_scatter


# All tensors are contiguous; reference.py has their shapes.
_gather_norm = define(
    "residual_gather_norm(Tensor x, Tensor? rows, Tensor? weight, Tensor? bias, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.residual_gather_norm,
    fake=_fake_gather_norm,
    triton=f"{_TRITON}:residual_gather_norm",
).call
_gather_norm_backward = define(
    "residual_gather_norm_backward(Tensor grad_h, Tensor grad_x, Tensor? x, Tensor? h, Tensor? rows, Tensor mean, "
    "Tensor rstd, Tensor? weight, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    reference=reference.residual_gather_norm_backward,
    fake=_fake_gather_norm_backward,
    triton=f"{_TRITON}:residual_gather_norm_backward",
).call
_scatter = define(
    "residual_scatter(Tensor x, Tensor residual, Tensor? position, Tensor? scale, Tensor? gamma, Tensor? bias) "
    "-> Tensor",
    reference=reference.residual_scatter,
    fake=_fake_scatter,
    triton=f"{_TRITON}:residual_scatter",
).call
_scatter_ = define(
    "residual_scatter_(Tensor(a!) x, Tensor residual, Tensor? rows, Tensor? scale, Tensor? gamma, Tensor? bias) -> ()",
    reference=reference.residual_scatter_,
    fake=_fake_scatter_,
    triton=f"{_TRITON}:residual_scatter_",
).call
_scatter_backward = define(
    "residual_scatter_backward(Tensor grad, Tensor? residual, Tensor? rows, Tensor? scale, Tensor? gamma, "
    "Tensor? bias, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    reference=reference.residual_scatter_backward,
    fake=_fake_scatter_backward,
    triton=f"{_TRITON}:residual_scatter_backward",
).call


_scatter_gather_norm = define(
    "residual_scatter_gather_norm(Tensor x, Tensor residual, Tensor? position, Tensor? scale, Tensor? gamma, "
    "Tensor? bias, Tensor? next_rows, Tensor? next_position, Tensor? weight, Tensor? norm_bias, float eps, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.residual_scatter_gather_norm,
    fake=_fake_scatter_gather_norm,
    triton=f"{_TRITON}:residual_scatter_gather_norm",
).call
_scatter_gather_norm_backward = define(
    "residual_scatter_gather_norm_backward(Tensor grad_h, Tensor grad_y, Tensor? y, Tensor? h, Tensor? next_rows, "
    "Tensor? next_position, Tensor mean, Tensor rstd, Tensor? weight, Tensor? norm_bias, Tensor? residual, "
    "Tensor? rows, Tensor? position, Tensor? scale, Tensor? gamma, Tensor? bias, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.residual_scatter_gather_norm_backward,
    fake=_fake_scatter_gather_norm_backward,
    triton=f"{_TRITON}:residual_scatter_gather_norm_backward",
).call


def gather_norm(
    x: Tensor, subset: Subset, norm: nn.LayerNorm, *, inplace: bool = False, recompute: bool = False
) -> tuple[Tensor, Tensor]:
    """LayerNorm of the kept tokens, and x itself for :func:`scatter_add`.

    The rest of the network uses the second result, so the gradient of x arrives here, and one pass adds the gradient of
    the norm to it. Under autocast, the norm is written directly in autocast's dtype.

    Args:
        x: [T, C] contiguous.
        subset: the kept tokens.
        norm: LayerNorm over C channels.
        inplace: the second result is x itself, which will be overwritten, instead of a view of x.
        recompute: backward recovers the normalised tokens from the result instead of x.

    Returns:
        The normalised tokens [t, C], and x.
    """
    dtype = autocast_dtype(x)
    weight, bias = _contiguous(norm.weight), _contiguous(norm.bias)
    if not needs_gradient(x, weight, bias):
        return _gather_norm(x, subset.rows, weight, bias, norm.eps, dtype)[0], x
    return differentiably(  # type: ignore[no-any-return]
        _GatherNorm, x, subset.rows, weight, bias, norm.eps, dtype, inplace, recompute or inplace
    )


def scatter_add(
    x: Tensor, residual: Tensor, subset: Subset, gamma: Tensor | None, bias: Tensor | None, *, inplace: bool = False
) -> Tensor:
    """x with scale * gamma * (residual + bias) added to the kept tokens.

    Args:
        x: [T, C] contiguous.
        residual: [t, C] result of the branch, in any floating dtype.
        subset: the kept tokens, with their scale.
        gamma: [C] LayerScale.
        bias: [C] bias of the branch's last linear layer, if the branch left it out.
        inplace: overwrite x.

    Returns:
        [T, C] in the dtype of x.
    """
    residual, gamma, bias = contiguous(residual), _contiguous(gamma), _contiguous(bias)
    if needs_gradient(x, residual, gamma, bias):
        return differentiably(  # type: ignore[no-any-return]
            _ScatterAdd, x, residual, subset.rows, subset.position, subset.scale, gamma, bias, inplace
        )
    return _run_scatter(x, residual, subset.rows, subset.position, subset.scale, gamma, bias, inplace)


def scatter_gather_norm(
    x: Tensor,
    residual: Tensor,
    subset: Subset,
    gamma: Tensor | None,
    bias: Tensor | None,
    next_subset: Subset,
    norm: nn.LayerNorm,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`scatter_add`, and :func:`gather_norm` of its result for the next connection, in one pass.

    Args:
        x, residual, subset, gamma, bias: as for :func:`scatter_add`.
        next_subset, norm, recompute: as for :func:`gather_norm`.

    Returns:
        The normalised tokens of the next connection, and the result of the scatter. With ``recompute``, backward does
        not need the latter, so it may be overwritten.
    """
    dtype = autocast_dtype(x)
    residual, gamma, bias = contiguous(residual), _contiguous(gamma), _contiguous(bias)
    weight, norm_bias = _contiguous(norm.weight), _contiguous(norm.bias)
    if needs_gradient(x, residual, gamma, bias, weight, norm_bias):
        return differentiably(  # type: ignore[no-any-return]
            _ScatterGatherNorm,
            x,
            residual,
            *(subset.rows, subset.position, subset.scale),
            gamma,
            bias,
            *(next_subset.rows, next_subset.position),
            weight,
            norm_bias,
            norm.eps,
            dtype,
            recompute,
        )
    y, h, _, _ = _scatter_gather_norm(
        *(x, residual, subset.position, subset.scale, gamma, bias),
        *(next_subset.rows, next_subset.position, weight, norm_bias, norm.eps, dtype),
    )
    return h, y


class _GatherNorm(KernelFunction):
    @staticmethod
    def definition(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *arguments, _, _ = args
        return reference.residual_gather_norm(x, *arguments)[0], x

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        inplace: bool,
        recompute: bool,
    ) -> tuple[Tensor, Tensor]:
        if inplace:
            ctx.mark_dirty(x)
        h, mean, rstd = _gather_norm(x, rows, weight, bias, eps, dtype)
        ctx.save_for_backward(*((None, h) if recompute else (x, None)), rows, mean, rstd, weight, bias)
        ctx.eps = eps
        return h, x

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        x, h, rows, mean, rstd, weight, bias = ctx.saved_tensors
        if is_beyond_kernels(grad_h, grad_x):
            statistics = _recorded_statistics(x, rows, ctx.eps)
            dx, dweight, dbias = in_pytorch(
                reference.residual_gather_norm_backward, grad_h, grad_x, x, None, rows, *statistics, weight, bias
            )
        else:
            dx, dweight, dbias = _gather_norm_backward(
                grad_h.contiguous(), grad_x.contiguous(), x, h, rows, mean, rstd, weight, bias
            )
        return dx, None, _gradient_of(weight, dweight), _gradient_of(bias, dbias), None, None, None, None


class _ScatterAdd(KernelFunction):
    @staticmethod
    def definition(x: Tensor, residual: Tensor, rows: Tensor | None, *args: Any) -> Tensor:
        *arguments, _ = args
        return reference.residual_scatter(x, residual, *arguments)

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        rows: Tensor | None,
        position: Tensor | None,
        scale: Tensor | None,
        gamma: Tensor | None,
        bias: Tensor | None,
        inplace: bool,
    ) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(None if gamma is None else residual, rows, scale, gamma, bias)
        ctx.residual_dtype = residual.dtype
        return _run_scatter(x, residual, rows, position, scale, gamma, bias, inplace)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *_, gamma, bias = saved = ctx.saved_tensors
        if is_beyond_kernels(grad):
            gradients = in_pytorch(reference.residual_scatter_backward, grad, *saved, ctx.residual_dtype)
        else:
            gradients = _scatter_backward(grad.contiguous(), *saved, ctx.residual_dtype)
        dresidual, dgamma, dbias = gradients
        return grad, dresidual, None, None, None, _gradient_of(gamma, dgamma), _gradient_of(bias, dbias), None


class _ScatterGatherNorm(KernelFunction):
    @staticmethod
    def definition(x: Tensor, residual: Tensor, rows: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        *arguments, _ = args
        y, h, _, _ = reference.residual_scatter_gather_norm(x, residual, *arguments)
        return h, y

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        rows: Tensor | None,
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
        recompute: bool,
    ) -> tuple[Tensor, Tensor]:
        y, h, mean, rstd = _scatter_gather_norm(
            x, residual, position, scale, gamma, bias, next_rows, next_position, weight, norm_bias, eps, dtype
        )
        of_norm = (*((None, h) if recompute else (y, None)), next_rows, next_position, mean, rstd, weight, norm_bias)
        ctx.save_for_backward(*of_norm, None if gamma is None else residual, rows, position, scale, gamma, bias)
        ctx.residual_dtype, ctx.eps = residual.dtype, eps
        return h, y

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        y, _, next_rows, next_position, _, _, *rest = saved = ctx.saved_tensors
        weight, norm_bias, *_, gamma, bias = rest
        if is_beyond_kernels(grad_h, grad_y):
            statistics = _recorded_statistics(y, next_rows, ctx.eps)
            gradients = in_pytorch(
                reference.residual_scatter_gather_norm_backward,
                *(grad_h, grad_y, y, None, next_rows, next_position, *statistics, *rest, ctx.residual_dtype),
            )
        else:
            gradients = _scatter_gather_norm_backward(
                grad_h.contiguous(), grad_y.contiguous(), *saved, ctx.residual_dtype
            )
        dx, dweight, dnorm_bias, dresidual, dgamma, dbias = gradients
        of_scatter = (dx, dresidual, None, None, None, _gradient_of(gamma, dgamma), _gradient_of(bias, dbias))
        of_norm = (None, None, _gradient_of(weight, dweight), _gradient_of(norm_bias, dnorm_bias), None, None, None)
        return *of_scatter, *of_norm


def _recorded_statistics(x: Tensor | None, rows: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Mean [t] and 1 / standard deviation [t] of the kept rows, as functions of x that autograd records."""
    if x is None:
        refuse_beyond_kernels("stochastic_depth, residual_chain, Block", "inplace=False and recompute=False")
    _, mean, rstd = in_pytorch(reference.residual_gather_norm, x, rows, None, None, eps, x.dtype)
    return mean, rstd


def _run_scatter(
    x: Tensor,
    residual: Tensor,
    rows: Tensor | None,
    position: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor | None,
    bias: Tensor | None,
    inplace: bool,
) -> Tensor:
    if inplace:
        _scatter_(x, residual, rows, scale, gamma, bias)
        return x
    y: Tensor = _scatter(x, residual, position, scale, gamma, bias)
    return y


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else contiguous(parameter)


def _gradient_of(parameter: Tensor | None, gradient: Tensor) -> Tensor | None:
    return None if parameter is None else gradient.to(parameter.dtype)
