"""What the extras of pyproject.toml install, and a Python that finds nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

OURS = "dinov2-kernels"
PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

HIDES_PACKAGES = """
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset({hidden!r})


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if path is None and name in HIDDEN else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def installed_with(*extras: str) -> set[str]:
    """Distributions that ``pip install 'dinov2-kernels[extras]'`` brings to this machine, as ``scikit-image``.

    Ours are read from pyproject.toml, those that they need in turn from what is installed here.
    """
    found: set[tuple[str, str]] = set()
    remaining = [(OURS, extra) for extra in ("", *extras)]
    while remaining:
        name, extra = remaining.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for requirement in _requirements(name, extra):
            remaining += [(canonicalize_name(requirement.name), part) for part in ("", *requirement.extras)]
    return {name for name, _ in found}


def _requirements(name: str, extra: str) -> Iterator[Requirement]:
    if name == OURS:
        lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    else:
        lines = metadata.requires(name) or []
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def hide_all_but(distributions: set[str], folder: Path) -> Path:
    """Fill a folder that, on PYTHONPATH, hides what else is installed from a Python and from its children."""
    hidden = {
        module
        for module, owners in metadata.packages_distributions().items()
        if distributions.isdisjoint(map(canonicalize_name, owners))
    }
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDES_PACKAGES.format(hidden=sorted(hidden)))
    return folder
