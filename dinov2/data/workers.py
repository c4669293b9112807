"""The worker processes that prepare batches: their start, and the error when one is lost."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

NEWS_SECONDS = 2
"""Seconds to wait when the connection to a worker breaks. The system's report comes a moment later as an error."""
Item = TypeVar("Item")
FROM_WORKER = "in DataLoader worker process"
"""Part of the message of every error that PyTorch passes on from a worker."""


class LostWorkerError(ChildProcessError):
    """A process that prepares batches ended too early."""


def start_worker(_: int) -> None:
    """Initialise a worker process."""
    os.setpgid(0, 0)  # Ctrl-C and SIGTERM reach only the training process, which then stops its workers
    sys.excepthook = _quiet_about_connections


def _quiet_about_connections(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Do not print lost connections to the training process in a worker's threads: that process reports its own end."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, traceback)


@contextmanager
def lost_workers_explained() -> Iterator[None]:
    """Context in which a worker that ends too early raises a :class:`LostWorkerError`.

    PyTorch raises a RuntimeError instead, at any place in the training process.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise LostWorkerError(explanation(str(error))) from error


def next_of_workers(items: Iterator[Item]) -> Item:
    """``next(items)`` for items from workers.

    Raises:
        LostWorkerError: a worker ended too early.
        Exception: a worker raised it; the message includes the worker's traceback.
    """
    try:
        with lost_workers_explained():
            return next(items)
    except Exception as error:
        if FROM_WORKER in str(error):
            # PyTorch's frames and the error refer to each other, so they are freed late, by garbage collection. Then
            # the workers are not told to end, and the loader waits five seconds for each of them.
            raise error.with_traceback(None) from None
        if isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
            with lost_workers_explained():
                time.sleep(NEWS_SECONDS)
            raise LostWorkerError(explanation(repr(error))) from error
        raise


def explanation(report: str) -> str:
    """One line about a lost worker and the likely cause, from PyTorch's report."""
    if "Bus error" in report:
        cause = (
            "/dev/shm, through which batches travel, is full: make it larger (docker run --shm-size), or lower"
            " data.num_workers or batch_size"
        )
    else:
        cause = (
            "most often the system ends one because memory is short (then the log of the kernel or of the scheduler"
            " says out of memory): lower data.num_workers, or give the job more memory"
        )
    return f"lost a process that prepares batches ({report.split('. ')[0].rstrip('.')}); {cause}"
