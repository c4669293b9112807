"""Swapping a module's forward for one that runs on the kernels: the module's class becomes a subclass of its class.

Parameters, buffers, hooks and their names belong to the instance and do not change. ``isinstance`` and wrapping
policies by class still work. A copy and a pickle are accelerated too. To undo it, the module gets its old class back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import nn

from dinov2_kernels._modules import own_forward, refuse_script
from dinov2_kernels.integrations.trial import Sides, agree, passes, small_module


class Accelerated(nn.Module):
    """Mixed in before a library's class, so that ``super().forward`` is the library's own.

    Attributes:
        runs_on: the kernel, for the report.
        parts: attributes that its forward reads; a module of another version may lack some.
        original_class: the class of the module before; set on the classes that :func:`accelerated_class` makes.
        library_forward: the forward of that class when the module was swapped; set there too.
        library_function: the same without wrappers, as it stands in its file; None if a tool replaced it before that.
        library_defaults: its optional arguments, with their defaults; set there too.
    """

    runs_on: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()
    original_class: ClassVar[type[nn.Module]]
    library_forward: ClassVar[Callable[..., Any]]
    library_function: ClassVar[Callable[..., Any] | None]
    library_defaults: ClassVar[dict[str, Any]]

    __prepare_scriptable__ = refuse_script

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        """Whether the module may be of this kind, by the name of its forward; :meth:`obstacle` then looks closer."""
        raise NotImplementedError

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Why a module that is recognised cannot be accelerated; None if it can."""
        if "forward" in vars(module):
            return "its forward was replaced on the instance"
        missing = [part for part in cls.parts if not hasattr(module, part)]
        if missing:
            return f"a version that has no {', '.join(missing)}"
        return None if cls._computes_the_same(module) else "its forward computes something else"

    @classmethod
    def stand_ins(cls, module: nn.Module) -> Iterator[Sides]:
        """Attributes for small modules of the class of ``module``, on which both forwards are compared.

        Attributes that ``module`` lacks are left out.
        """
        raise NotImplementedError

    @classmethod
    def library_on_trial(cls, module: Any) -> Callable[..., Any]:
        """The library's forward of a small module, as a trial calls it."""
        return module.forward  # type: ignore[no-any-return]

    def detour(self) -> str | None:
        """Why all calls run the library's own forward as things are now: a hook, a setting; None if there is none."""
        cls = type(self)
        is_own = cls.original_class.forward is cls.library_forward and cls.library_function is not None
        return None if is_own else "the forward of its class was replaced"

    @classmethod
    def detour_of(cls, module: nn.Module) -> str | None:
        """:meth:`detour` of a module that is not swapped yet, as it would be."""
        swapped = object.__new__(accelerated_class(type(module), cls))
        swapped.__dict__ = module.__dict__
        reason: str | None = swapped.detour()
        return reason

    def takes(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the kernels can serve a call with these arguments."""
        raise NotImplementedError

    def on_kernels(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that runs on the kernels, for calls that it takes."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments and the result of the library's own forward, which runs if the kernels cannot."""
        if self.detour() is None and self.takes(*args, **kwargs):
            return self.on_kernels(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def restriction(self) -> str:
        """When the library's own forward runs instead, as the end of a sentence; empty if never."""
        return ""

    @classmethod
    def swap(cls, module: nn.Module) -> None:
        """Accelerate a module without obstacles."""
        module.__class__ = accelerated_class(type(module), cls)

    @classmethod
    def _computes_the_same(cls, module: nn.Module) -> bool:
        """Whether both forwards give the same results; compared once for each class and forward."""
        original = type(module)
        key = cls, original, original.forward
        if key not in _SAME:
            made = accelerated_class(original, cls)
            _SAME[key] = passes(
                original,
                lambda: all(
                    agree(
                        cls.library_on_trial(small_module(original, theirs, mode)),
                        small_module(made, ours, mode).on_kernels,
                    )
                    for theirs, ours in cls.stand_ins(module)
                    for mode in (False, True)
                ),
            )
        return _SAME[key]

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class was made here, so pickle would not find it by its name
        recipe = _recipe(type(self))
        if recipe is None:
            return super().__reduce_ex__(protocol)
        reduced: tuple[Any, ...] = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        return _new, (self.original_class, recipe), *reduced[2:]


_SAME: dict[tuple[type[Accelerated], type[nn.Module], Any], bool] = {}
_CLASSES: dict[tuple[type[nn.Module], type[Accelerated]], type[Any]] = {}


def accelerated_class(cls: type[nn.Module], recipe: type[Accelerated]) -> type[Any]:
    """The one subclass of ``cls`` with the forward of ``recipe``, under the same name."""
    if (cls, recipe) in _CLASSES:
        return _CLASSES[cls, recipe]
    parameters = inspect.signature(cls.forward).parameters.values()
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "original_class": cls,
        "library_forward": cls.forward,
        "library_function": own_forward(cls),
        "library_defaults": {p.name: p.default for p in parameters if p.default is not p.empty},
    }
    return _CLASSES.setdefault((cls, recipe), type(cls.__name__, (recipe, cls), namespace))


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that an accelerated module had before; None for any other module."""
    return type(module).original_class if isinstance(module, Accelerated) and _recipe(type(module)) else None


def forward_name(module: nn.Module) -> tuple[str, str]:
    """Where the forward of a module is defined: ("timm.layers.attention", "Attention.forward").

    Two empty strings if its class does not define it, but a tool put it there.
    """
    function = own_forward(type(module))
    return (function.__module__, function.__qualname__) if function else ("", "")


def _recipe(cls: type[nn.Module]) -> type[Accelerated] | None:
    """The recipe of a class that :func:`accelerated_class` made; None for other classes, subclasses of it included."""
    return cls.__bases__[0] if "original_class" in vars(cls) else None


def _new(cls: type[nn.Module], recipe: type[Accelerated]) -> nn.Module:
    made: type[nn.Module] = accelerated_class(cls, recipe)
    return made.__new__(made)
