"""What ``accelerate`` did to a model, in numbers and as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

Status = Literal["accelerated", "native", "ready", "left"]
"""Swapped; one of our own modules; recognised and not swapped yet; not swapped for a reason."""


@dataclass(frozen=True)
class Row:
    """Modules of one kind to which the same thing happened.

    Attributes:
        kind: name of their class.
        names: their names in the model.
        status: what happened.
        detail: the kernel that runs, or the reason why none does.
    """

    kind: str
    names: tuple[str, ...]
    status: Status
    detail: str


@dataclass(frozen=True)
class Report:
    """One row per kind of module that the kernels could serve.

    Attributes:
        model: name of the model's class.
        rows: in the order of the model.
    """

    model: str
    rows: tuple[Row, ...]

    @property
    def on_kernels(self) -> int:
        """Number of modules that run on the kernels."""
        return sum(len(row.names) for row in self.rows if row.status in ("accelerated", "native"))

    def __str__(self) -> str:
        lines = [("module", "count", "status", "")]
        lines += [(row.kind, str(len(row.names)), row.status, row.detail) for row in self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        table = ["  ".join([*map(str.ljust, line, widths), line[3]]).rstrip() for line in lines]
        return "\n".join([f"{self.model}: {self.on_kernels} modules run on dinov2_kernels", *table])


def summarise(model: nn.Module, status_of: Callable[[nn.Module], tuple[Status, str] | None]) -> Report:
    """Walk the modules of a model and join those of one kind and status."""
    rows: dict[tuple[str, Status, str], list[str]] = {}
    for name, module in model.named_modules():
        if (status := status_of(module)) is not None:
            rows.setdefault((type(module).__name__, *status), []).append(name)
    return Report(
        type(model).__name__,
        tuple(Row(kind, tuple(names), status, detail) for (kind, status, detail), names in rows.items()),
    )
