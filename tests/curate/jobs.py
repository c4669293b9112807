"""Tasks that curation's tests run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from dinov2.curate.steps import Counts, Output


def square(output: Output, number: int) -> Counts:
    """The simplest task."""
    output.write_table({"square": [number * number]})
    return Counts(1, 1)


def killed_once(output: Output, number: int, marker: str) -> Counts:
    """Its process is killed the first time."""
    if not Path(marker).exists():
        Path(marker).parent.mkdir(parents=True, exist_ok=True)
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(output, number)


def always_killed(output: Output) -> Counts:
    """Its process is killed every time."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def failing(output: Output) -> Counts:
    """Leaves half of its work, and fails."""
    output.write_table({"square": [0]})
    raise ValueError("no luck")


def name_of(name: str, number: int) -> str:
    """What the result of a task depends on."""
    return name
