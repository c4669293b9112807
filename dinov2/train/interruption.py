"""Ctrl-C and SIGTERM: finish the step, save, then leave."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class Interrupted(KeyboardInterrupt):
    """Raised after a run was asked to stop and has saved a checkpoint; the message says how to continue."""


class StopSignals:
    """Context in which SIGINT and SIGTERM only set ``received``; a second signal interrupts at once.

    Signals reach the main thread alone: in any other one this context changes nothing.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignals:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        os.write(2, b"\nstopping: this step ends, then a checkpoint is saved; once more stops at once\n")  # signal-safe

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
