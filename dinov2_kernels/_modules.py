"""Modules computed without a call: when this changes nothing, and a linear layer whose bias is added later.

Also what all modules on the kernels say to ``torch.jit.script``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn, TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _global_backward_hooks as _BACKWARD_HOOKS
from torch.nn.modules.module import _global_backward_pre_hooks as _BACKWARD_PRE_HOOKS
from torch.nn.modules.module import _global_forward_hooks as _FORWARD_HOOKS
from torch.nn.modules.module import _global_forward_pre_hooks as _FORWARD_PRE_HOOKS

from dinov2_kernels._library import autocast_dtype

PLAIN = (Tensor, nn.Parameter, FakeTensor)
"""Tensor types without rules of their own. Other subclasses may change what a function does."""


_WRAPPERS = {("transformers.modeling_layers", "forward_with_checkpointing")}
"""Module and name of the functions that libraries themselves put around forwards, and that change no result."""


def own_forward(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """The function that a class, or a base of it, defines as its forward.

    None if ``cls.forward`` is anything else: a function that a tool put there, or decorated, may do more than its name
    says.
    """
    forward = _unwrapped(cls.forward)
    if not inspect.isfunction(forward) or hasattr(forward, "__wrapped__"):
        return None
    written_as = getattr(forward.__code__, "co_qualname", forward.__qualname__)  # since 3.11; no decorator changes it
    if forward.__qualname__ != written_as or forward.__code__.co_name != "forward":
        return None
    name = forward.__module__, forward.__qualname__
    definers = [base for base in cls.__mro__ if (base.__module__, f"{base.__qualname__}.forward") == name]
    return forward if any(_unwrapped(vars(base).get("forward")) is forward for base in definers) else None


def _unwrapped(function: Any) -> Any:
    while (
        hasattr(function, "__wrapped__") and (function.__globals__["__name__"], function.__code__.co_name) in _WRAPPERS
    ):
        function = function.__wrapped__
    return function


# Kept here, because tools may replace the forward of a class, or the call of all modules.
_FORWARDS: dict[type[nn.Module], Callable[..., Any] | None] = {
    cls: own_forward(cls) for cls in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GELU, nn.SiLU, nn.Dropout, nn.Identity)
}
_CALL = nn.Module.__call__

LAYER_NORM_FORWARDS: set[Callable[..., Any] | None] = {_FORWARDS[nn.LayerNorm]}
"""Forwards of subclasses of ``nn.LayerNorm`` that compute what it computes."""


def is_unwatched(module: nn.Module) -> bool:
    """Whether the module need not be called: nothing observes its calls and its results.

    It has no hook, neither its instance nor its class replaces how it is called, and it is not compiled by itself.
    """
    own = module.__dict__  # faster than attributes, and this runs many times in each block
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    is_changed = "forward" in own or module._compiled_call_impl is not None or type(module).__call__ is not _CALL
    return not (hooks or is_changed or _FORWARD_HOOKS or _FORWARD_PRE_HOOKS or _BACKWARD_HOOKS or _BACKWARD_PRE_HOOKS)


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call of the module does just what PyTorch's ``cls`` does: one of Linear, Dropout, Identity, ..."""
    return type(module).forward is _FORWARDS[cls] and is_unwatched(module)


def refuse_script(module: nn.Module) -> NoReturn:
    """The ``__prepare_scriptable__`` of modules on the kernels; ``torch.jit.script`` calls it before it compiles."""
    raise NotImplementedError(
        f"torch.jit.script: expected modules that do not run on dinov2_kernels, got a {type(module).__name__};"
        " use torch.jit.trace, or first call dinov2_kernels.integrations.restore(model) if accelerate changed the model"
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call of the module is just ``F.linear`` with a plain weight and bias."""
    if type(module) is not nn.Linear or not is_plain(module, nn.Linear):
        return False
    return all(p is None or type(p) in PLAIN for p in (module.weight, module.bias))


def is_plain_layer_norm(module: object) -> TypeGuard[nn.LayerNorm]:
    """Whether a call of the module is just ``F.layer_norm``, of parameters that are stored and not computed."""
    if not isinstance(module, nn.LayerNorm) or type(module).forward not in LAYER_NORM_FORWARDS:
        return False
    return is_unwatched(module) and "parametrizations" not in module._modules


def separable_bias(layer: nn.Module, drop: nn.Dropout) -> Tensor | None:
    """The bias of a layer, if it may be added after ``drop`` because ``drop`` does nothing now; else None.

    Under autocast the bias is cast, as in a call of the layer.
    """
    if not is_plain(drop, nn.Dropout) or (drop.p and drop.training):
        return None
    if not is_plain_linear(layer) or layer.bias is None:
        return None
    bias: Tensor = layer.bias  # type: ignore[assignment]
    return bias.to(autocast_dtype(bias))


def linear(layer: nn.Module, x: Tensor, *, bias: bool) -> Tensor:
    """A call of a layer. ``bias=False`` leaves out the bias of a plain linear layer; the caller adds it later."""
    y: Tensor = layer(x) if bias else F.linear(x, layer.weight)  # type: ignore[arg-type]
    return y
