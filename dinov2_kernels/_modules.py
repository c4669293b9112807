"""Modules computed without a call: when this changes nothing, and a linear layer whose bias is added later.

Also what all modules on the kernels say to ``torch.jit.script``.
"""

from __future__ import annotations

from typing import NoReturn

import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from dinov2_kernels._library import autocast_dtype

PLAIN = (Tensor, nn.Parameter, FakeTensor)
"""Tensor types without rules of their own. Other subclasses may change what a function does."""


def is_unwatched(module: nn.Module) -> bool:
    """Whether the module need not be called: nothing observes its calls and its results.

    It has no hook, its instance does not replace the forward of its class, and it is not compiled by itself.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    is_changed = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return not (hooks or _has_any_global_hook() or is_changed)


def refuse_script(module: nn.Module) -> NoReturn:
    """The ``__prepare_scriptable__`` of modules on the kernels; ``torch.jit.script`` calls it before it compiles."""
    raise NotImplementedError(
        f"torch.jit.script: expected modules that do not run on dinov2_kernels, got a {type(module).__name__};"
        " use torch.jit.trace, or first call dinov2_kernels.integrations.restore(model) if accelerate changed the model"
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call of the module is just ``F.linear`` with a plain weight and bias."""
    if type(module) is not nn.Linear or not is_unwatched(module):
        return False
    return all(p is None or type(p) in PLAIN for p in (module.weight, module.bias))


def separable_bias(layer: nn.Module, drop: nn.Dropout) -> Tensor | None:
    """The bias of a layer, if it may be added after ``drop`` because ``drop`` does nothing now; else None.

    Under autocast the bias is cast, as in a call of the layer.
    """
    drops = drop.p and drop.training
    if drops or not is_unwatched(drop) or not is_plain_linear(layer) or layer.bias is None:
        return None
    bias: Tensor = layer.bias  # type: ignore[assignment]
    return bias.to(autocast_dtype(bias))


def linear(layer: nn.Module, x: Tensor, *, bias: bool) -> Tensor:
    """A call of a layer. ``bias=False`` leaves out the bias of a plain linear layer; the caller adds it later."""
    y: Tensor = layer(x) if bias else F.linear(x, layer.weight)  # type: ignore[arg-type]
    return y
