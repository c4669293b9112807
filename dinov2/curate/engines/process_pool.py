"""Several tasks side by side, in processes of this machine."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing import forkserver

from dinov2.curate.engines.engine import Call, LostTaskError, Outcome, execute

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ProcessPool:
    """The default engine.

    Args:
        workers: processes; 0 is one for each core that this process may use.
    """

    def __init__(self, workers: int = 0) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))

    def run(self, calls: Sequence[Call], at_once: int | None = None) -> Iterator[Outcome]:
        """Run calls; when a process is lost, so are the tasks that were under way, and new processes do the rest."""
        remaining = iter(calls)
        width = min(at_once or self.workers, self.workers, max(len(calls), 1))
        while first := list(itertools.islice(remaining, width)):
            yield from self._until_broken(first, remaining, width)

    def _until_broken(self, first: Sequence[Call], remaining: Iterator[Call], width: int) -> Iterator[Outcome]:
        pool = ProcessPoolExecutor(width, _context(), initializer=_begin)
        under_way: dict[Future[None], Call] = {}
        try:
            under_way = {pool.submit(execute, call): call for call in first}
            broken = False
            while under_way:
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    call, error = under_way.pop(future), future.exception()
                    if isinstance(error, BrokenExecutor):
                        broken = True
                        error = LostTaskError("the process that made it was killed; most often memory is short")
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    yield Outcome(call, error)
                    if not broken and (following := next(remaining, None)) is not None:
                        under_way[pool.submit(execute, following)] = following
        finally:
            pool.shutdown(wait=not under_way, cancel_futures=True)
            for process in list((pool._processes or {}).values()) if under_way else []:
                process.terminate()


def _begin() -> None:
    """In a new process: Ctrl-C is for the first process, without which this one is of no use."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _context() -> multiprocessing.context.BaseContext:
    """Forks of a server that has loaded what tasks need; libraries were told of one thread when they were loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([execute.__module__, "faiss", "fsspec", "pyarrow.parquet"])
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    return context
