"""Shared by all benchmarks of peak memory. The module reads /proc, so it works on Linux only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")


def extra_peak(step: Callable[[], object]) -> int:
    """Peak bytes of a call, beyond the bytes that this process holds before the call."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present memory
    held = _memory("VmRSS")
    step()
    return _memory("VmHWM") - held


def printed_by(script: str, *arguments: str) -> int:
    """The number that a script prints, in a separate process: memory that other code has freed would change it."""
    command = [sys.executable, "-c", script, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _memory(name: str) -> int:
    return next(1024 * int(line.split()[1]) for line in STATUS.open() if line.startswith(name))
