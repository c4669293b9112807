"""A linear layer over an activation that backward makes again from its argument, in place of keeping it.

The argument is kept for the activation's own derivative anyhow. What is spared is the widest tensor of a transformer
block but one, [T, H] of a feed-forward layer of width H; what is paid is one more pass over the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_kernels._library import autocast_dtype, differentiably, needs_gradient
from dinov2_kernels.swiglu import swiglu


@dataclass(frozen=True)
class Activation:
    """An activation and its derivative.

    Attributes:
        forward: z [..., Z] to h [..., H].
        backward: gradient of h, and z, to the gradient of z.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def gelu(approximate: str) -> Activation:
    """GELU as ``nn.GELU(approximate)`` computes it."""
    return Activation(
        lambda z: F.gelu(z, approximate=approximate),
        lambda grad, z: torch.ops.aten.gelu_backward(grad, z, approximate=approximate),
    )


SWIGLU = Activation(swiglu, lambda grad, z: torch.ops.dinov2_kernels.swiglu_backward(grad.contiguous(), z))


def activated_linear(layer: nn.Linear, activation: Activation, z: Tensor) -> Tensor:
    """``layer(activation(z))`` without keeping ``activation(z)`` for backward; the same values and gradients.

    Under ``torch.compile``, whose partitioner chooses by itself what to make again, and where a call of the layer does
    more than a linear map, it is just that expression.

    Args:
        layer: linear layer from width H.
        activation: from width Z to width H.
        z: [..., Z] contiguous.

    Returns:
        [..., out_features].
    """
    if torch.compiler.is_compiling() or not _is_plain(layer) or not needs_gradient(z, layer.weight, layer.bias):
        y: Tensor = layer(activation.forward(z))
        return y
    return differentiably(_ActivatedLinear, activation, z, layer.weight, layer.bias)  # type: ignore[no-any-return]


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Activation, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, weight, bias)
        ctx.activation = activation
        dtype = autocast_dtype(z)
        return F.linear(activation.forward(z).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, bias = ctx.saved_tensors
        _, z_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # [T, out_features]
        dz = dweight = dbias = None
        if weight_wanted:
            h = ctx.activation.forward(z).to(grad.dtype).flatten(0, -2)  # [T, H]
            dweight = (rows.t() @ h).to(weight.dtype)
            del h
        if bias_wanted:
            dbias = rows.sum(dim=0).to(bias.dtype)
        if z_wanted:
            dz = ctx.activation.backward((grad @ weight.to(grad.dtype)).to(z.dtype), z)
        return None, dz, dweight, dbias


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of the module does nothing but ``F.linear``: no hooks, no other class."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is nn.Linear and not hooks
