"""What all benchmarks of peak memory share. It reads /proc, so it works on Linux alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")


def extra_peak(step: Callable[[], object]) -> int:
    """Bytes that a call takes, at its peak, beyond what this process holds before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    held = _memory("VmRSS")
    step()
    return _memory("VmHWM") - held


def printed_by(script: str, *arguments: str) -> int:
    """The number that a script prints, in a process of its own: what others freed would blur what it takes."""
    command = [sys.executable, "-c", script, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _memory(name: str) -> int:
    return next(1024 * int(line.split()[1]) for line in STATUS.open() if line.startswith(name))
