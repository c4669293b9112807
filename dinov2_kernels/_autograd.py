"""Derivatives: the first one in reverse mode runs on kernels, every other one comes from the operator's definition.

==============================================  ================================  =====================================
asked for                                       how an operator notices           what runs
==============================================  ================================  =====================================
gradient (``backward``, ``autograd.grad``)      an input requires a gradient      kernels in both directions
gradient of a gradient (``create_graph=True``)  grad mode is on in backward       backward in plain PyTorch, recorded
many gradients at once (``is_grads_batched``)   a gradient is a batch of them     backward in plain PyTorch
``torch.func``: grad, vmap, jvp, jacrev, ...    forward is under a transform      forward and backward in plain PyTorch
forward mode (``forward_ad.dual_level``)        a dual level is open              forward in plain PyTorch
none, in a trace or a file of ONNX              a recording is active             forward in plain PyTorch
==============================================  ================================  =====================================

So no derivative is silently zero. If backward keeps too little for plain PyTorch, it raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import compiler
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from dinov2_kernels._library import autocast_disabled, is_tracing

_transforms_are_active, _is_tracing = torch._C._are_functorch_transforms_active, torch._C._is_tracing


class KernelFunction(torch.autograd.Function):
    """An autograd function whose passes are kernels. :func:`differentiably` applies it."""

    @staticmethod
    def definition(*args: Any) -> Any:
        """The results of ``forward`` for the same arguments, in plain PyTorch that overwrites nothing."""
        raise NotImplementedError("this function has no definition in plain PyTorch")


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd or a transform must see a call. If not, the operator is called directly, which is cheaper."""
    if torch.is_grad_enabled():
        for x in tensors:  # half the time of any()
            if x is not None and x.requires_grad:
                return True
    return is_transformed()


def is_transformed() -> bool:
    """Whether a transform of ``torch.func``, a level of forward-mode derivatives, or :func:`leaves_pytorch` is active.

    Every operator asks this in every call, so nothing here is a call that can be left out; it takes 0.1 us.
    """
    return (
        _transforms_are_active()
        or forward_ad._current_level >= 0
        or _is_tracing()
        or (compiler._is_exporting_flag and torch.onnx.is_in_onnx_export())
    )


# torch.compile asks when it traces, as for dinov2_kernels._library.is_tracing.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def leaves_pytorch() -> bool:
    """Whether a call is recorded for a runtime that lacks our operators: by ``torch.jit.trace`` or for ONNX."""
    return is_tracing() or (compiler._is_exporting_flag and torch.onnx.is_in_onnx_export())


def differentiably(function: type[KernelFunction], *args: Any) -> Any:
    """``function.apply(*args)``; the function's definition if a transform is active.

    ``apply`` is called without its work for functorch, because no transform of functorch is active. This saves a third
    of its cost, about 1.5 us; a kernel for 50 tokens takes 5 us.
    """
    if is_transformed():
        return in_pytorch(function.definition, *args)
    if torch.compiler.is_compiling():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def in_pytorch(definition: Callable[..., Any], *args: Any) -> Any:
    """``definition(*args)`` without autocast: operators cast their arguments before, and definitions use float32."""
    first = next(x for x in args if isinstance(x, torch.Tensor))
    with autocast_disabled(first.device.type):
        return definition(*args)


def is_beyond_kernels(*grads: torch.Tensor) -> bool:
    """Whether plain PyTorch must compute a backward pass that has the gradients ``grads`` of its results.

    This is so if autograd records the pass, if it is under a transform, or if there are many gradients at once. It is
    never so under ``torch.compile``, which traces with grad mode on, and refuses to differentiate a backward pass.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or is_transformed() or any(map(is_legacy_batchedtensor, grads))


def gradients_of_definition(function: type[KernelFunction], ctx: Any, args: tuple[Any, ...], grad: torch.Tensor) -> Any:
    """The gradients of a function of one result by its definition: one for each argument, which autograd can record."""
    with torch.enable_grad():
        # Views stand for the arguments: one argument may have been computed from another, and its gradient must stop
        # where this function begins.
        views = [x.view_as(x) if wanted else x for x, wanted in zip(args, ctx.needs_input_grad, strict=True)]
        result = in_pytorch(function.definition, *views)
    chosen = [x for x, wanted in zip(views, ctx.needs_input_grad, strict=True) if wanted]
    gradients = iter(
        torch.autograd.grad(result, chosen, grad, create_graph=torch.is_grad_enabled(), materialize_grads=True)
    )
    return tuple(next(gradients) if wanted else None for wanted in ctx.needs_input_grad)


def refuse_beyond_kernels(operator: str, options: str) -> NoReturn:
    """Raise the error of a backward pass that kept too little for :func:`is_beyond_kernels`."""
    raise RuntimeError(
        f"{operator}: this backward pass is differentiated again, or has many gradients at once; expected {options}, "
        "because otherwise it keeps too little for that"
    )


def base_of(x: torch.Tensor) -> torch.Tensor:
    """The base of x if x is a view, else x itself; also x under torch.compile, where views have no base."""
    return x if torch.compiler.is_compiling() or x._base is None else x._base


def is_of_a_leaf(x: torch.Tensor) -> bool:
    """Whether x is a leaf that requires a gradient, or a view of one. Nothing may overwrite it."""
    base = base_of(x)
    return base.is_leaf and base.requires_grad and torch.is_grad_enabled()
