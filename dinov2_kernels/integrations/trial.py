"""Trials: whether two forwards compute the same, tried on small modules of the same class with made-up parts.

A name says little: projects copy layers and change them, and subclasses keep half of a name. So a class counts as known
only if its own forward gives the result that the kernels give, on a small module that has the attributes of the known
one and nothing else. A forward that reads anything else fails, and its modules are left alone. The parts are simple
functions, so a trial needs neither the weights nor the device of the module, and takes a millisecond, once per class.
Training is tried without dropped samples, because each library draws them in its own way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from dinov2_kernels._library import autocast_disabled
from dinov2_kernels._modules import own_forward

WIDTH = 8
"""Channels of the tokens of a trial."""

Sides = tuple[dict[str, Any], dict[str, Any]]
"""Attributes of two small modules: for the library's forward, and for that on the kernels."""


class Part(nn.Module):
    """A function in the place of a part of a module. No hook sees its calls, not even one of all modules.

    Args:
        function: takes the first argument of a call; further arguments are ignored.
        attributes: what the module reads from the part.
    """

    def __init__(self, function: Callable[[Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self, x: Tensor, *_: Any, **__: Any) -> Any:
        return self.function(x)


def identity(**attributes: Any) -> Part:
    """A part that returns its argument."""
    return Part(lambda x: x, **attributes)


def matrix(inputs: int, outputs: int, first: int = 0) -> Part:
    """A linear layer; another ``first`` gives it other weights."""
    weight = torch.arange(first, first + inputs * outputs, dtype=torch.float64).sin().view(inputs, outputs)
    return Part(lambda x: x @ weight)


def factors() -> Tensor:
    """Factors [C] of the channels: different ones, of both signs, below and above 1."""
    return torch.linspace(-2, 1.5, WIDTH, dtype=torch.float64)


def small_module(cls: type[nn.Module], attributes: dict[str, Any], training: bool) -> Any:
    """A module of a class with these attributes and no others; its constructor does not run."""
    module = object.__new__(cls)  # FSDP2's classes make instances of another class in their __new__
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    module.training = training  # of the module alone: a part has no modes
    return module


def passes(cls: type[nn.Module], trial: Callable[[], bool]) -> bool:
    """The result of a trial of a class; False if it raises.

    It runs on the CPU, whatever modes are active around it, and changes no random numbers of others. A forward that
    reads a number or a switch of its class fails, because a module may get a value of its own for it later.
    """
    if _reads_settings_of_class(cls):
        return False
    with (
        _disable_current_modes(),
        torch.device("cpu"),
        torch.no_grad(),
        autocast_disabled("cpu"),
        torch.random.fork_rng(devices=[]),
    ):
        torch.default_generator.manual_seed(0)
        try:
            return trial()
        except Exception:  # code of others, on a module without most of its attributes, may raise anything
            return False


def _reads_settings_of_class(cls: type[nn.Module]) -> bool:
    functions = [inspect.unwrap(forward) for base in cls.__mro__ if (forward := vars(base).get("forward"))]
    names = {name for function in functions if inspect.isfunction(function) for name in function.__code__.co_names}
    found = [value for name in names if (value := inspect.getattr_static(cls, name, None)) is not None]
    return any(not callable(value) and not hasattr(value, "__get__") for value in found)


def agree(theirs: Callable[[Tensor], Any], ours: Callable[[Tensor], Any]) -> bool:
    """Whether two functions of tokens [2, 3, C] have the same result, or the same first one if there are several."""
    tokens = torch.arange(2 * 3 * WIDTH, dtype=torch.float64).cos().view(2, 3, WIDTH)
    results = [function(tokens.clone()) for function in (theirs, ours)]
    expected, result = (result[0] if isinstance(result, tuple) else result for result in results)
    return isinstance(expected, Tensor) and expected.shape == result.shape and torch.allclose(result, expected)


def is_layer_scale(part: nn.Module) -> bool:
    """Whether a call of the part multiplies the channels by :func:`gamma_name`, or does nothing (an Identity)."""
    cls = type(part)
    return _LAYER_SCALES.get(cls) is cls.forward or _is_known(part, _LAYER_SCALES, _scales_channels)


def is_drop_path(part: nn.Module) -> bool:
    """Whether a call of the part drops samples at the rate ``drop_prob``, in training, or does nothing."""
    cls = type(part)
    return _DROP_PATHS.get(cls) is cls.forward or _is_known(part, _DROP_PATHS, _drops_samples)


def gamma_name(layer_scale: nn.Module) -> str:
    """The attribute in which a LayerScale has its factors."""
    return "lambda1" if "lambda1" in layer_scale._parameters else "gamma"


_Known = dict[type[nn.Module], Callable[..., Any] | None]
_IDENTITY = own_forward(nn.Identity)
_LAYER_SCALES: _Known = {nn.Identity: _IDENTITY}
_DROP_PATHS: _Known = {nn.Identity: _IDENTITY}


def _is_known(part: nn.Module, known: _Known, trial: Callable[[nn.Module], bool]) -> bool:
    """Whether the class of a part passes a trial, and still has the forward that passed it.

    The result of the trial stays in ``known``: the forward, or None if it failed.
    """
    cls = type(part)
    if cls not in known:
        if torch.compiler.is_compiling():  # a trial is nothing to compile
            return False
        forward = own_forward(cls)
        passed = forward is not None and (forward is _IDENTITY or passes(cls, lambda: trial(part)))
        known[cls] = cls.forward if passed else None
    return known[cls] is cls.forward


def _scales_channels(part: nn.Module) -> bool:
    attributes: dict[str, Any] = {gamma_name(part): nn.Parameter(factors(), requires_grad=False)}
    attributes |= {"inplace": False} if hasattr(part, "inplace") else {}
    modules = [small_module(type(part), attributes, training) for training in (False, True)]
    return all(agree(module.forward, factors().mul) for module in modules)


def _drops_samples(part: nn.Module) -> bool:
    def of_rate(rate: float, training: bool) -> Any:
        return small_module(type(part), {"drop_prob": rate, "scale_by_keep": True}, training)

    keeping = of_rate(0.0, False), of_rate(0.0, True), of_rate(0.5, False)
    if not all(agree(module.forward, torch.clone) for module in keeping):
        return False
    x = torch.linspace(1, 2, 64 * 3 * WIDTH, dtype=torch.float64).view(64, 3, WIDTH)
    y = of_rate(0.5, True).forward(x)
    scale = (y / x)[:, :1, :1]  # [64, 1, 1]
    return torch.allclose(y, x * scale) and scale.unique().tolist() == [0, 2]
