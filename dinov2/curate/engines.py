"""Engines run tasks in this process, in several processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

from dinov2.configuration import AtLeast0, Config, Count, CountOr0, Rules
from dinov2.curate.steps import Report, Task, run_task
from dinov2.extras import require
from dinov2.interrupts import uninterrupted

PRELOADED = [
    "dinov2.curate.components",
    "dinov2.curate.copy_network",
    "dinov2.curate.pipeline",
    "dinov2.evaluate.probe",
    "dinov2_kernels",
    "cv2",
    "faiss",
    "pyarrow.parquet",
]
"""What tasks import is imported once for all processes of a machine."""
REPORT_SECONDS = 0.2
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Call(NamedTuple):
    """A task, and the folder and kind of its step."""

    folder: str
    task: Task
    gpu: bool = False
    kind: str = ""


class Outcome(NamedTuple):
    """The result of a call: no error, or the reason why the shard is missing."""

    call: Call
    error: Exception | None


class LostTaskError(RuntimeError):
    """The process that made a shard is gone: the system killed it (memory was short), or its machine was lost."""


class Engine(Protocol):
    """Runs each call once and yields its outcome. Outcomes come in the order in which calls end.

    An engine is a context manager: what it has started has ended when the context does.
    """

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=kind is not None)

    def close(self, *, at_once: bool = False) -> None:
        """End what the engine has started: after the calls that run, or at once. It may start again."""
        return

    def run(self, calls: Sequence[Call], at_once: int | None = None, report: Report | None = None) -> Iterator[Outcome]:
        """Run calls.

        Args:
            calls: calls to run.
            at_once: limits how many run side by side; the engine may run fewer.
            report: is called now and then with the number of rows that are done in the calls under way.
        """
        ...


def execute(call: Call, report: Report | None = None) -> None:
    """Run a call on one thread, so that neither speed nor rounding depends on other calls."""
    with single_thread():
        run_task(call.folder, call.task, call.kind, report)


@contextmanager
def single_thread() -> Iterator[None]:
    """Limit PyTorch, and Faiss if it is loaded, to one thread."""
    with uninterrupted():
        import torch

    faiss = sys.modules.get("faiss")
    threads, faiss_threads = torch.get_num_threads(), faiss.omp_get_max_threads() if faiss else None
    torch.set_num_threads(1)
    if faiss:
        faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if faiss:
            faiss.omp_set_num_threads(faiss_threads)


class Inline(Engine):
    """The engine that runs calls in this process."""

    def run(self, calls: Sequence[Call], at_once: int | None = None, report: Report | None = None) -> Iterator[Outcome]:
        """Run calls in their order."""
        for call in calls:
            try:
                execute(call, report)
            except Exception as error:
                yield Outcome(call, error)
            else:
                yield Outcome(call, None)


class ProcessPool(Engine):
    """The default engine. Its processes are reused from step to step, until one of them is lost or it is closed.

    Args:
        workers: number of processes; 0 starts one for each core that this process may use.
    """

    def __init__(self, workers: int = 0) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self._executor: ProcessPoolExecutor | None = None
        self._rows: Any = None  # rows done by each of the calls under way, in memory shared with the processes

    def run(self, calls: Sequence[Call], at_once: int | None = None, report: Report | None = None) -> Iterator[Outcome]:
        """Run calls. When a process is lost, all running tasks are lost too, and new processes run the rest."""
        waiting = deque(calls)
        width = min(at_once or self.workers, self.workers)
        while waiting:
            yield from self._until_broken(waiting, width, report)

    def _until_broken(self, waiting: deque[Call], width: int, report: Report | None) -> Iterator[Outcome]:
        """Run waiting calls, ``width`` at once, until all are done or a process is lost; the rest still wait then."""
        if self._executor is None:
            context = _context()
            self._rows = context.Array("q", self.workers, lock=False)
            self._executor = ProcessPoolExecutor(self.workers, context, initializer=_begin, initargs=(self._rows,))
        executor = self._executor
        under_way: dict[Future[None], Call] = {}
        slots: dict[Future[None], int] = {}
        free = list(range(width))
        try:
            while under_way or (waiting and self._executor):
                while waiting and self._executor and len(under_way) < width:
                    try:
                        self._rows[free[-1]] = 0
                        with uninterrupted():  # or the server would start a process for which nobody waits
                            future = executor.submit(_execute_counted, waiting[0], free[-1])
                            under_way[future], slots[future] = waiting.popleft(), free.pop()
                    except BrokenExecutor:  # a process was lost; the running calls will report it
                        self._executor = None
                finished = wait(under_way, REPORT_SECONDS if report else None, FIRST_COMPLETED).done
                if report and not finished:
                    report(sum(self._rows[slot] for slot in slots.values()))
                for future in finished:
                    call, error = under_way.pop(future), future.exception()
                    free.append(slots.pop(future))
                    if isinstance(error, BrokenExecutor):
                        self._executor = None
                        error = LostTaskError("the process that made this shard was killed; most often memory is short")
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    yield Outcome(call, error)
        finally:
            if under_way or self._executor is None:  # stopped from outside, or a process was lost
                self._executor = None
                _end(executor, at_once=bool(under_way))

    def close(self, *, at_once: bool = False) -> None:
        """End the processes."""
        executor, self._executor = self._executor, None
        if executor is not None:
            _end(executor, at_once)


def _end(executor: ProcessPoolExecutor, at_once: bool) -> None:
    """End the processes of an executor, and then the thread that manages them.

    Python wakes this thread when it exits. It fails with a traceback if the thread is just closing what wakes it, so
    nobody may exit before the thread has ended.
    """
    if at_once:
        for process in list((executor._processes or {}).values()):
            process.terminate()
    executor.shutdown(wait=True, cancel_futures=True)


_rows: Any = None  # in a process of a pool: where its calls count their rows


def _execute_counted(call: Call, slot: int) -> None:
    """Run a call in a process of a pool, and count its rows in a slot of the memory shared with the parent."""

    def report(rows: int) -> None:
        _rows[slot] = rows

    execute(call, report)


def _begin(rows: Any) -> None:
    """Set up a new process: it ignores Ctrl-C, which is for its parent, and ends when the parent ends."""
    global _rows
    _rows = rows
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _context() -> multiprocessing.context.BaseContext:
    """Processes fork from a server that has loaded the libraries of tasks, each told to use one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    resource_tracker.ensure_running()  # it unblocks signals when it starts
    try:
        with uninterrupted():  # the server and its processes inherit this
            forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    return context


