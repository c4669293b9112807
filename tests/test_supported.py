"""docs/supported.md names a test for each of its lines; these tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    line
    for line in (ROOT / "docs/supported.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| what ")
]


@pytest.mark.parametrize("row", ROWS)
def test_every_line_has_its_test(row: str) -> None:
    names = re.findall(r"(tests/[\w/]+\.py)::(\w+)", row.rsplit(" | ", 1)[1])
    assert names, "this line names no test"
    for file, name in names:
        functions = {
            node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{file} has no {name}"
