"""The processes that prepare batches: how one begins, and what is said when one is lost."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

NEWS_SECONDS = 2
"""A connection to a worker breaks a moment before the system says why, which ends this wait by an error."""
Item = TypeVar("Item")
FROM_WORKER = "in DataLoader worker process"
"""Part of the message of every error that a worker raised and PyTorch raises again."""


class LostWorkerError(ChildProcessError):
    """A process that prepares batches ended before its time."""


def start_worker(_: int) -> None:
    """What a worker does first."""
    os.setpgid(0, 0)  # Ctrl-C and SIGTERM to the process group are for the training process, which stops its workers
    sys.excepthook = _quiet_about_connections


def _quiet_about_connections(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """The threads that hand batches over print what goes wrong; that the training process left, it says itself."""
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, traceback)


@contextmanager
def lost_workers_explained() -> Iterator[None]:
    """Context in which a worker that ends before its time is a :class:`LostWorkerError`.

    PyTorch says so by a RuntimeError, and raises it wherever the training process is when the system tells it.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise LostWorkerError(explanation(str(error))) from error


def next_of_workers(items: Iterator[Item]) -> Item:
    """``next(items)``, where items come from workers.

    Raises:
        LostWorkerError: one ended before its time.
        Exception: what one of them raised, with its traceback there as part of the message.
    """
    try:
        with lost_workers_explained():
            return next(items)
    except Exception as error:
        if FROM_WORKER in str(error):
            # PyTorch's frames and the error refer to each other. Garbage is collected late, and workers do not learn
            # then that they are to end: a loader in such a circle waits five seconds for each of them.
            raise error.with_traceback(None) from None
        if isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
            with lost_workers_explained():
                time.sleep(NEWS_SECONDS)
            raise LostWorkerError(explanation(repr(error))) from error
        raise


def explanation(report: str) -> str:
    """A line on a lost worker and its likely cause, from PyTorch's report."""
    if "Bus error" in report:
        cause = (
            "/dev/shm, through which batches travel, is full: make it larger (docker run --shm-size), or lower"
            " data.num_workers or batch_size"
        )
    else:
        cause = (
            "most often the system ends one because memory is short (the kernel's log, or that of the scheduler, then"
            " says out of memory): lower data.num_workers, or give the job more memory"
        )
    return f"lost a process that prepares batches ({report.split('. ')[0].rstrip('.')}); {cause}"
