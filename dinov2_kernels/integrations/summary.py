"""A report of what ``accelerate`` did to a model, in numbers and as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

Status = Literal["accelerated", "native", "ready", "left"]
"""accelerated: swapped; native: one of our own modules; ready: recognised, not swapped yet; left: cannot be swapped."""


@dataclass(frozen=True)
class Row:
    """Modules of one class with the same status.

    Attributes:
        kind: name of their class.
        names: names of these modules in the model.
        status: whether they run on the kernels.
        detail: the kernel that runs, or the reason why none does.
    """

    kind: str
    names: tuple[str, ...]
    status: Status
    detail: str


@dataclass(frozen=True)
class Report:
    """The modules of a model that run, or could run, on the kernels.

    Attributes:
        model: name of the model's class.
        rows: one row per class and status, in the order of the model.
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
    """The report of a model: modules of one class and status form one row."""
    rows: dict[tuple[str, Status, str], list[str]] = {}
    for name, module in model.named_modules():
        if (status := status_of(module)) is not None:
            rows.setdefault((type(module).__name__, *status), []).append(name)
    return Report(
        type(model).__name__,
        tuple(Row(kind, tuple(names), status, detail) for (kind, status, detail), names in rows.items()),
    )