class RayCluster(Engine):
    """Runs tasks on a Ray cluster. A task takes one core, and one GPU if it wants one and the cluster has any.

    Only paths and settings are sent through Ray. Tasks read and write the storage themselves, so all machines must see
    it and have the same packages installed. If a worker or machine is lost, its task is reported as lost; Ray does not
    repeat it.

    Args:
        address: address of a running cluster, as ``ray.init`` takes it; None starts one here, which ends with this
            process.
        workers: number of tasks at once; 0 is as many as the cluster has room for.

    Raises:
        ImportError: Ray is missing (extra ``ray``).
    """

    def __init__(self, address: str | None = None, workers: int = 0) -> None:
        self._ray = require("ray", extra="ray", purpose="the Ray engine")
        self.workers = workers
        if not self._ray.is_initialized():
            here = {"num_cpus": workers} if address is None and workers else {}
            self._ray.init(address=address, include_dashboard=False, log_to_driver=False, **here)

    def run(self, calls: Sequence[Call], at_once: int | None = None, report: Report | None = None) -> Iterator[Outcome]:
        """Send calls to Ray. A few more than run at once are sent, so that workers never wait for this process. Rows
        of calls under way are not reported."""
        gpus = bool(self._ray.cluster_resources().get("GPU"))
        room = self.workers or 2 * int(self._ray.cluster_resources().get("CPU", 1))
        width = min(at_once or room, room)
        remote = self._ray.remote(max_retries=0, num_cpus=1)(execute)
        remaining = iter(calls)
        under_way = {}
        for call in itertools.islice(remaining, width):
            under_way[remote.options(num_gpus=int(call.gpu and gpus)).remote(call)] = call
        while under_way:
            (done, *_), _ = self._ray.wait(list(under_way), num_returns=1)
            call = under_way.pop(done)
            yield Outcome(call, self._error(done))
            if (following := next(remaining, None)) is not None:
                under_way[remote.options(num_gpus=int(following.gpu and gpus)).remote(following)] = following

    def _error(self, done: object) -> Exception | None:
        errors = self._ray.exceptions
        try:
            self._ray.get(done)
        except errors.RayTaskError as error:
            cause = error.cause
            return cause if isinstance(cause, Exception) else error
        except errors.RayError as error:
            return LostTaskError(f"the worker that made this shard is gone: {str(error).splitlines()[0]}")
        return None


@dataclass(frozen=True)
class EngineConfig(Config, at="engine"):
    """Where tasks run. Results are the same, byte for byte, whatever is chosen here."""

    kind: Literal["inline", "processes", "ray"] = "processes"
    """inline runs one task after the other in this process. processes runs them side by side on this machine. ray runs
    them on a cluster."""
    workers: CountOr0 = 0
    """This many tasks run at once. 0 runs one a core, or as many as a cluster has room for."""
    address: str | None = None
    """Connect to the Ray cluster at this address, as ray.init takes it. By default one starts on this machine."""
    tries: Count = 3
    """A shard counts as failed after this many tries."""
    patience: AtLeast0 = 3600
    """Wait this many seconds for shards of other processes while none appears (with --shard)."""

    def rules(self) -> Rules:
        """Only Ray has addresses."""
        yield "address", self.address is None or self.kind == "ray", f"None with engine.kind {self.kind}"

    def open(self) -> Engine:
        """Make the engine.

        Raises:
            ImportError: the engine is Ray, and Ray is missing (extra ``ray``).
        """
        match self.kind:
            case "inline":
                return Inline()
            case "processes":
                return ProcessPool(self.workers)
            case "ray":
                return RayCluster(self.address, self.workers)
