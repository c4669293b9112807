"""Counting in commands: a progress bar, and options that are whole numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def counting_bar(what: str, console: Console) -> Progress:
    """A progress bar that counts ``what`` and shows the time left. It shows nothing without a terminal, or on a
    dumb one, which cannot draw a line anew."""
    return Progress(
        TextColumn(f"[bold]{what}"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_interactive,
        expand=True,
    )


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers of at least ``least``."""

    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return number

    return whole
