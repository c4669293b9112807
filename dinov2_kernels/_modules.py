"""Modules that are computed without being called: when nobody can tell, and a linear layer whose bias comes later."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from dinov2_kernels._library import autocast_dtype

PLAIN = (Tensor, nn.Parameter, FakeTensor)
"""Types of tensors that functions run on as they are. Others have rules of their own."""


def is_unwatched(module: nn.Module) -> bool:
    """Whether nobody would notice if the module were not called, or returned less.

    It has no hook, no forward of its own in place of its class's, and is not compiled by itself.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    is_changed = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return not (hooks or _has_any_global_hook() or is_changed)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call of the module does nothing but ``F.linear`` with a plain weight and bias."""
    if type(module) is not nn.Linear or not is_unwatched(module):
        return False
    return all(p is None or type(p) in PLAIN for p in (module.weight, module.bias))


def separable_bias(layer: nn.Module, drop: nn.Dropout) -> Tensor | None:
    """The bias of a layer that may be added behind ``drop``, since this does nothing now; None elsewhere.

    Under autocast it is cast, as a call of the layer would cast it.
    """
    drops = drop.p and drop.training
    if drops or not is_unwatched(drop) or not is_plain_linear(layer) or layer.bias is None:
        return None
    bias: Tensor = layer.bias  # type: ignore[assignment]
    return bias.to(autocast_dtype(bias))


def linear(layer: nn.Module, x: Tensor, *, bias: bool) -> Tensor:
    """A call of a layer; without its bias, if it is a plain linear one and whoever calls adds it."""
    y: Tensor = layer(x) if bias else F.linear(x, layer.weight)  # type: ignore[arg-type]
    return y
