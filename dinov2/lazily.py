"""Packages whose public names are imported when they are first used, so that a command imports only what it runs.

PyTorch alone takes longer to import than help should take to appear. A package therefore imports its configuration at
once, and all that needs PyTorch by the ``__getattr__`` of :func:`names_from`::

    if TYPE_CHECKING:
        from dinov2.models.dino_head import DINOHead
    else:
        __getattr__ = names_from(__name__, {"dino_head": ("DINOHead",)})

A module that a configuration is defined in imports PyTorch, and modules that do, within the functions that use them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def names_from(package: str, modules: Mapping[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package (PEP 562) that imports a module when one of its names is first asked for.

    Args:
        package: the package's own name, ``__name__``.
        modules: the names that each of its modules gives, by the module's name within the package. The modules
            themselves are attributes of the package as well.
    """
    places = {name: module for module, names in modules.items() for name in names}
    own = {module.partition(".")[0] for module in modules}

    def find(name: str) -> Any:
        if name in places:
            return getattr(importlib.import_module(f"{package}.{places[name]}"), name)
        if name in own:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
