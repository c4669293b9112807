"""The tables of docs/recipes.md are what the code computes."""

from __future__ import annotations

from pathlib import Path

from tests.recipes.tables import arithmetic, needs

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_page_has_the_tables_of_the_code() -> None:
    lines = PAGE.read_text().splitlines()
    for table in (list(arithmetic()), list(needs())):
        start = lines.index(table[0])
        assert lines[start : start + len(table)] == table, "print them anew: python -m tests.recipes.tables"
