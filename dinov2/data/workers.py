"""The processes that prepare batches: how one begins, and what is said when one is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class LostWorkerError(ChildProcessError):
    """A process that prepares batches ended before its time."""


def start_worker(_: int) -> None:
    """What a worker does first."""
    os.setpgid(0, 0)  # Ctrl-C and SIGTERM to the process group are for the training process, which stops its workers
    import cv2

    cv2.setNumThreads(0)  # one thread a worker; PyTorch limits its own


@contextmanager
def lost_workers_explained(*, receiving: bool = False) -> Iterator[None]:
    """Context in which a worker that ends before its time is a :class:`LostWorkerError`.

    PyTorch says so by a RuntimeError, and raises it wherever the training process is when the system tells it.

    Args:
        receiving: whether the context does nothing but wait for workers. Then a connection that broke belongs to one
            that ended so lately that nobody knows of it yet.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise LostWorkerError(explanation(str(error))) from error
    except (OSError, EOFError) as error:
        # What a dataset raised comes here too, with the traceback of its worker as its message.
        if not receiving or "in DataLoader worker process" in str(error):
            raise
        raise LostWorkerError(explanation(repr(error))) from error


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
