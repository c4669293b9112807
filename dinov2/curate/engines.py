"""Several tasks side by side, in processes of this machine."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing import forkserver

from dinov2.curate.engines.engine import Call, LostTaskError, Outcome, execute

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ProcessPool:
    """The default engine. Its processes stay from one step to the next, until one of them is lost.

    Args:
        workers: processes; 0 is one for each core that this process may use.
    """

    def __init__(self, workers: int = 0) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self._executor: ProcessPoolExecutor | None = None

    def run(self, calls: Sequence[Call], at_once: int | None = None) -> Iterator[Outcome]:
        """Run calls; when a process is lost, so are the tasks that were under way, and new processes do the rest."""
        waiting = deque(calls)
        width = min(at_once or self.workers, self.workers)
        while waiting:
            yield from self._until_broken(waiting, width)

    def _until_broken(self, waiting: deque[Call], width: int) -> Iterator[Outcome]:
        """Run what waits, ``width`` at once, until all is done or a process is lost; what waits then was not begun."""
        if self._executor is None:
            self._executor = ProcessPoolExecutor(self.workers, _context(), initializer=_begin)
        executor = self._executor
        under_way: dict[Future[None], Call] = {}
        try:
            while under_way or (waiting and self._executor):
                while waiting and self._executor and len(under_way) < width:
                    try:
                        future = executor.submit(execute, waiting[0])
                    except BrokenExecutor:  # lost meanwhile; what was under way will say so
                        self._executor = None
                    else:
                        under_way[future] = waiting.popleft()
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    call, error = under_way.pop(future), future.exception()
                    if isinstance(error, BrokenExecutor):
                        self._executor = None
                        error = LostTaskError("the process that made it was killed; most often memory is short")
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    yield Outcome(call, error)
        finally:
            if under_way:  # stopped from outside
                self._executor = None
                for process in list((executor._processes or {}).values()):
                    process.terminate()
            if self._executor is None:
                executor.shutdown(wait=not under_way, cancel_futures=True)


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
    context.set_forkserver_preload(["dinov2.curate", "cv2", "faiss", "pyarrow.parquet"])
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
