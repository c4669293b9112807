"""A progress bar that counts."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def counting_bar(what: str, console: Console) -> Progress:
    """A progress bar that counts ``what`` and shows the time left. Without a terminal it shows nothing."""
    return Progress(
        TextColumn(f"[bold]{what}"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        expand=True,
    )
