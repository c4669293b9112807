"""Ctrl-C waits where it must."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from dinov2.interrupts import uninterrupted


def test_another_thread_takes_the_signal() -> None:
    """It is blocked in the main thread alone, so the system gives it to the other one."""
    before, end, ended = signal.signal(signal.SIGINT, signal.default_int_handler), threading.Event(), list[bool]()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        ended.append(True)

    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            work()
        assert ended
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        end.set()
        thread.join()
