"""Linear layer, activation, linear layer; backward makes one pass over the features between its matrix products.

Forward keeps only the activation's input z [T, Z]. The pass computes the activation's result h [T, H] again, which the
gradient of the second weight needs, and the gradient of z. Its sum over the tokens is the gradient of the first bias.
Separate operators would compute h, the derivative of the activation, and the sum one after the other:

==========  ================================  ================================
activation  elements moved in one pass        by separate operators
==========  ================================  ================================
GELU        4 T H                             6 T H
SwiGLU      6 T H                             10 T H
==========  ================================  ================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_kernels._autograd import (
    KernelFunction,
    differentiably,
    gradients_of_definition,
    is_beyond_kernels,
    is_transformed,
    needs_gradient,
)
from dinov2_kernels._library import autocast_dtype
from dinov2_kernels._modules import PLAIN, is_plain_linear, linear
from dinov2_kernels.gelu import gelu_backward_
from dinov2_kernels.swiglu import swiglu, swiglu_backward_


@dataclass(frozen=True)
class Activation:
    """An activation, and its pass over the features in backward.

    Attributes:
        forward: function from z [..., Z] to h [..., H].
        backward: function from the gradient of h [T, H], which it may overwrite, and z [T, Z] to h, the gradient of z,
            and the sum [Z] of that gradient.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def gelu(approximate: str) -> Activation:
    """GELU as ``nn.GELU(approximate)`` computes it."""

    def backward(grad: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, dz_sum = gelu_backward_(grad, z, approximate=approximate)
        return h, grad, dz_sum

    return Activation(lambda z: F.gelu(z, approximate=approximate), backward)


def _swiglu_backward(grad: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dz, dz_sum = swiglu_backward_(grad, z)
    return grad, dz, dz_sum


SWIGLU = Activation(swiglu, _swiglu_backward)


def fused_mlp(first: nn.Module, activation: Activation, second: nn.Module, x: Tensor, *, bias: bool = True) -> Tensor:
    """``second(activation(first(x)))`` with the same values and gradients, and one pass between backward's products.

    Under ``torch.compile``, which fuses by itself, under a transform of ``torch.func``, or if a layer does more than
    ``F.linear``, it is the plain expression.

    Args:
        first: ``nn.Linear`` to width Z, or a module that replaces it.
        activation: activation from width Z to width H.
        second: ``nn.Linear`` from width H, or a module that replaces it.
        x: [..., in_features].
        bias: whether to add the bias of ``second``. If False, ``second`` must be a plain ``nn.Linear``.

    Returns:
        [..., out_features].
    """
    if torch.compiler.is_compiling() or is_transformed() or not _can_fuse(first, second, x):
        return linear(second, activation.forward(first(x)), bias=bias)
    parameters = first.weight, first.bias, second.weight, second.bias if bias else None
    tokens = x.to(autocast_dtype(x)).reshape(-1, x.shape[-1])  # [T, in_features]
    y: Tensor = differentiably(_FusedMlp, activation, tokens, *parameters)
    return y.view(*x.shape[:-1], -1) if x.dim() != 2 else y


def _can_fuse(first: nn.Module, second: nn.Module, x: Tensor) -> bool:
    if not (is_plain_linear(first) and is_plain_linear(second) and type(x) in PLAIN and x.numel()):
        return False
    parameters = [p for p in (first.weight, first.bias, second.weight, second.bias) if isinstance(p, Tensor)]
    if not needs_gradient(x, *parameters):
        return False
    dtypes = {tensor.dtype for tensor in (x, *parameters)}
    return len(dtypes) == 1 or (torch.is_autocast_enabled(x.device.type) and torch.float64 not in dtypes)


class _FusedMlp(KernelFunction):
    @staticmethod
    def definition(
        activation: Activation,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
    ) -> Tensor:
        return _linear(activation.forward(_linear(x, weight1, bias1)), weight2, bias2)

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
    ) -> Tensor:
        z = _linear(x, weight1, bias1)  # [T, Z]
        ctx.save_for_backward(x, z, weight1, bias1, weight2, bias2)
        ctx.activation = activation
        return _linear(activation.forward(z), weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight1, bias1, weight2, bias2 = ctx.saved_tensors
        activation, wanted = ctx.activation, ctx.needs_input_grad
        if is_beyond_kernels(grad):
            arguments = (activation, x, weight1, bias1, weight2, bias2)
            return gradients_of_definition(_FusedMlp, ctx, arguments, grad)  # type: ignore[no-any-return]
        _, x_wanted, weight1_wanted, bias1_wanted, weight2_wanted, bias2_wanted = wanted
        dx = dweight1 = dbias1 = dweight2 = dbias2 = None
        h: Any = None
        dz: Any = None
        if bias2_wanted:
            dbias2 = grad.sum(dim=0).to(bias2.dtype)
        if x_wanted or weight1_wanted or bias1_wanted:
            h, dz, dz_sum = activation.backward(grad @ weight2.to(grad.dtype), z)
            # Rounded to the dtype of z first, as autocast does: weights stored in that dtype get the same gradients.
            dbias1 = dz_sum.to(z.dtype).to(bias1.dtype) if bias1_wanted else None
        elif weight2_wanted:
            h = activation.forward(z)
        if weight2_wanted:
            dweight2 = (grad.t() @ h).to(weight2.dtype)
        del h
        if weight1_wanted:
            dweight1 = (dz.t() @ x).to(weight1.dtype)
        if x_wanted:
            dx = dz @ weight1.to(dz.dtype)
        return None, dx, dweight1, dbias1, dweight2, dbias2


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` in the dtype of x, as under autocast."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
