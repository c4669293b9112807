"""Swapping a module's forward for one that runs on the kernels: the module's class becomes a subclass of its class.

Parameters, buffers, hooks and their names belong to the instance and do not change. ``isinstance`` and wrapping
policies by class still work. A copy and a pickle are accelerated too. To undo it, the module gets its old class back.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import nn

from dinov2_kernels._modules import refuse_script


class Accelerated(nn.Module):
    """Mixed in before a library's class, so that ``super().forward`` is the library's own.

    Attributes:
        runs_on: the kernel, for the report; empty for a part that goes with its block.
        parts: attributes that its forward reads; a module of another version may lack some.
        original_class: the class of the module before; set on the classes that :func:`accelerated_class` makes.
    """

    runs_on: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()
    original_class: ClassVar[type[nn.Module]]

    __prepare_scriptable__ = refuse_script

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        """Whether this class can replace the forward of the module."""
        raise NotImplementedError

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Why a module that is recognised cannot be accelerated; None if it can."""
        if "forward" in vars(module):
            return "its forward was replaced on the instance"
        missing = [part for part in cls.parts if not hasattr(module, part)]
        return f"a version that has no {', '.join(missing)}" if missing else None

    @classmethod
    def swap(cls, module: nn.Module) -> None:
        """Accelerate a module without obstacles."""
        module.__class__ = accelerated_class(type(module), cls)

    def restriction(self) -> str:
        """When the library's own forward runs instead, as the end of a sentence; empty if never."""
        return ""

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class was made here, so pickle would not find it by its name
        recipe = _recipe(type(self))
        if recipe is None:
            return super().__reduce_ex__(protocol)
        reduced: tuple[Any, ...] = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        return _new, (self.original_class, recipe), *reduced[2:]


_CLASSES: dict[tuple[type[nn.Module], type[Accelerated]], type[nn.Module]] = {}


def accelerated_class(cls: type[nn.Module], recipe: type[Accelerated]) -> type[nn.Module]:
    """The one subclass of ``cls`` with the forward of ``recipe``, under the same name."""
    if (cls, recipe) in _CLASSES:
        return _CLASSES[cls, recipe]
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "original_class": cls,
    }
    return _CLASSES.setdefault((cls, recipe), type(cls.__name__, (recipe, cls), namespace))


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that an accelerated module had before; None for any other module."""
    return type(module).original_class if isinstance(module, Accelerated) and _recipe(type(module)) else None


def forward_of(module: nn.Module) -> Any:
    """The forward function of a module's class, without decorators; None if it is not a function."""
    function = inspect.unwrap(getattr(type(module), "forward", None))  # type: ignore[arg-type]
    return function if inspect.isfunction(function) else None


def forward_name(module: nn.Module) -> tuple[str, str]:
    """Where the forward of a module is defined: ("timm.layers.attention", "Attention.forward")."""
    function = forward_of(module)
    return (function.__module__, function.__qualname__) if function else ("", "")


def _recipe(cls: type[nn.Module]) -> type[Accelerated] | None:
    """The recipe of a class that :func:`accelerated_class` made; None for other classes, subclasses of it included."""
    return cls.__bases__[0] if "original_class" in vars(cls) else None


def _new(cls: type[nn.Module], recipe: type[Accelerated]) -> nn.Module:
    made = accelerated_class(cls, recipe)
    return made.__new__(made)
