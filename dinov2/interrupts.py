"""Ctrl-C at a bad moment. A module by itself, because the command line needs it before anything large is imported."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the context. Processes that start in it never get it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # If the process has other threads, as Arrow's, one of them takes the signal, and Python then interrupts this one.
    is_main, came = threading.current_thread() is threading.main_thread(), list[int]()
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            signal.raise_signal(signal.SIGINT)
