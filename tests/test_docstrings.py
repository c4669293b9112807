"""The docstring of every public function and module has an example, and each example gives what it says.

Examples are read as if ``import numpy as np``, ``import torch``, ``from torch import nn`` and an import of every public
name of the library stood before them.
"""

from __future__ import annotations

import doctest
import inspect
import io
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

PACKAGES = tuple(map(import_module, ("dinov2_kernels", "dinov2_kernels.nn", "dinov2_kernels.integrations")))
"""Packages whose names all need an example."""
OF_OPERATORS = tuple(import_module(f"dinov2_kernels.{name}") for name in ("gelu", "photometric", "residual", "swiglu"))
"""Packages that have more names than ``dinov2_kernels``: their functions need one."""


def _public() -> dict[str, Any]:
    found = {name: getattr(package, name) for package in (*OF_OPERATORS, *PACKAGES) for name in package.__all__}
    return {name: x for name, x in found.items() if not inspect.ismodule(x)}


PUBLIC = _public()
NEED_EXAMPLES = sorted(
    name for name, x in PUBLIC.items() if inspect.isroutine(x) or any(name in package.__all__ for package in PACKAGES)
)


def _examples(name: str) -> list[doctest.DocTest]:
    """Those of an object, and of its methods, each of which starts from fresh names."""
    names = {"np": np, "torch": torch, "nn": nn, **PUBLIC}
    return [test for test in doctest.DocTestFinder().find(PUBLIC[name], name, False, names) if test.examples]


@pytest.mark.parametrize("name", NEED_EXAMPLES)
def test_has_an_example(name: str) -> None:
    assert name in [test.name for test in _examples(name)], f"{name}: expected `Examples:` with `>>> ` in its docstring"
    assert "Examples:\n" in inspect.getdoc(PUBLIC[name]), f"{name}: expected its examples below the heading `Examples:`"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_examples_give_what_they_say(name: str) -> None:
    report = io.StringIO()
    for test in _examples(name):
        torch.manual_seed(0)
        result = doctest.DocTestRunner().run(test, out=report.write)
        assert result.failed == 0, report.getvalue()
