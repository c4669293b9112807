"""How an operator finds its Triton implementation: at the first call, once."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dinov2_kernels import _library


def test_the_library_imports_no_triton() -> None:
    code = "import sys, dinov2_kernels; assert not {'triton', 'dinov2_kernels._triton'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_operator_looks_for_its_launcher_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> SimpleNamespace:
        imported.append(name)
        return SimpleNamespace(add=lambda x, y: x + y)

    imported: list[str] = []
    monkeypatch.setattr(importlib, "import_module", import_module)
    operator = _library.Operator("add", reference=lambda x, y: None, triton="some.module:add", composite=None)
    assert not imported
    assert [operator.call_triton(1, 2), operator.call_triton(3, 4)] == [3, 7]
    assert imported == ["some.module"]


def test_an_operator_without_triton_says_so_at_each_call() -> None:
    operator = _library.Operator("add", reference=lambda x, y: None, triton=None, composite=None)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="add has no Triton implementation"):
            operator.call_triton(1, 2)
