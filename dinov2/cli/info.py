"""``dinov2 info``: show which kernels are built and which of them will run here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dinov2.cli import UsageError
from dinov2.interrupts import uninterrupted

HELP = "usage: dinov2 info\n\nShow which kernels are built and which of them will run here."


def run(arguments: Sequence[str]) -> None:
    """Print ``dinov2_kernels.info()`` as tables."""
    if list(arguments) in (["-h"], ["--help"]):
        print(HELP)
        return
    if arguments:
        raise UsageError(f"expected no arguments, got {' '.join(arguments)}")
    with uninterrupted():  # after the help, which needs no PyTorch
        import dinov2_kernels

    facts = dinov2_kernels.info()
    operators = facts.pop("operators")
    console = Console()
    overview = Table(box=None, show_header=False)
    for name, value in facts.items():
        overview.add_row(f"[dim]{name.replace('_', ' ')}[/dim]", _text(value))
    console.print(overview)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("operator")
    columns = list(next(iter(operators.values()), {}))
    for column in columns:
        table.add_column(column.replace("_", " "))
    for name, backends in operators.items():
        table.add_row(name, *(str(backends[column]) for column in columns))
    console.print(table)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
