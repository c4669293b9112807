"""facebook's package, which is named ``dinov2`` as well, beside this one in the same process.

``torch.hub.load("facebookresearch/dinov2", ...)`` puts a checkout on ``sys.path`` and imports ``dinov2.hub`` from it.
If this package is imported already, Python looks for that part here, and this package does not have it. The finder
below then takes it from the checkout. The modules of the checkout get names of their own, such as
``facebookresearch_dinov2.hub``, so their relative imports stay there, and this package stays whole. Only parts
that this package does not have are found this way: ``dinov2.models`` and ``dinov2.data`` always are its own.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType

NAME, OTHER = "dinov2", "facebookresearch_dinov2"
FOLDER = os.path.dirname(os.path.abspath(__file__))
THEIRS = frozenset(
    ("configs", "distributed", "eval", "fsdp", "hub", "layers", "logging", "loss", "run", "thirdparty", "utils")
)
"""Parts of facebook's package that this one does not have."""
PAGE = "see docs/two_packages.md of dinov2-kernels"


def make_room() -> None:
    """Let facebook's package be imported beside this one.

    Whoever removed facebook's package from ``sys.modules`` to import this one wants all of this one: submodules that
    were left behind would stand in for those of the same names here, so they are removed as well. Models that were
    made from them go on working.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{NAME}.") and not _is_here(module):
            del sys.modules[name]
    if not any(isinstance(finder, FacebooksFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, FacebooksFinder())


class FacebooksFinder(MetaPathFinder):
    """Finds the parts of facebook's package that this one does not have, in a checkout on ``sys.path``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == OTHER:
            if (folder := _checkout()) is None:
                return None
            init = os.path.join(folder, "__init__.py")
            return spec_from_file_location(OTHER, init, submodule_search_locations=[folder])
        if not fullname.startswith(f"{NAME}."):
            return None
        part = fullname.split(".")[1]
        if _has(FOLDER, part):
            if part in THEIRS:
                raise ImportError(
                    f"{FOLDER} holds the files of two packages named {NAME}, dinov2-kernels' and facebook's: install"
                    f" each in its own environment; {PAGE}",
                    name=fullname,
                )
            return None
        folder = _checkout()
        if folder is not None and _has(folder, part):
            return ModuleSpec(fullname, _UnderItsOwnName())
        if part in THEIRS:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: facebook's package {NAME} has it, and the one that is imported is"
                f" dinov2-kernels' in {FOLDER}; put a checkout of facebook's on sys.path, or {PAGE}",
                name=fullname,
            )
        return None


class _UnderItsOwnName(Loader):
    """Gives ``dinov2.hub`` the module ``facebookresearch_dinov2.hub``."""

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(OTHER + module.__name__.removeprefix(NAME))


def _checkout() -> str | None:
    """The folder of facebook's package: the one that is imported already, or else the first on ``sys.path``."""
    if OTHER in sys.modules:
        return next(iter(sys.modules[OTHER].__path__))
    for entry in sys.path:
        folder = os.path.join(os.path.abspath(entry), NAME)
        is_package = os.path.isfile(os.path.join(folder, "__init__.py"))
        if is_package and not os.path.samefile(folder, FOLDER) and any(_has(folder, part) for part in THEIRS):
            return folder
    return None


def _has(folder: str, part: str) -> bool:
    path = os.path.join(folder, part)
    return os.path.isdir(path) or os.path.isfile(f"{path}.py")


def _is_here(module: ModuleType) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(place and os.path.abspath(place).startswith(FOLDER + os.sep) for place in places)
